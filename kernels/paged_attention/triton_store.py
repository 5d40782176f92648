"""The Triton kernel that encodes new keys and values and writes them into their pages, in one pass.

The last axis of its grid chooses keys or values. Coded channels are held as 8 runs of S columns,
as in `turboquant.triton_kernels`, whose rounding, scalars and packing these are.

Shape suffixes: T tokens, H key/value heads, D head size, C coded channels, N pages, Y bytes of a
half page; in the kernel K is a chunk of the contracted axis.
"""

import triton
import triton.language as tl

from stillhouse.kernels.turboquant.triton_kernels import nearest, store_plane, stored_scalar

# float32 numbers as integers
SMALLEST_NORMAL = tl.constexpr(0x3C800000)  # of e4m3: 2^-6
LARGEST = tl.constexpr(0x43E80000)  # 464, the tie between 448 and the absent 480
INFINITY = tl.constexpr(0x7F800000)
SHIFTER = tl.constexpr(0x46800000)  # 2^14, whose last place is that of e4m3's subnormal numbers


@triton.jit
def fp8_codes(x):
    """e4m3 numbers, int32 in 0…255, nearest to float32 ones, ties to even; 0x7F past 464.

    By integers, because sm_80 has no instruction for it.
    """
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # 20 of 23 bits of the mantissa go; 120 lies between the exponents' biases.
    below = tl.minimum(size, INFINITY)  # a NaN would leave the integers
    normal = ((below + 0x7FFFF + ((below >> 20) & 1)) >> 20) - (120 << 3)
    tiny = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - SHIFTER
    code = tl.where(size < SMALLEST_NORMAL, tiny, normal)
    sign = (bits >> 24) & 0x80
    lost = size > LARGEST
    # A NaN keeps its sign, a number that e4m3 has no room for does not, as with `Fp8Codec`.
    sign = tl.where(lost & (size <= INFINITY), 0, sign)
    return tl.where(lost, 0x7F, code) | sign


