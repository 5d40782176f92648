"""Whether committed files are still what was committed.

Hashing gigabytes at every start would cost more than many stages, so a hash that was checked is
remembered beside the file's size and times, as git's index does. A file whose times are too fresh
to tell a later edit from the write itself is not remembered ("racily clean" in git's words).
"""

import errno
import hashlib
import json
import time
from collections.abc import Iterable
from pathlib import Path

from stillhouse.errors import IntegrityError
from stillhouse.storage.durable import replace_file
from stillhouse.storage.layout import RunFolder
from stillhouse.storage.manifest import FileEntry
from stillhouse.storage.strict_json import json_text

_RACY_NS = 2_000_000_000  # the coarsest time stamp of file systems in use is 2 s
CURE = (
    "Put the original file back, or delete it together with its stage's folder and its lines in "
    "manifest.jsonl to have the stage done again."
)

_NO_STAMP = (0, 0, 0)  # that of no file, so it is read again next time
Stamp = tuple[int, int, int]  # size, mtime_ns, ctime_ns (mtime can be set back, ctime cannot)
_Memo = dict[str, tuple[Stamp, str]]


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_entry(folder: RunFolder, path: Path, table: str, rows: int) -> FileEntry:
    """Return the entry of a file that is in place under the run folder."""
    size = path.stat().st_size
    return FileEntry(table, folder.relative(path), rows, size, sha256_of(path))


def verify(folder: RunFolder, files: Iterable[FileEntry]) -> int:
    """Check that every file is what its entry says; return how many had to be read.

    Raises IntegrityError naming the file, what was expected and found, and the cure.
    """
    memo = _load(folder)
    fresh: _Memo = {}
    for entry in files:
        checked = _check(folder, entry, memo)
        if checked is not None:
            fresh[entry.path] = checked
    if fresh:
        _save(folder, memo | fresh)
    return len(fresh)


def _check(folder: RunFolder, entry: FileEntry, memo: _Memo) -> tuple[Stamp, str] | None:
    """Check one file; return what to remember, or None when it was remembered already."""
    path = folder.root / entry.path
    now = time.time_ns()
    try:
        stat = path.stat()
    except FileNotFoundError as error:
        raise _refusal(entry, f"{entry.bytes:,} bytes", "no file") from error
    stamp = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    if stamp[0] != entry.bytes:
        raise _refusal(entry, f"{entry.bytes:,} bytes", f"{stamp[0]:,} bytes")
    if memo.get(entry.path) == (stamp, entry.sha256):
        return None
    found = sha256_of(path)
    if found != entry.sha256:
        raise _refusal(entry, f"sha256 {entry.sha256}", f"sha256 {found}")
    is_racy = max(stamp[1:]) > now - _RACY_NS
    return (_NO_STAMP if is_racy else stamp), found


def _refusal(entry: FileEntry, expected: str, found: str) -> IntegrityError:
    return IntegrityError(
        f"{entry.path} is not what was committed: expected {expected}, found {found}. {CURE}"
    )


def _load(folder: RunFolder) -> _Memo:
    """Return what is remembered; a memo that cannot be read only means more hashing."""
    try:
        raw = json.loads(folder.verified.read_bytes())
        return {
            path: ((int(size), int(mtime), int(ctime)), str(sha256))
            for path, (size, mtime, ctime, sha256) in raw.items()
        }
    except (FileNotFoundError, ValueError, TypeError, AttributeError):
        return {}


def _save(folder: RunFolder, memo: _Memo) -> None:
    rows = {path: [*stamp, sha256] for path, (stamp, sha256) in memo.items()}
    try:
        replace_file(folder.verified, json_text(rows, folder.verified).encode())
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise  # a run folder that may only be read is still a run folder to verify
