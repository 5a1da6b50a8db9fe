#!/usr/bin/env bash
# Prints constraints.txt from two environments that the tests have passed in:
#
#   VENV=.venv311 PYTHON=python3.11 bash scripts/test.sh
#   VENV=.venv313 PYTHON=python3.13 bash scripts/test.sh
#   bash scripts/pin.sh .venv311 .venv313 >constraints.new && mv constraints.new constraints.txt
#
# To move to newer versions, install them into the two environments first (pip install -U NAME).
set -euo pipefail
[ $# -eq 2 ] || { echo "usage: bash scripts/pin.sh VENV_OF_3.11 VENV_OF_3.12_OR_NEWER" >&2; exit 2; }

# name==version of everything installed there; no local version labels, such as torch's +cpu.
installed() {
    "$1/bin/python" -m pip freeze --exclude-editable --exclude sa-jax | grep -E '^[A-Za-z0-9._-]+==' |
        sed -E 's/\+[A-Za-z0-9.]+$//'
}

cat <<'END'
# What the tests passed with on Python 3.11 and 3.13. Made by scripts/pin.sh.
END
awk -F== '
    { name = $1; sub(/.*==/, ""); version[name, FNR == NR] = $0; names[name] = 1 }
    END {
        for (name in names) {
            old = version[name, 1]; new = version[name, 0]
            if (old == "" || new == "" || old == new) print name "==" (old == "" ? new : old)
            else {
                print name "==" old " ; python_version < \"3.12\""
                print name "==" new " ; python_version >= \"3.12\""
            }
        }
    }' <(installed "$1") <(installed "$2") | LC_ALL=C sort -f
