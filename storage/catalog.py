"""All rows of a run as SQL tables; the only module that knows DuckDB.

Each table of `storage/records.py` is a view over the Parquet files that the manifest lists, with a
column `_stage` saying which stage wrote the row. DuckDB works out of core: what does not fit in
memory is spilled into the run folder.

A user's SQL can read the run's files and nothing else. Four things see to it, and each is needed:
external access is off but for those files; the configuration is locked; only one statement of a
reading kind is taken, in a transaction that may only read; and the word COPY is refused, because
DuckDB 2 lets `WITH x AS (COPY …)` write, even in a read-only transaction, to a file it may read.
"""

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import duckdb

from stillhouse.errors import ConfigError, IntegrityError, StorageFullError
from stillhouse.storage.durable import spill_folder
from stillhouse.storage.layout import RunFolder
from stillhouse.storage.manifest import Manifest, stage_files
from stillhouse.storage.records import TABLES, Record
from stillhouse.storage.schema import schema_of
from stillhouse.storage.trace import Step, trace

R = TypeVar("R", bound=Record)

_TYPES = {
    "string": "VARCHAR",
    "int64": "BIGINT",
    "double": "DOUBLE",
    "bool": "BOOLEAN",
    "list<item: int64 not null>": "BIGINT[]",
    "list<item: float not null>": "FLOAT[]",
}
_READING = (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN)
_ALLOWED = (
    "Allowed is one statement that reads the run's tables: SELECT, WITH … SELECT, FROM, VALUES, "
    "DESCRIBE, SUMMARIZE, SHOW or EXPLAIN"
)
_BATCH = 1024

# Values for `?` in order, or for `$name` by name.
Parameters = Sequence[object] | Mapping[str, object]


