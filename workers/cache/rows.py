"""One layer's stored keys or values: sinks in 16 bits, packed vectors, recent ones in 16 bits.

A slot is a column of the batch, padding included: the slots of a sequence padded on the left begin
with pads, and its sinks are the first slots after them. Where nothing is padded no token is stored
twice. In a padded batch the rectangle of packed vectors has pads in it, as every batched cache,
and at the slots of later sequences' sinks packed copies that are never read.

Shape suffixes: B sequences, H key/value heads, T tokens, S sinks, D head size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from stillhouse.kernels.turboquant import VectorCodec, nbytes_of, to_half
from stillhouse.workers.cache.record_storage import PackedStorage


@dataclass(frozen=True, slots=True)
class Sinks:
    """The first S tokens of each sequence.

    values_BHSD: 16 bits, zeros until a token arrives. padding_B: int64, pads before each sequence;
    None where there are none. last: no slot from here on holds a sink.
    """

    values_BHSD: Tensor
    padding_B: Tensor | None
    last: int

    @classmethod
    def empty(cls, count: int, padding: Sequence[int] | None, sample_BHTD: Tensor) -> "Sinks":
        """Room for `count` tokens of sequences like the sample."""
        batch, heads, _, dim = sample_BHTD.shape
        zeros = to_half(sample_BHTD.new_zeros((batch, heads, count, dim)))
        if padding is None or not any(padding):
            return cls(zeros, None, count)
        padding_B = torch.tensor(padding, dtype=torch.int64, device=sample_BHTD.device)
        return cls(zeros, padding_B, count + max(padding))

    @property
    def count(self) -> int:
        """S."""
        return self.values_BHSD.shape[2]

    def with_new(self, x_BHTD: Tensor, slot: int) -> "Sinks":
        """With those tokens of x, at slots from `slot` on, that are sinks."""
        fresh_BHTD = x_BHTD[:, :, : max(self.last - slot, 0)]
        tokens = fresh_BHTD.shape[2]
        if not tokens:
            return self
        source_BS = self._slots(self.count, -slot, 1)
        inside_BS = (source_BS >= 0) & (source_BS < tokens)
        index = source_BS.clamp(0, tokens - 1)[:, None, :, None].expand_as(self.values_BHSD)
        found_BHSD = to_half(fresh_BHTD).gather(2, index)
        kept = torch.where(inside_BS[:, None, :, None], found_BHSD, self.values_BHSD)
        return replace(self, values_BHSD=kept)

    def laid_over(self, x_BHTD: Tensor, slot: int) -> Tensor:
        """x, at slots from `slot` on, with the padded sequences' sinks written into it."""
        tokens = min(self.last - slot, x_BHTD.shape[2])
        if self.padding_B is None or tokens <= 0:
            return x_BHTD
        number_BT = self._slots(tokens, slot, -1)
        is_sink_BT = (number_BT >= 0) & (number_BT < self.count)
        target = x_BHTD[:, :, :tokens]
        index = number_BT.clamp(0, self.count - 1)[:, None, :, None].expand_as(target)
        sinks = self.values_BHSD.gather(2, index).to(x_BHTD.dtype)
        target.copy_(torch.where(is_sink_BT[:, None, :, None], sinks, target))
        return x_BHTD

    def _slots(self, count: int, first: int, sign: int) -> Tensor:
        """first, first + 1, … plus or minus each sequence's padding, [B, count]."""
        device = self.values_BHSD.device
        numbers = torch.arange(first, first + count, device=device)[None]
        if self.padding_B is None:
            return numbers.expand(self.values_BHSD.shape[0], -1)
        return numbers + sign * self.padding_B[:, None]


class _Parts(NamedTuple):
    """What an append makes of new tokens. old: those to be packed, None for none."""

    sinks: Sinks | None
    old: Tensor | None
    recent: Tensor
    overlap: int


