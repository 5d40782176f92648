"""Writes the PTX that `ptx_pairs` and `ptx_tables` are made of, in the form that Triton inlines.

A register of 32 bits holds two 16-bit elements, each of two bytes j and j + 1 of one packed row.
Output registers hold two float16, of the same place in both elements: first those of both bytes j,
one for each index in a byte, then those of both bytes j + 1.
"""

import struct
from typing import NamedTuple


class Assembly(NamedTuple):
    """Code and constraints of `tl.inline_asm_elementwise`."""

    code: str
    constraints: str


class Writer:
    """Collects PTX; every value is a fresh register of 32 bits."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._count = 0
        self._words: dict[str, str] = {}

    def put(self, operation: str, *operands: str) -> str:
        """The register of an operation's result."""
        name = f"v{self._count}"
        self._count += 1
        self._lines.append(f"{operation} {name}, {', '.join(operands)};")
        return name

    def word(self, literal: bytes) -> str:
        """A register of four bytes, the lowest first."""
        name = "0x" + bytes(reversed(literal)).hex()
        if name not in self._words:
            self._words[name] = self.put("mov.b32", name)
        return self._words[name]

    def constant(self, value: float) -> str:
        """A register with two of it, rounded to float16."""
        return self.word(2 * struct.pack("<e", value))

    def field(self, word: str, mask: int, other: str) -> str:
        """(word & mask in both lanes) | other."""
        return self.put("lop3.b32", word, f"0x{mask:04x}{mask:04x}", other, "0xea")

    def byte_words(self, word: str) -> list[str]:
        """Words whose lanes end in the first bytes, and in the second bytes, of both elements."""
        return [word, self.put("shr.u32", word, "8")]

    def shifted(self, word: str, count: str) -> str:
        """Both lanes shifted right, by as much as the lower lane of `count` says, up to 7; a lane's
        topmost bits are the other's."""
        return self.put("shf.r.wrap.b32", word, self.word(bytes(4)), count)

    def look_up(self, table: bytes, selector: str) -> str:
        """A register of table bytes, one for each nibble of the selector's lower lane.

        table: of 8 bytes. A nibble of 8 or more gives 0x00 for a byte below 128, and 0xff.
        """
        return self.put("prmt.b32", self.word(table[:4]), self.word(table[4:]), selector)

    def chosen(self, low: str, high: str, places: tuple[int, int, int, int]) -> str:
        """A register of bytes of two registers: 0 to 3 of the first, 4 to 7 of the second; 8 more
        for 0x00 where the byte is below 128."""
        return self.put(
            "prmt.b32", low, high, f"0x{sum(n << 4 * at for at, n in enumerate(places)):04x}"
        )

    def nibbles3(self, low: str, third: str) -> tuple[str, str]:
        """Indices of 3 bits from both planes, one a nibble: those at bits 0 and 4 of the bytes of
        `low`, and those at bits 2 and 6; their third bits are bits 0, 2, 4 and 6 of `third`, whose
        others are the nibbles' topmost."""
        mask, either = "0x33333333", "0xca"  # mask ? low : third
        even = self.put("lop3.b32", mask, low, self.put("shl.b32", third, "2"), either)
        odd = self.put("lop3.b32", mask, self.put("shr.u32", low, "2"), third, either)
        return even, odd

    def assembly(self, outputs: list[str], inputs: int) -> Assembly:
        """All that was put."""
        registers = f".reg .b32 v<{self._count}>;"
        moves = [f"mov.b32 ${place}, {name};" for place, name in enumerate(outputs)]
        code = "\n".join(["{", registers, *self._lines, *moves, "}"])
        return Assembly(code, ",".join(["=r"] * len(outputs) + ["r"] * inputs))


def planes3(write: Writer, fold: bool, *, clean: bool) -> tuple[str, str]:
    """`nibbles3`, the topmost bit of each 0 if `clean`, of the inputs behind all outputs.

    These are the plane of 2 bits, that of 1 bit, and which bits of the latter are wanted: 0 for
    bits 0, 2, 4, 6, all ones for bits 1, 3, 5, 7. With `fold` also how far both are shifted right
    first, 0 or 4, the same for a pair: only the lower half of each byte is wanted then.
    """
    low, high, odd, half = (f"${(4 if fold else 8) + n}" for n in range(4))
    if fold:
        low, high = write.shifted(low, half), write.shifted(high, half)
    # Elements of a pair may differ in this: neighbours in a row, of another run each.
    high = write.put("lop3.b32", odd, write.put("shr.u32", high, "1"), high, "0xca")
    if clean:
        high = write.put("and.b32", high, "0x55555555")
    return write.nibbles3(low, high)
