"""What the kernels of a GPU read of a layer's two codecs: made once, shared by all caches."""

from typing import Any
from weakref import WeakKeyDictionary, ref

import torch

from stillhouse.kernels.paged_attention.gpu import CodedBasis, GpuCodec, GpuDecoder
from stillhouse.kernels.paged_attention.gpu_store import GpuStore

_KEPT: "WeakKeyDictionary[Any, GpuTables]" = WeakKeyDictionary()


class GpuTables:
    """Of one pair of codecs and one size of pages; ValueError for codecs that no kernel takes.

    store: writes keys and values.
    """

    def __init__(self, key: GpuCodec, value: GpuCodec, page: int, device: torch.device) -> None:
        self.store = GpuStore(key, value, page, device=device)
        self._bases = CodedBasis.of(key, device), CodedBasis.of(value, device)
        self._decoders: dict[tuple[float, float], GpuDecoder] = {}
        self._value = ref(value)  # the keys' codec keeps this object, so it must not be held

    @classmethod
    def of(cls, key: GpuCodec, value: GpuCodec, page: int, device: torch.device) -> "GpuTables":
        """Kept as long as the keys' codec: a map's matrices take longer than a step."""
        found = _KEPT.get(key)
        if found is None or not found._fits(value, page, device):
            found = cls(key, value, page, device)
            _KEPT[key] = found
        return found

    def _fits(self, value: GpuCodec, page: int, device: torch.device) -> bool:
        same = self._value() is value and self.store.pages.tokens == page
        return same and self.store.device == device

    def decoder(self, scaling: float, softcap: float) -> GpuDecoder:
        """For attention with these scores."""
        key = scaling, softcap
        if key not in self._decoders:
            self._decoders[key] = GpuDecoder(
                *self._bases,
                self.store.pages.tokens,
                self.store.head_dim,
                scaling=scaling,
                softcap=softcap,
            )
        return self._decoders[key]

    @property
    def nbytes(self) -> int:
        """Bytes of all tables."""
        return self.store.nbytes + sum(basis.nbytes for basis in self._bases)
