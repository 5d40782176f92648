"""The compiled loops against the PyTorch reference: the same bytes, ties aside."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.kernels.turboquant import (
    SCALAR_KINDS,
    ChannelGroup,
    FittedCodec,
    MseCodec,
    NotFiniteError,
    balance,
    fit_heads,
)
from stillhouse.kernels.turboquant.cpu_kernels import half_bits

TIE = 1e-5  # how near to a boundary a coordinate may fall on either side
GROUPS = (
    (ChannelGroup(64, 3),),
    (ChannelGroup(16, 5), ChannelGroup(32, 3), ChannelGroup(16, 0)),
    (ChannelGroup(8, 4), ChannelGroup(48, 2), ChannelGroup(8, 1)),
)


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fitted(groups, scalar, *, folded=False, heads=3):
    spread = torch.logspace(0, -2, 64, dtype=torch.float64)
    matrix = torch.diag(spread).expand(heads, 64, 64)
    fit = fit_heads(gaussian(heads, 64, seed=9), balance(matrix, matrix), groups)
    return FittedCodec(fit.without_map() if folded else fit, scalar)


def assert_same(codec, x):
    found, expected = codec.encode(x), codec.encode_reference(x)
    rows = (found.indices != expected.indices).any(-1)
    assert float(rows.double().mean()) < 100 * TIE  # 64 coordinates, density below 0.4, two sides
    torch.testing.assert_close(found.scalars[~rows], expected.scalars[~rows], rtol=2**-10, atol=0)
    decoded = codec.decode(expected)
    torch.testing.assert_close(decoded, codec.decode_reference(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scalar", SCALAR_KINDS)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("dim", [8, 64, 80, 256])
def test_the_mse_codec(dim, bits, scalar):
    assert_same(MseCodec(dim, bits, scalar), gaussian(2, 3, 40, dim) + 0.3)


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("scalar", ["unbiased", "least_squares"])
@pytest.mark.parametrize("groups", GROUPS)
def test_the_fitted_codec(groups, scalar, folded):
    codec = fitted(groups, scalar, folded=folded)
    assert_same(codec, gaussian(2, 3, 40, 64))
    other = gaussian(1, 3, 7, 64)
    part = codec.encode(other[:, :, 2:5])
    assert torch.equal(part.indices, codec.encode(other).indices[:, :, 2:5])


@settings(max_examples=30)
@given(
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.lists(st.integers(0, 3), min_size=0, max_size=3),
    st.sampled_from([1, 3, 4]),
    st.integers(0, 2**32),
)
def test_any_shape_dtype_and_stride(dtype, axes, bits, seed):
    x = gaussian(*axes, 16, 2, seed=seed).to(dtype).mT
    codec = MseCodec(16, bits, "unbiased")
    found, expected = codec.encode(x), codec.encode_reference(x)
    assert found.indices.shape == expected.indices.shape
    assert found.scalars.dtype == torch.float16
    assert float((codec.decode(found) - codec.decode_reference(expected)).abs().sum()) < 0.1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e5, 65_520.0])
def test_what_float16_cannot_hold_is_counted(value):
    x = gaussian(1, 3, 4, 64)
    x[0, 1, 2] = 0
    x[0, 1, 2, 5] = value
    with pytest.raises(NotFiniteError, match="found 1 of 12 that are NaN"):
        MseCodec(64, 4, "norm").encode(x)


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-40, 1e-30, 1e-19, 1e-9])
def test_tiny_vectors_decode_to_zeros(size):
    for codec in (MseCodec(64, 4, "unbiased"), fitted(GROUPS[1], "unbiased")):
        mean = codec.fit.mean_HD[:, None] if isinstance(codec, FittedCodec) else 0
        x = torch.full((1, 3, 2, 64), size) + mean
        decoded = codec.decode(codec.encode(x))
        torch.testing.assert_close(decoded, x, atol=1e-7, rtol=1e-3)


def test_tables_are_views_and_what_is_not_is_counted():
    codec = fitted(GROUPS[0], "unbiased")
    before = codec.nbytes
    codec.encode(gaussian(1, 3, 2, 64))
    assert codec.nbytes == before + 4 * 8 + 8 * 8  # the one row of groups, and the sizes
    mse = MseCodec(64, 4, "norm")
    before = mse.nbytes
    mse.encode(gaussian(1, 64))
    assert mse.nbytes == before + 12 * 8 + 2 * 64 * 4  # a mean of zeros and weights of one beside


def test_heads_take_their_own_map():
    codec = fitted(GROUPS[1], "unbiased")
    x = gaussian(1, 1, 5, 64).expand(2, 3, 5, 64)
    found = codec.encode(x).indices
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0, 0], found[0, 1])  # their means differ


def test_scalars_round_as_torch_rounds():
    """Every float16, what lies halfway to its neighbours, and their neighbours in float32."""
    bits = torch.arange(0x7C01, dtype=torch.int32).to(torch.int16)
    halves = bits.view(torch.float16).double()
    between = ((halves[1:] + halves[:-1]) / 2).float()
    between[-1] = 65_520  # halfway to the infinity
    around = [torch.nextafter(between, between * factor) for factor in (0, 2)]
    values = torch.cat((halves.float(), between, *around, torch.tensor([math.nan, 1e30, 1e-30])))
    values = torch.cat((values, -values))
    room = np.empty(1, np.float32)
    found = torch.tensor([int(half_bits(np.float32(value), room)) for value in values.tolist()])
    number = ~values.isnan()
    expected = values.half().view(torch.int16).long() & 0xFFFF
    assert torch.equal(found[number], expected[number])
    lost = found[~number].to(torch.int32).to(torch.int16).view(torch.float16)
    assert bool(lost.isnan().all())
