"""One step of a serving engine: which tokens of which requests attend to what.

Made once a step and read by every layer. Everything a token may see, itself included, is read as
it is stored, as `TurboQuantCache` does: an answer does not depend on how a prompt was cut into
chunks, nor on which of its blocks were there already.

Shape suffixes: R requests, T tokens of the step, W blocks of a request.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

_Ranges = tuple[list[tuple[int, int]], list[tuple[int, int, int, int]]]


class Piece(NamedTuple):
    """Tokens [first, end) of a sequence that attend together: sinks from `hidden` on, and packed
    tokens from `packed` on, as far as their window goes."""

    first: int
    end: int
    packed: int
    hidden: int


def pieces(first: int, end: int, sinks: int, window: int) -> Iterator[Piece]:
    """A chunk of tokens [first, end) in parts whose tokens all see the same sinks.

    window: how many tokens one sees, itself included; 0 for all.
    """
    while first < end:
        lost = max(first - window + 1, 0) if window else 0  # tokens before it are out of sight
        stop = end
        if window and lost < sinks:
            # The first token sees sinks from `lost` on; so do those whose window begins at 0.
            stop = min(end, window if not lost else first + 1)
        yield Piece(first, stop, max(lost, sinks), min(lost, sinks))
        first = stop


def slots_of(table_W: Tensor, first: int, end: int, block: int) -> Tensor:
    """int64: where the tokens [first, end) of a sequence with these blocks are stored."""
    place = torch.arange(first, end, device=table_W.device)
    slots: Tensor = table_W.long()[place // block] * block + place % block
    return slots


@dataclass(frozen=True)
class Step:
    """starts: the first row of each request's tokens among the step's, and the end of the last.
    lengths: tokens of each request after the step. table_RW: int32, its blocks."""

    starts: Sequence[int]
    lengths: Sequence[int]
    table_RW: Tensor
    block: int
    plans: dict[Any, Any] = field(default_factory=dict, compare=False)
    """What layers that see the same tokens share, made by the first of them."""
    _sinks: dict[int, "SinkRows"] = field(default_factory=dict, compare=False)
    _ranges: dict[tuple[int, int], _Ranges] = field(default_factory=dict, compare=False)

    @cached_property
    def singles(self) -> list[int]:
        """Requests with one token, as those that generate."""
        return [r for r in range(len(self.lengths)) if self.starts[r + 1] - self.starts[r] == 1]

    @cached_property
    def chunks(self) -> list[int]:
        """Requests with several."""
        return [r for r in range(len(self.lengths)) if self.starts[r + 1] - self.starts[r] > 1]

    @cached_property
    def single_rows(self) -> Tensor:
        """int64, the rows of `singles`."""
        return self._made([self.starts[r] for r in self.singles])

    @cached_property
    def single_table(self) -> Tensor:
        """int32, the blocks of `singles`."""
        longest = max((self.lengths[r] for r in self.singles), default=0)
        return self.table_RW[self.singles, : max(-(-longest // self.block), 1)].contiguous()

    @cached_property
    def single_firsts(self) -> Tensor:
        """int64, the first block of each of `singles`."""
        return self.single_table[:, 0].long()

    def first_of(self, request: int) -> int:
        """The place of its first token in its sequence."""
        return self.lengths[request] - (self.starts[request + 1] - self.starts[request])

    def single_ranges(self, sinks: int, window: int) -> _Ranges:
        """Of `singles`: the packed tokens, and the sinks, that each sees (`cpu.RawTokens`)."""
        key = sinks, window
        if key not in self._ranges:
            self._ranges[key] = self._found_ranges(sinks, window)
        return self._ranges[key]

    def _found_ranges(self, sinks: int, window: int) -> _Ranges:
        packed, raw = [], []
        for request in self.singles:
            end = self.lengths[request]
            lost = max(end - window, 0) if window else 0
            packed.append((min(max(lost, sinks), end), end))
            raw.append((min(lost, sinks), min(end, sinks), 0, 0))
        return packed, raw

    def sink_rows(self, sinks: int) -> "SinkRows":
        """The step's tokens that are sinks."""
        if sinks not in self._sinks:
            self._sinks[sinks] = self._found_sinks(sinks)
        return self._sinks[sinks]

    def _found_sinks(self, sinks: int) -> "SinkRows":
        rows, blocks, numbers = [], [], []
        for request in range(len(self.lengths)):
            first = self.first_of(request)
            for number in range(first, min(self.lengths[request], sinks)):
                rows.append(self.starts[request] + number - first)
                blocks.append(int(self.table_RW[request, 0]))
                numbers.append(number)
        return SinkRows(*(self._made(part) for part in (rows, blocks, numbers)))

    def _made(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self.table_RW.device)


class SinkRows(NamedTuple):
    """int64: rows of sinks among the step's tokens, the blocks they lie in, their numbers."""

    rows: Tensor
    blocks: Tensor
    numbers: Tensor
