"""Uniform levels between the least and the largest coordinate."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.kernels.turboquant import UniformCodec


def test_levels_by_hand() -> None:
    # 3 bits from -1 to 6: a scale of 1, and levels at every whole number.
    x = torch.tensor([[-1.0, -0.6, -0.5, 0.2, 1.5, 3.49, 5.6, 6.0]])
    codec = UniformCodec(8, 3)
    packed = codec.encode(x)
    assert packed.scale_zero.tolist() == [[1.0, -1.0]]
    assert codec.decode(packed).tolist() == [[-1.0, -1.0, 0.0, 0.0, 2.0, 3.0, 6.0, 6.0]]


@pytest.mark.parametrize(("bits", "stored"), [(3, 52), (4, 68)])
def test_bytes_are_vllms(bits: int, stored: int) -> None:
    codec = UniformCodec(128, bits)
    assert codec.bytes_per_vector == stored
    packed = codec.encode(torch.randn(5, 128))
    assert packed.indices.nbytes + packed.scale_zero.nbytes == 5 * stored


@given(st.integers(1, 5), st.floats(0.01, 1000), st.floats(-1000, 1000))
def test_no_coordinate_is_off_by_more_than_half_a_level(
    bits: int, width: float, offset: float
) -> None:
    x = torch.rand(4, 64, generator=torch.Generator().manual_seed(bits)) * width + offset
    codec = UniformCodec(64, bits)
    scale = (x.amax(-1) - x.amin(-1)) / (2**bits - 1)
    # Rounding scale and least value to float16 adds to it.
    slack = (x.amin(-1).abs() + 2**bits * scale) * 2**-10 + 1e-4
    error = (codec.decode(codec.encode(x)) - x).abs().amax(-1)
    assert bool((error <= scale / 2 + slack).all())


def test_equal_coordinates_come_back() -> None:
    x = torch.full((2, 8), 0.5)
    assert torch.equal(UniformCodec(8, 4).decode(UniformCodec(8, 4).encode(x)), x)
