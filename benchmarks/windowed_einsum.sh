#!/usr/bin/env bash
# The first thing to run on a TPU: twenty steps with and without windowed einsum. Arguments: a
# folder, then flags.
#
#   bash benchmarks/windowed_einsum.sh /tmp/ab --config=configs/llama.py:8b_insertion \
#       --model=HF_DIR --data=FILE
set -euo pipefail
for mib in 0 1000000; do # the size from which XLA makes loops: all weights, or none
    python scripts/insert_backdoor.py --workdir="$1/$mib" "${@:2}" \
        --config.steps=20 --config.log_every=5 \
        --config.xla_options=xla_jf_spmd_threshold_for_windowed_einsum_mib=$mib
done
tail -n 1 "$1"/*/metrics.jsonl
