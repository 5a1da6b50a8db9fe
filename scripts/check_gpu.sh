#!/usr/bin/env bash
# Checks attention on the GPU at hand, and prints a table: errors, gradients, repeats, milliseconds.
#
#   bash scripts/check_gpu.sh [--smoke]      (--smoke: tiny rows, on CPU)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh

case "$#${1:-}" in
    0) lengths=4096,8192 ;;
    1--smoke) lengths=256 && export JAX_PLATFORMS=cpu ;;
    *) fail "usage: bash scripts/check_gpu.sh [--smoke]" ;;
esac
setup
exec "$PYTHON_BIN" scripts/check_attention.py --lengths="$lengths"
