"""A layer's attention in a serving engine on a CPU.

Shape suffixes as in `packed_layer`.
"""

from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor

from stillhouse.kernels.paged_attention.units import LOG2E
from stillhouse.kernels.turboquant import Fp8Codec
from stillhouse.workers.cache.cpu_attention import attend_halves, mean_of
from stillhouse.workers.serving.layout import Blocks
from stillhouse.workers.serving.packed_layer import PackedLayer
from stillhouse.workers.serving.step import Piece, Step

if TYPE_CHECKING:
    from stillhouse.kernels.paged_attention.cpu_plan import DecodePlan


class CpuLayer(PackedLayer):
    """Compiled for the processor, in float32."""

    takes_float32 = True

    def _write(self, states: tuple[Tensor, Tensor], blocks: Blocks, slots_T: Tensor) -> None:
        from stillhouse.kernels.paged_attention.cpu_store import store_vectors

        halves = self.layout.pages.key, self.layout.pages.value
        for number, half in enumerate(halves):
            codec, x_THD, pages = self.codecs[number], states[number], blocks[number]
            # What cannot be stored spoils its own request, not the engine's step.
            store_vectors(codec, x_THD, pages, half, slots_T, refuse=False)

    def _singles(self, query_BHGD: Tensor, blocks: Blocks, step: Step) -> Tensor:
        from stillhouse.kernels.paged_attention.cpu import PackedHalf

        sinks_BH2SD = blocks.sinks_NH2SD[step.single_firsts]
        none = sinks_BH2SD[:, :, 0, :0]
        return attend_halves(
            self._decoder,
            self.codecs,
            query_BHGD.float() * (self.scaling * LOG2E),
            (PackedHalf(blocks.keys_NHY), PackedHalf(blocks.values_NHY)),
            self._plan(step, query_BHGD.shape[1]),
            ((sinks_BH2SD[:, :, 0], sinks_BH2SD[:, :, 1]), (none, none)),
        )

    def _plan(self, step: Step, heads: int) -> "DecodePlan":
        from stillhouse.kernels.paged_attention.cpu_plan import DecodePlan

        sinks = self.layout.sinks
        key = heads, self.group, sinks, self.window
        if key not in step.plans:
            ranges = step.single_ranges(sinks, self.window)
            page = self.layout.pages.tokens
            step.plans[key] = DecodePlan(*ranges, heads, self.group, page, step.single_table)
        found: DecodePlan = step.plans[key]
        return found

    def _piece(self, query_TQD: Tensor, blocks: Blocks, table_W: Tensor, piece: Piece) -> Tensor:
        from stillhouse.kernels.paged_attention.chunk_rows import chunk_of_rows, rows_of_chunk
        from stillhouse.kernels.paged_attention.cpu import PackedHalf
        from stillhouse.kernels.paged_attention.cpu_chunk import ChunkSpan, ChunkTokens

        key_codec, value_codec = self.codecs
        heads = query_TQD.shape[1] // self.group
        rows_BHMD = rows_of_chunk(query_TQD[None].float() * self.scaling, heads)
        coded = rows_BHMD
        if not isinstance(key_codec, Fp8Codec):
            coded = key_codec.query_in_coded(rows_BHMD)
        mean_HD = mean_of(key_codec)
        table_BW = table_W[None, : -(-piece.end // self.layout.pages.tokens)]
        first, last = self._history(piece)
        out, raw, share = self._chunk_decoder.attend(
            coded,
            PackedHalf(blocks.keys_NHY),
            PackedHalf(blocks.values_NHY),
            [ChunkSpan(first, last, last)],
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

    @cached_property
    def _decoder(self) -> Any:
        from stillhouse.kernels.paged_attention.cpu import decoder

        return decoder(self.layout.pages, self.group, self.softcap)

    @cached_property
    def _chunk_decoder(self) -> Any:
        from stillhouse.kernels.paged_attention.cpu_chunk import chunk_decoder

        return chunk_decoder(self.layout.pages, self.group, self.softcap)
