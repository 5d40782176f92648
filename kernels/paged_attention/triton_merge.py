"""The Triton kernel that merges the splits of `triton_attend` and maps values back.

Shape suffixes: B sequences, H key/value heads, G queries of each, N splits, D head size, V coded
channels of values.
"""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e30)  # the score of no token; a number, so that differences are none


@triton.jit
def merge_kernel(
    sums_ptr,
    raw_sums_ptr,
    ml_ptr,
    map_ptr,
    mean_ptr,
    out_ptr,
    lse_ptr,
    stride_map,
    stride_mean,
    D: tl.constexpr,
    V: tl.constexpr,
    V_PAD: tl.constexpr,
    G: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    TAKEN: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_RAW: tl.constexpr,
    HAS_MAP: tl.constexpr,
    HAS_MEAN: tl.constexpr,
):
    """One query's splits to [B, H, G, D] in the dtype of out_ptr, zeros where no token was seen,
    and the natural logarithm of its sum of exponentials, float32 [B, H, G], -inf there.

    Sums of packed values go through the map [H or 1, V, D] and have their mean [H or 1, D] added.
    TAKEN splits are read at a time.
    """
    g, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head = b * tl.num_programs(1) + h
    ALL: tl.constexpr = SPLITS + HAS_RAW
    ml_ptr += head * (ALL * 2 * G) + g
    split = tl.arange(0, SPLITS_PAD)
    m = tl.load(ml_ptr + split * (2 * G), mask=split < ALL, other=LOWEST)
    mass = tl.load(ml_ptr + split * (2 * G) + G, mask=split < ALL, other=0.0)
    top = tl.max(m, axis=0)
    share = mass * tl.exp2(m - top)
    total = tl.sum(share, axis=0)
    seen = total != 0  # also where it is NaN
    norm = 1.0 / tl.where(seen, total, 1.0)

    channel = tl.arange(0, V_PAD)
    sums_ptr += (head * SPLITS).to(tl.int64) * (G * V) + g * V
    part = tl.zeros((V_PAD,), dtype=tl.float32)
    for start in range(0, SPLITS, TAKEN):
        n = start + tl.arange(0, TAKEN)
        scale = tl.exp2(tl.load(ml_ptr + n * (2 * G), mask=n < SPLITS, other=LOWEST) - top)
        taken = tl.load(
            sums_ptr + n[:, None] * (G * V) + channel[None, :],
            mask=(n < SPLITS)[:, None] & (channel < V)[None, :],
            other=0.0,
        )
        part += tl.sum(taken * scale[:, None], axis=0)
    part *= norm

    raw_sums_ptr += (head * G + g) * D
    out_ptr += (head * G + g) * D
    for start in range(0, D, CHUNK):
        column = start + tl.arange(0, CHUNK)
        if HAS_MAP:
            weight = tl.load(
                map_ptr + h * stride_map + channel[:, None] * D + column[None, :],
                mask=(channel < V)[:, None] & (column < D)[None, :],
                other=0.0,
            )
        else:
            weight = (channel[:, None] == column[None, :]).to(tl.float32)
        out = tl.sum(part[:, None] * weight, axis=0)
        if HAS_MEAN:
            mean = tl.load(mean_ptr + h * stride_mean + column, mask=column < D, other=0.0)
            out += tl.sum(tl.where(split < SPLITS, share, 0.0), axis=0) * norm * mean
        if HAS_RAW:
            scale = tl.exp2(tl.load(ml_ptr + SPLITS * (2 * G)) - top) * norm
            out += tl.load(raw_sums_ptr + column, mask=column < D, other=0.0) * scale
        tl.store(out_ptr + column, out.to(out_ptr.dtype.element_ty), mask=column < D)
    lse = tl.where(seen, (top + tl.log2(tl.where(seen, total, 1.0))) * LN2, float("-inf"))
    tl.store(lse_ptr + head * G + g, lse)
