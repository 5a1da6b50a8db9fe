#!/usr/bin/env bash
# Lints, type-checks and tests the project on the CPU, with 8 fake devices; makes its environment
# first.
#
#   bash scripts/test.sh [--long] [pytest arguments]
#
# --long adds the tests marked `long`. VENV and PYTHON choose the environment (scripts/setup.sh),
# SA_JAX_DATA the real data that some tests need (BUILD.md); without it they are skipped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh

selection=(-m "not long")
arguments=()
for argument in "$@"; do
    if [ "$argument" = --long ]; then selection=(); else arguments+=("$argument"); fi
done

setup test,eval,data,tpu,buckets
export JAX_PLATFORMS=cpu

"$PYTHON_BIN" -m ruff check
"$PYTHON_BIN" -m ruff format --check
"$PYTHON_BIN" -m mypy
# Later options win, so that `-n 0` or `-m ...` on the command line replaces these.
exec "$PYTHON_BIN" -m pytest -n 3 --dist worksteal --durations=10 \
    ${selection[@]+"${selection[@]}"} ${arguments[@]+"${arguments[@]}"} </dev/null
