"""`tools/setup.sh` mends what a kill or an older version left; its Python here only takes notes."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# `-m venv` makes an environment with pip in it, as the real one does; all else is noted.
PYTHON = """#!/usr/bin/env bash
here=$(dirname "$0")
echo "$*" >>"$NOTES"
case "$1 ${2:-}" in
    "-m venv")
        mkdir -p "$3/bin"
        touch "$3/pyvenv.cfg" "$3/bin/pip"
        [[ -e $3/bin/python ]] || cp "$0" "$3/bin/python" ;;
    "-m pip")
        [[ -e $here/pip ]] || { echo "No module named pip" >&2; exit 1; }
        while (($#)); do
            if [[ $1 == --target ]]; then mkdir -p "$2/kernels" "$2/$(tail -n 1 "${@: -1}")"; fi
            shift
        done ;;
    "-c "*requires*) echo triton==1 ;;
    "--version "*) echo Python 3.11.0 ;;
esac
"""


class Checkout:
    """The script, what it reads, and that Python."""

    def __init__(self, root: Path) -> None:
        self.root, self.venv, self.notes = root, root / ".venv", root / "notes"
        (root / "tools").mkdir()
        (root / "requirements").mkdir()
        shutil.copy(ROOT / "tools" / "setup.sh", root / "tools" / "setup.sh")
        (root / "pyproject.toml").touch()
        (root / "constraints.txt").write_text("torch==2\ntriton==1\n")
        (root / "requirements" / "models.txt").touch()
        (root / "requirements" / "peers.txt").touch()
        self.kernels("kernels==1")
        self.python = root / "python-for-tests"
        self.python.write_text(PYTHON)
        self.python.chmod(0o755)

    def kernels(self, line: str) -> None:
        (self.root / "requirements" / "hf-kernels.txt").write_text(f"{line}\n")

    def setup(self) -> list[str]:
        """Run the script; returns what its Python was asked for."""
        self.notes.write_text("")
        environment = {"PATH": os.environ["PATH"], "NOTES": str(self.notes)}
        done = subprocess.run(
            ["bash", str(self.root / "tools" / "setup.sh")],
            env=environment | {"PYTHON": str(self.python)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return self.notes.read_text().splitlines()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_what_is_set_up_is_left_alone(checkout: Checkout) -> None:
    assert checkout.setup()
    assert checkout.setup() == []


def test_an_environment_without_pip_is_made_again(checkout: Checkout) -> None:
    """A kill during `python -m venv` leaves this: an interpreter, and pip not yet there."""
    (checkout.venv / "bin").mkdir(parents=True)
    (checkout.venv / "pyvenv.cfg").touch()
    shutil.copy(checkout.python, checkout.venv / "bin" / "python")
    assert "-m venv .venv" in checkout.setup()
    assert (checkout.venv / "bin" / "pip").exists()


def test_what_is_no_environment_is_never_emptied(checkout: Checkout) -> None:
    """VENV may name any folder."""
    precious = checkout.venv / "lib" / "precious"
    precious.mkdir(parents=True)
    checkout.setup()
    assert precious.exists()


def test_another_version_of_hf_kernels_replaces_the_old_one(checkout: Checkout) -> None:
    checkout.setup()
    checkout.kernels("kernels==2")
    checkout.setup()
    found = {path.name for path in (checkout.venv / "hf-kernels").iterdir()}
    assert found == {"kernels", "kernels==2"}
