#!/bin/bash
# Installs the project on a node of SkyPilot, whose own Python may be 3.10: sky_setup.sh EXTRAS
set -euo pipefail
curl -LsSf https://astral.sh/uv/install.sh | sh
export PATH="$HOME/.local/bin:$PATH"
[ -f .venv/pyvenv.cfg ] || uv venv --seed --python 3.12 .venv
. scripts/setup.sh
setup "$1"
