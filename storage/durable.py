"""Bytes that survive a kill: written beside their place, synced, renamed into it.

Renaming is atomic on POSIX file systems, so a reader sees the old file or the whole new one. What
a killed process leaves has the suffix `.tmp`; `sweep` removes it.
"""

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from stillhouse.errors import StorageFullError
from stillhouse.storage.layout import RunFolder

_FULL = {errno.ENOSPC: "no space left on the device", errno.EDQUOT: "the disk quota is used up"}
_SUFFIX = ".tmp"


def sync_path(path: Path) -> None:
    """Make a file's bytes, or the names in a folder, durable: a rename needs its folder synced."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def full_disk_explained(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn "disk full" into StorageFullError naming `path`, the free bytes, and those `needed`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        free = shutil.disk_usage(_existing(path)).free
        room = f"{free:,} bytes are free"
        if needed is not None:
            room = f"about {needed:,} bytes are needed, {free:,} are free"
        raise StorageFullError(
            f"{_FULL[error.errno]} while writing {path}: {room}. Free some space (old runs "
            "and model caches are the usual places) and start the same command again: everything "
            "committed so far is kept."
        ) from error


def _existing(path: Path) -> Path:
    """Return the nearest folder above `path` that exists."""
    return next(parent for parent in path.absolute().parents if parent.exists())


@contextlib.contextmanager
def staged(path: Path, needed: int) -> Iterator[Path]:
    """Yield a temporary file beside `path`; on success it is synced and becomes `path`.

    On any error it is removed and `path` stays as it was. `needed`: bytes, for the message when
    the disk is full (StorageFullError).
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_SUFFIX}")
    try:
        with full_disk_explained(path, needed):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_path(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def replace_file(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a kill leaves the old content or the new one."""
    with staged(path, len(data)) as temporary:
        temporary.write_bytes(data)


def sweep(folder: RunFolder) -> int:
    """Remove what dead runs left half-written and return how many files that were.

    Call it with the run's lock held: a living writer's files look the same.
    """
    leftovers = list((folder.root / "stages").rglob(f".*{_SUFFIX}"))
    leftovers += folder.root.glob(f".*{_SUFFIX}")
    for path in leftovers:
        path.unlink(missing_ok=True)
    for spill in folder.root.glob(folder.spill("*").name):
        if not _is_alive(spill.name.removeprefix(folder.spill("").name)):
            shutil.rmtree(spill, ignore_errors=True)
    return len(leftovers)


def spill_folder(folder: RunFolder) -> Path:
    """Return a new name (host, process, number) for one query's spill folder."""
    return folder.spill(f"{os.uname().nodename}@{os.getpid()}@{secrets.token_hex(4)}")


def _is_alive(name: str) -> bool:
    """Say whether the process that a spill folder is named after may still use it."""
    host, _, rest = name.partition("@")
    number = rest.partition("@")[0]
    if host != os.uname().nodename or not number.isdigit():
        return True  # another machine's, or not ours: not for us to judge
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
