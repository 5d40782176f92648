"""Folders that are complete or not there: temporary folder, hashes, fsync, rename. No torch."""

import errno
import json
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stillhouse.storage.durable import full_disk_explained, sync_path
from stillhouse.storage.integrity import sha256_of

HASHES = "hashes.json"  # written last; a folder without it was never finished


@contextmanager
def atomic_folder(target: Path, *, seal: bool = True) -> Iterator[Path]:
    """Yield a temporary folder to fill; on leaving, seal it with hashes and rename it to `target`.

    A folder that an interrupted process left half-filled is cleared first, and so is one this
    process fails to fill. An existing `target` is replaced.
    """
    temporary = target.with_name(f".partial-{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    with full_disk_explained(target):
        try:
            temporary.mkdir(parents=True)
            with _full_disk_as_os_error():
                yield temporary
            _let_others_read(temporary)
            if seal:
                _seal(temporary)
            for path in [*temporary.rglob("*"), temporary]:
                sync_path(path)
            if target.exists():
                shutil.rmtree(target)
            temporary.rename(target)
            sync_path(target.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def is_sealed(folder: Path) -> bool:
    """Whether the folder was finished and every file is still what it was then."""
    try:
        hashes = json.loads((folder / HASHES).read_text())
        return isinstance(hashes, dict) and all(
            sha256_of(folder / name) == digest for name, digest in hashes.items()
        )
    except (OSError, ValueError):
        return False


def write_json(path: Path, value: object) -> None:
    """Write JSON with sorted keys: equal values make equal bytes. NaN is refused."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _let_others_read(folder: Path) -> None:
    """safetensors makes its files private, whatever the umask; the folder's mode has heeded it."""
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _seal(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    write_json(
        folder / HASHES, {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}
    )


@contextmanager
def _full_disk_as_os_error() -> Iterator[None]:
    """safetensors wraps the system's error in its own and keeps only the text."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        text = str(error)
        if "code: 28" not in text or "No space left" not in text:
            raise
        raise OSError(errno.ENOSPC, text) from error
