"""The layout of a page: its size, what is written is read, nothing else is touched."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.kernels.paged_attention import (
    FP8,
    HalfPage,
    PageFormat,
    VectorFormat,
    read_vectors,
    write_vectors,
)
from stillhouse.kernels.turboquant import ChannelGroup
from tests.kernels.paged_attention.packed_pages import vectors

Packed = tuple[torch.Tensor, torch.Tensor | None]
MIXED = VectorFormat((ChannelGroup(16, 5), ChannelGroup(40, 3), ChannelGroup(8, 1)))


def test_half_pages_by_hand() -> None:
    half = HalfPage(VectorFormat.uniform(64, 3), 16)
    low, high = half.planes
    assert (low.first, low.row_bytes, low.width, low.shift) == (0, 16, 2, 0)
    assert (high.first, high.row_bytes, high.width, high.shift) == (256, 8, 1, 2)
    assert (half.scalars, half.nbytes) == (384, 416)
    (nibbles,) = HalfPage(VectorFormat.uniform(64, 4), 16).planes
    assert (nibbles.first, nibbles.row_bytes) == (0, 32)


@pytest.mark.parametrize(
    ("key", "value", "expected"), [(4, 4, 132), (3, 3, 100), (4, 2, 100), (2, 2, 68), (FP8, 4, 194)]
)
def test_bytes_a_token_are_those_of_the_codecs(key: int, value: int, expected: int) -> None:
    format = PageFormat.of(VectorFormat.uniform(128, key), VectorFormat.uniform(128, value), 64)
    assert format.nbytes == 64 * expected
    allocated = sum(half.empty(3, 2).nbytes for half in (format.key, format.value))
    assert allocated == 3 * 2 * 64 * expected


@given(
    st.sampled_from([16, 32, 64, 128]),
    st.sampled_from([VectorFormat.uniform(80, 3), MIXED, VectorFormat.uniform(64, FP8)]),
    st.data(),
)
def test_what_is_written_is_read_and_nothing_else_changes(
    tokens: int, format: VectorFormat, data: st.DataObject
) -> None:
    half = HalfPage(format, tokens)
    slots = data.draw(st.lists(st.integers(0, 3 * tokens - 1), max_size=20, unique=True))
    others = torch.tensor(sorted(set(range(3 * tokens)) - set(slots)))
    draw = torch.Generator().manual_seed(len(slots))
    pages = torch.randint(0, 256, (3, 2, half.nbytes), dtype=torch.uint8, generator=draw)
    before = read_vectors(pages, half, others)
    at = torch.tensor(slots, dtype=torch.int64)
    written = vectors(format, 2, len(slots), draw)
    write_vectors(pages, half, at, *written)
    assert_same(read_vectors(pages, half, others), before)
    assert_same(read_vectors(pages, half, at), written)


def assert_same(one: Packed, two: Packed) -> None:
    assert torch.equal(one[0], two[0])
    assert (one[1] is None) == (two[1] is None)
    if one[1] is not None and two[1] is not None:
        assert torch.equal(one[1].view(torch.int16), two[1].view(torch.int16))  # NaN included


def test_what_does_not_fit_is_refused() -> None:
    half, slots = HalfPage(VectorFormat.uniform(64, 4), 16), torch.tensor([0, 31])
    pages = half.empty(2, 3)
    packed, scalars = torch.zeros((3, 2, 32), dtype=torch.uint8), torch.zeros((3, 2)).half()
    with pytest.raises(ValueError, match=r"packed bytes \[3, 2, 32\].*found \[3, 2, 31\]"):
        write_vectors(pages, half, slots, packed[..., 1:], scalars)
    with pytest.raises(ValueError, match="and none"):
        write_vectors(pages, half, slots, packed, None)
    with pytest.raises(ValueError, match="slots from 0 to 31, found"):
        write_vectors(pages, half, slots + 1, packed, scalars)
    with pytest.raises(ValueError, match=r"pages of \(16, 32, 64, 128\) tokens, found 24"):
        HalfPage(half.format, 24)
    for groups in ((), (ChannelGroup(12, 3),), (ChannelGroup(8, 6),), (ChannelGroup(8, 8),) * 2):
        with pytest.raises(ValueError, match="expected groups of 8, 16"):
            VectorFormat(groups)


def test_one_token_that_was_read_can_be_written_again() -> None:
    half = HalfPage(VectorFormat.uniform(64, 4), 16)
    one, two = half.empty(1, 3), half.empty(1, 3)
    write_vectors(one, half, torch.tensor([5]), *vectors(half.format, 3, 1, torch.Generator()))
    write_vectors(two, half, torch.tensor([5]), *read_vectors(one, half, torch.tensor([5])))
    assert torch.equal(one, two)
