"""Queries into the keys' coded basis: the Triton kernel, and how attention loads its results.

Shape suffixes: B sequences, H key/value heads, R rows (queries of a head), M of them in a tile, D
head size, C coded channels, S columns of a tile of channels.
"""

import triton
import triton.language as tl

from stillhouse.kernels.paged_attention.triton_unpack import channel_of


@triton.jit(do_not_specialize=["ROWS"])
def query_kernel(
    query_ptr,
    map_ptr,
    mean_ptr,
    coded_ptr,
    factor_ptr,
    offset_ptr,
    scale,
    stride_qb,
    stride_qh,
    stride_map,
    stride_mean,
    ROWS,
    D: tl.constexpr,
    C: tl.constexpr,
    C_PAD: tl.constexpr,
    M: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_ROOT: tl.constexpr,
    HAS_MAP: tl.constexpr,
    HAS_MEAN: tl.constexpr,
):
    """Queries [B, H, R, D] times maps [H or 1, D, C] to float16 [B, H, R, C] with a largest
    magnitude of 1, and float32 factors and offsets [B, H, R].

    A score is coded · centroids · scalar · factor + offset; the offset is the product with the
    keys' mean [H or 1, D]. Both are times `scale`. HAS_ROOT: centroids are √C times too large.
    """
    h, b = tl.program_id(1), tl.program_id(2)
    head = (b * tl.num_programs(1) + h).to(tl.int64)
    row = tl.program_id(0) * M + tl.arange(0, M)
    live = row < ROWS
    column = tl.arange(0, C_PAD)
    query_ptr += b.to(tl.int64) * stride_qb + h.to(tl.int64) * stride_qh
    y = tl.zeros((M, C_PAD), dtype=tl.float32)
    offset = tl.zeros((M,), dtype=tl.float32)
    for start in range(0, D, CHUNK):
        k = start + tl.arange(0, CHUNK)
        q = tl.load(
            query_ptr + row.to(tl.int64)[:, None] * D + k[None, :],
            mask=live[:, None] & (k < D)[None, :],
            other=0.0,
        ).to(tl.float32)
        if HAS_MEAN:
            mean = tl.load(mean_ptr + h * stride_mean + k, mask=k < D, other=0.0)
            offset += tl.sum(q * mean[None, :], axis=1)
        if HAS_MAP:
            weight = tl.load(
                map_ptr + h * stride_map + k[:, None] * C + column[None, :],
                mask=(k < D)[:, None] & (column < C)[None, :],
                other=0.0,
            )
        else:
            weight = (k[:, None] == column[None, :]).to(tl.float32)
        y = tl.dot(q, weight, y, input_precision="tf32x3")
    largest = tl.max(tl.abs(y), axis=1)
    # Queries that are not finite are found by their factor: a maximum may pass over a NaN.
    largest += tl.sum(y * 0.0, axis=1)
    unit = y / tl.where(largest > 0, largest, 1.0)[:, None]
    coded_ptr += head * ROWS * C
    tl.store(
        coded_ptr + row.to(tl.int64)[:, None] * C + column[None, :],
        unit.to(tl.float16),
        mask=live[:, None] & (column < C)[None, :],
    )
    root: tl.constexpr = C**-0.5 if HAS_ROOT else 1.0
    tl.store(factor_ptr + head * ROWS + row, largest * (scale * root), mask=live)
    tl.store(offset_ptr + head * ROWS + row, offset * scale, mask=live)


@triton.jit
def coded_queries(
    coded_ptr, row, live, C: tl.constexpr, S: tl.constexpr, TILES: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """A tuple of float16 tiles [M, S] of a head's queries, columns as `unpack` has them."""
    found = ()
    for tile in tl.static_range(TILES):
        channel = channel_of(tile, tl.arange(0, S), C, BITS)
        place = coded_ptr + row.to(tl.int64)[:, None] * C + channel[None, :]
        found = found + (tl.load(place, mask=live[:, None] & (channel < C)[None, :], other=0.0),)
    return found
