"""The Triton kernels against `MseCodec` and float64, under Triton's interpreter or on a GPU.

`pytest -m gpu` compiles them; any other run interprets them on CPU tensors (tests/conftest.py).
"""

import math
import subprocess
import sys
from typing import Any, cast

import pytest
import torch

from stillhouse.kernels.turboquant import (
    SCALAR_KINDS,
    MseCodec,
    PackedVectors,
    Rotation,
    gaussian_codebook,
    unpack,
)
from stillhouse.kernels.turboquant.reference import (
    lloyd_max_reference,
    reconstruct,
    signed_hadamard,
)
from stillhouse.kernels.turboquant.triton_codec import TritonTables, decode, encode

BITS = [1, 2, 3, 4, 5]
HEAD_DIMS = [64, 80, 96, 128, 192, 256]
EDGE = 1e-5  # where float32 sums in another order may round to either side of a boundary
HALF_ULP = 2.0**-10  # a float16 next to another


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tables_of(codec: MseCodec, device="cpu") -> TritonTables:
    book = gaussian_codebook(codec.bits)
    return TritonTables.build(
        codec.rotation.matrix.to(device),
        torch.tensor(book.boundaries, device=device),
        torch.tensor(book.centroids, device=device),
        codec.bits,
    )


def unit_coordinates(z, matrix_GDD):
    """float64 √D y_j / ‖y‖, and ‖y‖, of z [B, H, T, D] under [G, D, D]."""
    y = torch.einsum("gde,bgte->bgtd", matrix_GDD.double().expand(z.shape[1], -1, -1), z.double())
    norm = y.norm(dim=-1, keepdim=True)
    return y / norm * math.sqrt(z.shape[-1]), norm[..., 0]


def assert_same_indices(found, expected, unit, bits):
    """Bit for bit, but next to a boundary; such coordinates are fewer than one in a thousand."""
    boundaries = torch.tensor(gaussian_codebook(bits).boundaries, dtype=torch.float64)
    near = (unit[..., None] - boundaries).abs().amin(dim=-1) < EDGE
    assert float(near.double().mean()) < 1e-3
    dim = unit.shape[-1]
    differs = unpack(found.cpu(), bits, dim) != unpack(expected, bits, dim)
    assert not bool((differs & ~near).any())


