"""Files of JSON lines that are only ever appended to, and that outlive a kill at any byte.

A line counts once its newline is on disk. Whatever follows the last good line was torn by a kill
or a full disk: readers ignore it, and the next append cuts it off first. A bad line with others
after it was not torn but edited, and is refused.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from stillhouse.errors import IntegrityError
from stillhouse.storage.durable import full_disk_explained, sync_path
from stillhouse.storage.strict_json import json_text

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"


@dataclass(frozen=True, slots=True)
class Line:
    """One whole line: its number from 1, the byte after it, and what it holds."""

    number: int
    end: int
    value: dict[str, JSON]


class Journal:
    """An append-only file of JSON objects. One process may append at a time; any may read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._end: int | None = None  # where our last good line ends

    def read(self, start: int = 0, number: int = 0) -> Iterator[Line]:
        """Yield the lines after byte `start`, which is the end of line `number`.

        Raises IntegrityError, with the line's number, when a line that others follow is malformed.
        """
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(start)
            end = start
            for raw in file:
                number, end = number + 1, end + len(raw)
                value = _parse(raw)
                if value is not None:
                    yield Line(number, end, value)
                elif next(file, None) is None:
                    return
                else:
                    raise IntegrityError(self._malformed(number, raw))

    def append(self, value: Mapping[str, object], *, sync: bool = True) -> None:
        """Append one line in one write; with `sync` it is on disk on return.

        Raises StillhouseError when a number in it is not finite.
        """
        data = json_text(value, self.path).encode() + b"\n"
        with full_disk_explained(self.path, len(data)):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            is_new = not self.path.exists()
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                end = self._good_end(os.fstat(descriptor).st_size)
                self._end = None  # until the write is whole
                os.ftruncate(descriptor, end)
                _write(descriptor, data, end)
                if sync:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
            self._end = end + len(data)
            if is_new:
                sync_path(self.path.parent)

    def _good_end(self, size: int) -> int:
        """Return where the last good line ends; the file is read when it is not as we left it."""
        if self._end == size:
            return size
        end = 0
        for line in self.read():
            end = line.end
        return end

    def _malformed(self, number: int, raw: bytes) -> str:
        return (
            f"{self.path}, line {number}: expected one JSON object, found {raw[:60]!r}. "
            "The file was edited or damaged: restore it from a copy, or cut it before this line "
            "(what the cut lines said is then done again)."
        )


def _parse(raw: bytes) -> dict[str, JSON] | None:
    if not raw.endswith(b"\n"):
        return None
    try:
        value = json.loads(raw)
    except ValueError:  # JSON and UTF-8 errors both
        return None
    return value if isinstance(value, dict) else None


def _write(descriptor: int, data: bytes, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