@triton.jit
def _store_fp8(x_rows, half_rows, place, live, D: tl.constexpr, D_PAD: tl.constexpr):
    """Rows of D numbers to rows of D bytes."""
    column = tl.arange(0, D_PAD)
    mask = live[:, None] & (column < D)[None, :]
    x = tl.load(x_rows[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
    rows = half_rows + place * D
    tl.store(rows[:, None] + column[None, :], fp8_codes(x).to(tl.uint8), mask=mask)


@triton.jit
def _transformed(
    x_rows, matrix_ptr, mean_ptr, head, stride_matrix, stride_mean, live,
    D: tl.constexpr, C: tl.constexpr, S: tl.constexpr, HAS_MAP: tl.constexpr,
    HAS_MEAN: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Coded channels [BLOCK, 8 S], float32: map [D, 8 S] times (x - mean), or its first C."""
    N: tl.constexpr = 8 * S
    E: tl.constexpr = C // 8
    column = tl.arange(0, N)
    if HAS_MEAN:
        mean_ptr += head * stride_mean
    if HAS_MAP:
        matrix_ptr += head * stride_matrix
        y = tl.zeros((BLOCK, N), dtype=tl.float32)
        for start in range(0, D, CHUNK):
            k = start + tl.arange(0, CHUNK)
            z = tl.load(x_rows[:, None] + k[None, :], mask=live[:, None], other=0.0).to(tl.float32)
            if HAS_MEAN:
                z -= tl.load(mean_ptr + k)[None, :]
            weight = tl.load(matrix_ptr + k[:, None] * N + column[None, :])
            y = tl.dot(z, weight, y, input_precision="ieee")
        return y
    else:
        channel = column // S * E + column % S
        inside = column % S < E
        mask = live[:, None] & inside[None, :]
        y = tl.load(x_rows[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        if HAS_MEAN:
            y -= tl.load(mean_ptr + channel, mask=inside, other=0.0)[None, :]
        return y


@triton.jit
def _store_coded(
    y, half_rows, place, live, boundary_ptr, centroid_ptr,
    C: tl.constexpr, S: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr,
    PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Indices and scalars of coded channels [BLOCK, 8 S] into half pages."""
    E: tl.constexpr = C // 8
    norm = tl.sqrt_rn(tl.sum(y * y, axis=1))
    root: tl.constexpr = C**0.5
    # The zero vector stays zero.
    to_unit = tl.div_rn(tl.full((BLOCK,), root, tl.float32), tl.where(norm > 0, norm, 1.0))
    unit = y * to_unit[:, None]
    index, centroid = nearest(unit, boundary_ptr, centroid_ptr, BITS)
    if S != E:
        centroid = tl.where((tl.arange(0, 8 * S) % S < E)[None, :], centroid, 0.0)
    scalar = stored_scalar(norm, unit, centroid, KIND, C)
    row_of_scalars = (half_rows + PAGE * (E * BITS)).to(tl.pointer_type(tl.float16))
    tl.store(row_of_scalars + place, scalar.to(tl.float16), mask=live)
    LOW: tl.constexpr = 2 if BITS == 3 else BITS
    rows = half_rows + place * (E * LOW)
    store_plane(rows, index & ((1 << LOW) - 1), live, LOW, E, S, BLOCK)
    if LOW != BITS:
        rows = half_rows + PAGE * (E * LOW) + place * E
        store_plane(rows, index >> LOW, live, 1, E, S, BLOCK)


@triton.jit
def _store_half(
    x_rows, matrix_ptr, mean_ptr, boundary_ptr, centroid_ptr, half_rows, head, stride_matrix,
    stride_mean, place, live,
    D: tl.constexpr, D_PAD: tl.constexpr, C: tl.constexpr, S: tl.constexpr, BITS: tl.constexpr,
    KIND: tl.constexpr, HAS_MAP: tl.constexpr, HAS_MEAN: tl.constexpr,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    if BITS == 8:
        _store_fp8(x_rows, half_rows, place, live, D, D_PAD)
    else:
        y = _transformed(
            x_rows, matrix_ptr, mean_ptr, head, stride_matrix, stride_mean, live,
            D, C, S, HAS_MAP, HAS_MEAN, BLOCK, CHUNK,
        )  # fmt: skip
        _store_coded(
            y, half_rows, place, live, boundary_ptr, centroid_ptr, C, S, BITS, KIND, PAGE, BLOCK
        )


@triton.jit(do_not_specialize=["T", "pages"])
def store_kernel(
    key_ptr,
    key_matrix_ptr,
    key_mean_ptr,
    key_boundary_ptr,
    key_centroid_ptr,
    key_pages_ptr,
    value_ptr,
    value_matrix_ptr,
    value_mean_ptr,
    value_boundary_ptr,
    value_centroid_ptr,
    value_pages_ptr,
    slot_ptr,
    stride_kt,
    stride_kh,
    stride_key_matrix,
    stride_key_mean,
    stride_key_page,
    stride_key_head,
    stride_vt,
    stride_vh,
    stride_value_matrix,
    stride_value_mean,
    stride_value_page,
    stride_value_head,
    T,
    pages,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    KEY_C: tl.constexpr,
    VALUE_C: tl.constexpr,
    KEY_S: tl.constexpr,
    VALUE_S: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    KEY_KIND: tl.constexpr,
    VALUE_KIND: tl.constexpr,
    KEY_HAS_MAP: tl.constexpr,
    VALUE_HAS_MAP: tl.constexpr,
    KEY_HAS_MEAN: tl.constexpr,
    VALUE_HAS_MEAN: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    CHECK: tl.constexpr,
):
    """Keys and values [T, H, D] into half pages [N, H, Y] at slots [T], page · PAGE + place.

    A slot below 0 is that of a token which is not stored. Matrices [H or 1, D, 8 S] and means
    [H or 1, D] are float32, their strides 0 where heads share them.
    """
    # Offsets of tokens and pages are 64-bit: a cache has more than 2^31 bytes.
    first = tl.program_id(0) * BLOCK
    head = tl.program_id(1)
    row = tl.arange(0, BLOCK)
    slot = tl.load(slot_ptr + first + row, mask=first + row < T, other=-1)
    live = slot >= 0
    page = (slot // PAGE).to(tl.int64)
    place = (slot % PAGE).to(tl.int32)
    if CHECK:
        tl.device_assert((slot >= -1) & (page < pages), "a slot out of range")
    if tl.program_id(2) == 0:
        x_rows = key_ptr + first.to(tl.int64) * stride_kt + head.to(tl.int64) * stride_kh
        half_rows = key_pages_ptr + page * stride_key_page + head.to(tl.int64) * stride_key_head
        _store_half(
            x_rows + row * stride_kt, key_matrix_ptr, key_mean_ptr, key_boundary_ptr,
            key_centroid_ptr, half_rows, head, stride_key_matrix, stride_key_mean,
            place, live, D, D_PAD, KEY_C, KEY_S, KEY_BITS, KEY_KIND,
            KEY_HAS_MAP, KEY_HAS_MEAN, PAGE, BLOCK, CHUNK,
        )  # fmt: skip
    else:
        x_rows = value_ptr + first.to(tl.int64) * stride_vt + head.to(tl.int64) * stride_vh
        half_rows = value_pages_ptr + page * stride_value_page
        half_rows += head.to(tl.int64) * stride_value_head
        _store_half(
            x_rows + row * stride_vt, value_matrix_ptr, value_mean_ptr, value_boundary_ptr,
            value_centroid_ptr, half_rows, head, stride_value_matrix, stride_value_mean,
            place, live, D, D_PAD, VALUE_C, VALUE_S, VALUE_BITS, VALUE_KIND,
            VALUE_HAS_MAP, VALUE_HAS_MEAN, PAGE, BLOCK, CHUNK,
        )  # fmt: skip
