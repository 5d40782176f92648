"""Vectors kept in 16 bits: layers, sinks and windows that are not quantised.

Shape suffixes: D head size, ... any leading axes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from stillhouse.kernels.turboquant.codec import NotFiniteError
from stillhouse.kernels.turboquant.inputs import require_vectors


@dataclass(frozen=True, slots=True)
class HalfVectors:
    """float16 or bfloat16 [..., D]."""

    values: Tensor


def to_half(x_D: Tensor) -> Tensor:
    """float16 of float32 and float16, bfloat16 of bfloat16; NotFiniteError on the CPU.

    float16 keeps 3 more bits than bfloat16 of a number below 65,504; larger ones are refused.
    """
    half_D = x_D.detach().to(torch.bfloat16 if x_D.dtype == torch.bfloat16 else torch.float16)
    if half_D.device.type == "cpu" and not bool(torch.isfinite(half_D).all()):
        raise NotFiniteError(
            "expected finite keys and values below 65,504 in magnitude, found NaN, infinities or "
            "larger ones; run the model in bfloat16, or find the layer that overflows"
        )
    return half_D


class HalfCodec:
    """No compression: what a 16-bit cache would hold; `dtype` None takes it from `to_half`."""

    nbytes = 0

    def __init__(self, head_dim: int, dtype: torch.dtype | None = None) -> None:
        self.head_dim, self.dtype = head_dim, dtype

    @property
    def bytes_per_vector(self) -> int:
        """2 D."""
        return 2 * self.head_dim

    def encode(self, x_D: Tensor) -> HalfVectors:
        """[..., D] → 16 bits a coordinate, in storage of their own."""
        require_vectors(x_D, self.head_dim)
        half_D = to_half(x_D if self.dtype is None else x_D.detach().to(self.dtype))
        return HalfVectors(half_D.clone() if half_D.data_ptr() == x_D.data_ptr() else half_D)

    def decode(self, packed: HalfVectors, dtype: torch.dtype = torch.float32) -> Tensor:
        """The same numbers in another dtype."""
        return packed.values.to(dtype)
