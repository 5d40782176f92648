"""From packed bytes to float16 tiles in registers: what the attention kernels multiply.

A row of C channels is read as 16-bit elements, so that `ldmatrix` brings pairs of them from shared
memory to where a product wants them, and decoded as tiles of S columns, at least the 16 that a
product needs (`channel_of` says which channel is where). A byte holds a channel of each of R runs
of C/R channels (R is 2 for 4 bits, 4 for 2, 8 for the 1-bit plane of 3, 1 for fp8): a tile is a
run's even or its odd channels. Rows of 8 elements are read twice, side by side, and tiles hold two
runs: they are called folded.

ASM is a compile-time flag: PTX for pairs (`ptx_pairs`, `ptx_tables`), or the same in Triton's
language, for the interpreter, which has no PTX.
"""

import triton
import triton.language as tl

from stillhouse.kernels.paged_attention.ptx_pairs import (
    POLYNOMIALS,
    fp8_assembly,
    unpack3_assembly,
    unpack_assembly,
)
from stillhouse.kernels.paged_attention.ptx_tables import (
    SPLIT4,
    TABLE3,
    split4_assembly,
    table3_assembly,
)

_ASM2, _FOLD2 = unpack_assembly(2, False), unpack_assembly(2, True)
_ASM3, _FOLD3 = unpack3_assembly(False), unpack3_assembly(True)
_TABLE3, _FOLD_TABLE3 = table3_assembly(False), table3_assembly(True)
_ASM4, _SPLIT4, _ASM8 = unpack_assembly(4, False), split4_assembly(), fp8_assembly()
CODE2, WIRES2 = tl.constexpr(_ASM2.code), tl.constexpr(_ASM2.constraints)
FOLD_CODE2, FOLD_WIRES2 = tl.constexpr(_FOLD2.code), tl.constexpr(_FOLD2.constraints)
CODE3, WIRES3 = tl.constexpr(_ASM3.code), tl.constexpr(_ASM3.constraints)
FOLD_CODE3, FOLD_WIRES3 = tl.constexpr(_FOLD3.code), tl.constexpr(_FOLD3.constraints)
TABLE_CODE3 = tl.constexpr(_TABLE3.code)  # wired as the others
FOLD_TABLE_CODE3 = tl.constexpr(_FOLD_TABLE3.code)
SPLIT_CODE4, SPLIT_WIRES4 = tl.constexpr(_SPLIT4.code), tl.constexpr(_SPLIT4.constraints)
CODE4, WIRES4 = tl.constexpr(_ASM4.code), tl.constexpr(_ASM4.constraints)
CODE8, WIRES8 = tl.constexpr(_ASM8.code), tl.constexpr(_ASM8.constraints)
P2, P3, P4 = (tl.constexpr(POLYNOMIALS[bits]) for bits in (2, 3, 4))
CENTROIDS3, BYTES4 = tl.constexpr(TABLE3), tl.constexpr(SPLIT4.bytes)


def elements(channels: int, bits: int) -> int:
    """16-bit elements of a row of channels; for 3 bits, of the plane of 2."""
    return channels // 8 if bits == 3 else channels * bits // 16


def tile_count(channels: int, bits: int) -> int:
    """How many tiles hold a row."""
    each = {2: 8, 3: 8, 4: 4, 8: 2}[bits]
    return each // 2 if elements(channels, bits) == 8 else each


def tile_columns(channels: int, bits: int) -> int:
    """S."""
    return max(16, 1 << (elements(channels, bits) - 1).bit_length())


