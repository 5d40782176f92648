"""Uniform levels between a vector's least and largest coordinate: vLLM's codec for values.

As in vLLM 0.32 (vllm/v1/attention/ops/triton_turboquant_store.py, `_store_quantized_value`):
scale = (max - min) / (2^bits - 1), at least 1e-8; index = ⌊(x - min) / scale + 1/2⌋; scale and min
are stored in float16, and decoding reads only these. Here to be compared with.

Shape suffixes: D head size, P packed bytes, ... any leading axes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from stillhouse.kernels.turboquant.codec import NotFiniteError
from stillhouse.kernels.turboquant.inputs import require_vectors
from stillhouse.kernels.turboquant.packing import pack, packed_bytes, unpack

_LEAST_SCALE = 1e-8


@dataclass(frozen=True, slots=True)
class UniformVectors:
    """Encoded vectors: `indices` uint8 [..., P]; `scale_zero` float16 [..., 2]."""

    indices: Tensor
    scale_zero: Tensor


class UniformCodec:
    """head_dim: D, a multiple of 8. bits: 1…5 or 8. ValueError for others."""

    nbytes = 0  # no tables

    def __init__(self, head_dim: int, bits: int) -> None:
        self._packed = packed_bytes(head_dim, bits)
        self.head_dim, self.bits = head_dim, bits

    @property
    def bytes_per_vector(self) -> int:
        """Bytes stored for one vector: packed indices, float16 scale and float16 least value."""
        return self._packed + 4

    def encode(self, x_D: Tensor) -> UniformVectors:
        """float32/float16/bfloat16 [..., D] → packed vectors; float32 arithmetic.

        ValueError for another dtype or last axis; NotFiniteError on the CPU for vectors that are
        not finite or whose range exceeds float16.
        """
        require_vectors(x_D, self.head_dim)
        x_D = x_D.detach().float()
        least, most = x_D.aminmax(dim=-1, keepdim=True)
        scale = ((most - least) / (2**self.bits - 1)).clamp_min(_LEAST_SCALE)
        level_D = ((x_D - least) / scale + 0.5).floor().clamp(0, 2**self.bits - 1)
        scale_zero = torch.cat((scale, least), dim=-1).half()
        if x_D.device.type == "cpu" and not bool(torch.isfinite(scale_zero).all()):
            raise NotFiniteError(
                "expected finite vectors with coordinates that float16 holds (65,504), found NaN, "
                "infinities or larger ones; keep this layer's cache in 16 bits"
            )
        return UniformVectors(pack(level_D.to(torch.uint8), self.bits), scale_zero)

    def decode(self, packed: UniformVectors, dtype: torch.dtype = torch.float32) -> Tensor:
        """Packed vectors → `dtype` [..., D]; float32 arithmetic, rounded once at the end."""
        level_D = unpack(packed.indices, self.bits, self.head_dim).float()
        scale, least = packed.scale_zero.float().unsqueeze(-2).unbind(dim=-1)
        return (level_D * scale + least).to(dtype)
