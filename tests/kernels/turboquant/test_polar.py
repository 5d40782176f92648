"""PolarQuant: the laws of its angles, its codebooks, its error, its bytes."""

import math

import numpy as np
import pytest
import torch

from stillhouse.kernels.turboquant import PolarCodec
from stillhouse.kernels.turboquant.laws import angle_law
from stillhouse.kernels.turboquant.polar import POLAR_BITS, angle_codebook


def angle_density(level: int, psi: np.ndarray) -> np.ndarray:
    """∝ sin^(2^(l-1) - 1)(2ψ) on [0, π/2], by a sum over a fine grid."""
    grid = (np.arange(200_000) + 0.5) / 200_000 * math.pi / 2
    power = 2 ** (level - 1) - 1
    return np.sin(2 * psi) ** power / (np.sin(2 * grid) ** power).mean() / (math.pi / 2)


@pytest.mark.parametrize("level", [2, 3, 4])
def test_the_law_of_a_level_is_the_papers(level: int) -> None:
    angles = angle_law(level)
    psi = np.linspace(0.05, math.pi / 2 - 0.05, 40)
    x = (psi - math.pi / 4) / angles.deviation
    found = [angles.law.density(abs(v)) / angles.deviation for v in x]
    np.testing.assert_allclose(found, angle_density(level, psi), rtol=1e-4)
    assert angles.law.tail(0.0) == pytest.approx(0.5)
    # Two radii that are norms of 2^(l-1) Gaussian coordinates.
    generator = np.random.default_rng(0)
    half = 2 ** (level - 1)
    first, second = np.linalg.norm(generator.normal(size=(2, 200_000, half)), axis=2)
    drawn = np.arctan2(second, first)
    assert drawn.mean() == pytest.approx(math.pi / 4, abs=2e-3)
    assert drawn.std() == pytest.approx(angles.deviation, rel=0.01)
    cell = (np.abs(drawn - math.pi / 4) / angles.deviation > 1).mean()
    assert 2 * angles.law.tail(1.0) == pytest.approx(cell, abs=4e-3)


def test_level_2_by_hand() -> None:
    # ∝ sin 2ψ: of φ = ψ - π/4 the variance is ∫ φ² cos 2φ = π²/16 - 1/2.
    assert angle_law(2).deviation == pytest.approx(math.sqrt(math.pi**2 / 16 - 0.5))
    with pytest.raises(ValueError, match="level of 2 or more, found 1"):
        angle_law(1)


def test_centroids_are_their_cells_means() -> None:
    grid = (np.arange(400_000) + 0.5) / 400_000 * math.pi / 2
    for level in (2, 3, 4):
        book = angle_codebook(level, 2)
        cell = np.searchsorted(book.boundaries, grid)
        weight = angle_density(level, grid)
        means = [np.average(grid[cell == i], weights=weight[cell == i]) for i in range(4)]
        np.testing.assert_allclose(book.centroids, means, rtol=1e-5)


def test_the_circle_is_cut_in_equal_arcs() -> None:
    book = angle_codebook(1, 4)
    np.testing.assert_allclose(np.diff(book.centroids), math.pi / 8)
    assert min(abs(c) for c in book.centroids) < 1e-12


@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_the_error_is_the_expected_one(dim: int) -> None:
    """2 (1 - Π E[cos(ψ_l - ψ̂_l)]) on Gaussian vectors, 0.0321."""
    kept = 1.0
    grid = (np.arange(400_000) + 0.5) / 400_000
    for level, bits in enumerate(POLAR_BITS, start=1):
        book = angle_codebook(level, bits)
        if level == 1:
            kept *= math.sin(math.pi / 2**bits) / (math.pi / 2**bits)
            continue
        psi = grid * math.pi / 2
        error = psi - np.array(book.centroids)[np.searchsorted(book.boundaries, psi)]
        kept *= np.average(np.cos(error), weights=angle_density(level, psi))
    assert 2 * (1 - kept) == pytest.approx(0.0321, abs=2e-4)
    x = torch.randn(4000, dim, generator=torch.Generator().manual_seed(0))
    codec = PolarCodec(dim)
    error = (codec.decode(codec.encode(x)) - x).square().sum() / x.square().sum()
    assert float(error) == pytest.approx(2 * (1 - kept), rel=0.02)


@pytest.mark.parametrize(("dim", "stored"), [(64, 31), (128, 62), (256, 124), (80, 20 + 9 + 10)])
def test_bytes(dim: int, stored: int) -> None:
    codec = PolarCodec(dim)
    packed = codec.encode(torch.randn(3, 5, dim))
    assert codec.bytes_per_vector == stored
    assert packed.nbytes == 15 * stored


def test_a_head_size_that_16_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 16, found 72"):
        PolarCodec(72)
