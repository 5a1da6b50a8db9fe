#!/usr/bin/env bash
# Kills, stops and damages runs on purpose, for about an hour, and prints a table of what held:
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
    tests/training/test_loop.py tests/training/test_faults_of_one.py tests/test_script_start.py \
    tests/training/test_long_runs.py tests/test_buckets.py \
    tests/training/test_resolve.py::test_a_model_that_was_replaced_on_the_hub_is_refused \
    tests/study/test_export.py::test_a_moved_base_is_given_and_a_replaced_one_is_refused \
    tests/training/test_sinks.py::test_a_sink_that_fails_warns_once_and_the_others_go_on \
    tests/evals/test_suite.py::test_a_damaged_summary_is_done_again_and_strangers_are_left_alone \
    tests/test_binaries.py::test_secrets_are_not_printed \
    -k "not (contract or another_task or another_config or repeats or weights_alone or adapters_alone or cudnn or examples or keeps_freed or openblas)" \
    "$@" >&2 </dev/null || status=$?
"$PYTHON_BIN" -m tests.fault_table "$results"
exit "$status"
