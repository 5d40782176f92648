"""Fractional bits by a split of the channels (TurboQuant, arXiv:2504.19874, §4.3).

Two independent mse codecs on two fixed sets of channels, each with its own rotation and its own
float16 scalar. `bits` is the nominal average of the indices alone: the paper's 32 channels at 3
bits and 96 at 2 are 2.25, and 2.5 only with the two scalars of a vector; `bytes_per_vector` is all
in.

Which channels get more bits is the caller's choice (outliers found on a calibration set). Without
one the choice is blind and the high set is spread evenly: of D/2 it is every other channel. Then a
channel c < D/2 and its RoPE partner c + D/2 lie in one set and both sets see all frequencies
alike; the first half of the channels would instead split every pair.

Shape suffixes: D head size, ... any leading axes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from stillhouse.kernels.turboquant.codec import (
    CoordinateLaw,
    MseCodec,
    PackedVectors,
    ScalarKind,
)
from stillhouse.kernels.turboquant.inputs import require_vectors


@dataclass(frozen=True, slots=True)
class SplitVectors:
    """Encoded vectors: `high` of the channels with more bits, `low` of the others."""

    high: PackedVectors
    low: PackedVectors

    @property
    def nbytes(self) -> int:
        """Bytes of the storage behind all four tensors."""
        return self.high.nbytes + self.low.nbytes

    def require_finite(self) -> None:
        """NotFiniteError when a vector could not be stored; makes the host wait for the device."""
        self.high.require_finite()
        self.low.require_finite()


class SplitCodec:
    """One instance a head size; its tables lie on one device.

    head_dim: D. high_bits, low_bits: of the two sets, the first the larger. scalar, seed, law: as
    `MseCodec`, for both. high_channels: how many channels get high_bits, spread evenly (D/2 when
    not given). high_channels_index: which ones instead, integers [n] in any order. Both sets have
    sizes that are positive multiples of 8. ValueError for others.
    """

    def __init__(
        self,
        head_dim: int,
        high_bits: int,
        low_bits: int,
        scalar: ScalarKind,
        seed: int = 0,
        *,
        high_channels: int | None = None,
        high_channels_index: Tensor | None = None,
        law: CoordinateLaw = "gaussian",
        device: torch.device | str = "cpu",
    ) -> None:
        if high_bits <= low_bits:
            raise ValueError(f"expected high_bits above low_bits, found {high_bits} and {low_bits}")
        high = _high_set(head_dim, high_channels, high_channels_index)
        low = sorted(set(range(head_dim)) - set(high))
        _require_sizes(head_dim, len(high))
        self.head_dim, self.high_bits, self.low_bits = head_dim, high_bits, low_bits
        self.scalar, self.seed = scalar, seed
        # No two codecs of whatever seeds share a rotation.
        self.high = MseCodec(len(high), high_bits, scalar, 2 * seed, law=law, device=device)
        self.low = MseCodec(len(low), low_bits, scalar, 2 * seed + 1, law=law, device=device)
        self.high_index = torch.tensor(high, dtype=torch.int64, device=device)
        self.low_index = torch.tensor(low, dtype=torch.int64, device=device)
        # Where channel c lies in (high set, low set), one after the other.
        self._place = torch.cat((self.high_index, self.low_index)).argsort()

    @property
    def bits(self) -> float:
        """The nominal average of bits a coordinate, without the scalars."""
        high, low = self.high.head_dim, self.low.head_dim
        return (self.high_bits * high + self.low_bits * low) / self.head_dim

    @property
    def bytes_per_vector(self) -> int:
        """Bytes stored for one vector: both sets' indices and both float16 scalars."""
        return self.high.bytes_per_vector + self.low.bytes_per_vector

    @property
    def nbytes(self) -> int:
        """Bytes of the codec's tables: those of both codecs and of the channels' order."""
        order = (self.high_index, self.low_index, self._place)
        tables = sum(table.untyped_storage().nbytes() for table in order)
        return self.high.nbytes + self.low.nbytes + tables

    def encode(self, x_D: Tensor) -> SplitVectors:
        """float32/float16/bfloat16 [..., D] → packed vectors; raises as `MseCodec.encode`."""
        require_vectors(x_D, self.head_dim)
        return SplitVectors(
            self.high.encode(x_D.index_select(-1, self.high_index)),
            self.low.encode(x_D.index_select(-1, self.low_index)),
        )

    def decode(self, packed: SplitVectors, dtype: torch.dtype = torch.float32) -> Tensor:
        """Packed vectors → `dtype` [..., D]; float32 arithmetic, rounded once at the end."""
        sets = (self.high.decode(packed.high, dtype), self.low.decode(packed.low, dtype))
        return torch.cat(sets, dim=-1).index_select(-1, self._place)


def spread_channels(head_dim: int, count: int) -> list[int]:
    """`count` ascending channels of `head_dim`, as evenly spaced as whole numbers allow.

    For even numbers of both, c < head_dim/2 is among them just when c + head_dim/2 is.
    """
    return [i * head_dim // count for i in range(count)]


def _high_set(head_dim: int, count: int | None, index: Tensor | None) -> list[int]:
    """Ascending channels of the high set; sizes are checked elsewhere."""
    if index is None:
        return spread_channels(head_dim, head_dim // 2 if count is None else count)
    if count is not None:
        raise ValueError("expected high_channels or high_channels_index, found both; give one")
    if index.ndim != 1 or index.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            "expected high_channels_index to be int64 or int32 with one axis, "
            f"found {index.dtype} {list(index.shape)}"
        )
    high = sorted(index.tolist())
    if len(set(high)) < len(high) or not set(high) <= set(range(head_dim)):
        raise ValueError(f"expected distinct channels from 0 to {head_dim - 1}, found {high}")
    return high


def _require_sizes(head_dim: int, high: int) -> None:
    low = head_dim - high
    if high <= 0 or low <= 0 or high % 8 or low % 8:
        raise ValueError(
            "expected two sets of channels whose sizes are positive multiples of 8, "
            f"found {high} and {low} of {head_dim}"
        )
