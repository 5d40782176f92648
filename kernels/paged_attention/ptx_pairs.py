"""PTX that turns packed indices into pairs of float16 centroids; `triton_unpack` inlines it.

A centroid is computed, not looked up: with i the index of b bits, u = (i - (2^b - 1)/2) / 2^(b-2),
it is u · P(u²), P of least mean squared error over the codebook's law (`POLYNOMIALS`). For a pair
that is one multiply-add to make u, one product for its square, a multiply-add for each further
coefficient and one product; the indices enter as the mantissa bits of 1024 + i, by one logical
operation. A table would be gathered from memory, or cost more integer operations.

Input registers hold two 16-bit elements, each of two bytes j and j + 1 of one packed row. Output
registers hold two float16, of the same byte of both elements: first those of both bytes j, one for
each index in a byte, then those of both bytes j + 1.
"""

import struct
from typing import NamedTuple

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


class Assembly(NamedTuple):
    """Code and constraints of `tl.inline_asm_elementwise`."""

    code: str
    constraints: str


def unpack_assembly(bits: int, fold: bool) -> Assembly:
    """2 and 4 bits. fold: a second input holds how far each pair's elements are shifted right, 0 or
    4, and only the lower half of each byte is decoded."""
    write, inner = _Writer(), 4 if fold else 8
    outputs = 2 * inner // bits
    word = f"${outputs}"
    if fold:
        word = write.put("shr.u32", word, write.put("and.b32", f"${outputs + 1}", "7"))
    found = [
        write.centroid(write.field(byte, (2**bits - 1) << at, _ONE), at, bits)
        for byte in write.bytes(word)
        for at in range(0, inner, bits)
    ]
    return write.assembly(found, 1 + fold)


def unpack3_assembly(fold: bool) -> Assembly:
    """Inputs: the plane of 2 bits, that of 1 bit, how far the latter is shifted right so that its
    bits 0, 2, 4, 6 are those wanted; with `fold` how far the former is, as in `unpack_assembly`."""
    write, inner = _Writer(), 4 if fold else 8
    outputs = inner
    low, high, shift = (f"${outputs + n}" for n in range(3))
    high = write.put("shr.u32", high, write.put("and.b32", shift, "7"))
    if fold:
        low = write.put("shr.u32", low, write.put("and.b32", f"${outputs + 3}", "7"))
    found = []
    for low_byte, high_byte in zip(write.bytes(low), write.bytes(high), strict=True):
        third = write.put("shl.b32", high_byte, "2")
        for at in range(0, inner, 2):
            x = write.field(low_byte, 3 << at, _ONE)
            found.append(write.centroid(write.field(third, 4 << at, x), at, 3))
    return write.assembly(found, 3 + fold)


def fp8_assembly() -> Assembly:
    """e4m3 to float16 on any processor: its bits are those of a float16 2^8 times smaller.

    480 = 0x7f would be the next number; it stands for NaN: it alone overflows times 146 · 2^8.
    """
    write = _Writer()
    found = []
    for word in write.bytes("$2"):
        sign = write.put("and.b32", write.put("shl.b32", word, "8"), "0x80008000")
        small = write.field(write.put("shl.b32", word, "7"), 0x3F80, sign)
        value = write.put("mul.rn.f16x2", small, write.constant(256.0))
        large = write.put("mul.rn.f16x2", small, write.constant(256.0 * 146))
        found.append(write.put("fma.rn.f16x2", large, write.constant(0.0), value))
    return write.assembly(found, 1)


class _Writer:
    """Collects PTX; every value is a fresh register of 32 bits."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._count = 0
        self._constants: dict[float, str] = {}

    def put(self, operation: str, *operands: str) -> str:
        name = f"v{self._count}"
        self._count += 1
        self._lines.append(f"{operation} {name}, {', '.join(operands)};")
        return name

    def constant(self, value: float) -> str:
        """A register with two of it, rounded to float16."""
        if value not in self._constants:
            literal = "0x" + 2 * struct.pack(">e", value).hex()
            self._constants[value] = self.put("mov.b32", literal)
        return self._constants[value]

    def field(self, word: str, mask: int, other: str) -> str:
        """(word & mask in both lanes) | other."""
        return self.put("lop3.b32", word, f"0x{mask:04x}{mask:04x}", other, "0xea")

    def bytes(self, word: str) -> list[str]:
        """Words whose lanes end in the first bytes, and in the second bytes, of both elements."""
        return [word, self.put("shr.u32", word, "8")]

    def centroid(self, x: str, at: int, bits: int) -> str:
        """From 1024 + 2^at · index."""
        middle, scale = (2**bits - 1) / 2, 2.0 ** (2 - bits)
        start = (1024 * 2.0**-at + middle) * scale
        if not _is_half(start):
            x = self.put("add.rn.f16x2", x, self.constant(-1024.0))
            start = middle * scale
        u = self.put("fma.rn.f16x2", x, self.constant(scale * 2.0**-at), self.constant(-start))
        square = self.put("mul.rn.f16x2", u, u)
        *rest, top = POLYNOMIALS[bits]
        value = self.constant(top)
        for coefficient in reversed(rest):
            value = self.put("fma.rn.f16x2", value, square, self.constant(coefficient))
        return self.put("mul.rn.f16x2", u, value)

    def assembly(self, outputs: list[str], inputs: int) -> Assembly:
        registers = f".reg .b32 v<{self._count}>;"
        moves = [f"mov.b32 ${place}, {name};" for place, name in enumerate(outputs)]
        code = "\n".join(["{", registers, *self._lines, *moves, "}"])
        return Assembly(code, ",".join(["=r"] * len(outputs) + ["r"] * inputs))


def _is_half(value: float) -> bool:
    """Whether float16 holds it exactly."""
    return bool(struct.unpack("e", struct.pack("e", value))[0] == value)
