"""What scores are made of in the Triton kernels of attention over packed pages.

Shape suffixes: M rows in a tile, T tokens of a tile, C coded channels.
"""

import triton
import triton.language as tl

from stillhouse.kernels.paged_attention.ptx_tables import SPLIT4, UNIT

SLOPE, STEP = tl.constexpr(SPLIT4.slope / UNIT), tl.constexpr(SPLIT4.step / UNIT)
BIAS = tl.constexpr(SPLIT4.bias)


@triton.jit
def scalars(rows, live, place, C: tl.constexpr, BITS: tl.constexpr, PAGE: tl.constexpr):
    """float32 [T] of a half page's tokens, 0 where not live; infinities become NaN."""
    at = (rows + PAGE * (C * BITS // 8)).to(tl.pointer_type(tl.float16))
    value = tl.load(at + place, mask=live, other=0.0).to(tl.float32)
    return value * 0.0 + value


@triton.jit
def exponent(scalar):
    """A number above log2 of a scalar's size and at most 0.1 more; -24 for one below float16's."""
    bits = scalar.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.maximum(bits.to(tl.float32) * 2.0**-23 - 126.91, -24.0)


@triton.jit
def capped(score, cap, HAS_CAP: tl.constexpr):
    """cap · tanh(score / cap)."""
    if HAS_CAP:
        # exp2 of at most 0, so that nothing overflows
        small = tl.exp2(-tl.abs(score) * (2.8853900817779268 / cap))
        size = cap * (1.0 - small) / (1.0 + small)
        score = tl.where(score < 0, -size, size)
    return score


@triton.jit
def raw_product(a, b, sums, ASM: tl.constexpr):
    """a · b + sums of numbers in 16 bits."""
    if ASM:
        return tl.dot(a, b, sums)
    else:  # the interpreter multiplies the bits of bfloat16 as if they were integers
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums)


@triton.jit
def weighted_raw(weight, value, sums, ASM: tl.constexpr):
    """weight · value + sums, weights of float32 as two numbers in the values' 16 bits: one alone
    would cost as much as rounding the result does. A single product, of twice as many terms: with
    two, registers hold the sums twice."""
    high = weight.to(value.dtype)
    low = (weight - high.to(tl.float32)).to(value.dtype)
    M: tl.constexpr = weight.shape[0]
    T: tl.constexpr = weight.shape[1]
    S: tl.constexpr = value.shape[1]
    both = tl.reshape(tl.permute(tl.join(high, low), (0, 2, 1)), (M, 2 * T))
    twice = tl.reshape(tl.permute(tl.join(value, value), (2, 0, 1)), (2 * T, S))
    return raw_product(both, twice, sums, ASM)


@triton.jit
def split_queries(query, M: tl.constexpr, TILES: tl.constexpr):
    """Queries for tiles of indices, of which odd ones are 16 times as large, and what a product
    with the centroids has beside those with indices and bytes."""
    indexed = ()
    total = tl.zeros((M,), tl.float32)
    for tile in tl.static_range(TILES):
        wide = query[tile].to(tl.float32)
        total += tl.sum(wide, axis=1)
        indexed = indexed + ((wide / 16).to(tl.float16) if tile % 2 else query[tile],)
    return indexed, total * -BIAS
