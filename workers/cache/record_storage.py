"""Packed vectors behind one interface, and the form that every codec has: its record.

Shape suffixes: B sequences, H key/value heads, T tokens, D head size.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from stillhouse.kernels.turboquant import VectorCodec, join, map_tensors, nbytes_of, tensors_of


class PackedStorage(Protocol):
    """One layer's packed keys or values. Every change makes a new object."""

    @property
    def codec(self) -> VectorCodec:
        """Whose vectors they are."""
        ...

    @property
    def length(self) -> int:
        """Vectors of each sequence and head."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes allocated, without the tables of codecs and kernels."""
        ...

    def append_both(
        self, values: Any, key_BHTD: Tensor, value_BHTD: Tensor
    ) -> "tuple[PackedStorage, PackedStorage]":
        """This storage, of keys, and that of the values in the same form, with new vectors.

        Raises as `codec.encode`, and then neither has changed.
        """
        ...

    def decode(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """The vectors from `start` to `stop`, [B, H, T, D]."""
        ...

    def cut(self, part: slice) -> "PackedStorage":
        """That part of every head's vectors; the rest is freed."""
        ...

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "PackedStorage":
        """With the batch axis, the first, changed."""
        ...


@dataclass(frozen=True, slots=True)
class RecordStorage:
    """The codec's record of all vectors, which grows by concatenation: no slack."""

    codec: VectorCodec
    record: Any

    @classmethod
    def empty(cls, codec: VectorCodec, sample_BHTD: Tensor) -> "RecordStorage":
        """No vectors, of sequences like the sample."""
        return cls(codec, codec.encode(sample_BHTD[:, :, :0]))

    @property
    def length(self) -> int:
        """Vectors of each sequence and head."""
        return tensors_of(self.record)[0].shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of the storage behind the record."""
        return nbytes_of(self.record)

    def append_both(
        self, values: "RecordStorage", key_BHTD: Tensor, value_BHTD: Tensor
    ) -> "tuple[RecordStorage, RecordStorage]":
        """See `PackedStorage`."""
        return self._appended(key_BHTD), values._appended(value_BHTD)

    def _appended(self, x_BHTD: Tensor) -> "RecordStorage":
        return RecordStorage(self.codec, join(self.record, self.codec.encode(x_BHTD), 2))

    def decode(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """See `PackedStorage`."""
        part = map_tensors(self.record, lambda tensor: tensor[:, :, start:stop])
        return self.codec.decode(part, dtype)

    def cut(self, part: slice) -> "RecordStorage":
        """Cloned: a view would free nothing."""
        return replace(
            self, record=map_tensors(self.record, lambda tensor: tensor[:, :, part].clone())
        )

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "RecordStorage":
        """See `PackedStorage`."""
        return replace(self, record=map_tensors(self.record, change))
