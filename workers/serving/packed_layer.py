"""A layer's attention in a serving engine: store, then attend to what is stored.

Shape suffixes: T tokens of a step, Q query heads, H key/value heads, G query heads of each, D head
size, B requests, R tokens in 16 bits; others as in `layout`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from stillhouse.kernels.paged_attention import HalfPage, read_vectors
from stillhouse.kernels.turboquant import Fp8Vectors, PackedVectors
from stillhouse.workers.serving.layout import BlockLayout, Blocks
from stillhouse.workers.serving.step import Piece, Step, pieces, slots_of


@dataclass(frozen=True)
class PackedLayer(ABC):
    """codecs: of keys and of values. group: G. window: tokens that one sees, 0 for all."""

    takes_float32: ClassVar[bool] = False

    codecs: tuple[Any, Any]
    layout: BlockLayout
    group: int
    scaling: float
    softcap: float = 0.0
    window: int = 0

    def store(
        self, states: tuple[Tensor, Tensor], blocks: Blocks, slots_T: Tensor, step: Step
    ) -> None:
        """Write keys and values [T, H, D] at their slots, sinks in 16 bits; -1 stores nothing.

        What attends to a vector that cannot be stored (`NotFiniteError`) is no number.
        """
        sinks = step.sink_rows(self.layout.sinks)
        if sinks.rows.numel():
            slots_T = slots_T.index_fill(0, sinks.rows, -1)
        self._write(states, blocks, slots_T)
        if sinks.rows.numel():
            for number, x_THD in enumerate(states):
                kept = x_THD[sinks.rows].to(blocks.sinks_NH2SD.dtype)
                blocks.sinks_NH2SD[sinks.blocks, :, number, sinks.numbers] = kept

    def attend(self, query_TQD: Tensor, blocks: Blocks, step: Step, out_TQD: Tensor) -> None:
        """Of every request's tokens, each up to itself; after `store`. out_TQD: of any floats."""
        if step.singles:
            rows = step.single_rows
            query_BQD = query_TQD[rows]
            batch, queries, dim = query_BQD.shape
            query_BHGD = query_BQD.view(batch, queries // self.group, self.group, dim)
            out_BHGD = self._singles(query_BHGD, blocks, step)
            out_TQD[rows] = out_BHGD.view(batch, queries, dim).to(out_TQD.dtype)
        for request in step.chunks:
            first, row = step.first_of(request), step.starts[request]
            for piece in pieces(first, step.lengths[request], self.layout.sinks, self.window):
                rows_T = slice(row + piece.first - first, row + piece.end - first)
                found = self._piece(query_TQD[rows_T], blocks, step.table_RW[request], piece)
                out_TQD[rows_T] = found.to(out_TQD.dtype)

    @abstractmethod
    def _write(self, states: tuple[Tensor, Tensor], blocks: Blocks, slots_T: Tensor) -> None:
        """Encode and write."""

    @abstractmethod
    def _singles(self, query_BHGD: Tensor, blocks: Blocks, step: Step) -> Tensor:
        """Of the requests with one token, [B, H, G, D]."""

    @abstractmethod
    def _piece(self, query_TQD: Tensor, blocks: Blocks, table_W: Tensor, piece: Piece) -> Tensor:
        """Of tokens of one request that see the same sinks, [T, Q, D]."""

    def _history(self, piece: Piece) -> tuple[int, int]:
        """The packed tokens before a piece that its first token sees; empty from where it begins
        when there are none."""
        last = max(piece.first, piece.packed)
        return min(piece.packed, last), last

    def _raw(self, blocks: Blocks, table_W: Tensor, piece: Piece) -> tuple[Tensor, Tensor]:
        """Keys and values of the sinks that it sees and of its own tokens, as stored, float32
        [1, H, R, D]."""
        block, end = self.layout.pages.tokens, piece.end
        first = min(max(piece.first, self.layout.sinks), end)
        slots_T = slots_of(table_W, first, end, block)
        sinks_H2SD = blocks.sinks_NH2SD[table_W[0].long()][:, :, piece.hidden : end].float()
        halves = self.layout.pages.key, self.layout.pages.value
        found = []
        for number, (codec, half) in enumerate(zip(self.codecs, halves, strict=True)):
            own = stored_vectors(codec, blocks[number], half, slots_T)
            found.append(torch.cat((sinks_H2SD[:, number], own), dim=1)[None])
        return found[0], found[1]


def stored_vectors(codec: Any, pages_NHY: Tensor, half: HalfPage, slots_T: Tensor) -> Tensor:
    """What a codec's vectors at these slots decode to, float32 [H, T, D]."""
    packed_HTP, scalars_HT = read_vectors(pages_NHY, half, slots_T)
    record: Any = Fp8Vectors(packed_HTP[None])
    if scalars_HT is not None:
        record = PackedVectors(packed_HTP[None], scalars_HT[None])
    decoded: Tensor = codec.decode(record)[0]
    return decoded