def assert_same_scalars(found, expected):
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.cpu().float(), expected.float(), rtol=HALF_ULP, atol=2.0**-24)


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("bits", BITS)
def test_encodes_and_decodes_as_the_torch_codec(bits, dim, device):
    codec = MseCodec(dim, bits, "unbiased", seed=bits)
    tables = tables_of(codec, device)
    x = gaussian(1, 2, 67, dim, seed=dim)  # 67: one full block and a part
    expected = codec.encode(x)
    indices, scalars = encode(x.to(device), tables, "unbiased")
    assert indices.shape == expected.indices.shape
    unit, _ = unit_coordinates(x, codec.rotation.matrix)
    assert_same_indices(indices, expected.indices, unit, bits)
    assert_same_scalars(scalars, expected.scalars)
    # The same bytes, whichever encoder made them, decode alike.
    decoded = decode(expected.indices.to(device), expected.scalars.to(device), tables)
    torch.testing.assert_close(decoded.cpu(), codec.decode(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scalar", SCALAR_KINDS)
@pytest.mark.parametrize("bits", [1, 3, 4])
def test_every_scalar_equals_torch_and_the_float64_reference(bits, scalar, device):
    codec = MseCodec(80, bits, scalar, seed=5)
    x = gaussian(40, 80) * torch.linspace(0.01, 100, 40)[:, None]
    tables = tables_of(codec, device)
    indices, scalars = encode(x.to(device), tables, scalar)
    assert_same_scalars(scalars, codec.encode(x).scalars)
    rotation = signed_hadamard(codec.rotation.signs, codec.rotation.block)
    expected = reconstruct(x, rotation, lloyd_max_reference(bits, steps=1500), scalar)
    error = (decode(indices, scalars, tables).cpu() - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(error.max()) < HALF_ULP


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_and_strides(dtype, device):
    codec = MseCodec(64, 3, "least_squares")
    tables = tables_of(codec, device)
    # [B, T, H, D] of a longer buffer, as a projection leaves it; every stride is its own.
    x = gaussian(2, 40, 6, 64).to(dtype).to(device)[:, 3:36, ::2].transpose(1, 2)
    before = x.clone()
    indices, scalars = encode(x, tables, "least_squares")
    plain = encode(x.float().contiguous(), tables, "least_squares")
    assert torch.equal(indices, plain[0])
    assert torch.equal(scalars, plain[1])
    assert torch.equal(x, before)
    expected = codec.encode(x.cpu())
    assert_same_scalars(scalars, expected.scalars)
    # A part of a longer cache, and an output that is rounded once.
    longer = indices.new_full((2, 3, 50, indices.shape[-1]), 255)
    longer[:, :, 9:42] = indices
    wide = scalars.new_full((2, 3, 50), math.nan)
    wide[:, :, 9:42] = scalars
    decoded = decode(longer[:, :, 9:42], wide[:, :, 9:42], tables, dtype)
    assert decoded.dtype == dtype
    rounded = decode(indices, scalars, tables).to(dtype)
    if device == "cpu" and dtype == torch.bfloat16:  # the interpreter truncates to bfloat16
        torch.testing.assert_close(decoded, rounded, rtol=2**-7, atol=0)
    else:
        assert torch.equal(decoded, rounded)


def test_a_last_axis_with_a_stride_and_other_numbers_of_axes(device):
    codec = MseCodec(16, 4, "norm")
    tables = tables_of(codec, device)
    x = gaussian(2, 2, 3, 5, 16).to(device)
    indices, scalars = encode(x, tables, "norm")
    assert indices.shape == (2, 2, 3, 5, 8)
    assert scalars.shape == (2, 2, 3, 5)
    swapped = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert torch.equal(encode(swapped, tables, "norm")[0], indices)
    one = encode(x[1, 0, 2], tables, "norm")
    assert torch.equal(one[0], indices[1, 0, 2])
    assert torch.equal(decode(*one, tables), decode(indices, scalars, tables)[1, 0, 2])


@pytest.mark.parametrize("dim", [8, 24, 40])
def test_small_head_sizes(dim, device):
    codec = MseCodec(dim, 5, "corrected")
    tables = tables_of(codec, device)
    x = gaussian(300, dim, seed=1)
    packed = codec.encode(x)
    indices, scalars = encode(x.to(device), tables, "corrected")
    unit, _ = unit_coordinates(x[None, None], codec.rotation.matrix)
    assert_same_indices(indices, packed.indices, unit[0, 0], 5)
    decoded = decode(indices, scalars, tables).cpu()
    torch.testing.assert_close(decoded, codec.decode(packed), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shared", [True, False])
def test_a_map_and_a_mean_for_each_head(shared, device):
    heads, dim, bits = 3, 80, 4
    rotation = Rotation.seeded(dim, 7).matrix
    groups = 1 if shared else heads
    # R·A with A invertible and not orthogonal.
    matrix = rotation @ (torch.eye(dim) + 0.05 * gaussian(groups, dim, dim, seed=3))
    mean = gaussian(groups, dim, seed=4)
    book = gaussian_codebook(bits)
    tables = TritonTables.build(
        matrix.to(device),
        torch.tensor(book.boundaries, device=device),
        torch.tensor(book.centroids, device=device),
        bits,
        back_GDD=torch.linalg.inv(matrix).mT.to(device),
        mean_GD=mean.to(device),
    )
    x = gaussian(2, heads, 9, dim) + 3
    indices, scalars = encode(x.to(device), tables, "norm")
    unit, norm = unit_coordinates(x - mean[:, None], matrix)
    assert_same_scalars(scalars, norm.half())
    boundaries = torch.tensor(book.boundaries, dtype=torch.float64)
    index = torch.bucketize(unit.contiguous(), boundaries)
    near = (unit[..., None] - boundaries).abs().amin(dim=-1) < EDGE
    assert not bool(((unpack(indices.cpu(), bits, dim) != index) & ~near).any())
    centroid = torch.tensor(book.centroids, dtype=torch.float64)[index]
    y = centroid * scalars.cpu().double()[..., None] / math.sqrt(dim)
    back = torch.linalg.inv(matrix.double()).mT
    expected = y @ back + mean[:, None].double()
    decoded = decode(indices, scalars, tables)
    torch.testing.assert_close(decoded.cpu().double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scalar", SCALAR_KINDS)
def test_zero_and_tiny_vectors_store_zero_and_one_huge_channel_is_spread(scalar, device):
    codec = MseCodec(64, 4, scalar)
    tables = tables_of(codec, device)
    x = gaussian(6, 64)
    x[1] = 0
    x[2] *= 1e-40  # denormal
    x[3] *= 1e-22  # its squares are zero or denormal
    x[4, 17] = 3e4
    indices, scalars = encode(x.to(device), tables, scalar)
    assert scalars[1:4].tolist() == [0, 0, 0]
    decoded = decode(indices, scalars, tables).cpu()
    assert not decoded[1:4].any()
    assert_same_scalars(scalars, codec.encode(x).scalars)
    expected = codec.decode(codec.encode(x))
    torch.testing.assert_close(decoded[4], expected[4], rtol=2e-3, atol=30)


@pytest.mark.parametrize("scalar", SCALAR_KINDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e5, 3e38])
def test_what_cannot_be_stored_decodes_to_nan_and_spoils_no_neighbour(scalar, value, device):
    codec = MseCodec(80, 2, scalar)
    tables = tables_of(codec, device)
    x = gaussian(5, 80)
    clean = encode(x.to(device), tables, scalar)
    x[3, 7] = value
    indices, scalars = encode(x.to(device), tables, scalar)
    assert scalars.isfinite().tolist() == [True, True, True, False, True]
    decoded = decode(indices, scalars, tables)
    assert bool(decoded[3].isnan().all())
    others = torch.tensor([0, 1, 2, 4], device=device)
    assert torch.equal(decoded[others], decode(*clean, tables)[others])


def test_on_a_boundary_the_lower_index_wins(device):
    # The zero vector has every coordinate on the boundary 0, which is not strictly below 0.
    codec = MseCodec(64, 4, "norm")
    x = torch.zeros(2, 64)
    indices, _ = encode(x.to(device), tables_of(codec, device), "norm")
    assert torch.equal(indices.cpu(), codec.encode(x).indices)
    assert unpack(indices.cpu(), 4, 64).unique().tolist() == [7]


def test_no_tokens_and_no_sequences(device):
    tables = tables_of(MseCodec(64, 3, "norm"), device)
    for shape in [(1, 2, 0, 64), (0, 2, 5, 64), (0, 64)]:
        indices, scalars = encode(torch.zeros(shape, device=device), tables, "norm")
        assert indices.shape == (*shape[:-1], 24)
        assert decode(indices, scalars, tables).shape == shape


def test_bytes_of_the_tables_are_those_allocated():
    tables = tables_of(MseCodec(80, 3, "norm"))
    assert tables.nbytes == 4 * (2 * 80 * 128 + 8 + 7)


def test_wrong_arguments_are_refused():
    codec = MseCodec(64, 4, "norm")
    tables = tables_of(codec)
    x = gaussian(3, 64)
    indices, scalars = encode(x, tables, "norm")
    with pytest.raises(ValueError, match=r"\[\.\.\., 64\]"):
        encode(torch.zeros(2, 32), tables, "norm")
    with pytest.raises(ValueError, match=r"found torch\.float64"):
        encode(x.double(), tables, "norm")
    with pytest.raises(ValueError, match="expected a scalar in"):
        encode(x, tables, cast(Any, "mean"))
    with pytest.raises(ValueError, match=r"expected uint8 \[3, 32\]"):
        decode(indices[:, :31], scalars, tables)
    with pytest.raises(ValueError, match="expected float16 scalars"):
        decode(indices, scalars.float(), tables)
    with pytest.raises(ValueError, match="expected tensors on cpu, found one on meta"):
        encode(x.to("meta"), tables, "norm")
    matrix, edges, levels = codec.rotation.matrix, tables.boundaries, tables.centroids
    with pytest.raises(ValueError, match="found 8 bits and 64"):
        TritonTables.build(matrix, edges, levels, 8)
    with pytest.raises(ValueError, match=r"expected boundaries \[15\]"):
        TritonTables.build(matrix, edges[:7], levels, 4)
    with pytest.raises(ValueError, match=r"expected mean \[1, 64\]"):
        TritonTables.build(matrix, edges, levels, 4, mean_GD=torch.zeros(2, 64))
    grouped = TritonTables.build(matrix.expand(2, -1, -1), edges, levels, 4)
    with pytest.raises(ValueError, match="expected 2 KV heads, one for each map, found 1"):
        encode(x, grouped, "norm")


def test_the_package_does_not_import_triton():
    code = "import sys, stillhouse.kernels.turboquant; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("bits", BITS)
def test_the_codec_takes_the_kernels_where_they_run(bits, device, monkeypatch):
    codec = MseCodec(64, bits, "unbiased", device=device)
    x = gaussian(2, 3, 7, 64).to(device)
    torch_codec = MseCodec(64, bits, "unbiased")
    expected = torch_codec.encode(x.cpu())
    if device == "cpu":  # as if they were on CUDA: the interpreter runs the same kernels
        monkeypatch.setattr(MseCodec, "_on_triton", lambda *_: True)
    before = codec.nbytes
    packed = codec.encode(x)
    assert codec.nbytes == before + codec._triton_tables.nbytes
    unit, _ = unit_coordinates(x.cpu(), torch_codec.rotation.matrix)
    assert_same_indices(packed.indices, expected.indices, unit, bits)
    assert_same_scalars(packed.scalars, expected.scalars)
    decoded = codec.decode(packed).cpu()
    monkeypatch.undo()
    same = PackedVectors(packed.indices.cpu(), packed.scalars.cpu())
    torch.testing.assert_close(decoded, torch_codec.decode(same), rtol=1e-5, atol=1e-5)


def test_the_codec_stays_with_torch_elsewhere():
    codec = MseCodec(64, 4, "unbiased")
    codec.decode(codec.encode(gaussian(3, 64)))
    assert "_triton_tables" not in vars(codec)
