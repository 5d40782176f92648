"""The Arrow schema of each table, rendered from its record's annotations.

    str, Literal      string            list[int]     list<int64>
    int               int64             list[float]   list<float32> (per-token log-probabilities)
    float             float64           X | None      X, nullable
    bool              bool              list[str]     list<string>
    anything else is refused

Scalars are float64 so that sums stay exact enough to compare; per-token lists are float32, which
halves the largest columns and is what a model computes in.
"""

import types
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import pyarrow as pa

from stillhouse.storage.records import Record

_ARROW: dict[Any, pa.DataType] = {
    str: pa.string(),
    int: pa.int64(),
    float: pa.float64(),
    bool: pa.bool_(),
    list[int]: pa.list_(pa.field("item", pa.int64(), nullable=False)),
    list[str]: pa.list_(pa.field("item", pa.string(), nullable=False)),
    list[float]: pa.list_(pa.field("item", pa.float32(), nullable=False)),
}


class Column(NamedTuple):
    """One column: its Arrow field and, for a Literal, the values it may hold."""

    field: pa.Field
    allowed: frozenset[str] | None


def columns_of(record_type: type[Record]) -> tuple[Column, ...]:
    """Return the columns of `record_type` in the order of its fields.

    Raises TypeError when an annotation has no column type.
    """
    hints = get_type_hints(record_type)
    return tuple(
        _column(f"{record_type.__name__}.{field.name}", field.name, hints[field.name])
        for field in fields(record_type)
    )


def schema_of(record_type: type[Record]) -> pa.Schema:
    """Return the Arrow schema of the table that `record_type` declares."""
    return pa.schema([column.field for column in columns_of(record_type)])


def table_of(record_type: type[Record], rows: Sequence[Record]) -> pa.Table:
    """Return `rows` as an Arrow table with exactly `schema_of(record_type)`.

    Raises ValueError naming table, column and value when a row does not fit its declaration.
    """
    for row in rows:
        if type(row) is not record_type:
            raise ValueError(
                f"table {record_type.TABLE}: expected {record_type.__name__}, found {row!r}"
            )
    columns = columns_of(record_type)
    arrays = [_array(record_type.TABLE, column, rows) for column in columns]
    return pa.Table.from_arrays(arrays, schema=schema_of(record_type))


def _column(where: str, name: str, hint: Any) -> Column:
    nullable = get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint)
    if nullable:
        inner = [part for part in get_args(hint) if part is not type(None)]
        hint = inner[0] if len(inner) == 1 else hint
    allowed = frozenset(get_args(hint)) if get_origin(hint) is Literal else None
    arrow = _ARROW.get(str if allowed is not None else hint)
    if arrow is None:
        raise TypeError(f"{where}: no column type for {hint}; storage/schema.py lists what has one")
    return Column(pa.field(name, arrow, nullable=nullable), allowed)


def _array(table: str, column: Column, rows: Sequence[Record]) -> pa.Array:
    field, allowed = column
    values = [getattr(row, field.name) for row in rows]
    if not field.nullable and None in values:
        raise ValueError(f"{table}.{field.name}: expected a value in every row, found None")
    if allowed is not None and not allowed.issuperset(set(values) - {None}):
        found = sorted(set(values) - allowed - {None})
        raise ValueError(f"{table}.{field.name}: expected one of {sorted(allowed)}, found {found}")
    try:
        return pa.array(values, field.type)
    except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeEncodeError) as error:
        raise ValueError(f"{table}.{field.name}: expected {field.type}: {error}") from error
