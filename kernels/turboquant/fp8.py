"""Vectors cast to 8-bit floats (e4m3fn: 4 exponent bits, 3 mantissa bits), the plain baseline.

No rotation and no scale: what vLLM calls `fp8` with scales of 1. Normal numbers, from 2^-6 to 448,
are off by at most 2^-4 of themselves, smaller ones by at most 2^-10.

e4m3fn has no infinity and its largest number is 448. What rounds above it (anything past 464, the
midpoint to the absent 480) is not clamped, which would change numbers silently: it becomes NaN, and
on the CPU NotFiniteError, as `codec` has it.

Shape suffixes: D head size, ... any leading axes.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stillhouse.kernels.turboquant.codec import NotFiniteError
from stillhouse.kernels.turboquant.contract import nbytes_of
from stillhouse.kernels.turboquant.inputs import require_vectors

_FLOAT8 = torch.float8_e4m3fn
_LARGEST = 464.0  # halfway from 448 to 480; the tie goes to the even mantissa, that of 448
_NAN_CODE = 0x7F  # with either sign


@dataclass(frozen=True, slots=True)
class Fp8Vectors:
    """`codes`: uint8 [..., D], the bits of e4m3fn numbers (torch indexes bytes on every device)."""

    codes: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the storage behind the codes, also where they are a view of a part of it."""
        return nbytes_of(self)

    def require_finite(self) -> None:
        """NotFiniteError when a vector holds a NaN; makes the host wait for the device."""
        broken_D = (self.codes & _NAN_CODE) == _NAN_CODE
        broken = int(broken_D.any(dim=-1).sum())
        if broken:
            raise NotFiniteError(
                f"expected vectors whose coordinates round to 448 or less, found {broken} of "
                f"{broken_D.shape[:-1].numel()} that hold a NaN, an infinity or more; keep this "
                "layer's cache in 16 bits, or find the layer that overflows"
            )


class Fp8Codec:
    """Cast and cast back. head_dim: D, positive, else ValueError.

    device: taken for the common face; there are no tables to place.
    """

    def __init__(self, head_dim: int, *, device: torch.device | str = "cpu") -> None:
        if head_dim <= 0:
            raise ValueError(f"expected a positive head size, found {head_dim}")
        self.head_dim = head_dim

    @property
    def bytes_per_vector(self) -> int:
        """Bytes stored for one vector: one a coordinate."""
        return self.head_dim

    nbytes = 0  # no tables

    def encode(self, x_D: Tensor) -> Fp8Vectors:
        """float32/float16/bfloat16 [..., D] → codes, to the nearest, ties to even.

        ValueError for another dtype or last axis; NotFiniteError on the CPU for a NaN, an infinity
        or a magnitude above 464.
        """
        require_vectors(x_D, self.head_dim)
        packed = self.encode_reference(x_D)
        if x_D.device.type == "cpu":
            packed.require_finite()
        return packed

    def encode_reference(self, x_D: Tensor) -> Fp8Vectors:
        """As `encode`; refuses nothing: a NaN's code stands for what is too large."""
        wide_D = x_D.detach().float()
        # Written out because the cast of torch 2.13 makes 448 of all of these, infinity too.
        kept_D = wide_D.masked_fill(wide_D.abs() > _LARGEST, math.nan)
        return Fp8Vectors(kept_D.contiguous().to(_FLOAT8).view(torch.uint8))

    def decode(self, packed: Fp8Vectors, dtype: torch.dtype = torch.float32) -> Tensor:
        """Codes → `dtype` [..., D]; exact in float32, float16 and bfloat16."""
        return packed.codes.view(_FLOAT8).to(dtype)
