"""Which codec each layer's keys and values go through, and what stays in 16 bits.

Shape suffixes: B sequences, H key/value heads, T tokens, D head size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from stillhouse.kernels.turboquant import MseCodec, ScalarKind, VectorCodec

CacheKind = Literal["key", "value"]
CACHE_KINDS: tuple[CacheKind, CacheKind] = ("key", "value")


class CacheScheme(Protocol):
    """Made once a model, shared by all its caches, so that tables are built and stored once."""

    @property
    def sinks(self) -> int:
        """How many first tokens of each sequence stay in 16 bits."""
        ...

    @property
    def recent(self) -> int:
        """How many last tokens of each sequence stay in 16 bits."""
        ...

    def codec(self, layer: int, kind: CacheKind, sample_BHTD: Tensor) -> VectorCodec:
        """The codec for vectors like these; the same object each time.

        ValueError when the scheme was made for another number of layers, heads or channels.
        """
        ...


@dataclass(frozen=True, slots=True)
class CacheFormat:
    """Bits (1…5 or 8) and stored scalar of keys and of values; windows in 16 bits.

    seed: of the rotation's signs. sinks, recent: first and last tokens of a sequence.
    """

    key_bits: int = 4
    value_bits: int = 4
    key_scalar: ScalarKind = "unbiased"
    value_scalar: ScalarKind = "least_squares"
    seed: int = 0
    sinks: int = 0
    recent: int = 0


MakeCodec = Callable[[int, CacheKind, torch.device], VectorCodec]


class SameCodecScheme:
    """The same codec for every layer; `make` is asked once a head size, kind and device."""

    def __init__(self, make: MakeCodec, sinks: int = 0, recent: int = 0) -> None:
        self.sinks, self.recent = sinks, recent
        self._make = make
        self._codecs: dict[tuple[int, CacheKind, torch.device], VectorCodec] = {}

    def codec(self, layer: int, kind: CacheKind, sample_BHTD: Tensor) -> VectorCodec:
        """One a head size, kind and device."""
        key = (sample_BHTD.shape[-1], kind, sample_BHTD.device)
        if key not in self._codecs:
            self._codecs[key] = self._make(*key)
        return self._codecs[key]


class ObliviousScheme(SameCodecScheme):
    """The same mse codec for every layer: needs nothing but the head size."""

    def __init__(self, format: CacheFormat | None = None) -> None:
        self.format = format or CacheFormat()
        super().__init__(self._mse, self.format.sinks, self.format.recent)

    def _mse(self, head_dim: int, kind: CacheKind, device: torch.device) -> MseCodec:
        bits = self.format.key_bits if kind == "key" else self.format.value_bits
        scalar = self.format.key_scalar if kind == "key" else self.format.value_scalar
        return MseCodec(head_dim, bits, scalar, self.format.seed, device=device)