@dataclass(frozen=True, slots=True)
class Rows:
    """The slots from `start` to the end of what was appended; an append makes a new object.

    packed: the vectors of the slots from `first_packed` on. recent_BHTD: 16 bits, the last
    slots, `recent_limit` at most and `overlap` more, which are packed too: they are held until
    `without_last` says which slots stay. Where there is a `recent_limit` every vector is packed
    from its 16 bits, so that what is stored is the same in any pieces.
    """

    recent_limit: int
    start: int
    sinks: Sinks | None
    packed: PackedStorage
    recent_BHTD: Tensor
    overlap: int = 0

    @classmethod
    def empty(
        cls,
        packed: PackedStorage,
        sinks: int,
        recent: int,
        padding: Sequence[int] | None,
        sample_BHTD: Tensor,
    ) -> "Rows":
        """No tokens yet, of sequences like the sample."""
        none = sample_BHTD[:, :, :0]
        room = Sinks.empty(sinks, padding, sample_BHTD) if sinks else None
        return cls(recent, 0, room, packed, to_half(none).clone())

    @property
    def codec(self) -> VectorCodec:
        """Of the packed vectors."""
        return self.packed.codec

    @property
    def batch_size(self) -> int:
        """B."""
        return self.recent_BHTD.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes allocated for all parts."""
        sinks = () if self.sinks is None else (self.sinks.values_BHSD,)
        padding = self.sinks.padding_B if self.sinks is not None else None
        raw = nbytes_of((self.recent_BHTD, *sinks))
        return self.packed.nbytes + raw + (0 if padding is None else nbytes_of(padding))

    @property
    def first_packed(self) -> int:
        """The slot of the first packed vector."""
        return max(self.start, self.sinks.count if self.sinks else 0)

    @property
    def packed_length(self) -> int:
        """How many slots are packed."""
        return self.packed.length

    @property
    def _first_recent(self) -> int:
        """Where `recent_BHTD` begins, in slots after `first_packed`."""
        return self.packed_length - self.overlap

    def _parts(self, x_BHTD: Tensor, slot: int, hold: bool) -> _Parts:
        """Of the tokens of x at slots from `slot` on; hold: as `append_both`."""
        sinks = None if self.sinks is None else self.sinks.with_new(x_BHTD, slot)
        new = x_BHTD[:, :, max(self.first_packed - slot, 0) :]
        if self.recent_limit:
            new = to_half(new)
            new = torch.cat((self.recent_BHTD.to(new.dtype), new), dim=2)
        old = max(new.shape[2] - self.overlap - self.recent_limit, 0)
        stop = self.overlap + old
        overlap = stop if hold and self.recent_limit else 0
        recent = self.recent_BHTD
        if recent.shape[2] or new.shape[2] > stop - overlap:
            recent = to_half(new[:, :, stop - overlap :]).clone()
        return _Parts(sinks, new[:, :, self.overlap : stop] if old else None, recent, overlap)

    def _with(self, parts: _Parts, packed: PackedStorage) -> "Rows":
        # Not `replace`, which takes longer: a generated token comes by here twice a layer.
        return Rows(self.recent_limit, self.start, parts.sinks, packed, parts.recent, parts.overlap)

    def decode(self, first: int, end: int, dtype: torch.dtype, read_at: int) -> Tensor:
        """The slots from `first` to `end`, where the stored ones end, [B, H, T, D].

        Slots stored both ways are given as they stood when `read_at` was the end.
        """
        skip, recent_at = max(first - self.first_packed, 0), self._first_recent
        edge = max(read_at - self.recent_limit - self.first_packed, recent_at)
        edge = min(edge, self.packed_length)
        recent = self.recent_BHTD[:, :, max(skip, edge) - recent_at :]
        parts = [self.packed.decode(skip, edge, dtype), recent.to(dtype)]
        if self.sinks is None:
            return torch.cat(parts, dim=2)
        parts.insert(0, self.sinks.values_BHSD[:, :, first:end].to(dtype))
        return self.sinks.laid_over(torch.cat(parts, dim=2), first)

    def without_before(self, start: int) -> "Rows":
        """Without the slots before `start`; only where none is held."""
        if start <= self.start:
            return self
        sinks = None if self.sinks is None or start >= self.sinks.last else self.sinks
        rest = replace(self, start=start, sinks=sinks)
        dropped = rest.first_packed - self.first_packed
        if not dropped:
            return rest
        return rest._cut(slice(dropped, None), slice(max(dropped - self.packed_length, 0), None))

    def without_last(self, slots: int) -> "Rows":
        """Without the last slots, and with `recent_limit` slots in 16 bits at most.

        Those are the last ones as far as they are held; what else was packed stays so. A sink among
        the removed is overwritten by the next append.
        """
        if not slots and not self.overlap:
            return self
        first = self._first_recent
        stop = max(first + self.recent_BHTD.shape[2] - slots, 0)
        recent = min(max(stop - first, 0), self.recent_limit)
        kept = stop - recent
        return self._cut(slice(kept), slice(kept - first, stop - first))

    def _cut(self, packed: slice, recent: slice) -> "Rows":
        """Parts of both; cloned, as a view would free nothing."""
        return replace(
            self,
            packed=self.packed.cut(packed),
            recent_BHTD=self.recent_BHTD[:, :, recent].clone(),
            overlap=0,
        )

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Rows":
        """With every tensor's batch axis changed."""
        sinks = self.sinks
        if sinks is not None:
            padding = sinks.padding_B
            sinks = replace(
                sinks,
                values_BHSD=change(sinks.values_BHSD),
                padding_B=None if padding is None else change(padding),
            )
        packed = self.packed.mapped(change)
        return replace(self, sinks=sinks, packed=packed, recent_BHTD=change(self.recent_BHTD))


def append_both(
    rows: tuple[Rows, ...], states: tuple[Tensor, Tensor], slot: int, hold: bool = False
) -> tuple[Rows, Rows]:
    """Keys and values with their tokens at slots from `slot` on; NotFiniteError as the codecs'.

    hold: keep 16 bits of what leaves `recent`, too. Both are encoded before one is stored: a
    refused value leaves the rows as they were.
    """
    keys, values = rows
    key = keys._parts(states[0], slot, hold)
    value = values._parts(states[1], slot, hold)
    packed = keys.packed, values.packed
    if key.old is not None and value.old is not None:
        packed = keys.packed.append_both(values.packed, key.old, value.old)
    return keys._with(key, packed[0]), values._with(value, packed[1])
