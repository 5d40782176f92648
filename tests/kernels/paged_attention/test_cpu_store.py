"""What is stored into pages in one pass is what encoding and writing in two makes."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.kernels.paged_attention import FP8, HalfPage, VectorFormat, write_vectors
from stillhouse.kernels.paged_attention.cpu_store import store_vectors
from stillhouse.kernels.turboquant import (
    ChannelGroup,
    Fp8Codec,
    MseCodec,
)
from stillhouse.kernels.turboquant.codec import NotFiniteError
from tests.kernels.paged_attention.fits import fitted_codec

HEADS, DIM = 3, 64


def codec_of(name: str) -> tuple[Any, VectorFormat]:
    if name == "fp8":
        return Fp8Codec(DIM), VectorFormat.uniform(DIM, FP8)
    if name.startswith("mse"):
        return MseCodec(DIM, int(name[3:]), "unbiased"), VectorFormat.uniform(DIM, int(name[3:]))
    groups = (ChannelGroup(16, 4), ChannelGroup(40, 3), ChannelGroup(8, 0))
    codec = fitted_codec(groups, HEADS, with_map=name == "fitted")
    return codec, VectorFormat(codec.coded_groups)


@settings(max_examples=40)
@given(
    st.sampled_from(["mse1", "mse2", "mse3", "mse4", "mse5", "fitted", "plain", "fp8"]),
    st.sampled_from([16, 32, 64, 128]),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.data(),
)
def test_bytes_are_those_of_encoding_and_writing(
    name: str, tokens: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    codec, format = codec_of(name)
    half = HalfPage(format, tokens)
    slots = data.draw(st.lists(st.integers(0, 3 * tokens - 1), max_size=40, unique=True))
    skipped = data.draw(st.sets(st.integers(0, max(len(slots) - 1, 0))))
    at = torch.tensor([-1 if i in skipped else slot for i, slot in enumerate(slots)]).long()
    draw = torch.Generator().manual_seed(len(slots))
    x = torch.randn((len(slots), HEADS, DIM), generator=draw).to(dtype)
    both = torch.randint(0, 256, (3, HEADS, 2, half.nbytes), dtype=torch.uint8, generator=draw)
    one, two = both[:, :, 0], both.clone()[:, :, 0]  # pages of keys and values, side by side
    before = both[:, :, 1].clone()
    kept = at >= 0
    record = codec.encode(x[kept].transpose(0, 1))
    parts = (record.codes, None) if name == "fp8" else (record.indices, record.scalars)
    write_vectors(two, half, at[kept], *parts)
    store_vectors(codec, x, one, half, at)
    assert torch.equal(one, two)
    assert torch.equal(both[:, :, 1], before)


def test_a_vector_that_is_no_number_leaves_its_slot_as_it_was() -> None:
    codec, format = codec_of("mse4")
    half = HalfPage(format, 16)
    pages = half.empty(1, HEADS)
    x = torch.randn(2, HEADS, DIM)
    x[0, 1, 5] = math.nan
    with pytest.raises(NotFiniteError, match="found 1 of 6"):
        store_vectors(codec, x, pages, half, torch.tensor([3, 4]))
    assert not pages[0, 1, half.scalars + 6 : half.scalars + 8].any()
    assert bool(pages[0, 1, half.scalars + 8 : half.scalars + 10].any())


@pytest.fixture(params=[2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_threads_share_a_prompt_and_what_is_lost_adds_up(threads: int) -> None:
    codec, format = codec_of("fitted")
    half, count = HalfPage(format, 64), 150
    one, two = half.empty(3, HEADS), half.empty(3, HEADS)
    x, slots = torch.randn(count, HEADS, DIM), torch.randperm(3 * 64)[:count]
    x[::30, 1, 5] = math.inf
    with pytest.raises(NotFiniteError, match="found 5 of 450"):
        store_vectors(codec, x, one, half, slots)
    torch.set_num_threads(1)
    with pytest.raises(NotFiniteError, match="found 5 of 450"):
        store_vectors(codec, x, two, half, slots)
    assert torch.equal(one, two)


def test_what_does_not_fit_is_refused() -> None:
    codec, format = codec_of("mse4")
    half = HalfPage(format, 16)
    pages, x, slots = half.empty(2, HEADS), torch.randn(2, HEADS, DIM), torch.tensor([0, 31])
    with pytest.raises(ValueError, match=r"a codec of .*64, 4.* found one of .*64, 3"):
        store_vectors(codec_of("mse3")[0], x, pages, half, slots)
    with pytest.raises(ValueError, match=r"half pages uint8 \[2, 2, 544\]"):
        store_vectors(codec, x[:, 1:], pages, half, slots)
    with pytest.raises(ValueError, match=r"integer slots \[2\]"):
        store_vectors(codec, x, pages, half, slots[:1])
    with pytest.raises(ValueError, match=r"slots from -1 to 31, found \[1, 32\]"):
        store_vectors(codec, x, pages, half, slots + 1)
    with pytest.raises(ValueError, match="slots from -1 to 31"):
        store_vectors(codec, x, pages, half, slots - 2)
    with pytest.raises(ValueError, match=r"expected float32, float16 or bfloat16"):
        store_vectors(codec, x.double(), pages, half, slots)
