"""Triton kernels of the mse codec: one that encodes, one that decodes. Launched by `triton_codec`.

A head's D = 8 E coordinates are held as 8 runs of S columns, S the power of two at or above E (at
least 2): dim e E + s is column e S + s, and columns with s ≥ E are padding. A plane of w bits keeps
in byte q E + s, bits r w…, the index of dim (r w + q) E + s. Packing is then a sum over r and
unpacking a shift, both inside a column, and a head size that is no power of two needs no gather.

Shape suffixes: B batch, H KV heads, T tokens, D head size, N = 8 S padded columns, P packed bytes,
G groups that have a map of their own (1 or H); in the kernels K is a chunk of the contracted axis.
"""

from typing import Any

import triton
import triton.language as tl


def run_columns(head_dim: int) -> int:
    """S, the columns of one of 8 runs: tile sizes are powers of two, and a dot needs 16."""
    return max(2, 1 << (head_dim // 8 - 1).bit_length())


def encode_options(head_dim: int, bits: int, scalar: str, has_mean: bool) -> dict[str, Any]:
    """Keyword arguments of a launch of `encode_kernel`; tools/kernel_report.py compiles these."""
    run = run_columns(head_dim)
    # A larger tile of a large head would spill.
    tile = {"BLOCK": 32, "CHUNK": 16} if run > 16 else {"BLOCK": 64, "CHUNK": 16}
    shape = {"BITS": bits, "D": head_dim, "S": run, "KIND": scalar, "HAS_MEAN": has_mean}
    return shape | tile | _COMPILE_OPTIONS


def decode_options(head_dim: int, bits: int, has_mean: bool) -> dict[str, Any]:
    """Keyword arguments of a launch of `decode_kernel`."""
    run = run_columns(head_dim)
    tile = {"BLOCK": 64, "RUNS": max(1, 16 // run), "COLUMNS": 8 * run}
    shape = {"BITS": bits, "D": head_dim, "S": run, "HAS_MEAN": has_mean}
    return shape | tile | _COMPILE_OPTIONS


# Without a bound of registers ptxas aims at one more block an SM and spills a few bytes for it.
# Fusion is named because Triton is about to change its default.
_COMPILE_OPTIONS = {"num_warps": 8, "num_stages": 2, "maxnreg": 255, "enable_fp_fusion": True}


@triton.jit(do_not_specialize=["T"])
def encode_kernel(
    x_ptr,
    matrix_ptr,
    mean_ptr,
    boundary_ptr,
    centroid_ptr,
    index_ptr,
    scalar_ptr,
    T,
    stride_xb,
    stride_xh,
    stride_xt,
    stride_matrix,
    stride_mean,
    BITS: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    KIND: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Rows of x to packed indices [B, H, T, P] and float16 scalars [B, H, T], both contiguous."""
    N: tl.constexpr = 8 * S
    E: tl.constexpr = D // 8
    P: tl.constexpr = E * BITS
    # Bases are 64-bit: a long cache has more than 2^31 elements. Offsets inside a tile are small.
    first = tl.program_id(0) * BLOCK
    head = tl.program_id(1)
    x_ptr += tl.program_id(2).to(tl.int64) * stride_xb + head.to(tl.int64) * stride_xh
    x_ptr += first.to(tl.int64) * stride_xt
    matrix_ptr += head.to(tl.int64) * stride_matrix
    row = tl.arange(0, BLOCK)
    live = first + row < T
    column = tl.arange(0, N)

    y = tl.zeros((BLOCK, N), dtype=tl.float32)
    for start in range(0, D, CHUNK):
        k = start + tl.arange(0, CHUNK)
        z = tl.load(
            x_ptr + row[:, None] * stride_xt + k[None, :],
            mask=live[:, None] & (k < D)[None, :],
            other=0.0,
        ).to(tl.float32)
        if HAS_MEAN:
            z -= tl.load(mean_ptr + head * stride_mean + k, mask=k < D, other=0.0)[None, :]
        weight = tl.load(
            matrix_ptr + k[:, None] * N + column[None, :], mask=(k < D)[:, None], other=0.0
        )
        y = tl.dot(z, weight, y, input_precision="ieee")

    # The rotation keeps lengths, so ‖y‖ is the norm. The zero vector stays zero.
    norm = tl.sqrt_rn(tl.sum(y * y, axis=1))
    root: tl.constexpr = D**0.5
    to_unit = tl.div_rn(tl.full((BLOCK,), root, tl.float32), tl.where(norm > 0, norm, 1.0))
    unit = y * to_unit[:, None]
    index, centroid = nearest(unit, boundary_ptr, centroid_ptr, BITS)
    if S != E:
        centroid = tl.where((column % S < E)[None, :], centroid, 0.0)
    scalar = stored_scalar(norm, unit, centroid, KIND, D)

    place = (tl.program_id(2) * tl.num_programs(1) + head).to(tl.int64) * T + first
    tl.store(scalar_ptr + place + row, scalar.to(tl.float16), mask=live)
    rows_ptr = index_ptr + place * P + row * P
    LOW: tl.constexpr = BITS if BITS != 3 and BITS != 5 else BITS - 1
    store_plane(rows_ptr, index & ((1 << LOW) - 1), live, LOW, E, S, BLOCK)
    if LOW != BITS:
        store_plane(rows_ptr + E * LOW, index >> LOW, live, 1, E, S, BLOCK)


@triton.jit
def nearest(unit, boundary_ptr, centroid_ptr, BITS: tl.constexpr):
    """How many boundaries lie strictly below each value, as torch.bucketize, and its centroid."""
    index = tl.zeros(unit.shape, dtype=tl.int32)
    centroid = tl.zeros(unit.shape, dtype=tl.float32) + tl.load(centroid_ptr)
    for i in range(2**BITS - 1):
        above = unit > tl.load(boundary_ptr + i)
        index += above.to(tl.int32)
        centroid = tl.where(above, tl.load(centroid_ptr + i + 1), centroid)
    return index, centroid


@triton.jit
def stored_scalar(norm, unit, centroid, KIND: tl.constexpr, D: tl.constexpr):
    """`MseCodec._stored_scalar`: float32 [BLOCK] from √D y and √D c."""
    scalar = norm
    if KIND == "corrected":
        scalar = tl.div_rn(norm, tl.sqrt_rn(tl.sum(centroid * centroid, axis=1) / D))
    if KIND == "unbiased":
        inner = tl.sum(unit * centroid, axis=1) / D
        scalar = tl.div_rn(norm, tl.maximum(inner, 1e-20))
    if KIND == "least_squares":
        inner = tl.sum(unit * centroid, axis=1)
        scalar = tl.div_rn(norm * inner, tl.sum(centroid * centroid, axis=1))
    return scalar


@triton.jit
def store_plane(
    rows_ptr,
    value,
    live,
    W: tl.constexpr,
    E: tl.constexpr,
    S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A plane of W bits of the int32 values [BLOCK, 8 S], at pointers [BLOCK] to its rows."""
    value = tl.reshape(value, (BLOCK, 8 // W, W, S))
    shift = tl.arange(0, 8 // W) * W
    byte = tl.sum(value << shift[None, :, None, None], axis=1)
    q = tl.arange(0, W)[None, :, None]
    s = tl.arange(0, S)[None, None, :]
    tl.store(
        rows_ptr[:, None, None] + q * E + s,
        byte.to(tl.uint8),
        mask=live[:, None, None] & (s < E),
    )


@triton.jit(do_not_specialize=["T"])
def decode_kernel(
    index_ptr,
    scalar_ptr,
    matrix_ptr,
    mean_ptr,
    centroid_ptr,
    out_ptr,
    T,
    stride_ib,
    stride_ih,
    stride_it,
    stride_sb,
    stride_sh,
    stride_st,
    stride_matrix,
    stride_mean,
    BITS: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
    RUNS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Packed rows to [B, H, T, D], contiguous, in the dtype of out_ptr."""
    E: tl.constexpr = D // 8
    LOW: tl.constexpr = BITS if BITS != 3 and BITS != 5 else BITS - 1
    first = tl.program_id(0) * BLOCK
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    index_ptr += batch * stride_ib + head.to(tl.int64) * stride_ih + first.to(tl.int64) * stride_it
    scalar_ptr += batch * stride_sb + head.to(tl.int64) * stride_sh + first.to(tl.int64) * stride_st
    matrix_ptr += head.to(tl.int64) * stride_matrix
    row = tl.arange(0, BLOCK)
    live = first + row < T
    column = tl.arange(0, COLUMNS)

    # Bytes are read again for each run they hold, from the L1 cache: so the loop needs no slices.
    run = tl.arange(0, RUNS)[None, :, None]
    s = tl.arange(0, S)[None, None, :]
    k = tl.arange(0, RUNS * S)
    byte_ptr = index_ptr + row[:, None, None] * stride_it + s
    readable = live[:, None, None] & (s < E)
    x = tl.zeros((BLOCK, COLUMNS), dtype=tl.float32)
    for start in range(0, 8, RUNS):
        e = start + run
        low = tl.load(byte_ptr + e % LOW * E, mask=readable, other=0).to(tl.int32)
        index = (low >> (e // LOW * LOW)) & ((1 << LOW) - 1)
        if LOW != BITS:
            high = tl.load(byte_ptr + tl.zeros_like(e) + LOW * E, mask=readable, other=0)
            index |= ((high.to(tl.int32) >> e) & 1) << LOW
        centroid = tl.reshape(_look_up(index, centroid_ptr, 0, BITS), (BLOCK, RUNS * S))
        weight = tl.load(
            matrix_ptr + (start * S + k)[:, None] * D + column[None, :],
            mask=(column < D)[None, :],
            other=0.0,
        )
        x = tl.dot(centroid, weight, x, input_precision="ieee")

    scalar = tl.load(scalar_ptr + row * stride_st, mask=live, other=0.0).to(tl.float32)
    # An infinity becomes NaN, so that no part of a vector that was not stored looks like a number.
    scalar = tl.where(scalar - scalar == 0, scalar, float("nan"))
    root: tl.constexpr = D**0.5
    x *= (scalar / root)[:, None]
    if HAS_MEAN:
        x += tl.load(mean_ptr + head * stride_mean + column, mask=column < D, other=0.0)[None, :]
    place = (batch * tl.num_programs(1) + head) * T + first
    tl.store(
        out_ptr + place * D + row[:, None] * D + column[None, :],
        x.to(out_ptr.dtype.element_ty),
        mask=live[:, None] & (column < D)[None, :],
    )


@triton.jit
def _look_up(index, centroid_ptr, BASE: tl.constexpr, BITS: tl.constexpr):
    """centroid[BASE + index mod 2^BITS] by a tree of selects: no gather from memory."""
    if BITS == 0:
        return tl.zeros(index.shape, dtype=tl.float32) + tl.load(centroid_ptr + BASE)
    else:
        HALF: tl.constexpr = 2 ** (BITS - 1)
        return tl.where(
            (index & HALF) != 0,
            _look_up(index, centroid_ptr, BASE + HALF, BITS - 1),
            _look_up(index, centroid_ptr, BASE, BITS - 1),
        )
