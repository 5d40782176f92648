"""vLLM 0.32's TurboQuant presets as cache schemes, to be measured in the same run as ours.

From vllm/model_executor/layers/quantization/turboquant/config.py (presets, sizes, boundary layers),
vllm/v1/attention/backends/turboquant_attn.py (a Hadamard matrix without signs, for all layers)
and vllm/v1/attention/ops/triton_turboquant_store.py (keys rounded to Lloyd–Max centroids, values
uniform). Its keys store ‖x‖ and scale the centroids to length 1 when they are read; here ‖x‖/‖c‖ is
stored, the same two bytes and the same vector. Its centroids come from a coarse integration, ours
from an exact one. It has no head sizes that are no power of two, and no tokens in 16 bits.

Shape suffixes: B sequences, H key/value heads, T tokens, D head size.
"""

from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from stillhouse.kernels.turboquant import (
    Fp8Codec,
    HalfCodec,
    MseCodec,
    Rotation,
    UniformCodec,
    VectorCodec,
)
from stillhouse.workers.cache.scheme import CacheKind

BOUNDARY_LAYERS = 2  # at each end, in 16 bits


@dataclass(frozen=True, slots=True)
class VllmPreset:
    """Bits of keys (8 are fp8) and of values."""

    key_bits: int
    value_bits: int


VLLM_PRESETS = MappingProxyType(
    {
        "k8v4": VllmPreset(8, 4),
        "4bit_nc": VllmPreset(4, 4),
        "k3v4_nc": VllmPreset(3, 4),
        "3bit_nc": VllmPreset(3, 3),
    }
)


class VllmScheme:
    """A preset for a model of `layers` layers; `boundary` 0 quantises all of them."""

    sinks = recent = 0

    def __init__(self, preset: str, layers: int, boundary: int = BOUNDARY_LAYERS) -> None:
        if preset not in VLLM_PRESETS:
            raise ValueError(f"expected a preset of {sorted(VLLM_PRESETS)}, found {preset!r}")
        self.preset = VLLM_PRESETS[preset]
        ends = min(boundary, layers // 2)
        self._exact = {*range(ends), *range(layers - ends, layers)}
        self._codecs: dict[tuple[int, CacheKind, bool, torch.device], VectorCodec] = {}

    def codec(self, layer: int, kind: CacheKind, sample_BHTD: Tensor) -> VectorCodec:
        """One a head size, kind and device; ValueError for head sizes that vLLM does not serve."""
        head_dim, device = sample_BHTD.shape[-1], sample_BHTD.device
        key = (head_dim, kind, layer in self._exact, device)
        if key not in self._codecs:
            self._codecs[key] = self._made(*key)
        return self._codecs[key]

    def _made(
        self, head_dim: int, kind: CacheKind, exact: bool, device: torch.device
    ) -> VectorCodec:
        if exact:
            return HalfCodec(head_dim)
        if kind == "value":
            return UniformCodec(head_dim, self.preset.value_bits)
        if self.preset.key_bits == 8:
            return Fp8Codec(head_dim)
        rotation = Rotation.without_signs(head_dim, device)
        if rotation.block != head_dim:
            raise ValueError(
                f"expected a head size that is a power of two, as vLLM's Hadamard, found {head_dim}"
            )
        bits = self.preset.key_bits
        return MseCodec(head_dim, bits, "corrected", device=device, rotation=rotation)
