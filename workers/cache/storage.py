"""Where a layer's packed vectors lie: in a codec's record, or in pages that a GPU's kernels read.

Shape suffixes: B sequences, H key/value heads, T tokens, D head size.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from stillhouse.kernels.paged_attention import PAGE_TOKENS
from stillhouse.kernels.turboquant import VectorCodec
from stillhouse.kernels.turboquant.codec import has_triton
from stillhouse.workers.cache.page_storage import PageStorage
from stillhouse.workers.cache.record_storage import PackedStorage, RecordStorage

StorageKind = Literal["auto", "pages", "records"]
_HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class CacheStorage:
    """kind: `auto` takes pages where a GPU's kernels attend to them: on CUDA, for keys and values
    in 16 bits whose codecs they know (docs/kernels.md); `pages` takes them or raises ValueError.
    page: tokens of a page, 16 to 128; small ones have less slack and are slower.
    """

    kind: StorageKind = "auto"
    page: int = 128

    def __post_init__(self) -> None:
        if self.page not in PAGE_TOKENS:
            raise ValueError(f"expected pages of {PAGE_TOKENS} tokens, found {self.page}")

    def empty(
        self,
        codecs: tuple[VectorCodec, VectorCodec],
        states: tuple[Tensor, Tensor],
        attend_packed: bool,
    ) -> tuple[PackedStorage, PackedStorage]:
        """For keys and values like these."""
        on_gpu = states[0].is_cuda and has_triton()
        wanted = attend_packed and on_gpu and states[0].dtype in _HALVES
        if self.kind == "pages" or (self.kind == "auto" and wanted):
            try:
                return self._pages(codecs, states)
            except ValueError:  # a codec, or a head size, that the kernels do not take
                if self.kind == "pages":
                    raise
        key, value = (RecordStorage.empty(*pair) for pair in zip(codecs, states, strict=True))
        return key, value

    def _pages(self, codecs: Any, states: tuple[Tensor, Tensor]) -> tuple[PageStorage, PageStorage]:
        # Imported here: Triton takes its time, and a CPU does without.
        from stillhouse.workers.cache.gpu_tables import GpuTables

        key, value = states
        if key.dtype not in _HALVES:
            raise ValueError(f"expected a model in float16 or bfloat16, found {key.dtype} keys")
        tables = GpuTables.of(codecs[0], codecs[1], self.page, key.device)
        halves = tables.store.pages
        return (
            PageStorage.empty(codecs[0], tables, halves.key, key),
            PageStorage.empty(codecs[1], tables, halves.value, value),
        )
