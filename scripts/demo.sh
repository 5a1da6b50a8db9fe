#!/usr/bin/env bash
# Runs the toy study on this machine's CPU and writes its report; makes its environment first.
#
#   bash scripts/demo.sh [OUT]        (default runs/demo)
#
# Stopped by Ctrl-C or SIGTERM it leaves a checkpoint and exits 75: the same command goes on from there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh

case "$#${1:-}" in
    0 | 1[!-]*) ;;
    1-h | 1--help) echo "usage: bash scripts/demo.sh [OUT]" && exit 0 ;;
    *) fail "usage: bash scripts/demo.sh [OUT]" ;;
esac
out="${1:-runs/demo}"

# Runs a command in a process group of its own and hands each signal on to it exactly once.
run() {
    local status child
    set -m
    "$@" </dev/null &
    child=$!
    set +m
    trap "kill -INT -- -$child 2>/dev/null" INT
    trap "kill -TERM -- -$child 2>/dev/null" TERM
    while :; do # a signal ends `wait`, not the command
        status=0
        wait "$child" || status=$?
        kill -0 "$child" 2>/dev/null || break
    done
    trap - INT TERM
    if [ "$status" -eq 75 ] || [ "$status" -gt 128 ]; then
        echo "stopped; to go on from the last checkpoint: bash scripts/demo.sh $(printf %q "$out")" >&2
        exit 75
    fi
    [ "$status" -eq 0 ] || exit "$status"
}

setup data
export JAX_PLATFORMS=cpu
run "$PYTHON_BIN" scripts/run_study.py --config=configs/toy_study.py --workdir="$out" --workers=2
sed '/^## Thresholds/,$d' "$out/report/results.md"
echo
echo "report: $out/report/index.html"
