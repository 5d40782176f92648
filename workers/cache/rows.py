"""One layer's stored keys or values: sinks in 16 bits, packed vectors, recent ones in 16 bits.

A slot is a column of the batch, padding included: the slots of a sequence padded on the left begin
with pads, and its sinks are the first slots after them. Where nothing is padded no token is stored
twice. In a padded batch the rectangle of packed vectors has pads in it, as every batched cache,
and at the slots of later sequences' sinks packed copies that are never read.

Shape suffixes: B sequences, H key/value heads, T tokens, S sinks, D head size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stillhouse.kernels.turboquant import (
    VectorCodec,
    join,
    map_tensors,
    nbytes_of,
    tensors_of,
    to_half,
)


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


@dataclass(frozen=True, slots=True)
class Rows:
    """The slots from `start` to the end of what was appended; an append makes a new object.

    packed: the codec's record of the slots from `first_packed` on. recent_BHTD: 16 bits, the last
    slots, at most `recent_limit`.
    """

    codec: VectorCodec
    recent_limit: int
    start: int
    sinks: Sinks | None
    packed: Any
    recent_BHTD: Tensor

    @classmethod
    def empty(
        cls,
        codec: VectorCodec,
        sinks: int,
        recent: int,
        padding: Sequence[int] | None,
        sample_BHTD: Tensor,
    ) -> "Rows":
        """No tokens yet, of sequences like the sample."""
        none = sample_BHTD[:, :, :0]
        room = Sinks.empty(sinks, padding, sample_BHTD) if sinks else None
        return cls(codec, recent, 0, room, codec.encode(none), to_half(none).clone())

    @property
    def batch_size(self) -> int:
        """B."""
        return self.recent_BHTD.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the storage behind all parts."""
        sinks = () if self.sinks is None else (self.sinks.values_BHSD,)
        padding = self.sinks.padding_B if self.sinks is not None else None
        return nbytes_of((self.packed, self.recent_BHTD, *sinks)) + (
            0 if padding is None else nbytes_of(padding)
        )

    @property
    def first_packed(self) -> int:
        """The slot of the first packed vector."""
        return max(self.start, self.sinks.count if self.sinks else 0)

    @property
    def _packed_length(self) -> int:
        return tensors_of(self.packed)[0].shape[2]

    def appended(self, x_BHTD: Tensor, slot: int) -> "Rows":
        """With the tokens of x at slots from `slot` on; NotFiniteError as the codec's."""
        sinks = None if self.sinks is None else self.sinks.with_new(x_BHTD, slot)
        new = x_BHTD[:, :, max(self.first_packed - slot, 0) :]
        if self.recent_BHTD.shape[2]:
            new = torch.cat((self.recent_BHTD.to(new.dtype), new), dim=2)
        old = max(new.shape[2] - self.recent_limit, 0)
        packed = join(self.packed, self.codec.encode(new[:, :, :old]), 2) if old else self.packed
        return replace(
            self, sinks=sinks, packed=packed, recent_BHTD=to_half(new[:, :, old:]).clone()
        )

    def decode(self, first: int, end: int, dtype: torch.dtype) -> Tensor:
        """The slots from `first` to `end`, where the stored ones end, [B, H, T, D]."""
        skip = max(first - self.first_packed, 0)
        packed = map_tensors(self.packed, lambda tensor: tensor[:, :, skip:])
        recent = self.recent_BHTD[:, :, max(skip - self._packed_length, 0) :]
        parts = [self.codec.decode(packed, dtype), recent.to(dtype)]
        if self.sinks is None:
            return torch.cat(parts, dim=2)
        parts.insert(0, self.sinks.values_BHSD[:, :, first:end].to(dtype))
        return self.sinks.laid_over(torch.cat(parts, dim=2), first)

    def without_before(self, start: int) -> "Rows":
        """Without the slots before `start`."""
        if start <= self.start:
            return self
        sinks = None if self.sinks is None or start >= self.sinks.last else self.sinks
        rest = replace(self, start=start, sinks=sinks)
        dropped = rest.first_packed - self.first_packed
        return rest._sliced(dropped, None) if dropped else rest

    def without_last(self, slots: int) -> "Rows":
        """Without the last slots; a sink that was among them is overwritten by the next append."""
        return self._sliced(0, -slots) if slots else self

    def _sliced(self, first: int, last: int | None) -> "Rows":
        """Packed and recent vectors together as one axis, cut."""
        packed, recent = self._packed_length, self.recent_BHTD.shape[2]
        start, stop, _ = slice(first, last).indices(packed + recent)
        # Clones: a view would free nothing.
        return replace(
            self,
            packed=map_tensors(
                self.packed, lambda tensor: tensor[:, :, start : min(stop, packed)].clone()
            ),
            recent_BHTD=self.recent_BHTD[
                :, :, max(start - packed, 0) : max(stop - packed, 0)
            ].clone(),
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
        packed = map_tensors(self.packed, change)
        return replace(self, sinks=sinks, packed=packed, recent_BHTD=change(self.recent_BHTD))
