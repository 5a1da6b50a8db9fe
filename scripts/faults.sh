#!/usr/bin/env bash
# Kills, stops and damages runs on purpose, for about half an hour, and prints a table of what held:
# the tests of faults, those marked `long` too.
#
#   bash scripts/faults.sh [pytest arguments]
#
# VENV and PYTHON choose the environment, as for scripts/test.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh

setup test,eval,data,tpu,buckets
export JAX_PLATFORMS=cpu

results=$(mktemp)
trap 'rm -f "$results"' EXIT
status=0
"$PYTHON_BIN" -m pytest -n 0 -q --junitxml="$results" \
    tests/parallel/test_peers.py tests/training/test_agreement.py tests/training/test_watch.py \
    tests/training/test_preemption.py tests/training/test_checkpoints_of_processes.py \
    tests/training/test_loop.py tests/training/test_long_runs.py tests/test_buckets.py \
    tests/training/test_resolve.py::test_a_model_that_was_replaced_on_the_hub_is_refused \
    -k "not (contract or another_task or another_config or repeats or alone or examples)" \
    "$@" >&2 </dev/null || status=$?
"$PYTHON_BIN" -m tests.fault_table "$results"
exit "$status"
