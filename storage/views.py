"""The SQL that makes one view a table, over the Parquet files of each stage."""

import re
from collections.abc import Iterator, Mapping

from stillhouse.storage.layout import RunFolder
from stillhouse.storage.manifest import Manifest, stage_files
from stillhouse.storage.records import TABLES, Record
from stillhouse.storage.schema import schema_of

_TYPES = {
    "string": "VARCHAR",
    "int64": "BIGINT",
    "double": "DOUBLE",
    "bool": "BOOLEAN",
    "list<item: int64 not null>": "BIGINT[]",
    "list<item: float not null>": "FLOAT[]",
    "list<item: string not null>": "VARCHAR[]",
}

Files = dict[str, dict[str, list[str]]]  # table -> stage -> absolute paths


def files_of(folder: RunFolder, manifest: Manifest, keys: Mapping[str, str]) -> Files:
    """Return the files of each table that the manifest lists for the stages in `keys`."""
    files: Files = {table: {} for table in TABLES}
    for stage, entries in stage_files(manifest, keys).items():
        for entry in entries:
            if entry.table in files:
                path = str(folder.absolute(entry.path))
                files[entry.table].setdefault(stage, []).append(path)
    return files


def paths_of(files: Files) -> Iterator[tuple[str, type[Record]]]:
    """Yield every file with the record of its table."""
    for table, stages in files.items():
        for paths in stages.values():
            yield from ((path, TABLES[table]) for path in paths)


def view(record_type: type[Record], files: Mapping[str, list[str]]) -> str:
    """Return the statement that makes a table's view over the files of each stage."""
    schema = schema_of(record_type)
    columns = ", ".join(f'"{name}"' for name in schema.names)
    parts = []
    for stage, paths in files.items():
        listed = ", ".join(quoted(literal(path)) for path in paths)
        source = f"read_parquet([{listed}])"
        parts.append(f"SELECT {columns}, {quoted(stage)} AS _stage FROM {source}")
    if not parts:
        typed = [f'NULL::{_TYPES[str(field.type)]} AS "{field.name}"' for field in schema]
        parts.append(f"SELECT {', '.join(typed)}, NULL::VARCHAR AS _stage WHERE false")
    return f'CREATE VIEW "{record_type.TABLE}" AS {" UNION ALL ".join(parts)}'


def quoted(text: str) -> str:
    """Return `text` as a string of SQL."""
    return "'" + text.replace("'", "''") + "'"


def literal(path: str) -> str:
    """Return a pattern that matches `path` and nothing else: `runs/[old]` is a folder's name."""
    return re.sub(r"[*?[]", r"[\g<0>]", path)
