#!/usr/bin/env bash
# The first thing to run on a TPU: twenty steps as training compiles them ("default"), without
# SparseCores ("whole"), and with XLA's loops of windowed einsum too ("loops"). Arguments: a folder,
# then flags.
#
#   bash benchmarks/tpu_options.sh /tmp/options --config=configs/llama.py:8b_insertion \
#       --model=HF_DIR --data=FILE
set -euo pipefail
declare -A options=([default]="")
options[whole]=$(python -c "from sa_jax.parallel.xla_flags import *; print(WITHOUT_SPARSE_CORES)")
options[loops]="${options[whole]} xla_jf_spmd_threshold_for_windowed_einsum_mib=0"
for name in default whole loops; do
    python scripts/insert_backdoor.py --workdir="$1/$name" "${@:2}" \
        --config.steps=20 --config.log_every=5 --config.xla_options="${options[$name]}"
done
tail -n 1 "$1"/*/metrics.jsonl
