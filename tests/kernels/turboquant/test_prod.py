"""The prod codec: its sketch's closed forms, a float64 reference, then no bias and its variance."""

import math
from typing import Any

import pytest
import torch

from stillhouse.kernels.turboquant import (
    PROD_BITS,
    SKETCH_KINDS,
    NotFiniteError,
    ProdCodec,
    Sketch,
    distortion,
    gaussian_codebook,
)
from stillhouse.kernels.turboquant.reference import (
    lloyd_max_reference,
    reconstruct,
    signed_hadamard,
)
from stillhouse.kernels.turboquant.sketch import mean_coordinate


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_mean_coordinate_of_a_sphere_by_hand():
    assert mean_coordinate(1) == pytest.approx(1)
    assert mean_coordinate(2) == pytest.approx(2 / math.pi)
    assert mean_coordinate(3) == pytest.approx(1 / 2)
    assert mean_coordinate(4096) == pytest.approx(math.sqrt(2 / (math.pi * 4096)), rel=1e-3)


def test_an_orthogonal_sketch_has_orthonormal_rows_and_a_gaussian_one_unit_variance():
    rows = Sketch.seeded(64, "orthogonal", 3).matrix
    torch.testing.assert_close(rows @ rows.T, torch.eye(64), atol=1e-5, rtol=0)
    entries = Sketch.seeded(64, "gaussian", 3).matrix
    assert float(entries.mean()) == pytest.approx(0, abs=4 / 64)
    assert float(entries.var()) == pytest.approx(1, abs=4 * math.sqrt(2) / 64)


def test_signs_and_direction_by_hand():
    sketch = Sketch(torch.tensor([[1.0, 0.0], [-3.0, 4.0]]), scale=0.5)
    signs = sketch.signs(torch.tensor([[2.0, 1.0], [-1.0, -1.0]]))
    assert signs.tolist() == [[1, 0], [0, 0]]
    assert sketch.direction(signs).tolist() == [[2.0, -2.0], [1.0, -2.0]]