class Catalog:
    """The tables of a run. Close it, or use it in a `with` block."""

    def __init__(
        self,
        folder: RunFolder,
        manifest: Manifest,
        keys: Mapping[str, str],
        *,
        memory_limit: str = "1GB",
        threads: int | None = None,
    ) -> None:
        """Open the tables of the stages in `keys` ({stage: key}).

        `memory_limit` is DuckDB's; `threads` defaults to the processors at hand, four at most.
        """
        self._spill = spill_folder(folder)
        self._connection = duckdb.connect(
            ":memory:",
            config={
                "memory_limit": memory_limit,
                "threads": threads or min(4, len(os.sched_getaffinity(0))),
                "temp_directory": str(self._spill),
            },
        )
        files = _files_of(folder, manifest, keys)
        self._paths = [
            path for stages in files.values() for found in stages.values() for path in found
        ]
        try:
            for table, record_type in TABLES.items():
                self._connection.execute(_view(record_type, files[table]))
        except (duckdb.IOException, duckdb.InvalidInputException) as error:
            self.close()
            self._explain(error)
            raise
        self._shut()

    def _shut(self) -> None:
        """Close every way out of the run's files; it cannot be opened again."""
        # a view asks for its files by pattern, and by the path that the pattern matched
        allowed = dict.fromkeys(name for path in self._paths for name in (path, _literal(path)))
        listed = ", ".join(_quoted(name) for name in allowed)
        for setting in (
            f"allowed_paths = [{listed}]",
            "python_enable_replacements = false",  # else SQL could name our Python variables
            "autoinstall_known_extensions = false",
            "autoload_known_extensions = false",
            "enable_external_access = false",
            "lock_configuration = true",
        ):
            self._connection.execute(f"SET {setting}")

    def records(
        self,
        sql: str,
        record_type: type[R],
        batch_rows: int = _BATCH,
        parameters: Parameters = (),
    ) -> Iterator[R]:
        """Yield the rows of `sql` as records, `batch_rows` in memory at a time.

        The query may return more columns than the record has, in any order.
        Raises ValueError when it lacks one.
        """
        names, rows = self._stream(sql, parameters, batch_rows)
        wanted = [field.name for field in fields(record_type)]
        missing = [name for name in wanted if name not in names]
        if missing:
            raise ValueError(f"{record_type.__name__} needs the columns {missing}; {sql!r} has not")
        places = [names.index(name) for name in wanted]
        return (record_type(*(row[place] for place in places)) for row in rows)

    def rows(self, sql: str, parameters: Parameters = ()) -> list[tuple[Any, ...]]:
        """Return all rows of an internal query that is known to be short."""
        return list(self._stream(sql, parameters, _BATCH)[1])

    def stream(self, sql: str, parameters: Parameters = ()) -> Iterator[tuple[Any, ...]]:
        """Yield the rows of an internal query of any length, a batch in memory at a time."""
        return self._stream(sql, parameters, _BATCH)[1]

    def query(self, sql: str) -> tuple[list[str], Iterator[tuple[Any, ...]]]:
        """Run a user's SQL and return its column names and an iterator over its rows.

        Raises ConfigError, saying what is allowed, when it does anything but read the run.
        """
        try:
            _refuse_writing(sql)
            names, rows = self._stream(sql, (), _BATCH)
        except duckdb.Error as error:
            raise _refusal(str(error)) from error
        return names, _explained(rows)

    def trace(self, identity: str) -> list[Step]:
        """Return all rows about one prompt, answer, example or question, in order of the line.

        Each is (table, row by column name, with `_stage`). Raises ConfigError for an unknown id.
        """
        return trace(self._dicts, identity)

    def _dicts(self, sql: str, parameters: Parameters) -> list[dict[str, Any]]:
        names, rows = self._stream(sql, parameters, _BATCH)
        return [dict(zip(names, row, strict=True)) for row in rows]

    def _stream(
        self, sql: str, parameters: Parameters, batch: int
    ) -> tuple[list[str], Iterator[tuple[Any, ...]]]:
        """Start a read-only query on a cursor of its own; rows are made as they are asked for."""
        cursor = self._connection.cursor()
        cursor.execute("BEGIN TRANSACTION READ ONLY")
        try:
            cursor.execute(sql, parameters)
        except (duckdb.IOException, duckdb.PermissionException) as error:
            self._explain(error)
            raise
        return [column[0] for column in cursor.description or ()], self._batches(cursor, batch)

    def _batches(self, cursor: duckdb.DuckDBPyConnection, batch: int) -> Iterator[tuple[Any, ...]]:
        try:
            while rows := cursor.fetchmany(batch):
                yield from rows
        except duckdb.IOException as error:
            self._explain(error)
            raise
        finally:
            cursor.close()

    def _explain(self, error: duckdb.Error) -> None:
        """Raise what a failed read means; return when it is about none of the run's files.

        DuckDB looks for a file that is gone as a folder, and reports that as a lack of permission.
        """
        if "No space left" in str(error):
            raise StorageFullError(
                f"no space left in {self._spill.parent} for what the query does not fit in memory: "
                f"{error}. Free some space and start the same command again."
            ) from error
        gone = [path for path in self._paths if not Path(path).exists()]
        if gone or isinstance(error, duckdb.IOException):
            raise IntegrityError(
                f"a file of the run cannot be read: {gone[0] if gone else error}. "
                "`stillhouse run` checks every file against the manifest and says what to do."
            ) from error

    def close(self) -> None:
        """Close the tables and remove what queries spilled."""
        self._connection.close()
        shutil.rmtree(self._spill, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _explained(rows: Iterator[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    """Errors of a user's query may come as late as its last row."""
    try:
        yield from rows
    except duckdb.Error as error:
        raise _refusal(str(error)) from error


def _refuse_writing(sql: str) -> None:
    statements = duckdb.extract_statements(sql)
    if len(statements) != 1:
        raise _refusal(f"found {len(statements)} statements")
    if statements[0].type not in _READING:
        raise _refusal(f"found {statements[0].type.name}")
    text = sql.encode()  # token positions count bytes
    for start, kind in duckdb.tokenize(sql):
        if kind is duckdb.token_type.keyword and re.match(rb"copy\b", text[start:], re.IGNORECASE):
            raise _refusal('found COPY (a column of that name: "copy")')


def _refusal(found: str) -> ConfigError:
    return ConfigError(f"this SQL was refused: {found}. {_ALLOWED}.")


Files = dict[str, dict[str, list[str]]]  # table -> stage -> absolute paths


def _files_of(folder: RunFolder, manifest: Manifest, keys: Mapping[str, str]) -> Files:
    files: Files = {table: {} for table in TABLES}
    for stage, entries in stage_files(manifest, keys).items():
        for entry in entries:
            if entry.table in files:
                path = str(folder.absolute(entry.path))
                files[entry.table].setdefault(stage, []).append(path)
    return files


def _view(record_type: type[Record], files: Mapping[str, list[str]]) -> str:
    """Return the statement that makes a table's view over the files of each stage."""
    schema = schema_of(record_type)
    columns = ", ".join(f'"{name}"' for name in schema.names)
    parts = []
    for stage, paths in files.items():
        listed = ", ".join(_quoted(_literal(path)) for path in paths)
        source = f"read_parquet([{listed}])"
        parts.append(f"SELECT {columns}, {_quoted(stage)} AS _stage FROM {source}")
    if not parts:
        typed = [f'NULL::{_TYPES[str(field.type)]} AS "{field.name}"' for field in schema]
        parts.append(f"SELECT {', '.join(typed)}, NULL::VARCHAR AS _stage WHERE false")
    return f'CREATE VIEW "{record_type.TABLE}" AS {" UNION ALL ".join(parts)}'


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _literal(path: str) -> str:
    """Return a pattern that matches `path` and nothing else: `runs/[old]` is a folder's name."""
    return re.sub(r"[*?[]", r"[\g<0>]", path)
