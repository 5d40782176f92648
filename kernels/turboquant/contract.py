"""What every codec of vectors offers, and what can be done with any codec's records.

A record is a dataclass whose fields are tensors, records, or tuples of these; all tensors have the
vectors' axes [B, H, T] first.

Shape suffixes: B sequences, H heads, T tokens, D head size.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

Record = TypeVar("Record")


class VectorCodec(Protocol):
    """Vectors to fewer bytes and back; its tables lie on one device."""

    @property
    def bytes_per_vector(self) -> int:
        """Bytes stored for one vector, everything in."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of the codec's own tables."""
        ...

    def encode(self, x_BHTD: Tensor) -> Any:
        """float32/float16/bfloat16 [B, H, T, D] → a record of [B, H, T].

        ValueError for another dtype or head size; NotFiniteError on the CPU for a vector that
        cannot be stored.
        """
        ...

    def decode(self, packed: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        """A record of [B, H, T] → `dtype` [B, H, T, D]."""
        ...


@cache
def _field_names(kind: Any) -> tuple[str, ...]:
    """Of a dataclass; kept, since a generated token's cache asks for them many times a layer."""
    return tuple(field.name for field in dataclasses.fields(kind))


def map_tensors(record: Record, change: Callable[[Tensor], Tensor]) -> Record:
    """The same record with every tensor changed."""
    changed: Any = record
    if isinstance(record, Tensor):
        changed = change(record)
    elif isinstance(record, tuple):
        changed = tuple(map_tensors(part, change) for part in record)
    elif dataclasses.is_dataclass(record) and not isinstance(record, type):
        names = _field_names(type(record))
        changed = type(record)(*[map_tensors(getattr(record, name), change) for name in names])
    else:
        raise TypeError(f"expected a tensor, a tuple or a dataclass, found {type(record).__name__}")
    return cast(Record, changed)


def tensors_of(record: object) -> list[Tensor]:
    """All tensors of a record, in the order of its fields; TypeError as `map_tensors`."""
    if isinstance(record, Tensor):
        return [record]
    if isinstance(record, tuple):
        return [tensor for part in record for tensor in tensors_of(part)]
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        parts = [getattr(record, name) for name in _field_names(type(record))]
        return [tensor for part in parts for tensor in tensors_of(part)]
    raise TypeError(f"expected a tensor, a tuple or a dataclass, found {type(record).__name__}")


def join(first: Record, second: Record, dim: int) -> Record:
    """Both records' vectors along an axis, in new storage."""
    others: Iterator[Tensor] = iter(tensors_of(second))
    return map_tensors(first, lambda tensor: torch.cat((tensor, next(others)), dim=dim))


def nbytes_of(record: object) -> int:
    """Bytes of the storage behind a record, also where its tensors are views of a part of it."""
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors_of(record))
