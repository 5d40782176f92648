"""One clean run of `tiny` a session; every contract that needs a finished run reads it."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from stillhouse.storage.layout import RunFolder
from tests.contracts.tiny_run import LIMIT, ROOT, command, environment


@pytest.fixture(scope="session")
def clean_process(tmp_path_factory, cache_root: Path) -> Iterator[tuple[subprocess.Popen, Path]]:
    """The clean run, started; a test that has work of its own lets it go on meanwhile."""
    home = tmp_path_factory.mktemp("clean")
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            command("run", "tiny", f"runs_root={home / 'runs'}"),
            cwd=ROOT,
            env=environment(cache_root, PYTHONHASHSEED="0"),
            stdout=log,
            stderr=log,
        )
    yield process, home
    process.kill()
    process.wait()


@pytest.fixture(scope="session")
def clean_run(clean_process) -> RunFolder:
    """The folder of a finished clean run. Shared: copy it before you change it."""
    process, home = clean_process
    code = process.wait(LIMIT)
    assert code == 0, (home / "log").read_text()
    return RunFolder(home / "runs" / "tiny")
