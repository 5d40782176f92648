"""PTX that looks centroids up in registers, by byte permutations; `triton_unpack` inlines it.

A permutation takes four nibbles as places in 8 bytes. Three bits find the two bytes of a float16,
exact. Four bits are too many for it, but a product is linear: with i the index, a centroid is
slope · i + step · byte(i) - bias (`SPLIT4`), so that queries are multiplied by the indices, and by
the bytes, each as they are: as the last bits of a float16 below 2^-14, which counts them in 2^-24.
That leaves the multiply-adds of `ptx_pairs` to the tensor cores, and takes integer instructions in
their place; so it pays for keys beside values that are computed.
"""

import struct
from typing import NamedTuple

from stillhouse.kernels.paged_attention.ptx_writer import Assembly, Writer, planes3
from stillhouse.kernels.turboquant import gaussian_codebook

UNIT = 2.0**-24  # of the last bit of a float16 below 2^-14


class Split(NamedTuple):
    """Centroids as slope · index + step · byte - bias; bytes are below 128."""

    slope: float
    step: float
    bytes: tuple[int, ...]

    @property
    def bias(self) -> float:
        """Where index and byte are in their middles."""
        return self.slope * (len(self.bytes) - 1) / 2 + self.step * 63.5


# Root mean square error over the codebook's law: 4.8e-4, the least of a search over slope and step.
_ABOVE = (57, 44, 33, 25, 22, 28, 50, 111)  # bytes of the centroids above 0
SPLIT4 = Split(0.3296478, 0.00548388, (*(127 - byte for byte in reversed(_ABOVE)), *_ABOVE))
TABLE3 = tuple(
    struct.unpack("e", struct.pack("e", centroid))[0] for centroid in gaussian_codebook(3).centroids
)


def split4_assembly() -> Assembly:
    """4 bits: indices, those in a byte's upper half 16 times as large, then bytes; both in units of
    2^-24. Each four outputs."""
    write = Writer()
    word = "$8"
    # Each table gives 0 for the nibbles of the other.
    below, above = bytes(SPLIT4.bytes[:8]), bytes(SPLIT4.bytes[8:])
    flipped = write.put("xor.b32", word, "0x88888888")
    elements = []
    for shift in (0, 16):
        places = [
            write.put("shr.u32", part, f"{shift}") if shift else part for part in (word, flipped)
        ]
        parts = [write.look_up(*pair) for pair in zip((below, above), places, strict=True)]
        elements.append(write.put("or.b32", *parts))
    indices = [
        write.put("and.b32", byte, f"0x{15 << at:04x}{15 << at:04x}")
        for byte in write.byte_words(word)
        for at in (0, 4)
    ]
    first, second = elements
    found = [write.chosen(first, second, (n, 8 + n, 4 + n, 12 + n)) for n in range(4)]
    return write.assembly(indices + found, 1)


def table3_assembly(fold: bool) -> Assembly:
    """3 bits, as `ptx_pairs.unpack3_assembly`, but exact."""
    write = Writer()
    nibbles = (0, 2) if fold else (0, 1, 2, 3)
    words = [_looked_up3(write, word, nibbles) for word in planes3(write, fold, clean=True)]
    # The bytes' nibbles, and of each the even and the odd index.
    found = [word[n] for n in range(len(nibbles)) for word in words]
    return write.assembly(found, 3 + fold)


def _looked_up3(write: Writer, word: str, nibbles: tuple[int, ...]) -> list[str]:
    """Centroids of some nibbles of both elements, a register each."""
    codes = [struct.pack("<e", value) for value in TABLE3]
    tables = [bytes(code[byte] for code in codes) for byte in (0, 1)]
    pairs = list(zip(nibbles[::2], nibbles[1::2], strict=True))
    elements = []
    for element in (word, write.put("shr.u32", word, "16")):
        low, high = (write.look_up(table, element) for table in tables)
        elements.append([write.chosen(low, high, (a, 4 + a, b, 4 + b)) for a, b in pairs])
    return [
        write.chosen(first, second, places)
        for first, second in zip(*elements, strict=True)
        for places in ((0, 1, 4, 5), (2, 3, 6, 7))
    ]
