#!/usr/bin/env bash
# Checks a GPU in half an hour: kernels, a step's memory, remat, kill and resume, insertion, decoding,
# a step beside torch's, and what it costs to repeat bit for bit. Prints a table of what was seen and
# what is expected. benchmarks/gpu.py says what each part does.
#
#   bash scripts/check_gpu.sh [--smoke] [--out=DIR] [--parts=kernels,step_8b]   (--smoke: on CPU)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh

case " $* " in
    *" --smoke "*) setup test && export JAX_PLATFORMS=cpu ;;
    *)
        setup test,cuda
        # torch's cuDNN, NCCL and NVSHMEM, for CUDA 13, lie in the same folders as jax's, for CUDA 12,
        # and those that were installed last are used.
        if [ ! "$VENV/sa_jax.cuda12" -nt "$VENV/sa_jax.installed" ]; then
            "$PYTHON_BIN" -m pip freeze | grep -E '^nvidia-(cudnn|nccl|nvshmem)-cu12==' |
                "$PYTHON_BIN" -m pip install --quiet --force-reinstall --no-deps -r /dev/stdin
            touch "$VENV/sa_jax.cuda12"
        fi
        ;;
esac
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}" # one is enough
exec "$PYTHON_BIN" -m benchmarks.gpu "$@"
