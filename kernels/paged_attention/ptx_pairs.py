"""PTX that computes pairs of float16 centroids from packed indices; `triton_unpack` inlines it.

With i the index of b bits, u = (i - (2^b - 1)/2) / 2^(b-2), a centroid is u · P(u²), P of least
mean squared error over the codebook's law (`POLYNOMIALS`). For a pair that is one multiply-add to
make u, one product for its square, a multiply-add for each further coefficient and one product; the
indices enter as the mantissa bits of 1024 + i, by one logical operation. What is looked up instead
is in `ptx_tables`; what registers hold, in `ptx_writer`.
"""

import struct

from stillhouse.kernels.paged_attention.ptx_writer import Assembly, Writer, planes3

GPU_BITS = (2, 3, 4, 8)
# P from the constant up, float16. Root mean square errors, as evaluated here in float16, over the
# codebook's law: 4.1e-4, 5.8e-4 and 3.3e-4 of a centroid's (2.2e-4, 1.6e-4, 2.1e-4 of rounding).
POLYNOMIALS = {
    2: (0.89306640625, 0.050689697265625),
    3: (0.9814453125, 0.038604736328125, 0.01389312744140625),
    4: (
        1.02734375,
        0.052215576171875,
        0.0202178955078125,
        -0.006999969482421875,
        0.001964569091796875,
    ),
}
_ONE = "0x64006400"  # two 1024.0: the last bit of their mantissas counts 1


def unpack_assembly(bits: int, fold: bool) -> Assembly:
    """2 and 4 bits. fold: a second input holds how far each pair's elements are shifted right, 0 or
    4, and only the lower half of each byte is decoded."""
    write, inner = Writer(), 4 if fold else 8
    outputs = 2 * inner // bits
    word = f"${outputs}"
    if fold:
        word = write.shifted(word, f"${outputs + 1}")
    found = [
        _centroid(write, write.field(byte, (2**bits - 1) << at, _ONE), at, bits)
        for byte in write.byte_words(word)
        for at in range(0, inner, bits)
    ]
    return write.assembly(found, 1 + fold)


def unpack3_assembly(fold: bool) -> Assembly:
    """3 bits; inputs as `planes3` takes them."""
    write = Writer()
    even, odd = (write.byte_words(word) for word in planes3(write, fold, clean=False))
    found = [
        _centroid(write, write.field(word[byte], 7 << at, _ONE), at, 3)
        for byte in range(2)
        for at in ((0,) if fold else (0, 4))
        for word in (even, odd)
    ]
    return write.assembly(found, 3 + fold)


def fp8_assembly() -> Assembly:
    """e4m3 to float16 on any processor: its bits are those of a float16 2^8 times smaller.

    480 = 0x7f would be the next number; it stands for NaN: it alone overflows times 146 · 2^8.
    """
    write = Writer()
    found = []
    for word in write.byte_words("$2"):
        sign = write.put("and.b32", write.put("shl.b32", word, "8"), "0x80008000")
        small = write.field(write.put("shl.b32", word, "7"), 0x3F80, sign)
        value = write.put("mul.rn.f16x2", small, write.constant(256.0))
        large = write.put("mul.rn.f16x2", small, write.constant(256.0 * 146))
        found.append(write.put("fma.rn.f16x2", large, write.constant(0.0), value))
    return write.assembly(found, 1)


def _centroid(write: Writer, x: str, at: int, bits: int) -> str:
    """From 1024 + 2^at · index."""
    middle, scale = (2**bits - 1) / 2, 2.0 ** (2 - bits)
    start = (1024 * 2.0**-at + middle) * scale
    if not _is_half(start):
        x = write.put("add.rn.f16x2", x, write.constant(-1024.0))
        start = middle * scale
    u = write.put("fma.rn.f16x2", x, write.constant(scale * 2.0**-at), write.constant(-start))
    square = write.put("mul.rn.f16x2", u, u)
    *rest, top = POLYNOMIALS[bits]
    value = write.constant(top)
    for coefficient in reversed(rest):
        value = write.put("fma.rn.f16x2", value, square, write.constant(coefficient))
    return write.put("mul.rn.f16x2", u, value)


def _is_half(value: float) -> bool:
    """Whether float16 holds it exactly."""
    return bool(struct.unpack("e", struct.pack("e", value))[0] == value)
