"""One runner a run folder, whatever becomes of it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stillhouse.errors import LockedError
from stillhouse.storage.layout import RunFolder
from stillhouse.storage.lock import RunLock, holder_of

HOLD = """
import os, sys
from pathlib import Path
from stillhouse.storage.layout import RunFolder
from stillhouse.storage.lock import RunLock
with RunLock(RunFolder(Path(sys.argv[1]))):
    child = os.fork() if sys.argv[2] == "fork" else 0
    if child or sys.argv[2] != "fork":
        print(child, flush=True)
    sys.stdin.read()
"""


def holder(folder: RunFolder, kind: str = "alone") -> tuple[subprocess.Popen[str], int]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder.root), kind],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        pipe.close()


def test_a_free_folder_has_no_holder(folder: RunFolder) -> None:
    assert holder_of(folder) is None
    with RunLock(folder):
        found = holder_of(folder)
        assert found is not None
        assert found.pid == os.getpid()
    assert holder_of(folder) is None


def test_the_second_runner_is_told_who_the_first_is(folder: RunFolder) -> None:
    with RunLock(folder), pytest.raises(LockedError, match=f"by process {os.getpid()} of .* on "):
        RunLock(folder).__enter__()
    with RunLock(folder):
        pass


def test_a_killed_holder_leaves_no_lock(folder: RunFolder) -> None:
    process, _ = holder(folder)
    with pytest.raises(LockedError, match=f"process {process.pid} .*holds no lock"):
        RunLock(folder).__enter__()
    kill(process)
    assert holder_of(folder) is None
    with RunLock(folder):
        pass


def test_a_child_that_outlives_its_killed_parent_holds_nothing(folder: RunFolder) -> None:
    process, child = holder(folder, "fork")
    try:
        process.send_signal(signal.SIGKILL)
        process.wait()
        os.kill(child, 0)  # it lives
        with RunLock(folder):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        kill(process)


def test_a_holder_that_has_not_said_who_it_is(folder: RunFolder) -> None:
    with RunLock(folder):
        folder.lock.write_bytes(b"")
        with pytest.raises(LockedError, match="by a process that has just started"):
            RunLock(folder).__enter__()
