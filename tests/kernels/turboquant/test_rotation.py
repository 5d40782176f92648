"""The rotation against hand values, the dense matrix and the order of its two factors."""

import math

import pytest
import torch

from stillhouse.kernels.turboquant.reference import (
    haar_rotation,
    hadamard_matrix,
    signed_hadamard,
)
from stillhouse.kernels.turboquant.rotation import (
    Rotation,
    hadamard_block,
    hadamard_transform,
    random_signs,
)

DIMS = [8, 16, 64, 80, 96, 128, 192, 256]


def test_transform_of_four_by_hand():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    expected = torch.tensor([10.0, -2.0, -4.0, 0.0], dtype=torch.float64) / 2
    torch.testing.assert_close(hadamard_transform(x, 4), expected)


def test_transform_works_block_by_block():
    x = torch.tensor([1.0, 2.0, 3.0, 5.0])
    expected = torch.tensor([3.0, -1.0, 8.0, -2.0]) / math.sqrt(2)
    torch.testing.assert_close(hadamard_transform(x, 2), expected)


@pytest.mark.parametrize(("dim", "block"), [(64, 64), (80, 16), (96, 32), (192, 64), (256, 256)])
def test_block_is_the_largest_power_of_two_divisor(dim, block):
    assert hadamard_block(dim) == block


@pytest.mark.parametrize("dim", DIMS)
def test_all_forms_equal_the_dense_float64_matrix(dim):
    rotation = Rotation.seeded(dim, seed=3)
    dense = signed_hadamard(random_signs(dim, 3), hadamard_block(dim))
    x = torch.randn(2, 5, dim, generator=torch.Generator().manual_seed(dim))
    expected = x.double() @ dense.T
    torch.testing.assert_close(rotation.matrix.double(), dense, atol=1e-7, rtol=0)
    torch.testing.assert_close(rotation.rotate(x).double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(rotation.rotate_fast(x.double()), expected, atol=1e-7, rtol=0)
    torch.testing.assert_close(rotation.rotate_back(expected.float()), x, atol=1e-5, rtol=0)
    torch.testing.assert_close(rotation.rotate_back_fast(expected).float(), x, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dim", DIMS)
def test_matrix_is_orthogonal(dim):
    matrix = Rotation.seeded(dim, seed=0).matrix.double()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(dim).double(), atol=1e-6, rtol=0)


def test_signs_come_before_the_hadamard():
    # Signs first: e_0 goes to ±(1, 1, …)/√D. Signs last would give the signs themselves.
    rotation = Rotation.seeded(64, seed=0)
    first = rotation.rotate(torch.eye(64)[0])
    assert torch.equal(first, first[0].expand(64))


def test_signs_are_pinned_and_differ_by_seed():
    # The cache of one machine is read on another: the stream of signs must never change.
    assert random_signs(8, 0).tolist() == [-1, -1, 1, 1, -1, 1, -1, 1]
    assert not torch.equal(random_signs(64, 0), random_signs(64, 1))


def test_tables_ignore_the_default_dtype():
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        rotation = Rotation.seeded(64, seed=0)
    finally:
        torch.set_default_dtype(before)
    assert rotation.matrix.dtype == rotation.signs.dtype == torch.float32
    assert torch.equal(rotation.matrix, Rotation.seeded(64, seed=0).matrix)


def test_reference_matrices_are_orthogonal():
    eye = torch.eye(16, dtype=torch.float64)
    for matrix in (haar_rotation(16, seed=1), hadamard_matrix(16)):
        torch.testing.assert_close(matrix @ matrix.T, eye)


@pytest.mark.parametrize("dim", [0, -8, 4, 12, 63])
def test_other_head_sizes_are_refused(dim):
    with pytest.raises(ValueError, match="positive multiple of 8"):
        hadamard_block(dim)


@pytest.mark.parametrize("block", [0, 3, 32])
def test_blocks_that_do_not_fit_are_refused(block):
    with pytest.raises(ValueError, match="power-of-two block"):
        hadamard_transform(torch.zeros(16), block)
