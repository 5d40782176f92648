"""A folder for what is made once and used by every run: digests, converted and toy models.

Standard library only: a finished run asks for fingerprints and must not load torch for them.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from stillhouse.errors import StorageFullError
from stillhouse.workers.folders import atomic_folder

BLOCK = 1 << 22


def default_cache_root() -> Path:
    """`$STILLHOUSE_CACHE`, else `stillhouse` in the XDG cache folder."""
    given = os.environ.get("STILLHOUSE_CACHE")
    if given:
        return Path(given).expanduser().resolve()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "stillhouse"


def file_digest(pieces: Sequence[Path], cache_root: Path) -> str:
    """SHA-256 of the concatenated `pieces`, remembered by path, size and time stamps of each."""
    stamp = [_stamp(piece) for piece in pieces]
    names = "\n".join(str(entry[0]) for entry in stamp)
    memo = cache_root / "digests" / f"{hashlib.sha256(names.encode()).hexdigest()[:32]}.json"
    known = _read_memo(memo)
    if known is not None and known.get("stamp") == stamp:
        return str(known["sha256"])
    digest = hashlib.sha256()
    for block in _blocks(pieces):
        digest.update(block)
    _write_memo(memo, {"stamp": stamp, "sha256": digest.hexdigest()})
    return digest.hexdigest()


def _stamp(piece: Path) -> list[str | int]:
    found = piece.stat()  # mtime can be set back, ctime cannot
    return [str(piece.resolve()), found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def join_pieces(pieces: Sequence[Path], target: Path) -> None:
    """Write the concatenated `pieces` to `target`."""
    with target.open("wb") as out:
        for block in _blocks(pieces):
            out.write(block)


def build_once(
    target: Path, build: Callable[[Path], None], waiting: Callable[[], None] = lambda: None
) -> Path:
    """Return folder `target`, made by `build(partial)` if it is not there yet.

    The folder appears whole or not at all, and one process builds while others wait (`waiting`
    is called in those). Raises StorageFullError when the device is full, whoever noticed it.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.with_name(f"{target.name}.lock"), waiting):
        if not target.is_dir():
            with atomic_folder(target, seal=False) as partial:
                build(partial)
    return target


def require_space(folder: Path, needed: int, what: str) -> None:
    """Refuse before the work when `folder`'s device has fewer than `needed` bytes left."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageFullError(
            f"{what} needs {needed / 1e9:.1f} GB in {folder}; {free / 1e9:.1f} GB are free. Free "
            f"some space, or set STILLHOUSE_CACHE to a folder on a larger device."
        )


def _blocks(pieces: Sequence[Path]) -> Iterator[bytes]:
    for piece in pieces:
        with piece.open("rb") as stream:
            while block := stream.read(BLOCK):
                yield block


@contextmanager
def _locked(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold an advisory lock; the kernel drops it when the process dies."""
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _read_memo(path: Path) -> dict[str, object] | None:
    try:
        memo = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):  # absent, or cut short by a power failure
        return None
    return memo if isinstance(memo, dict) else None


def _write_memo(path: Path, memo: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(memo))
    temporary.replace(path)
