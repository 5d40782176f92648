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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import duckdb

from stillhouse.errors import ConfigError, IntegrityError, StillhouseError, StorageFullError
from stillhouse.storage.durable import spill_folder
from stillhouse.storage.layout import RunFolder
from stillhouse.storage.manifest import Manifest
from stillhouse.storage.records import TABLES, Record
from stillhouse.storage.shards import check_columns
from stillhouse.storage.trace import Step, trace
from stillhouse.storage.views import files_of, literal, paths_of, quoted, view

R = TypeVar("R", bound=Record)

_READING = (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN)
_ALLOWED = (
    "Allowed is one statement that reads the run's tables: SELECT, WITH … SELECT, FROM, VALUES, "
    "DESCRIBE, SUMMARIZE, SHOW or EXPLAIN. The tables are "
) + ", ".join(TABLES)
# What DuckDB raises where a file is gone, damaged, or has other columns than the one before it.
_OF_FILES = (
    duckdb.IOException,
    duckdb.PermissionException,  # it looks for a file that is gone as a folder
    duckdb.InvalidInputException,
    duckdb.ConversionException,
)
_SLIPS = (duckdb.CatalogException, duckdb.BinderException, duckdb.ParserException)
_BATCH = 1024

# Values for `?` in order, or for `$name` by name.
Parameters = Sequence[object] | Mapping[str, object]
Meaning = Callable[[duckdb.Error], StillhouseError]


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
        Raises IntegrityError when a file cannot be read or another version wrote its columns.
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
        self._memory_limit = memory_limit
        self._files = files_of(folder, manifest, keys)
        try:
            for table, record_type in TABLES.items():
                for paths in self._files[table].values():
                    check_columns(Path(paths[0]), record_type)  # a view has the first file's
                self._connection.execute(view(record_type, self._files[table]))
        except duckdb.Error as error:
            self.close()
            raise self._told(error, self._failed) from error
        except StillhouseError:
            self.close()
            raise
        self._shut()

    def _shut(self) -> None:
        """Close every way out of the run's files; it cannot be opened again."""
        # a view asks for its files by pattern, and by the path that the pattern matched
        allowed = dict.fromkeys(
            name for path, _ in paths_of(self._files) for name in (path, literal(path))
        )
        listed = ", ".join(quoted(name) for name in allowed)
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
        names, rows = self._stream(sql, parameters, batch_rows, self._failed)
        wanted = [field.name for field in fields(record_type)]
        missing = [name for name in wanted if name not in names]
        if missing:
            raise ValueError(f"{record_type.__name__} needs the columns {missing}; {sql!r} has not")
        places = [names.index(name) for name in wanted]
        return (record_type(*(row[place] for place in places)) for row in rows)

    def rows(self, sql: str, parameters: Parameters = ()) -> list[tuple[Any, ...]]:
        """Return all rows of an internal query that is known to be short."""
        return list(self.stream(sql, parameters))

    def stream(self, sql: str, parameters: Parameters = ()) -> Iterator[tuple[Any, ...]]:
        """Yield the rows of an internal query of any length, a batch in memory at a time."""
        return self._stream(sql, parameters, _BATCH, self._failed)[1]

    def query(self, sql: str) -> tuple[list[str], Iterator[tuple[Any, ...]]]:
        """Run a user's SQL and return its column names and an iterator over its rows.

        Raises ConfigError, saying what is allowed, when it does anything but read the run.
        """
        try:
            _refuse_writing(sql)
        except duckdb.Error as error:
            raise _meaning(error) from error
        return self._stream(sql, (), _BATCH, _meaning)

    def trace(self, identity: str) -> list[Step]:
        """Return all rows about one prompt, answer, example or question, in order of the line.

        Each is (table, row by column name, with `_stage`). Raises ConfigError for an unknown id.
        """
        return trace(self._dicts, identity)

    def _dicts(self, sql: str, parameters: Parameters) -> list[dict[str, Any]]:
        names, rows = self._stream(sql, parameters, _BATCH, self._failed)
        return [dict(zip(names, row, strict=True)) for row in rows]

    def _stream(
        self, sql: str, parameters: Parameters, batch: int, otherwise: Meaning
    ) -> tuple[list[str], Iterator[tuple[Any, ...]]]:
        """Start a read-only query on a cursor of its own; rows are made as they are asked for.

        An error that is not about the run's files or the disk means what `otherwise` says.
        """
        cursor = self._connection.cursor()
        try:
            with _interrupts():
                cursor.execute("BEGIN TRANSACTION READ ONLY")
                cursor.execute(sql, parameters)
        except duckdb.Error as error:
            raise self._told(error, otherwise) from error
        names = [column[0] for column in cursor.description or ()]
        return names, self._batches(cursor, batch, otherwise)

    def _batches(
        self, cursor: duckdb.DuckDBPyConnection, batch: int, otherwise: Meaning
    ) -> Iterator[tuple[Any, ...]]:
        try:
            while rows := _fetched(cursor, batch):
                yield from rows
        except duckdb.Error as error:  # it may come as late as the last row
            raise self._told(error, otherwise) from error
        finally:
            cursor.close()

    def _told(self, error: duckdb.Error, otherwise: Meaning) -> StillhouseError:
        """Return what an error means to a user; raises where the run's files are at fault."""
        if "No space left" in str(error):
            return StorageFullError(
                f"no space left in {self._spill.parent} for what the query does not fit in memory: "
                f"{error}. Free some space and start the same command again."
            )
        if isinstance(error, _OF_FILES):
            for path, record_type in paths_of(self._files):
                check_columns(Path(path), record_type)
        if isinstance(error, duckdb.IOException):
            return IntegrityError(
                f"a file of the run cannot be read: {error}. "
                "`stillhouse run` checks every file against the manifest and says what to do."
            )
        return otherwise(error)

    def _failed(self, error: duckdb.Error) -> StillhouseError:
        """Return what an error in a query of ours means."""
        if isinstance(error, duckdb.OutOfMemoryException):
            free = shutil.disk_usage(self._spill.parent).free
            return StorageFullError(
                f"a query over {self._spill.parent} found no room: DuckDB may hold "
                f"{self._memory_limit} in memory and spills the rest into the run folder, where "
                f"{free:,} bytes are free. Free some space or memory and start the same command "
                f"again: everything committed so far is kept. DuckDB says: {error}"
            )
        return StillhouseError(
            f"DuckDB could not answer a query of ours over {self._spill.parent}: {error}. This is "
            "an error in this software, not in the data: nothing of the run is lost."
        )

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


@contextmanager
def _interrupts() -> Iterator[None]:
    """Within it Ctrl-C is a KeyboardInterrupt; DuckDB makes it a RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        if str(error) != "Query interrupted":
            raise
        raise KeyboardInterrupt from error


def _fetched(cursor: duckdb.DuckDBPyConnection, rows: int) -> list[tuple[Any, ...]]:
    with _interrupts():
        return cursor.fetchmany(rows)


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


def _meaning(error: duckdb.Error) -> ConfigError:
    """Tell a slip from what is not allowed."""
    if isinstance(error, _SLIPS):
        return ConfigError(f"this SQL failed: {error}. {_ALLOWED}.")
    return _refused(error)


def _refused(error: duckdb.Error) -> ConfigError:
    return _refusal(str(error))


def _refusal(found: str) -> ConfigError:
    return ConfigError(f"this SQL was refused: {found}. {_ALLOWED}.")
