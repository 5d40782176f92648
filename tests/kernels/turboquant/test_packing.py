"""Packing against bytes worked out by hand, then round trips."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.kernels.turboquant.packing import pack, packed_bytes, unpack

BITS = [1, 2, 3, 4, 5, 8]
EIGHT = torch.tensor([1, 2, 3, 0, 3, 2, 1, 0], dtype=torch.uint8)


def test_four_bits_are_nibble_halves():
    index = torch.tensor([1, 2, 3, 4, 10, 11, 12, 15], dtype=torch.uint8)
    assert pack(index, 4).tolist() == [0xA1, 0xB2, 0xC3, 0xF4]


def test_two_bits_are_quarters():
    # Byte 0 holds dims 0, 2, 4, 6 = 1, 3, 3, 1; byte 1 holds dims 1, 3, 5, 7 = 2, 0, 2, 0.
    assert pack(EIGHT, 2).tolist() == [0b01_11_11_01, 0b00_10_00_10]


def test_one_bit_is_one_dim_a_bit():
    index = torch.tensor([1, 0, 0, 1, 1, 0, 0, 0], dtype=torch.uint8)
    assert pack(index, 1).tolist() == [0b00011001]


def test_three_bits_are_the_two_bit_plane_then_the_one_bit_plane():
    high = torch.tensor([0, 0, 1, 1, 0, 0, 0, 1], dtype=torch.uint8)
    packed = pack(EIGHT + 4 * high, 3)
    assert packed.tolist() == [*pack(EIGHT, 2).tolist(), *pack(high, 1).tolist()]
    assert packed.tolist() == [0b01_11_11_01, 0b00_10_00_10, 0b10001100]


def test_five_bits_are_the_nibbles_then_the_one_bit_plane():
    index = torch.tensor([17, 2, 3, 4, 10, 11, 12, 31], dtype=torch.uint8)
    assert pack(index, 5).tolist() == [0xA1, 0xB2, 0xC3, 0xF4, 0b10000001]


@pytest.mark.parametrize(
    ("dim", "bits", "expected"),
    [(128, 4, 64), (128, 3, 48), (128, 2, 32), (64, 8, 64), (80, 3, 30)],
)
def test_bytes_of_a_vector(dim, bits, expected):
    assert packed_bytes(dim, bits) == expected
    assert pack(torch.zeros(2, dim, dtype=torch.uint8), bits).shape == (2, expected)


@given(st.data())
def test_round_trip(data):
    bits = data.draw(st.sampled_from(BITS))
    dim = 8 * data.draw(st.integers(1, 6))
    rows = data.draw(st.integers(0, 3))
    values = data.draw(
        st.lists(st.integers(0, 2**bits - 1), min_size=rows * dim, max_size=rows * dim)
    )
    index = torch.tensor(values, dtype=torch.uint8).view(rows, dim)
    before = index.clone()
    assert torch.equal(unpack(pack(index, bits), bits, dim), index)
    assert torch.equal(index, before)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"expected indices of dtype torch\.uint8"):
        pack(torch.zeros(8, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match="multiple of 8, found 12"):
        pack(torch.zeros(12, dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match="found 6"):
        packed_bytes(64, 6)
    with pytest.raises(ValueError, match="32 bytes for 64 indices of 4 bits"):
        unpack(torch.zeros(31, dtype=torch.uint8), 4, 64)
