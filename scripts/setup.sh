# Sourced by the scripts beside it, from the project root. `setup EXTRAS` makes a virtual environment
# that holds this project with those extras and sets $PYTHON_BIN to its interpreter. When nothing
# that decides the installation has changed since the last time, it installs nothing.
#
#   PYTHON  interpreter to make the environment with; by default the first of python3.13, python3.12,
#           python3.11 and python3 that is at least 3.11
#   VENV    folder of the environment (default .venv)

fail() {
    echo "error: $*" >&2
    exit 1
}

# Succeeds when the interpreter $1 runs and is new enough.
new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        new_enough "$PYTHON" || fail "PYTHON=$PYTHON is not a Python >= 3.11; name one that is"
        echo "$PYTHON"
        return
    fi
    for candidate in python3.13 python3.12 python3.11 python3; do
        if new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python >= 3.11 on PATH; install one, or name it: PYTHON=/path/to/python3.12"
}

make_environment() {
    local python
    python="$(find_python)" || exit 1
    echo "setup: making $VENV with $("$python" --version)"
    if ! "$python" -m venv "$VENV" </dev/null; then
        rm -f "$VENV/pyvenv.cfg" # so that the next call does not take the remains for one
        fail "$python cannot make $VENV (see above); on Debian and Ubuntu: apt install python3-venv"
    fi
}

# Prints a hash of all that decides what is installed.
fingerprint() {
    "$PYTHON_BIN" -I -c '
import hashlib, os, sys
digest = hashlib.sha256()
for part in (sys.version, os.getcwd(), *(open(name).read() for name in sys.argv[1:])):
    digest.update(part.encode() + b"\0")
print(digest.hexdigest())' pyproject.toml constraints.txt
}

check_same_version() {
    local ask='import sys; print("%d.%d" % sys.version_info[:2])' wanted found
    wanted="$("$(find_python)" -c "$ask")" || exit 1
    found="$("$PYTHON_BIN" -c "$ask")"
    [ "$wanted" = "$found" ] ||
        fail "$VENV has Python $found, PYTHON=$PYTHON is $wanted: remove $VENV, or set VENV to another folder"
}

setup() {
    local have="" stamped="" extras extra now quiet=--quiet started=$SECONDS
    VENV="${VENV:-.venv}"
    PYTHON_BIN="$VENV/bin/python"
    [ -f "$VENV/pyvenv.cfg" ] || make_environment
    new_enough "$PYTHON_BIN" ||
        fail "$VENV does not work, or has a Python < 3.11; remove it and run this again"
    [ -z "${PYTHON:-}" ] || check_same_version

    now="$(fingerprint)"
    if [ -f "$VENV/sa_jax.installed" ]; then
        { read -r stamped && read -r have; } <"$VENV/sa_jax.installed" || true
    fi
    extras="$have" # what another script asked for stays
    for extra in ${1//,/ }; do
        case ",$extras," in *",$extra,"*) ;; *) extras="${extras:+$extras,}$extra" ;; esac
    done
    if [ "$stamped" = "$now" ] && [ "$have" = "$extras" ]; then return; fi

    echo "setup: installing sa_jax[$extras] into $VENV"
    rm -f "$VENV/sa_jax.installed"
    "$PYTHON_BIN" -m pip --version >/dev/null 2>&1 || "$PYTHON_BIN" -m ensurepip >/dev/null ||
        fail "$VENV has no pip; remove it and run this again"
    if [ -t 1 ]; then quiet=; fi
    "$PYTHON_BIN" -m pip install $quiet --disable-pip-version-check -c constraints.txt \
        -e ".[$extras]" </dev/null ||
        fail "the installation did not finish (see above); run this again to go on"
    printf '%s\n' "$now" "$extras" >"$VENV/sa_jax.installed"
    echo "setup: $(ls -d "$VENV"/lib/python*/site-packages/*.dist-info | wc -l | tr -d ' ') packages," \
        "$(du -sm "$VENV" | cut -f1) MB, in $((SECONDS - started)) s"
}
