"""The PTX that decodes, instruction by instruction, and the decoding kernels around it."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from stillhouse.kernels.paged_attention import HalfPage, VectorFormat, write_vectors
from stillhouse.kernels.paged_attention.gpu_configs import padded
from stillhouse.kernels.paged_attention.ptx_pairs import (
    POLYNOMIALS,
    fp8_assembly,
    unpack3_assembly,
    unpack_assembly,
)
from stillhouse.kernels.paged_attention.ptx_tables import (
    SPLIT4,
    UNIT,
    split4_assembly,
    table3_assembly,
)
from stillhouse.kernels.paged_attention.ptx_writer import Assembly
from stillhouse.kernels.paged_attention.reference import coded_vectors
from stillhouse.kernels.paged_attention.triton_scores import BIAS, SLOPE, STEP
from stillhouse.kernels.paged_attention.triton_unpack import (
    channel_of,
    column_tables,
    load_columns,
    tile_columns,
    tile_count,
    unpack,
)
from stillhouse.kernels.turboquant import gaussian_codebook
from tests.kernels.paged_attention.packed_pages import vectors
from tests.kernels.paged_attention.ptx_emulator import lanes_of, run

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Rounding of float16 and the polynomial's own error, of the largest and of a usual centroid.
WORST = {2: 6e-4, 3: 4e-3, 4: 1.3e-3}
USUAL = {2: 4.2e-4, 3: 5.9e-4, 4: 3.5e-4}


def elements(seed: int) -> np.ndarray:
    """uint16 [4096, 2]: pairs of packed elements."""
    return np.random.default_rng(seed).integers(0, 2**16, (4096, 2), dtype=np.uint16)


def words(pairs: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(pairs).view(np.uint32)[:, 0]


def shifts(pairs: np.ndarray, most: int) -> np.ndarray:
    """The same for both elements of a pair."""
    return np.repeat(np.random.default_rng(1).integers(0, most, len(pairs)), 2).reshape(-1, 2)


def centroids(bits: int) -> np.ndarray:
    return np.array(gaussian_codebook(bits).centroids)


def usual(found: np.ndarray, book: np.ndarray) -> float:
    """Root mean square error over the codebook's law, as a share of a centroid's."""
    edges = torch.tensor([-np.inf, *((book[1:] + book[:-1]) / 2), np.inf])
    mass = torch.diff(torch.special.ndtr(edges.double())).numpy()
    return float(np.sqrt((mass * (found - book) ** 2).sum() / (mass * book**2).sum()))


def outputs(assembly: Assembly, *inputs: np.ndarray) -> np.ndarray:
    """float16 [tiles, pairs, 2]."""
    found = run(assembly.code, assembly.constraints, [words(part) for part in inputs])
    return np.stack([lanes_of(register) for register in found])


@pytest.mark.parametrize("bits", [2, 4])
def test_each_field_of_each_byte_becomes_its_centroid(bits: int) -> None:
    pairs = elements(bits)
    found = outputs(unpack_assembly(bits, False), pairs)
    assert len(found) == 16 // bits
    for tile, values in enumerate(found):
        index = pairs >> (tile * bits) & (2**bits - 1)
        np.testing.assert_allclose(values, centroids(bits)[index], rtol=WORST[bits])


def test_folded_rows_of_2_bits_are_shifted_first() -> None:
    pairs, half = elements(5), shifts(elements(5), 2) * 4
    found = outputs(unpack_assembly(2, True), pairs, half.astype(np.uint16))
    assert len(found) == 4
    for tile, values in enumerate(found):
        index = pairs >> (half + tile // 2 * 8 + tile % 2 * 2) & 3
        np.testing.assert_allclose(values, centroids(2)[index], rtol=WORST[2])


def test_what_is_shifted_as_a_pair_is_a_pair() -> None:
    for channels in range(64, 257, 16):
        for bits in (2, 3):
            half, odd = column_tables(channels, bits)
            assert half[::2] == half[1::2]
            assert set(odd) <= {0, 0xFFFF}


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("table", [False, True])
def test_3_bits_take_their_third_from_the_other_plane(table: bool, fold: bool) -> None:
    low, high = elements(6), elements(7)
    half = shifts(low, 2) * 4 if fold else np.zeros_like(low)
    odd = np.random.default_rng(2).integers(0, 2, high.shape).astype(np.uint16)  # in any pair
    more = [half.astype(np.uint16)] if fold else []
    assembly = table3_assembly(fold) if table else unpack3_assembly(fold)
    found = outputs(assembly, low, high, odd * np.uint16(0xFFFF), *more)
    assert len(found) == (4 if fold else 8)
    for tile, values in enumerate(found):
        fields = len(found) // 2
        at = tile // fields * 8 + tile % fields * 2
        index = (low >> (half + at) & 3) | (high >> (half + odd + at) & 1) << 2
        wanted = centroids(3)[index]
        if table:
            np.testing.assert_array_equal(values, wanted.astype(np.float16))
        np.testing.assert_allclose(values, wanted, rtol=WORST[3])


def test_4_bits_are_an_index_and_a_byte() -> None:
    pairs = elements(8)
    found = outputs(split4_assembly(), pairs)
    assert len(found) == 8
    for tile, (places, rest) in enumerate(zip(found[:4], found[4:], strict=True)):
        index = pairs >> (tile * 4) & 15
        np.testing.assert_array_equal(places / UNIT, index * (16.0 if tile % 2 else 1.0))
        np.testing.assert_array_equal(rest / UNIT, np.array(SPLIT4.bytes)[index])


def test_index_and_byte_make_the_centroids() -> None:
    book, parts = centroids(4), np.array(SPLIT4.bytes)
    assert set(parts) <= set(range(128))
    found = SPLIT4.slope * np.arange(16) + SPLIT4.step * parts - SPLIT4.bias
    np.testing.assert_allclose(found, -found[::-1], atol=1e-12)
    assert usual(found, book) < 4.8e-4


def test_fp8_is_exact_and_its_nan_stays_one() -> None:
    byte = np.arange(256, dtype=np.uint16)
    pairs = np.stack((byte | byte[::-1] << 8, byte), axis=1)
    found = outputs(fp8_assembly(), pairs)
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(found[0], np.stack((numbers, numbers), axis=1))
    np.testing.assert_array_equal(found[1], np.stack((numbers[::-1], 0 * byte), axis=1))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_error_over_the_codebooks_law_is_what_the_module_says(bits: int) -> None:
    book = centroids(bits)
    index = np.arange(2**bits, dtype=np.uint16)
    zero = 0 * index
    pairs = np.stack((index, index), axis=1)
    if bits == 3:
        low, high = np.stack((index & 3, index & 3), 1), np.stack((index >> 2, index >> 2), 1)
        found = outputs(unpack3_assembly(False), low, high, np.stack((zero, zero), 1))[0]
    else:
        found = outputs(unpack_assembly(bits, False), pairs)[0]
    assert usual(found[:, 0], book) < USUAL[bits]
    assert all(value == float(np.float16(value)) for value in POLYNOMIALS[bits])


@triton.jit
def _decode_kernel(
    page_ptr, columns_ptr, out_ptr, count, stride_page,
    C: tl.constexpr, S: tl.constexpr, TILES: tl.constexpr, BITS: tl.constexpr,
    PAGE: tl.constexpr, MASKED: tl.constexpr, ASM: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    token = tl.arange(0, PAGE)
    rows = page_ptr + tl.program_id(0) * stride_page
    columns = load_columns(columns_ptr, S, BITS)
    found = unpack(rows, token < count, token, columns, C, S, BITS, PAGE, MASKED, ASM, TABLE)
    for tile in tl.static_range(TILES):
        channel = channel_of(tile, tl.arange(0, S), C, BITS)
        place = (tl.program_id(0) * PAGE + token)[:, None] * C + channel[None, :]
        value = found[tile].to(tl.float32)
        if BITS == 4 and TABLE:
            slope: tl.constexpr = SLOPE / 16 if tile % 2 else SLOPE
            value = value * slope + found[TILES + tile].to(tl.float32) * STEP - BIAS
        tl.store(out_ptr + place, value, mask=(channel < C)[None, :])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("bits", "table"), [(2, 0), (3, 0), (3, 1), (4, 0), (4, 1), (8, 0)])
@pytest.mark.parametrize("channels", [64, 80, 96, 112, 128, 192, 256])
def test_tiles_hold_every_channel_of_every_token(
    channels: int, bits: int, table: int, masked: bool, device: str
) -> None:
    half, tokens = HalfPage(VectorFormat.uniform(channels, bits), 16), 16
    packed, scalars = vectors(half.format, 2, tokens, torch.Generator().manual_seed(bits))
    pages = half.empty(1, 2)
    write_vectors(pages, half, torch.arange(tokens), packed, scalars)
    one = None if scalars is None else torch.ones_like(scalars)
    wanted = coded_vectors(packed, one, half.format) * (1 if bits == 8 else channels**0.5)
    out = torch.empty((2, tokens, channels), dtype=torch.float32, device=device)
    columns = tile_columns(channels, bits)
    tables = torch.tensor(column_tables(channels, bits), dtype=torch.uint16, device=device)
    assert columns == padded(columns) >= 16
    _decode_kernel[(2,)](
        pages.to(device), tables, out, 9 if masked else tokens, half.nbytes, channels, columns,
        tile_count(channels, bits), bits, 16, masked, device == "cuda", bool(table),
    )  # fmt: skip
    seen = 9 if masked else tokens
    torch.testing.assert_close(
        out[:, :seen].double().cpu(),
        wanted[:, :seen],
        rtol=WORST.get(bits, 0),
        atol=1e-3 if bits == 4 and table else 0,
    )
