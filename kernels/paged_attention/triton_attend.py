"""The Triton kernel of decode attention over packed pages, and the loops it is made of.

Scores are in units of log2. Weights are taken relative to the largest product of a weight and its
value's scalar, times 2^-14, so that products fit float16 whatever the scalars are: 128,000 tokens
of tiny weight still count.

Shape suffixes: B sequences, H key/value heads, G queries of each, R rows (queries of a head), M of
them in a tile (padded), D head size, C coded channels of keys, V of values (for both: S columns of
a tile), T tokens of a tile, N splits.
"""

import triton
import triton.language as tl

from stillhouse.kernels.paged_attention.triton_merge import LOWEST
from stillhouse.kernels.paged_attention.triton_query import coded_queries
from stillhouse.kernels.paged_attention.triton_scores import (
    SLOPE,
    STEP,
    capped,
    exponent,
    raw_product,
    scalars,
    split_queries,
    weighted_raw,
)
from stillhouse.kernels.paged_attention.triton_unpack import (
    channel_of,
    load_columns,
    unpack,
)

# Products of a weight and a scalar stay below 2^14; float16 ends at 2^16.
HEADROOM = tl.constexpr(14.0)


@triton.jit
def attend_packed(
    coded_ptr, factor_ptr, offset_ptr, keys_ptr, values_ptr, table_ptr, columns_ptr, row, live_row,
    first, lowest, highest, begin, end, cap, stride_kn, stride_vn, pages,
    C: tl.constexpr, V: tl.constexpr, M: tl.constexpr,
    KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr,
    KEY_TILES: tl.constexpr, VALUE_TILES: tl.constexpr,
    KEY_COLUMNS: tl.constexpr, VALUE_COLUMNS: tl.constexpr,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    HAS_CAP: tl.constexpr, CHECK: tl.constexpr, ASM: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """m, l and a tuple of sums [M, S], float32, over tokens of whole tiles from `begin` to `end`.

    first: int32 [M], the first token that each row sees; lowest and highest: the ends of these.
    TABLE: of keys, as `unpack` has it; for few rows, whose products cost little.
    """
    SPLIT: tl.constexpr = TABLE and KEY_BITS == 4
    factor = tl.load(factor_ptr + row, mask=live_row, other=0.0)
    offset = tl.load(offset_ptr + row, mask=live_row, other=0.0)
    query = coded_queries(coded_ptr, row, live_row, C, KEY_COLUMNS, KEY_TILES, KEY_BITS)
    if SPLIT:
        indexed, bias = split_queries(query, M, KEY_TILES)
        bias *= factor
    m = tl.zeros((M,), tl.float32) + LOWEST
    total = tl.zeros((M,), tl.float32)
    sums = ()
    for _ in tl.static_range(VALUE_TILES):
        sums = sums + (tl.zeros((M, VALUE_COLUMNS), tl.float32),)
    key_columns = load_columns(columns_ptr, KEY_COLUMNS, KEY_BITS)
    value_columns = load_columns(columns_ptr + 64, VALUE_COLUMNS, VALUE_BITS)
    for at in tl.range(begin, end, BLOCK, num_stages=STAGES):
        token = at + tl.arange(0, BLOCK)
        live = (token >= lowest) & (token < end)
        if BLOCK <= PAGE:
            page = tl.load(table_ptr + at // PAGE)
            place = at % PAGE + tl.arange(0, BLOCK)
        else:
            page = tl.load(table_ptr + token // PAGE, mask=live, other=0)
            place = token % PAGE
        if CHECK:
            tl.device_assert((page >= 0) & (page < pages), "a page out of range")
        key_rows = keys_ptr + page.to(tl.int64) * stride_kn
        keys = unpack(
            key_rows,
            live,
            place,
            key_columns,
            C,
            KEY_COLUMNS,
            KEY_BITS,
            PAGE,
            BLOCK > PAGE,
            ASM,
            TABLE,
        )
        score = tl.zeros((M, BLOCK), tl.float32)
        if SPLIT:
            rest = tl.zeros((M, BLOCK), tl.float32)
            for tile in tl.static_range(KEY_TILES):
                score = tl.dot(indexed[tile], tl.trans(keys[tile]), score)
                rest = tl.dot(query[tile], tl.trans(keys[KEY_TILES + tile]), rest)
            rest = rest * (factor * STEP)[:, None] + bias[:, None]
            score = score * (factor * SLOPE)[:, None] + rest
        else:
            for tile in tl.static_range(KEY_TILES):
                score = tl.dot(query[tile], tl.trans(keys[tile]), score)
            score *= factor[:, None]
        if KEY_BITS != 8:
            score *= scalars(key_rows, live, place, C, KEY_BITS, PAGE)[None, :]
        score = capped(score + offset[:, None], cap, HAS_CAP)
        if (at < highest) | (at + BLOCK > end):
            seen = live[None, :] & (token[None, :] >= first[:, None])
            score = tl.where(seen, score, float("-inf"))

        value_rows = values_ptr + page.to(tl.int64) * stride_vn
        product = score
        if VALUE_BITS != 8:
            scalar = scalars(value_rows, live, place, V, VALUE_BITS, PAGE)
            product += exponent(scalar)[None, :]
        top = tl.maximum(m, tl.max(product, axis=1) - HEADROOM)
        weight = tl.exp2(score - top[:, None])
        fade = tl.exp2(m - top)
        m = top
        total = total * fade + tl.sum(weight, axis=1)
        if VALUE_BITS != 8:
            weight *= scalar[None, :]
        weight = weight.to(tl.float16)
        # Numbers in fp8 have no scalar that would be 0 where no token is: they are not read there.
        values = unpack(
            value_rows, live, place, value_columns, V, VALUE_COLUMNS, VALUE_BITS, PAGE,
            BLOCK > PAGE or VALUE_BITS == 8, ASM,
        )  # fmt: skip
        added = ()
        for tile in tl.static_range(VALUE_TILES):
            added = added + (tl.dot(weight, values[tile], sums[tile] * fade[:, None]),)
        sums = added
    return m, total, sums


@triton.jit
def packed_range(first_ptr, last_ptr, room, CHECK: tl.constexpr):
    """A sequence's packed tokens."""
    first, last = tl.load(first_ptr), tl.load(last_ptr)
    if CHECK:
        tl.device_assert((first >= 0) & (last <= room), "packed tokens out of range")
    return first, tl.maximum(last, first)


@triton.jit
def store_sums(
    sums_ptr, sums, row, live_row, V: tl.constexpr, BITS: tl.constexpr, TILES: tl.constexpr,
    S: tl.constexpr,
):  # fmt: skip
    """`attend_packed`'s sums to rows of V channels."""
    root: tl.constexpr = 1.0 if BITS == 8 else V**-0.5
    for tile in tl.static_range(TILES):
        channel = channel_of(tile, tl.arange(0, S), V, BITS)
        tl.store(
            sums_ptr + row[:, None] * V + channel[None, :],
            sums[tile] * root,
            mask=live_row[:, None] & (channel < V)[None, :],
        )


@triton.jit
def _attend_raw(
    query_ptr, keys_ptr, values_ptr, first, last, scale, cap, row, live_row,
    D: tl.constexpr, D_PAD: tl.constexpr, M: tl.constexpr, HAS_CAP: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """m, l and sums [M, D_PAD] over tokens [first, last) in 16 bits."""
    column = tl.arange(0, D_PAD)
    query = tl.load(
        query_ptr + row[:, None] * D + column[None, :],
        mask=live_row[:, None] & (column < D)[None, :],
        other=0.0,
    )
    m = tl.zeros((M,), tl.float32) + LOWEST
    total = tl.zeros((M,), tl.float32)
    sums = tl.zeros((M, D_PAD), tl.float32)
    for at in range(first, last, 16):
        token = at + tl.arange(0, 16)
        place = token[:, None] * D + column[None, :]
        mask = (token < last)[:, None] & (column < D)[None, :]
        key = tl.load(keys_ptr + place, mask=mask, other=0.0).to(query.dtype)
        value = tl.load(values_ptr + place, mask=mask, other=0.0)
        score = raw_product(query, tl.trans(key), tl.zeros((M, 16), tl.float32), ASM)
        score = capped(score * scale, cap, HAS_CAP)
        score = tl.where((token < last)[None, :], score, float("-inf"))
        top = tl.maximum(m, tl.max(score, axis=1))
        weight = tl.exp2(score - top[:, None])
        fade = tl.exp2(m - top)
        m = top
        total = total * fade + tl.sum(weight, axis=1)
        sums = weighted_raw(weight, value, sums * fade[:, None], ASM)
    return m, total, sums


@triton.jit(do_not_specialize=["pages", "room", "raw_tokens", "stride_table"])
def attend_kernel(
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
    raw_keys_ptr,
    raw_values_ptr,
    raw_first_ptr,
    raw_last_ptr,
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
    raw_tokens,
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
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_RAW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    CHECK: tl.constexpr,
    ASM: tl.constexpr,
):
    """M queries and one split of a sequence and head: sums [B, H, N, G, V] of packed tokens, or
    [B, H, G, D] of those in 16 bits, and (m, l) [B, H, N (+ 1), 2, G], all float32.

    A split is so many whole tiles of the true range of the sequence: the grid is fixed. room:
    tokens that the table has pages for.
    """
    TILES: tl.constexpr = (G + M - 1) // M  # of queries; side by side, as they read the same pages
    n, h, b = tl.program_id(0) // TILES, tl.program_id(1), tl.program_id(2)
    head = b * tl.num_programs(1) + h
    row = tl.program_id(0) % TILES * M + tl.arange(0, M)
    live_row = row < G
    if HAS_RAW and n == SPLITS:
        query_ptr += b.to(tl.int64) * stride_qb + h.to(tl.int64) * stride_qh
        raw_keys_ptr += b.to(tl.int64) * stride_rkb + h.to(tl.int64) * stride_rkh
        raw_values_ptr += b.to(tl.int64) * stride_rvb + h.to(tl.int64) * stride_rvh
        first, last = tl.load(raw_first_ptr + b), tl.load(raw_last_ptr + b)
        if CHECK:
            tl.device_assert((first >= 0) & (last <= raw_tokens), "raw tokens out of range")
        m, total, plain = _attend_raw(
            query_ptr, raw_keys_ptr, raw_values_ptr, first, last, scale, cap, row, live_row,
            D, D_PAD, M, HAS_CAP, ASM,
        )  # fmt: skip
        column = tl.arange(0, D_PAD)
        tl.store(
            raw_sums_ptr + (head * G + row)[:, None] * D + column[None, :],
            plain,
            mask=live_row[:, None] & (column < D)[None, :],
        )
    else:
        first, last = packed_range(first_ptr + b, last_ptr + b, room, CHECK)
        begin = first // BLOCK * BLOCK
        span = tl.cdiv(tl.cdiv(last - begin, BLOCK), SPLITS) * BLOCK
        begin += n * span
        m, total, sums = attend_packed(
            coded_ptr + head * (G * C), factor_ptr + head * G, offset_ptr + head * G,
            keys_ptr + h.to(tl.int64) * stride_kh, values_ptr + h.to(tl.int64) * stride_vh,
            table_ptr + b.to(tl.int64) * stride_table, columns_ptr, row, live_row,
            first + tl.zeros((M,), tl.int32), first, first, begin,
            tl.minimum(begin + span, last), cap,
            stride_kn, stride_vn, pages, C, V, M, KEY_BITS, VALUE_BITS, KEY_TILES, VALUE_TILES,
            KEY_COLUMNS, VALUE_COLUMNS, PAGE, BLOCK, STAGES, HAS_CAP, CHECK, ASM,
            TABLE=VALUE_BITS != 8,  # integers are what fp8 takes already
        )  # fmt: skip
        sums_ptr += (head * SPLITS + n).to(tl.int64) * (G * V)
        store_sums(sums_ptr, sums, row, live_row, V, VALUE_BITS, VALUE_TILES, VALUE_COLUMNS)
    ml_ptr += (head * (SPLITS + HAS_RAW) + n) * (2 * G)
    tl.store(ml_ptr + row, m, mask=live_row)
    tl.store(ml_ptr + G + row, total, mask=live_row)
