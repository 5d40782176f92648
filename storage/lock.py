"""One runner a run folder. The kernel holds the lock, so a killed holder holds nothing.

The file's content only says who to ask; the truth is the flock on it. It is never deleted: a
second process could otherwise lock a file that no longer has a name.
"""

import fcntl
import getpass
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Self

from stillhouse.errors import LockedError
from stillhouse.storage.layout import RunFolder
from stillhouse.storage.redaction import redact_uris

_held: set[int] = set()
_TRIES, _PAUSE = 4, 0.05  # seconds


@dataclass(frozen=True, slots=True)
class Holder:
    """Who runs a run."""

    pid: int
    host: str
    user: str
    started: str  # UTC, ISO 8601
    command: str


class RunLock:
    """Holds the run folder for as long as the `with` block (or the process) lives."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._descriptor = -1

    def __enter__(self) -> Self:
        """Take the lock; raises LockedError saying who holds it."""
        self._folder.root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._folder.lock, os.O_RDWR | os.O_CREAT, 0o666)
        if not _take(descriptor):
            holder = _read(descriptor)
            os.close(descriptor)
            raise LockedError(_held_by(self._folder, holder))
        self._descriptor = descriptor
        _held.add(descriptor)
        _write(descriptor, json.dumps(asdict(_ourselves())).encode())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._descriptor not in _held:
            return  # a forked child that unwinds: the lock is its parent's
        _write(self._descriptor, b"")
        _held.discard(self._descriptor)
        os.close(self._descriptor)


def holder_of(folder: RunFolder) -> Holder | None:
    """Return who runs this run now, or None when nobody does."""
    try:
        descriptor = os.open(folder.lock, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read(descriptor) or Holder(0, "unknown", "unknown", "just now", "unknown")
    finally:
        os.close(descriptor)
    return None


def _take(descriptor: int) -> bool:
    """Try for a moment: `holder_of` in another process has the file for microseconds."""
    for _ in range(_TRIES):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_PAUSE)
        else:
            return True
    return False


def _ourselves() -> Holder:
    return Holder(
        pid=os.getpid(),
        host=os.uname().nodename,
        user=_user(),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        command=redact_uris(" ".join(sys.argv)),
    )


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run a number that has no name
        return str(os.getuid())


def _held_by(folder: RunFolder, holder: Holder | None) -> str:
    if holder is None:  # it has the lock and has not yet written who it is
        who = "a process that has just started"
    else:
        who = (
            f"process {holder.pid} of {holder.user} on {holder.host} since {holder.started} "
            f"({holder.command})"
        )
    return (
        f"{folder.root} is being run by {who}. Wait for it or stop it; a process that has died "
        "holds no lock, so there is no file to delete."
    )


def _read(descriptor: int) -> Holder | None:
    try:
        return Holder(**json.loads(os.pread(descriptor, 65_536, 0)))
    except (ValueError, TypeError):
        return None


def _write(descriptor: int, data: bytes) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, data, 0)


def _drop_in_child() -> None:
    """Close inherited locks: a forked helper must not hold its dead parent's run."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_drop_in_child)
