"""Streams the rows of a data reference; see `refs` for what references there are."""

import difflib
import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from stillhouse.errors import SourceError
from stillhouse.workers.sources.builtins import rows_of
from stillhouse.workers.sources.files import (
    MalformedRow,
    Rows,
    SourceRow,
    read_csv,
    read_jsonl,
    text_row,
)
from stillhouse.workers.sources.refs import DataRef, data_file, fingerprint, parse

_TELLING_ROWS = 16  # when none of the first has a column, its name is wrong

__all__ = ["MalformedRow", "SourceRow", "fingerprint", "read"]


def read(ref: str, base_dir: Path, columns: Sequence[str] = ()) -> Rows:
    """Yield the rows of a reference in order, one at a time; broken lines as MalformedRow.

    `columns` are those the caller needs: a source that has none of one raises SourceError with
    the nearest name; a single row without one is malformed. Relative paths count from `base_dir`.
    Raises SourceError for a missing file, package, data set or split.
    """
    parsed = parse(ref)
    return _with_columns(_open(parsed, base_dir), tuple(columns), ref)


def _open(ref: DataRef, base_dir: Path) -> Rows:
    if ref.scheme == "hf":
        return _hub_rows(ref)
    if ref.scheme == "builtin":
        return _builtin_rows(ref, base_dir)
    file, form = data_file(ref, base_dir)
    label = ref.body if ref.scheme != "package" else f"package:{ref.body}"
    if form == "parquet":
        from stillhouse.storage.foreign import read_parquet_rows

        return _numbered(read_parquet_rows(file.pieces[0]), label)
    readers: dict[str, Callable[[Path, str], Rows]] = {"jsonl": read_jsonl, "csv": read_csv}
    return readers[form](file.pieces[0], label)


def _numbered(rows: Iterable[dict[str, object]], label: str) -> Rows:
    for number, row in enumerate(rows, start=1):
        yield text_row(row, f"{label}:{number}")


def _with_columns(rows: Rows, columns: tuple[str, ...], ref: str) -> Rows:
    """Set rows aside that lack a column; refuse a source whose first rows all lack one."""
    first = list(islice(rows, _TELLING_ROWS))
    readable = [row for row in first if isinstance(row, SourceRow)]
    for name in columns:
        if readable and all(name not in row.values for row in readable):
            raise SourceError(_no_column(ref, name, readable[0]))
    for row in chain(first, rows):
        absent = [name for name in columns if isinstance(row, SourceRow) and name not in row.values]
        if absent:
            yield MalformedRow(row.locator, f"expected a value in {absent[0]!r}, found none")
        else:
            yield row


def _no_column(ref: str, name: str, row: SourceRow) -> str:
    near = difflib.get_close_matches(name, row.values, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    found = ", ".join(row.values) or "none"
    return f"{ref} ({row.locator}): expected a column {name!r}, found {found}{hint}"


def _hub_rows(ref: DataRef) -> Rows:
    try:
        datasets: Any = importlib.import_module("datasets")
    except ModuleNotFoundError as error:
        raise SourceError(
            f"hf:{ref.body}: expected the package datasets, which is not installed. Install it: "
            f"pip install 'stillhouse[hub]'"
        ) from error
    options = dict(ref.options)
    unknown = sorted(set(options) - {"split", "config"})
    if unknown:
        raise SourceError(f"hf:{ref.body}: expected split and config, found {unknown[0]!r}")
    split = options.get("split", "train")
    try:
        rows = datasets.load_dataset(
            ref.body, options.get("config"), split=split, revision=ref.revision, streaming=True
        )
        yield from _numbered(rows, f"hf:{ref.body}/{split}")
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise SourceError(
            f"hf:{ref.body}@{ref.revision}: could not read split {split!r}: "
            f"{type(error).__name__}: {error}. Check the name, the revision, the split and the "
            "network"
        ) from error


def _builtin_rows(ref: DataRef, base_dir: Path) -> Rows:
    options = dict(ref.options)
    rows = rows_of(ref.body, options, base_dir)
    return _numbered(_plain(rows), f"builtin:{ref.body}/{options.get('split', '')}")


def _plain(rows: Iterable[dict[str, str]]) -> Iterator[dict[str, object]]:
    for row in rows:
        yield {**row}
