"""Rows of text files, streamed: JSON lines and CSV. A broken line is set aside, never fatal."""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stillhouse.errors import SourceError

_LONGEST_CELL = 1 << 27  # csv stops at 128 KiB unless told otherwise


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row; values that are not strings are given as JSON, absent ones are left out."""

    values: dict[str, str]
    locator: str  # source and line


@dataclass(frozen=True, slots=True)
class MalformedRow:
    """A line that could not be read, and why."""

    locator: str
    reason: str


Rows = Iterator[SourceRow | MalformedRow]


def read_jsonl(path: Path, label: str) -> Rows:
    """One JSON object a line; empty lines are skipped. Locators are `label:line`."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield _object(line, f"{label}:{number}")


def _object(line: bytes, locator: str) -> SourceRow | MalformedRow:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return MalformedRow(locator, _not_utf8(error))
    except (json.JSONDecodeError, RecursionError) as error:
        return MalformedRow(locator, f"expected a JSON object, found invalid JSON: {error}")
    except ValueError as error:  # Python turns no more than 4,300 digits into a number
        return MalformedRow(
            locator, f"expected a JSON object, found a number too long to read: {error}"
        )
    if not isinstance(value, dict):
        return MalformedRow(locator, f"expected a JSON object, found {_kind(value)}")
    return text_row(value, locator)


def text_row(value: dict[str, object], locator: str) -> SourceRow | MalformedRow:
    """Turn plain values into text; a lone surrogate, which no UTF-8 file can hold, is malformed."""
    try:
        values = {str(name): _text(cell) for name, cell in value.items() if cell is not None}
        "".join(values.values()).encode("utf-8")
    except UnicodeEncodeError as error:
        return MalformedRow(locator, f"expected text, found a lone surrogate: {error.reason}")
    except RecursionError as error:
        return MalformedRow(locator, f"expected values that nest less deeply: {error}")
    return SourceRow(values, locator)


def _text(cell: object) -> str:
    return cell if isinstance(cell, str) else json.dumps(cell, ensure_ascii=False, default=str)


def _kind(value: object) -> str:
    if value is None:
        return "null"
    names: dict[type, str] = {list: "an array", str: "a string", bool: "a boolean"}
    return names.get(type(value), "a number")


def _not_utf8(error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return f"expected UTF-8, found byte 0x{byte:02x} at position {error.start} of the line"


def read_csv(path: Path, label: str) -> Rows:
    """Comma-separated values under a header line; locators name the line a row ends on.

    Raises SourceError when there is no header, or when it names a column twice.
    """
    csv.field_size_limit(_LONGEST_CELL)
    # Bytes that are no UTF-8 become lone surrogates, so that one bad cell costs one row.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        reader = csv.reader(stream, strict=True)
        header = _header(reader, path)
        while True:
            first = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                # A quote that nobody closes takes every line to the end of the file with it.
                lines = (
                    f"lines {first} to {reader.line_num}" if reader.line_num > first else "a line"
                )
                reason = f"expected CSV, found {lines} that cannot be read: {error}"
                yield MalformedRow(f"{label}:{first}", reason)
                continue
            if cells:
                yield _cells(header, cells, f"{label}:{reader.line_num}")


def _header(reader: Iterator[list[str]], path: Path) -> list[str]:
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise SourceError(f"{path}: expected a header line, found: {error}") from error
    twice = [name for name in header if header.count(name) > 1]
    if not header or twice:
        found = f"{twice[0]!r} twice" if twice else "none"
        raise SourceError(f"{path}: expected a header line of distinct columns, found {found}")
    return header


def _cells(header: list[str], cells: list[str], locator: str) -> SourceRow | MalformedRow:
    if len(cells) != len(header):
        return MalformedRow(locator, f"expected {len(header)} cells, found {len(cells)}")
    for cell in cells:
        try:
            cell.encode("utf-8")
        except UnicodeEncodeError as error:
            byte = ord(cell[error.start]) & 0xFF
            return MalformedRow(locator, f"expected UTF-8, found byte 0x{byte:02x}")
    return SourceRow(dict(zip(header, cells, strict=True)), locator)
