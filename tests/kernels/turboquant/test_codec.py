"""The mse codec: closed forms, the float64 reference, then what each scalar promises."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.kernels.turboquant import (
    COORDINATE_LAWS,
    SCALAR_KINDS,
    MseCodec,
    distortion,
    gaussian_codebook,
    sphere_codebook,
)
from stillhouse.kernels.turboquant.reference import (
    haar_rotation,
    lloyd_max_reference,
    reconstruct,
    signed_hadamard,
)

BITS = [1, 2, 3, 4, 5, 8]
HALF_STEP = 2.0**-11  # relative rounding of a float16 scalar


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_error(x, decoded):
    return float((decoded - x).double().square().sum() / x.double().square().sum())


def test_one_bit_of_a_rotated_corner_by_hand():
    # R e_0 = ±(1, …, 1)/√D: every coordinate is one sign, so c is a multiple of y, and every
    # scalar but `norm` gives the vector back; `norm` shrinks it by the centroid √(2/π).
    x = 3 * torch.eye(64)[:1]
    for scalar in ("corrected", "unbiased", "least_squares"):
        codec = MseCodec(64, 1, scalar)
        torch.testing.assert_close(codec.decode(codec.encode(x)), x, atol=1e-5, rtol=HALF_STEP)
    codec = MseCodec(64, 1, "norm")
    packed = codec.encode(x)
    assert packed.scalars.tolist() == [3.0]
    assert packed.indices.unique().numel() == 1
    shrunk = x * math.sqrt(2 / math.pi)
    torch.testing.assert_close(codec.decode(packed), shrunk, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scalar", SCALAR_KINDS)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dim", [64, 80])
def test_equals_the_float64_reference(dim, bits, scalar):
    codec = MseCodec(dim, bits, scalar, seed=5)
    x = gaussian(50, dim) * torch.linspace(0.01, 100, 50)[:, None]
    rotation = signed_hadamard(codec.rotation.signs, codec.rotation.block)
    expected = reconstruct(x, rotation, lloyd_max_reference(bits, steps=1500), scalar)
    error = (codec.decode(codec.encode(x)) - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(error.max()) < 2 * HALF_STEP


def on_the_sphere(dim, bits):
    """E[(u - c(u))²] and E[u c(u)] of the Gaussian codebook c, u = √D y, y on the unit sphere.

    The density of u is ∝ (1 - u²/D)^((D-3)/2) (arXiv:2504.19874, lemma 1), integrated numerically.
    """
    book = gaussian_codebook(bits)
    u = torch.linspace(-math.sqrt(dim), math.sqrt(dim), 400_001, dtype=torch.float64)
    density = (1 - u.square() / dim).clamp_min(0) ** ((dim - 3) / 2)
    density /= density.sum()
    centroids = torch.tensor(book.centroids, dtype=torch.float64)
    rounded = centroids[torch.bucketize(u, torch.tensor(book.boundaries, dtype=torch.float64))]
    error, inner = (u - rounded).square() @ density, (u * rounded) @ density
    return float(error), float(inner)


@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
def test_error_on_gaussian_data_is_the_distortion(dim, bits):
    codec = MseCodec(dim, bits, "norm")
    x = gaussian(2**20 // dim, dim)
    error = relative_error(x, codec.decode(codec.encode(x)))
    expected, _ = on_the_sphere(dim, bits)
    assert error == pytest.approx(expected, rel=0.015)  # rare tails make the mean noisy
    # A finite head size cuts the tails, so the error stays a little under the table's D(bits).
    assert (1 - 2.7 / dim) * distortion(bits) < expected < distortion(bits)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_codebook_of_the_sphere_has_the_error_it_says_and_less_than_the_gaussian(bits):
    x = gaussian(2**21 // 16, 16)
    error = {}
    for law in COORDINATE_LAWS:
        codec = MseCodec(16, bits, "norm", law=law)
        error[law] = relative_error(x, codec.decode(codec.encode(x)))
    assert error["sphere"] == pytest.approx(sphere_codebook(bits, 16).distortion, rel=0.005)
    assert error["sphere"] < error["gaussian"]


def test_unbiased_is_unbiased_over_haar_rotations_for_one_pair():
    query, key = gaussian(1, 16, seed=1), gaussian(1, 16, seed=2)
    key = key + query  # correlated, as the keys that attention picks
    centroids = lloyd_max_reference(2)
    products = [
        (query * reconstruct(key, haar_rotation(16, seed), centroids, "unbiased")).sum()
        for seed in range(1000)
    ]
    estimates = torch.stack(products)
    standard_error = float(estimates.std()) / math.sqrt(len(products))
    assert abs(float(estimates.mean() - (query * key).sum())) < 4 * standard_error


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_bias_of_inner_products(bits):
    keys = gaussian(1000, 64, seed=1)
    queries = keys + gaussian(1000, 64, seed=2)
    bias = {}
    for scalar in SCALAR_KINDS:
        codecs = [MseCodec(64, bits, scalar, seed) for seed in range(20)]
        products = [(queries * c.decode(c.encode(keys))).double().sum() for c in codecs]
        truth = (queries * keys).double().sum()
        bias[scalar] = float(torch.stack(products).mean() / truth - 1)
    assert abs(bias["unbiased"]) < 1e-3
    _, inner = on_the_sphere(64, bits)
    assert bias["norm"] == pytest.approx(inner - 1, abs=1e-3)  # about -D(bits)
    assert 0.4 < bias["corrected"] / bias["norm"] < 0.6


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_least_squares_has_the_least_error_of_every_vector(bits):
    x = gaussian(200, 64) + 0.5
    errors = {}
    for scalar in SCALAR_KINDS:
        codec = MseCodec(64, bits, scalar)
        errors[scalar] = (codec.decode(codec.encode(x)) - x).norm(dim=1)
    for scalar in SCALAR_KINDS:
        assert bool((errors["least_squares"] <= errors[scalar] * (1 + 1e-4)).all()), scalar


def test_keys_with_a_constant_offset_are_no_worse():
    # Without the signs, or with the signs last, the offset falls into one coordinate and is
    # clipped: the error is then 0.2 and more.
    codec = MseCodec(128, 4, "norm")
    keys = gaussian(2000, 128) + 10
    assert relative_error(keys, codec.decode(codec.encode(keys))) < 0.012


def test_one_huge_channel_is_spread():
    keys = gaussian(2000, 128)
    keys[:, 17] *= 100
    codec = MseCodec(128, 4, "least_squares")
    assert relative_error(keys, codec.decode(codec.encode(keys))) < 0.012


@pytest.mark.parametrize("bits", BITS)
def test_bytes_are_those_allocated(bits):
    codec = MseCodec(128, bits, "unbiased")
    packed = codec.encode(gaussian(2, 3, 5, 128))
    assert packed.indices.dtype == torch.uint8
    assert packed.scalars.dtype == torch.float16
    assert packed.scalars.shape == (2, 3, 5)
    assert codec.bytes_per_vector == 128 * bits // 8 + 2
    assert packed.nbytes == 2 * 3 * 5 * codec.bytes_per_vector
    matrix, signs, tables = 128 * 128 * 4, 128 * 4, (2 * 2**bits - 1) * 4
    assert codec.nbytes == matrix + signs + tables


@pytest.mark.parametrize("scalar", SCALAR_KINDS)
def test_zero_vectors_stay_zero(scalar):
    x = gaussian(3, 64)
    x[1] = 0
    codec = MseCodec(64, 4, scalar)
    packed = codec.encode(x)
    assert packed.scalars[1] == 0
    assert bool((codec.decode(packed)[1] == 0).all())
    assert codec.encode(x[:0]).indices.shape == (0, 32)


@pytest.mark.parametrize("scalar", SCALAR_KINDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e5, 3e38])
def test_what_float16_cannot_hold_is_refused(scalar, value):
    x = gaussian(3, 64)
    x[1, 7] = value
    with pytest.raises(ValueError, match=r"found 1 of 3 that are NaN, infinite or larger"):
        MseCodec(64, 4, scalar).encode(x)


def test_a_scalar_that_overflowed_on_a_device_decodes_to_nan():
    codec = MseCodec(64, 4, "unbiased")
    packed = codec.encode(gaussian(2, 64))
    packed.scalars[1] = math.inf
    decoded = codec.decode(packed)
    assert bool(decoded[0].isfinite().all())
    assert not bool(decoded[1].isfinite().all())


def test_norms_up_to_float16_work():
    codec = MseCodec(64, 4, "least_squares")
    x = gaussian(20, 64)
    x *= 60_000 / x.norm(dim=1, keepdim=True)
    assert relative_error(x, codec.decode(codec.encode(x))) < 0.012


@given(st.floats(0, 6e-8), st.sampled_from(SCALAR_KINDS))
def test_tiny_vectors_are_off_by_at_most_two_to_the_minus_24(size, scalar):
    codec = MseCodec(16, 4, scalar)
    x = gaussian(4, 16)
    x *= size / x.norm(dim=1, keepdim=True)
    error = (codec.decode(codec.encode(x)) - x).norm(dim=1)
    assert float(error.max()) <= 2**-24


@settings(max_examples=40)
@given(
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.sampled_from([8, 16, 80, 64]),
    st.sampled_from(BITS),
    st.sampled_from(SCALAR_KINDS),
    st.integers(0, 2**32),
)
def test_dtypes_shapes_and_a_second_round(dtype, dim, bits, scalar, seed):
    x = gaussian(2, 4, dim, seed=seed).to(dtype).transpose(0, 1)  # not contiguous
    before = x.clone()
    codec = MseCodec(dim, bits, scalar, seed)
    packed = codec.encode(x)
    decoded = codec.decode(packed, dtype)
    assert decoded.shape == x.shape
    assert decoded.dtype == dtype
    assert torch.equal(x, before)
    same = codec.encode(x.float())
    assert torch.equal(packed.indices, same.indices)
    assert torch.equal(packed.scalars, same.scalars)


def test_tables_ignore_the_default_dtype():
    x = gaussian(5, 64)
    expected = MseCodec(64, 4, "unbiased").encode(x)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        codec = MseCodec(64, 4, "unbiased")
        found = codec.encode(x)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.scalars, expected.scalars)


def test_wrong_arguments_are_refused():
    codec = MseCodec(64, 4, "unbiased")
    no_scalar: Any = "mean"
    with pytest.raises(ValueError, match=r"\[\.\.\., 64\]"):
        codec.encode(torch.zeros(2, 32))
    with pytest.raises(ValueError, match=r"found torch\.float64"):
        codec.encode(torch.zeros(2, 64, dtype=torch.float64))
    with pytest.raises(ValueError, match="expected a scalar in"):
        MseCodec(64, 4, no_scalar)
    with pytest.raises(ValueError, match="expected bits in"):
        MseCodec(64, 6, "norm")
    with pytest.raises(ValueError, match="multiple of 8"):
        MseCodec(60, 4, "norm")