@triton.jit
def channel_of(tile: tl.constexpr, column, C: tl.constexpr, BITS: tl.constexpr):
    """The channel of each of a tile's columns; C for columns that hold none."""
    E: tl.constexpr = C // 8 if BITS == 3 else C * BITS // 16
    FOLD: tl.constexpr = 2 if E == 8 else 1
    FIELDS: tl.constexpr = (4 if BITS == 3 else 8 // BITS) // FOLD  # of a byte, in one tile
    field = tile % FIELDS + column // E * FIELDS
    element = column % E
    if BITS == 3:
        HALF: tl.constexpr = E // 2
        run = 2 * field + element // HALF
        channel = run * E + 2 * (element % HALF) + tile // FIELDS
    else:
        channel = field * (2 * E) + 2 * element + tile // FIELDS
    return tl.where(column < E * FOLD, channel, C)


def column_tables(channels: int, bits: int) -> tuple[list[int], list[int]]:
    """Of a tile's columns, 32 each: how far a row's bytes are shifted right, and whether (all ones)
    the plane of 1 bit is shifted by one more. Kernels load them: Triton decodes where a product
    wants its factor only if all that it is made from are loads and constants."""
    each, columns = elements(channels, bits), range(32)
    if bits not in (2, 3):
        return [0] * 32, [0] * 32
    half = [column // each * 4 % 8 for column in columns]  # in folded tiles
    odd = [0xFFFF * (column % each // (each // 2)) for column in columns]
    return half, odd if bits == 3 else [0] * 32


@triton.jit
def load_columns(columns_ptr, S: tl.constexpr, BITS: tl.constexpr):
    """Both of `column_tables`, uint16 [S]; outside of the loop."""
    if BITS == 2 or BITS == 3:
        return tl.load(columns_ptr + tl.arange(0, S)), tl.load(columns_ptr + 32 + tl.arange(0, S))
    else:
        return tl.zeros((S,), tl.uint16), tl.zeros((S,), tl.uint16)


@triton.jit
def unpack(
    rows,
    live,
    place,
    columns,
    C: tl.constexpr,
    S: tl.constexpr,
    BITS: tl.constexpr,
    PAGE: tl.constexpr,
    MASKED: tl.constexpr,
    ASM: tl.constexpr,
    TABLE: tl.constexpr = False,
):
    """A tuple of float16 tiles [T, S] without scalars: centroids times √C, or fp8 numbers.

    rows: where each token's half page begins, a pointer to bytes or [T] of them. place: int32 [T],
    in it. columns: of `load_columns`. MASKED: tokens that are not live are not read. TABLE: 3 bits
    are looked up, exact, and 4 bits are two tuples, one behind the other: indices, times 16 in odd
    tiles, and bytes of `SPLIT4`, both in units of 2^-24.
    """
    E: tl.constexpr = C // 8 if BITS == 3 else C * BITS // 16
    FOLD: tl.constexpr = 2 if E == 8 else 1
    column = tl.arange(0, S)
    row = (rows + place * (2 * E)).to(tl.pointer_type(tl.uint16))
    packed = _elements(row, column % E, column < E * FOLD, live, E * FOLD == S, MASKED)
    half = tl.broadcast_to(columns[0][None, :], packed.shape)
    if BITS == 3:
        HALF: tl.constexpr = E // 2
        row = (rows + PAGE * (2 * E) + place * E).to(tl.pointer_type(tl.uint16))
        high = _elements(row, column % HALF, column < E * FOLD, live, E * FOLD == S, MASKED)
        odd = tl.broadcast_to(columns[1][None, :], packed.shape)
        return _unpack3(packed, high, odd, half, FOLD, ASM, TABLE)
    elif BITS == 2:
        return _unpack2(packed, half, FOLD, ASM)
    elif BITS == 4:
        return _split4(packed, ASM) if TABLE else _unpack4(packed, ASM)
    else:
        return _unpack8(packed, ASM)


@triton.jit
def _elements(rows, column, inside, live, FULL: tl.constexpr, MASKED: tl.constexpr):
    """uint16 [T, S] and zeros."""
    place = rows[:, None] + column[None, :]
    if MASKED:
        return tl.load(place, mask=live[:, None] & inside[None, :], other=0)
    elif FULL:
        return tl.load(place)
    else:
        return tl.load(place, mask=tl.broadcast_to(inside[None, :], place.shape), other=0)


@triton.jit
def _centroid(index, BITS: tl.constexpr, P: tl.constexpr, TERMS: tl.constexpr):
    u = ((index & (2**BITS - 1)).to(tl.float32) - (2**BITS - 1) / 2) / 2 ** (BITS - 2)
    square = (u * u).to(tl.float16).to(tl.float32)
    value = tl.zeros(u.shape, tl.float32) + P[TERMS - 1]
    for n in tl.static_range(TERMS - 1):  # rounded as multiply-adds of float16 are
        value = (value * square + P[TERMS - 2 - n]).to(tl.float16).to(tl.float32)
    return (u * value).to(tl.float16)


@triton.jit
def _unpack2(packed, half, FOLD: tl.constexpr, ASM: tl.constexpr):
    if ASM and FOLD == 2:
        return tl.inline_asm_elementwise(
            FOLD_CODE2, FOLD_WIRES2, [packed, half],
            (tl.float16, tl.float16, tl.float16, tl.float16), True, 2,
        )  # fmt: skip
    elif ASM:
        return tl.inline_asm_elementwise(
            CODE2, WIRES2, [packed],
            (tl.float16, tl.float16, tl.float16, tl.float16,
             tl.float16, tl.float16, tl.float16, tl.float16), True, 2,
        )  # fmt: skip
    else:
        FIELDS: tl.constexpr = 4 // FOLD
        found = ()
        for tile in tl.static_range(2 * FIELDS):
            index = packed >> (half + (tile // FIELDS * 8 + tile % FIELDS * 2))
            found = found + (_centroid(index, 2, P2, 2),)
        return found


@triton.jit
def _unpack3(
    low, high, odd, half, FOLD: tl.constexpr, ASM: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    if ASM and FOLD == 2:
        return tl.inline_asm_elementwise(
            FOLD_TABLE_CODE3 if TABLE else FOLD_CODE3, FOLD_WIRES3, [low, high, odd, half],
            (tl.float16, tl.float16, tl.float16, tl.float16), True, 2,
        )  # fmt: skip
    elif ASM:
        return tl.inline_asm_elementwise(
            TABLE_CODE3 if TABLE else CODE3, WIRES3, [low, high, odd],
            (tl.float16, tl.float16, tl.float16, tl.float16,
             tl.float16, tl.float16, tl.float16, tl.float16), True, 2,
        )  # fmt: skip
    else:
        FIELDS: tl.constexpr = 4 // FOLD
        found = ()
        for tile in tl.static_range(2 * FIELDS):
            at = tile // FIELDS * 8 + tile % FIELDS * 2
            third = (high >> (half + (odd & 1) + at)) & 1
            index = ((low >> (half + at)) & 3) | (third << 2)
            if TABLE:
                found = found + (_entry(index, CENTROIDS3, 8).to(tl.float16),)
            else:
                found = found + (_centroid(index, 3, P3, 3),)
        return found


@triton.jit
def _entry(index, table: tl.constexpr, COUNT: tl.constexpr):
    """float32, for the interpreter."""
    found = tl.zeros(index.shape, tl.float32)
    for n in tl.static_range(COUNT):
        found = tl.where(index == n, table[n], found)
    return found


@triton.jit
def _split4(packed, ASM: tl.constexpr):
    if ASM:
        return tl.inline_asm_elementwise(
            SPLIT_CODE4, SPLIT_WIRES4, [packed],
            (tl.float16, tl.float16, tl.float16, tl.float16,
             tl.float16, tl.float16, tl.float16, tl.float16), True, 2,
        )  # fmt: skip
    else:
        indices, found = (), ()
        for tile in tl.static_range(4):
            index = (packed >> (4 * tile)) & 15
            place = (index << (tile % 2 * 4)).to(tl.uint16)
            indices = indices + (place.to(tl.float16, bitcast=True),)
            byte = _entry(index, BYTES4, 16).to(tl.uint16)
            found = found + (byte.to(tl.float16, bitcast=True),)
        return indices + found


@triton.jit
def _unpack4(packed, ASM: tl.constexpr):
    if ASM:
        return tl.inline_asm_elementwise(
            CODE4, WIRES4, [packed],
            (tl.float16, tl.float16, tl.float16, tl.float16), True, 2,
        )  # fmt: skip
    else:
        found = ()
        for tile in tl.static_range(4):
            found = found + (_centroid(packed >> (4 * tile), 4, P4, 5),)
        return found


@triton.jit
def _unpack8(packed, ASM: tl.constexpr):
    if ASM:
        return tl.inline_asm_elementwise(CODE8, WIRES8, [packed], (tl.float16, tl.float16), True, 2)
    else:
        found = ()
        for tile in tl.static_range(2):
            code = (packed >> (8 * tile)).to(tl.int32) & 0xFF
            bits = (((code & 0x7F) << 7) | ((code & 0x80) << 8)).to(tl.uint16)
            value = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
            value = tl.where((code & 0x7F) == 0x7F, float("nan"), value)
            found = found + (value.to(tl.float16),)
        return found
