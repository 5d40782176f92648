"""Packed vectors in pages, as the kernels of a GPU write and read them.

Each sequence has a ring of pages of its own: what a sliding layer drops at the front is written
again at the end, so that a generated token copies nothing. A ring that is full grows by a quarter,
so that all its copies together are a few times its bytes.

Shape suffixes: B sequences, W pages of each, N = B · W, H key/value heads, Y bytes of a half page,
T tokens, D head size, P packed bytes of a vector.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stillhouse.kernels.paged_attention import HalfPage, read_vectors
from stillhouse.kernels.turboquant import Fp8Vectors, PackedVectors

if TYPE_CHECKING:
    from stillhouse.workers.cache.gpu_tables import GpuTables


@dataclass(frozen=True, slots=True)
class PageStorage:
    """`length` vectors of each sequence from place `first` of its ring.

    pages_BWHY: uint8. table_BW: int32 [B, 2 W], the numbers of each sequence's pages among N,
    twice, so that a ring is read on past its end. An append writes into the pages: of objects that
    share them only the newest may be appended to.
    """

    codec: Any
    tables: "GpuTables"
    half: HalfPage
    pages_BWHY: Tensor
    table_BW: Tensor
    first: int = 0
    length: int = 0

    @classmethod
    def empty(
        cls, codec: Any, tables: "GpuTables", half: HalfPage, sample_BHTD: Tensor
    ) -> "PageStorage":
        """No vectors and no page, of sequences like the sample."""
        batch, heads = sample_BHTD.shape[:2]
        pages_NHY = half.empty(0, heads, sample_BHTD.device)
        pages_BWHY = pages_NHY.view(batch, 0, heads, half.nbytes)
        return cls(codec, tables, half, pages_BWHY, _ring_table(pages_BWHY))

    @property
    def all_pages(self) -> Tensor:
        """uint8 [N, H, Y], all sequences'."""
        batch, pages, heads, size = self.pages_BWHY.shape
        return self.pages_BWHY.view(batch * pages, heads, size)  # a copy would not be written to

    @property
    def nbytes(self) -> int:
        """Bytes allocated: pages, those not yet full or used included, and the table."""
        return sum(part.untyped_storage().nbytes() for part in (self.pages_BWHY, self.table_BW))

    @property
    def _room(self) -> int:
        """Tokens of a ring."""
        return self.pages_BWHY.shape[1] * self.half.tokens

    def _pages_for(self, length: int) -> int:
        """How many pages so many tokens from `first` on take; that of the first token is none of
        the last ones', though the ring may have room there."""
        return -(-(self.first % self.half.tokens + length) // self.half.tokens)

    def append_both(
        self, values: "PageStorage", key_BHTD: Tensor, value_BHTD: Tensor
    ) -> "tuple[PageStorage, PageStorage]":
        """See `PackedStorage`; one launch. Nothing is refused: see `gpu_store` for what a vector
        with a NaN stores."""
        tokens = key_BHTD.shape[2]
        self.require_twin(values)
        keys, values = self._with_room(tokens), values._with_room(tokens)
        self.tables.store.store(
            _in_rows(key_BHTD),
            _in_rows(value_BHTD),
            keys.all_pages,
            values.all_pages,
            keys._slots(self.length, tokens),
            trusted=True,  # they are places of rings that have the room
        )
        length = self.length + tokens
        return replace(keys, length=length), replace(values, length=length)

    def require_twin(self, values: "PageStorage") -> None:
        """AssertionError unless keys and values, which kernels find by the keys' table, lie in the
        same places: they do as long as both see the same changes."""
        assert (self.first, self.length) == (values.first, values.length)
        assert self.table_BW.shape == values.table_BW.shape

    def _with_room(self, tokens: int) -> "PageStorage":
        wanted, pages = self._pages_for(self.length + tokens), self.pages_BWHY.shape[1]
        return self if wanted <= pages else self._moved(max(wanted, _with_slack(pages)))

    def _moved(self, pages: int) -> "PageStorage":
        """Into a ring of so many pages."""
        batch, old, heads, size = self.pages_BWHY.shape
        head, used = self.first // self.half.tokens, self._pages_for(self.length)
        tail = self.pages_BWHY.new_zeros((batch, pages - used, heads, size))
        wrapped = max(head + used - old, 0)
        moved = (self.pages_BWHY[:, head : head + used], self.pages_BWHY[:, :wrapped], tail)
        pages_BWHY = torch.cat(moved, dim=1)
        first = self.first % self.half.tokens
        return replace(self, pages_BWHY=pages_BWHY, table_BW=_ring_table(pages_BWHY), first=first)

    def _slots(self, start: int, tokens: int) -> Tensor:
        """Where the tokens from `start` on lie among all pages, int64 [B T], by sequence."""
        room, device = self._room, self.pages_BWHY.device
        place, end = (self.first + start) % max(room, 1), self.pages_BWHY.shape[0] * room
        if tokens == 1:  # a generated token: one launch
            return torch.arange(place, end, room, device=device)
        place_T = torch.arange(place, place + tokens, device=device) % max(room, 1)
        ring_B = torch.arange(self.pages_BWHY.shape[0], device=device) * room
        return (ring_B[:, None] + place_T).flatten()

    def decode(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """See `PackedStorage`."""
        decoded: Tensor = self.codec.decode(self.record(start, stop), dtype)
        return decoded

    def record(self, start: int, stop: int) -> PackedVectors | Fp8Vectors:
        """The vectors from `start` to `stop` as the codec packs them."""
        slots = self._slots(start, max(stop - start, 0))
        packed_HTP, scalars_HT = read_vectors(self.all_pages, self.half, slots)
        packed_BHTP = self._by_sequence(packed_HTP)
        if scalars_HT is None:
            return Fp8Vectors(packed_BHTP)
        return PackedVectors(packed_BHTP, self._by_sequence(scalars_HT))

    def _by_sequence(self, x_HT: Tensor) -> Tensor:
        """[H, B T, …] → [B, H, T, …]."""
        batch = self.pages_BWHY.shape[0]
        tokens = x_HT.shape[1] // max(batch, 1)
        x_HBT: Tensor = x_HT.unflatten(1, (batch, tokens))
        return x_HBT.transpose(0, 1).contiguous()

    def cut(self, part: slice) -> "PageStorage":
        """See `PackedStorage`; pages are freed once fewer than about half of them are used."""
        start, stop, _ = part.indices(self.length)
        length = max(stop - start, 0)
        first = (self.first + start) % max(self._room, 1) if length else 0
        rest = replace(self, first=first, length=length)
        fitting = _with_slack(rest._pages_for(length))
        return rest if self.pages_BWHY.shape[1] <= 2 * fitting else rest._moved(fitting)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "PageStorage":
        """See `PackedStorage`."""
        pages_BWHY = change(self.pages_BWHY)
        table_BW = self.table_BW
        if pages_BWHY.shape[0] != table_BW.shape[0]:
            table_BW = _ring_table(pages_BWHY)
        return replace(self, pages_BWHY=pages_BWHY, table_BW=table_BW)


def _with_slack(pages: int) -> int:
    return pages + max(pages // 4, 1)


def _ring_table(pages_BWHY: Tensor) -> Tensor:
    batch, pages = pages_BWHY.shape[:2]
    numbers = torch.arange(batch * pages, dtype=torch.int32, device=pages_BWHY.device)
    return numbers.view(batch, pages).repeat(1, 2)


def _in_rows(x_BHTD: Tensor) -> Tensor:
    """[B T, H, D], each vector contiguous."""
    rows = x_BHTD.detach().transpose(1, 2).flatten(0, 1)
    return rows if rows.stride(-1) == 1 else rows.contiguous()
