"""Shards on disk: one Parquet file a table, the same bytes for the same rows, every time.

The writer's options are fixed here and no time, host or path goes into a file, so a shard that is
done again after a kill lands on the same name with the same bytes.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from stillhouse.errors import IntegrityError
from stillhouse.storage.durable import staged
from stillhouse.storage.integrity import CURE, file_entry
from stillhouse.storage.layout import RunFolder
from stillhouse.storage.manifest import FileEntry
from stillhouse.storage.records import TABLES, Record
from stillhouse.storage.schema import schema_of, table_of

__all__ = ["check_columns", "hash_artifacts", "read_rows", "write_shard"]

R = TypeVar("R", bound=Record)

_ROW_GROUP = 8_192  # rows; bounds what a streaming reader holds


def write_shard(
    folder: RunFolder, stage: str, key: str, shard: str, rows: Mapping[str, Sequence[Record]]
) -> tuple[FileEntry, ...]:
    """Write one shard's tables and return their entries in order of table name.

    A table without rows is written too. The shard counts once its entry is in the manifest.
    Raises ValueError when a row does not fit its table, StorageFullError when the disk is full.
    """
    entries = []
    for name in sorted(rows):
        if name not in TABLES:
            raise ValueError(f"no table {name!r} is declared in storage/records.py")
        table = table_of(TABLES[name], rows[name])
        path = folder.shard_path(stage, key, name, shard)
        with staged(path, table.nbytes) as temporary:
            _write(table, temporary)
        entries.append(file_entry(folder, path, name, table.num_rows))
    return tuple(entries)


def read_rows(
    folder: RunFolder, entry: FileEntry, record_type: type[R], batch: int = 1024
) -> Iterator[R]:
    """Yield the rows of one file, holding `batch` rows at a time.

    Raises IntegrityError when the file is missing, is not Parquet, or has other columns.
    """
    expected = schema_of(record_type)
    try:
        with pq.ParquetFile(folder.root / entry.path) as file:
            if not file.schema_arrow.equals(expected):
                raise IntegrityError(
                    f"{entry.path}: expected the columns of {record_type.TABLE} "
                    f"({_names(expected)}), found {_names(file.schema_arrow)}. "
                    f"It was written by another version or by hand. {CURE}"
                )
            for rows in file.iter_batches(batch_size=batch):
                columns = [column.to_pylist() for column in rows.columns]
                yield from map(record_type, *columns)
    except (pa.ArrowInvalid, FileNotFoundError) as error:
        raise IntegrityError(
            f"{entry.path}: expected a Parquet file of {entry.bytes:,} bytes, found {error}. {CURE}"
        ) from error


def check_columns(path: Path, record_type: type[Record]) -> None:
    """Raise IntegrityError when a table's file lacks one of its columns or has another type there.

    Columns that the table has no more are let by. Only the file's footer is read.
    """
    try:
        found = pq.read_schema(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise IntegrityError(
            f"a file of the run cannot be read: {path}: expected Parquet, found {error}. "
            "`stillhouse run` checks every file against the manifest and says what to do."
        ) from error
    for field in schema_of(record_type):
        there = found.field(field.name).type if field.name in found.names else None
        if there != field.type:
            kind = f"of type {there}" if there else "none of that name"
            raise IntegrityError(
                f"{path}: expected the column {field.name} ({field.type}) of {record_type.TABLE}, "
                f"found {kind}: another version of this software wrote the file. Run the recipe "
                "again: a stage that has changed since is done anew, under a key of its own."
            )


def hash_artifacts(folder: RunFolder, path: Path) -> tuple[FileEntry, ...]:
    """Return the entries of all files under a folder that holds no rows, in order of name."""
    files = sorted(found for found in path.rglob("*") if found.is_file())
    return tuple(file_entry(folder, found, "artifact", 0) for found in files)


def _write(table: pa.Table, path: Path) -> None:
    pq.write_table(
        table,
        path,
        version="2.6",
        compression="zstd",
        compression_level=3,
        row_group_size=_ROW_GROUP,
        data_page_version="1.0",
        use_dictionary=True,
        write_statistics=True,
        store_schema=True,
    )


def _names(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)
