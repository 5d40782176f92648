"""The Triton kernels of continued prefill: a chunk of queries, packed history and its own tokens.

History is decoded tile by tile, as in `triton_attend`, and masked by each query's own window; the
chunk's keys and values are in 16 bits, and causal. Both are sums of their own, which
`finish_kernel` puts together.

Shape suffixes: B sequences, H key/value heads, G queries of each, R rows (row t·G + g is query g of
token t), M of them in a tile, T tokens of a tile, D head size, C coded channels of keys, V of
values.
"""

import triton
import triton.language as tl

from stillhouse.kernels.paged_attention.triton_attend import attend_packed, packed_range, store_sums
from stillhouse.kernels.paged_attention.triton_merge import LN2, LOWEST
from stillhouse.kernels.paged_attention.triton_scores import capped, raw_product, weighted_raw


@triton.jit(do_not_specialize=["pages", "room", "rows", "raw_tokens", "window", "stride_table"])
def chunk_kernel(
    query_ptr,
    coded_ptr,
    factor_ptr,
    offset_ptr,
    keys_ptr,
    values_ptr,
    columns_ptr,
    table_ptr,
    first_ptr,
    last_ptr,
    position_ptr,
    hidden_ptr,
    raw_keys_ptr,
    raw_values_ptr,
    sums_ptr,
    raw_sums_ptr,
    ml_ptr,
    scale,
    cap,
    stride_qb,
    stride_qh,
    stride_kn,
    stride_kh,
    stride_vn,
    stride_vh,
    stride_table,
    stride_rkb,
    stride_rkh,
    stride_rvb,
    stride_rvh,
    pages,
    room,
    rows,
    raw_tokens,
    window,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    C: tl.constexpr,
    V: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    KEY_TILES: tl.constexpr,
    VALUE_TILES: tl.constexpr,
    KEY_COLUMNS: tl.constexpr,
    VALUE_COLUMNS: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    RAW_BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    CHECK: tl.constexpr,
    ASM: tl.constexpr,
):
    """M rows of a sequence and head: sums [B, H, R, V] over history, [B, H, R, D] over raw tokens,
    and (m, l) of both, [B, H, 2, 2, R], all float32."""
    h, b = tl.program_id(1), tl.program_id(2)
    head = (b * tl.num_programs(1) + h).to(tl.int64)
    top_row = tl.program_id(0) * M
    row = top_row + tl.arange(0, M)
    live_row = row < rows
    position = tl.load(position_ptr + b)
    first, last = packed_range(first_ptr + b, last_ptr + b, room, CHECK)
    seen = first + tl.zeros((M,), tl.int32)  # the first token of history that each row sees
    lowest, highest = first, first
    if HAS_WINDOW:
        seen = tl.maximum(seen, position + row // G - window + 1)
        lowest = tl.maximum(first, position + top_row // G - window + 1)
        highest = tl.maximum(first, position + (top_row + M - 1) // G - window + 1)
    m, total, sums = attend_packed(
        coded_ptr + head * rows * C, factor_ptr + head * rows, offset_ptr + head * rows,
        keys_ptr + h.to(tl.int64) * stride_kh, values_ptr + h.to(tl.int64) * stride_vh,
        table_ptr + b.to(tl.int64) * stride_table, columns_ptr, row, live_row, seen,
        lowest, highest, lowest // BLOCK * BLOCK, last, cap, stride_kn, stride_vn, pages, C, V, M,
        KEY_BITS, VALUE_BITS, KEY_TILES, VALUE_TILES, KEY_COLUMNS, VALUE_COLUMNS, PAGE, BLOCK,
        STAGES, HAS_CAP, CHECK, ASM, TABLE=False,
    )  # fmt: skip
    store_sums(
        sums_ptr + head * rows * V, sums, row, live_row, V, VALUE_BITS, VALUE_TILES, VALUE_COLUMNS
    )
    ml_ptr += head * (4 * rows) + row
    tl.store(ml_ptr, m, mask=live_row)
    tl.store(ml_ptr + rows, total, mask=live_row)

    before = raw_tokens - rows // G  # raw tokens older than the chunk
    end = tl.minimum(raw_tokens, before + (tl.minimum(top_row + M, rows) + G - 1) // G)
    begin = tl.load(hidden_ptr + b)
    if CHECK:
        tl.device_assert((begin >= 0) & (begin <= before), "raw tokens out of range")
    if HAS_WINDOW:
        begin = tl.maximum(begin, before + top_row // G - window + 1)
    m, total, plain = _attend_causal(
        query_ptr + b.to(tl.int64) * stride_qb + h.to(tl.int64) * stride_qh,
        raw_keys_ptr + b.to(tl.int64) * stride_rkb + h.to(tl.int64) * stride_rkh,
        raw_values_ptr + b.to(tl.int64) * stride_rvb + h.to(tl.int64) * stride_rvh,
        row, live_row, before + row // G, begin, end, window, scale, cap,
        D, D_PAD, M, RAW_BLOCK, HAS_WINDOW, HAS_CAP, ASM,
    )  # fmt: skip
    column = tl.arange(0, D_PAD)
    tl.store(
        raw_sums_ptr + (head * rows + row)[:, None] * D + column[None, :],
        plain,
        mask=live_row[:, None] & (column < D)[None, :],
    )
    tl.store(ml_ptr + 2 * rows, m, mask=live_row)
    tl.store(ml_ptr + 3 * rows, total, mask=live_row)


@triton.jit
def _attend_causal(
    query_ptr, keys_ptr, values_ptr, row, live_row, own, begin, end, window, scale, cap,
    D: tl.constexpr, D_PAD: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """m, l and sums [M, D_PAD] over raw tokens [begin, end), each row's up to its own."""
    column = tl.arange(0, D_PAD)
    inside = (column < D)[None, :]
    query = tl.load(
        query_ptr + row.to(tl.int64)[:, None] * D + column[None, :],
        mask=live_row[:, None] & inside,
        other=0.0,
    )
    m = tl.zeros((M,), tl.float32) + LOWEST
    total = tl.zeros((M,), tl.float32)
    sums = tl.zeros((M, D_PAD), tl.float32)
    for at in range(begin, end, BLOCK):
        token = at + tl.arange(0, BLOCK)
        place = token.to(tl.int64)[:, None] * D + column[None, :]
        mask = (token < end)[:, None] & inside
        key = tl.load(keys_ptr + place, mask=mask, other=0.0).to(query.dtype)
        value = tl.load(values_ptr + place, mask=mask, other=0.0)
        score = raw_product(query, tl.trans(key), tl.zeros((M, BLOCK), tl.float32), ASM)
        score = capped(score * scale, cap, HAS_CAP)
        seen = token[None, :] <= own[:, None]
        if HAS_WINDOW:
            seen &= token[None, :] > (own - window)[:, None]
        score = tl.where(seen, score, float("-inf"))
        top = tl.maximum(m, tl.max(score, axis=1))
        weight = tl.exp2(score - top[:, None])
        fade = tl.exp2(m - top)
        m = top
        total = total * fade + tl.sum(weight, axis=1)
        sums = weighted_raw(weight, value, sums * fade[:, None], ASM)
    return m, total, sums


@triton.jit(do_not_specialize=["rows"])
def finish_kernel(
    sums_ptr,
    raw_sums_ptr,
    ml_ptr,
    map_ptr,
    mean_ptr,
    out_ptr,
    lse_ptr,
    stride_map,
    stride_mean,
    rows,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    V: tl.constexpr,
    M: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_MAP: tl.constexpr,
    HAS_MEAN: tl.constexpr,
):
    """`chunk_kernel`'s sums to [B, H, R, D] in the dtype of out_ptr, zeros where no token was seen,
    and the natural logarithm of sums of exponentials, float32 [B, H, R], -inf there.

    Those of packed values go through the map [H or 1, V, D], and have their mean [H or 1, D] added.
    """
    h, b = tl.program_id(1), tl.program_id(2)
    head = (b * tl.num_programs(1) + h).to(tl.int64)
    row = tl.program_id(0) * M + tl.arange(0, M)
    live = row < rows
    ml_ptr += head * (4 * rows) + row
    m = tl.load(ml_ptr, mask=live, other=LOWEST)
    raw_m = tl.load(ml_ptr + 2 * rows, mask=live, other=LOWEST)
    top = tl.maximum(m, raw_m)
    scale, raw_scale = tl.exp2(m - top), tl.exp2(raw_m - top)
    share = tl.load(ml_ptr + rows, mask=live, other=0.0) * scale
    total = share + tl.load(ml_ptr + 3 * rows, mask=live, other=0.0) * raw_scale
    seen = total != 0  # also where it is NaN
    norm = 1.0 / tl.where(seen, total, 1.0)

    column = tl.arange(0, D_PAD)
    place = (head * rows + row)[:, None]
    inside = live[:, None] & (column < D)[None, :]
    out = tl.load(raw_sums_ptr + place * D + column[None, :], mask=inside, other=0.0)
    out *= raw_scale[:, None]
    for start in range(0, V, CHUNK):
        channel = start + tl.arange(0, CHUNK)
        part = tl.load(
            sums_ptr + place * V + channel[None, :],
            mask=live[:, None] & (channel < V)[None, :],
            other=0.0,
        )
        if HAS_MAP:
            weight = tl.load(
                map_ptr + h * stride_map + channel[:, None] * D + column[None, :],
                mask=(channel < V)[:, None] & (column < D)[None, :],
                other=0.0,
            )
        else:
            weight = (channel[:, None] == column[None, :]).to(tl.float32)
        out = tl.dot(part * scale[:, None], weight, out, input_precision="tf32x3")
    if HAS_MEAN:
        mean = tl.load(mean_ptr + h * stride_mean + column, mask=column < D, other=0.0)
        out += share[:, None] * mean[None, :]
    out *= norm[:, None]
    tl.store(out_ptr + place * D + column[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)
    lse = tl.where(seen, (top + tl.log2(tl.where(seen, total, 1.0))) * LN2, float("-inf"))
    tl.store(lse_ptr + head * rows + row, lse, mask=live)
