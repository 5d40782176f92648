"""A layer's attention in a serving engine on a GPU, by Triton's kernels.

Shape suffixes as in `packed_layer`.
"""

import torch
from torch import Tensor

from stillhouse.errors import ModelError
from stillhouse.kernels.paged_attention.chunk_rows import chunk_of_rows, rows_of_chunk
from stillhouse.kernels.paged_attention.gpu import GpuDecoder, RawTokens, Sequences
from stillhouse.kernels.paged_attention.gpu_chunk import ChunkTokens, attend_chunk
from stillhouse.workers.cache.gpu_attention import ends_of, rounded_up
from stillhouse.workers.cache.gpu_tables import GpuTables
from stillhouse.workers.serving.layout import Blocks
from stillhouse.workers.serving.packed_layer import PackedLayer
from stillhouse.workers.serving.step import Piece, Step


class GpuLayer(PackedLayer):
    """In float16 or bfloat16; for codecs of one channel group of 2, 3 or 4 bits, or fp8."""

    def _write(self, states: tuple[Tensor, Tensor], blocks: Blocks, slots_T: Tensor) -> None:
        key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in states)
        halves = blocks.keys_NHY, blocks.values_NHY
        self._tables(key.device).store.store(
            key, value, *halves, slots_T.contiguous(), trusted=True
        )

    def _singles(self, query_BHGD: Tensor, blocks: Blocks, step: Step) -> Tensor:
        table_BW, device = step.single_table, query_BHGD.device
        packed, seen = step.single_ranges(self.layout.sinks, self.window)
        raw = None
        if self.layout.sinks:
            sinks_BH2SD = blocks.sinks_NH2SD[step.single_firsts].to(query_BHGD.dtype)
            key, value = (sinks_BH2SD[:, :, number].contiguous() for number in (0, 1))
            raw = RawTokens(key, value, *ends_of([ends[:2] for ends in seen], device))
        out_BHGD, _ = self._decoder(device).attend(
            query_BHGD.contiguous(),
            blocks.keys_NHY,
            blocks.values_NHY,
            Sequences(table_BW, *ends_of(packed, device)),
            raw=raw,
            tokens=rounded_up(max(end - first for first, end in packed)),
            trusted=True,
        )
        return out_BHGD

    def _piece(self, query_TQD: Tensor, blocks: Blocks, table_W: Tensor, piece: Piece) -> Tensor:
        device, heads = query_TQD.device, query_TQD.shape[1] // self.group
        first, last = self._history(piece)
        key, value = (x.to(query_TQD.dtype) for x in self._raw(blocks, table_W, piece))
        ends = (torch.tensor([n], dtype=torch.int32, device=device) for n in (first, last, last, 0))
        begin_B, end_B, position_B, hidden_B = ends
        out_BHMD, _ = attend_chunk(
            self._decoder(device),
            rows_of_chunk(query_TQD[None], heads).contiguous(),
            blocks.keys_NHY,
            blocks.values_NHY,
            Sequences(table_W[None], begin_B, end_B),
            ChunkTokens(key, value, position_B, hidden_B),
            group=self.group,
            window=self.window,
            trusted=True,
        )
        return chunk_of_rows(out_BHMD, self.group)[0]

    def _tables(self, device: torch.device) -> GpuTables:
        """Kept with the codecs; ModelError for those that no kernel takes."""
        try:
            return GpuTables.of(*self.codecs, self.layout.pages.tokens, device)
        except ValueError as error:
            raise ModelError(
                f"cache: a GPU's kernels do not read it: {error}; compress with "
                "`channel_groups: 1`, or serve with --cache bf16"
            ) from error

    def _decoder(self, device: torch.device) -> GpuDecoder:
        return self._tables(device).decoder(self.scaling, self.softcap)
