"""The codebooks against the published table, the paper's bounds and plain Lloyd iterations."""

import math

import pytest
import torch

from stillhouse.kernels.turboquant.codebook import (
    SUPPORTED_BITS,
    distortion,
    gaussian_codebook,
    sphere_codebook,
)
from stillhouse.kernels.turboquant.laws import sphere_law
from stillhouse.kernels.turboquant.reference import lloyd_max_reference

POSITIVE_HALF = {
    1: [0.7979],
    2: [0.4528, 1.5104],
    3: [0.2451, 0.7560, 1.3439, 2.1519],
    4: [0.1284, 0.3880, 0.6568, 0.9423, 1.2562, 1.6180, 2.0690, 2.7326],
}
DISTORTION = {1: 0.3634, 2: 0.1175, 3: 0.03455, 4: 0.00950, 5: 0.00250}


def test_one_bit_is_the_closed_form():
    # E[|x|] = √(2/π), and D = 1 - E[|x|]².
    book = gaussian_codebook(1)
    assert book.centroids[1] == pytest.approx(math.sqrt(2 / math.pi), abs=1e-14)
    assert book.distortion == pytest.approx(1 - 2 / math.pi, abs=1e-14)
    assert book.boundaries == (0.0,)


@pytest.mark.parametrize("bits", POSITIVE_HALF)
def test_centroids_equal_the_table(bits):
    half = gaussian_codebook(bits).centroids[2 ** (bits - 1) :]
    assert half == pytest.approx(POSITIVE_HALF[bits], abs=5.001e-5)


@pytest.mark.parametrize("bits", DISTORTION)
def test_distortion_equals_the_table(bits):
    assert distortion(bits) == pytest.approx(DISTORTION[bits], abs=5.1e-5 if bits < 3 else 5.1e-6)


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_distortion_lies_between_the_papers_bounds(bits):
    # arXiv:2504.19874, theorems 1 and 3.
    assert 4**-bits <= distortion(bits) <= math.sqrt(3) * math.pi / 2 * 4**-bits


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_boundaries_are_midpoints_of_an_antisymmetric_ladder(bits):
    book = gaussian_codebook(bits)
    centroids = torch.tensor(book.centroids, dtype=torch.float64)
    assert len(book.centroids) == 2**bits
    assert bool((centroids.diff() > 0).all())
    assert torch.equal(centroids, -centroids.flip(0))
    boundaries = torch.tensor(book.boundaries, dtype=torch.float64)
    torch.testing.assert_close(boundaries, (centroids[1:] + centroids[:-1]) / 2)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
def test_equals_plain_lloyd_iterations(bits):
    found = torch.tensor(gaussian_codebook(bits).centroids, dtype=torch.float64)
    torch.testing.assert_close(found, lloyd_max_reference(bits), atol=1e-9, rtol=0)


def test_eight_bits_is_a_fixed_point_by_quadrature():
    # A cell's centroid is its mean under the density, here by a fine midpoint rule.
    book = gaussian_codebook(8)
    for cell in (0, 40, 126, 200, 254):
        low, high = book.boundaries[cell - 1] if cell else -12.0, book.boundaries[cell]
        steps = 20_000
        x = low + (torch.arange(steps, dtype=torch.float64) + 0.5) * (high - low) / steps
        weight = torch.exp(-x.square() / 2)
        mean = float((x * weight).sum() / weight.sum())
        assert book.centroids[cell] == pytest.approx(mean, abs=1e-6)


@pytest.mark.parametrize("bits", [0, 6, 7, 9, -1])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match=r"expected bits in \(1, 2, 3, 4, 5, 8\)"):
        gaussian_codebook(bits)


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_in_three_dimensions_a_coordinate_is_uniform_and_so_are_the_levels(bits):
    # Archimedes: u_1 is uniform on [-1, 1]; times √3, cells of 2√3 / 2^b have the error 4^-b.
    book = sphere_codebook(bits, 3)
    width = 2 * math.sqrt(3) / 2**bits
    expected = [-math.sqrt(3) + width * (i + 0.5) for i in range(2**bits)]
    assert book.centroids == pytest.approx(expected, abs=1e-9)
    assert book.distortion == pytest.approx(4.0**-bits, rel=1e-7)


@pytest.mark.parametrize("dim", [4, 64, 80])
def test_the_law_of_a_sphere_by_quadrature(dim):
    law = sphere_law(dim)
    for low in (0.0, 0.3, 1.5):
        steps = 400_000
        x = low + (torch.arange(steps, dtype=torch.float64) + 0.5) * (law.end - low) / steps
        weight = (1 - x.square() / dim) ** ((dim - 3) / 2)
        weight *= law.density(0.0) * (law.end - low) / steps
        assert law.tail(low) == pytest.approx(float(weight.sum()), rel=1e-6)
        assert law.tail_sum(low) == pytest.approx(float((x * weight).sum()), rel=1e-6)
    assert law.tail(0.0) == pytest.approx(0.5, rel=1e-12)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
def test_the_sphere_of_many_dimensions_is_gaussian(bits):
    assert sphere_codebook(bits, 4096).distortion == pytest.approx(distortion(bits), rel=1e-3)
    assert sphere_codebook(bits, 64).distortion < distortion(bits)


def test_a_sphere_of_two_dimensions_is_refused():
    with pytest.raises(ValueError, match="expected at least 3 dimensions, found 2"):
        sphere_codebook(2, 2)
