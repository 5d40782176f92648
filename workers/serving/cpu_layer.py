"""A layer's attention in a serving engine on a CPU: store, then attend to what is stored.

Shape suffixes: T tokens of a step, Q query heads, H key/value heads, G query heads of each, D head
size, B requests, S sinks; others as in `layout`.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from stillhouse.kernels.paged_attention import HalfPage, read_vectors
from stillhouse.kernels.turboquant import Fp8Codec, Fp8Vectors, PackedVectors, to_half
from stillhouse.workers.cache.cpu_attention import attend_halves, mean_of
from stillhouse.workers.serving.layout import BlockLayout, Blocks
from stillhouse.workers.serving.step import Piece, Step, pieces


@dataclass(frozen=True)
class CpuLayer:
    """codecs: of keys and of values. group: G. window: tokens that one sees, 0 for all."""

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

        NotFiniteError for vectors that cannot be stored.
        """
        from stillhouse.kernels.paged_attention.cpu_store import store_vectors

        sinks = step.sink_rows(self.layout.sinks)
        if sinks.rows.numel():
            slots_T = slots_T.index_fill(0, sinks.rows, -1)
        halves = self.layout.pages.key, self.layout.pages.value
        for number, (codec, x_THD, half) in enumerate(
            zip(self.codecs, states, halves, strict=True)
        ):
            store_vectors(codec, x_THD, blocks[number], half, slots_T)
            if sinks.rows.numel():
                kept = to_half(x_THD[sinks.rows]).to(blocks.sinks_NH2SD.dtype)
                blocks.sinks_NH2SD[sinks.blocks, :, number, sinks.numbers] = kept

    def attend(self, query_TQD: Tensor, blocks: Blocks, step: Step, out_TQD: Tensor) -> None:
        """Of every request's tokens, each up to itself; after `store`. out_TQD: of any floats."""
        if step.singles:
            out_TQD[step.single_rows] = self._singles(query_TQD[step.single_rows], blocks, step).to(
                out_TQD.dtype
            )
        for request in step.chunks:
            first, row = step.first_of(request), step.starts[request]
            for piece in pieces(first, step.lengths[request], self.layout.sinks, self.window):
                rows = slice(row + piece.first - first, row + piece.end - first)
                out_TQD[rows] = self._piece(
                    query_TQD[rows], blocks, step.table_RW[request], piece
                ).to(out_TQD.dtype)

    def _singles(self, query_BQD: Tensor, blocks: Blocks, step: Step) -> Tensor:
        from stillhouse.kernels.paged_attention.cpu import LOG2E, PackedHalf

        batch, queries, dim = query_BQD.shape
        query_BHGD = query_BQD.view(batch, queries // self.group, self.group, dim).float()
        table_BW = step.single_table
        sinks_BH2SD = blocks.sinks_NH2SD[table_BW[:, 0].long()]
        none = sinks_BH2SD[:, :, 0, :0]
        out_BHGD = attend_halves(
            self._decoder,
            self.codecs,
            query_BHGD * (self.scaling * LOG2E),
            (PackedHalf(blocks.keys_NHY), PackedHalf(blocks.values_NHY)),
            step.single_ranges(self.layout.sinks, self.window),
            ((sinks_BH2SD[:, :, 0], sinks_BH2SD[:, :, 1]), (none, none)),
            table_BW,
        )
        return out_BHGD.view(batch, queries, dim)

    def _piece(self, query_TQD: Tensor, blocks: Blocks, table_W: Tensor, piece: Piece) -> Tensor:
        from stillhouse.kernels.paged_attention.cpu import PackedHalf
        from stillhouse.kernels.paged_attention.cpu_chunk import (
            ChunkSpan,
            ChunkTokens,
            chunk_of_rows,
            rows_of_chunk,
        )

        key_codec, value_codec = self.codecs
        heads = query_TQD.shape[1] // self.group
        rows_BHMD = rows_of_chunk(query_TQD[None].float() * self.scaling, heads)
        coded = rows_BHMD
        if not isinstance(key_codec, Fp8Codec):
            coded = key_codec.query_in_coded(rows_BHMD)
        mean_HD = mean_of(key_codec)
        table_BW = table_W[None, : -(-piece.end // self.layout.pages.tokens)]
        last = max(piece.first, piece.packed)
        out, raw, share = self._chunk_decoder.attend(
            coded,
            PackedHalf(blocks.keys_NHY),
            PackedHalf(blocks.values_NHY),
            [ChunkSpan(min(piece.packed, last), last, last)],
            ChunkTokens(rows_BHMD, *self._raw(blocks, table_BW[0], piece)),
            table_BW=table_BW,
            offset_BHM=None if mean_HD is None else (rows_BHMD @ mean_HD[:, :, None])[..., 0],
            window=self.window,
        )
        if not isinstance(value_codec, Fp8Codec):
            out = value_codec.from_coded(out)
        if (mean_HD := mean_of(value_codec)) is not None:
            out = out + share[..., None] * mean_HD[:, None]
        return chunk_of_rows(out + raw, self.group)[0]

    def _raw(self, blocks: Blocks, table_W: Tensor, piece: Piece) -> tuple[Tensor, Tensor]:
        """Keys and values of the sinks that it sees and of its own tokens, as stored, float32
        [1, H, R, D]."""
        own_T = torch.arange(min(max(piece.first, self.layout.sinks), piece.end), piece.end)
        slots_T = table_W.long()[own_T // self.layout.pages.tokens] * self.layout.pages.tokens
        slots_T += own_T % self.layout.pages.tokens
        sinks_H2SD = blocks.sinks_NH2SD[int(table_W[0])][:, :, piece.hidden : piece.end].float()
        halves = self.layout.pages.key, self.layout.pages.value
        found = []
        for number, (codec, half) in enumerate(zip(self.codecs, halves, strict=True)):
            own = stored_vectors(codec, blocks[number], half, slots_T)
            found.append(torch.cat((sinks_H2SD[:, number], own), dim=1)[None])
        return found[0], found[1]

    @cached_property
    def _decoder(self) -> Any:
        from stillhouse.kernels.paged_attention.cpu import decoder

        return decoder(self.layout.pages, self.group, self.softcap)

    @cached_property
    def _chunk_decoder(self) -> Any:
        from stillhouse.kernels.paged_attention.cpu_chunk import chunk_decoder

        return chunk_decoder(self.layout.pages, self.group, self.softcap)


def stored_vectors(codec: Any, pages_NHY: Tensor, half: HalfPage, slots_T: Tensor) -> Tensor:
    """What a codec's vectors at these slots decode to, float32 [H, T, D]."""
    packed_HTP, scalars_HT = read_vectors(pages_NHY, half, slots_T)
    record: Any = Fp8Vectors(packed_HTP[None])
    if scalars_HT is not None:
        record = PackedVectors(packed_HTP[None], scalars_HT[None])
    decoded: Tensor = codec.decode(record)[0]
    return decoded