@pytest.mark.parametrize("kind", SKETCH_KINDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_equals_the_float64_reference(bits, kind):
    codec = ProdCodec(64, bits, kind, seed=5)
    x = gaussian(50, 64) * torch.linspace(0.01, 100, 50)[:, None]
    rotation = codec.mse.rotation
    coarse = reconstruct(
        x, signed_hadamard(rotation.signs, rotation.block), lloyd_max_reference(bits - 1), "norm"
    )
    residual = x.double() - coarse
    sketch = codec.sketch.matrix.double()
    estimate = (residual @ sketch.T).sign() @ sketch * codec.sketch.scale
    expected = coarse + residual.norm(dim=1, keepdim=True) * estimate
    error = (codec.decode(codec.encode(x)) - expected).norm(dim=1) / x.norm(dim=1)
    # A float16 norm moves a residual a little, and with it now and then one sign of 64.
    assert float(error.median()) < 2.0**-10
    assert float(error.max()) < 0.25


@pytest.mark.parametrize("kind", SKETCH_KINDS)
@pytest.mark.parametrize("along", [True, False])
def test_inner_products_have_no_bias_and_the_variance_of_the_paper(kind, along):
    draws, dim = 2000, 16
    x = gaussian(1, dim, seed=1)
    q = x[0] if along else gaussian(dim, seed=2)
    found = []
    for seed in range(draws):
        sketch = Sketch.seeded(dim, kind, seed)
        found.append(float((x.norm() * sketch.direction(sketch.signs(x)))[0] @ q))
    samples = torch.tensor(found, dtype=torch.float64)
    expected = float(x[0] @ q)
    error = float(samples.std()) / math.sqrt(draws)
    assert float(samples.mean()) == pytest.approx(expected, abs=4 * error)
    variance = float(math.pi / 2 * q.square().sum() * x.square().sum() - expected**2) / dim
    if kind == "gaussian":
        assert float(samples.var()) == pytest.approx(variance, rel=0.15)
    else:
        assert float(samples.var()) < variance


@pytest.mark.parametrize("dim", [64, 80])
def test_the_mse_codec_shrinks_and_prod_does_not(dim):
    x = gaussian(4000, dim, seed=4)
    codec = ProdCodec(dim, 2)
    slope = (codec.decode(codec.encode(x)) * x).sum() / x.square().sum()
    coarse = (codec.mse.decode(codec.mse.encode(x)) * x).sum() / x.square().sum()
    assert float(coarse) < 0.66  # 1 - D(1) = 2/π
    # One sketch for all vectors: its own scatter is that of D² Gaussian entries.
    assert float(slope) == pytest.approx(1, abs=3 / dim)


def test_bytes_are_those_allocated():
    codec = ProdCodec(128, 3)
    packed = codec.encode(gaussian(7, 2, 128))
    assert packed.nbytes == 14 * codec.bytes_per_vector == 14 * (128 * 3 // 8 + 4)
    assert codec.nbytes == codec.mse.nbytes + 4 * 128 * 128


def test_zero_stays_zero_and_dtypes_round_once():
    codec = ProdCodec(64, 3)
    assert not codec.decode(codec.encode(torch.zeros(2, 64))).any()
    packed = codec.encode(gaussian(3, 64).bfloat16())
    assert torch.equal(codec.decode(packed, torch.bfloat16), codec.decode(packed).bfloat16())


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"expected bits in \(2, 3, 4, 5\), found 1"):
        ProdCodec(64, 1)
    other: Any = "haar"
    with pytest.raises(ValueError, match=r"expected a sketch in .*'haar'"):
        ProdCodec(64, 2, other)
    with pytest.raises(NotFiniteError):
        ProdCodec(64, 2).encode(torch.full((1, 64), math.nan))


def sketches(dim, kind, draws):
    """The law of `Sketch.seeded`, drawn fast."""
    generator = torch.Generator().manual_seed(7)
    scale = Sketch.seeded(dim, kind, 0).scale
    for _ in range(draws):
        matrix = torch.randn(dim, dim, generator=generator)
        if kind == "orthogonal":
            factors = torch.linalg.qr(matrix)
            matrix = factors.Q * factors.R.diagonal().sign()
        yield Sketch(matrix, scale)


def sphere_error(dim, bits):
    """Exact relative error of the Gaussian codebook on the sphere, `mse` at `bits`."""
    book = gaussian_codebook(bits)
    u = torch.linspace(-math.sqrt(dim), math.sqrt(dim), 200_001, dtype=torch.float64)
    density = (1 - u.square() / dim).clamp_min(0) ** ((dim - 3) / 2)
    centroids = torch.tensor(book.centroids, dtype=torch.float64)
    rounded = centroids[torch.bucketize(u, torch.tensor(book.boundaries, dtype=torch.float64))]
    return float((u - rounded).square() @ density / density.sum())


@pytest.mark.parametrize("kind", SKETCH_KINDS)
@pytest.mark.parametrize(("dim", "draws"), [(64, 350), (128, 250)])
def test_bias_and_variance_over_sketches_are_the_papers(dim, draws, kind):
    """arXiv:2504.19874, theorem 2: no bias, and a variance of (π/2)·D(b-1)‖q‖²‖x‖²/d.

    Queries key ± across, as long as the key: the two signs' mean is the product along the key.
    """
    keys, across = gaussian(700, dim, seed=5), gaussian(700, dim, seed=6)
    across -= keys * ((across * keys).sum(-1) / keys.square().sum(-1))[:, None]
    across *= (keys.norm(dim=-1) / across.norm(dim=-1))[:, None]
    square = keys.double().square().sum(-1)
    codecs = {bits: ProdCodec(dim, bits, kind) for bits in PROD_BITS}
    found: dict[int, list[torch.Tensor]] = {bits: [] for bits in PROD_BITS}
    for sketch in sketches(dim, kind, draws):
        for bits, codec in codecs.items():
            codec.sketch = sketch
            error = codec.decode(codec.encode(keys)) - keys
            products = [(error * query).double().sum(-1) / square for query in (keys, across)]
            found[bits].append(torch.stack(products))
    for bits in PROD_BITS:
        errors = torch.stack(found[bits])  # draw, along or across, key
        bias = errors.mean((0, 2))
        standard_error = errors.mean(2).std(0) / math.sqrt(draws)
        assert float(standard_error.max()) < 3.5e-4  # at 2 bits; 0.5e-4 at 5
        assert float(bias.abs().max()) < 1e-3
        variance = float(errors[:, 1].square().mean())
        # -1/d: a product with the residual itself scatters less (the theorem is an upper bound).
        exact = (math.pi / 2 - 1 / dim) * sphere_error(dim, bits - 1) / dim
        papers = math.pi / 2 * distortion(bits - 1) / dim
        if kind == "gaussian":
            assert variance == pytest.approx(exact, rel=0.03)
            assert 0.94 * papers < variance < 1.01 * papers
        else:
            assert 0.33 < variance / exact < 0.39
