"""From packed bytes to centroids in registers: a lane is a token of keys, a channel of values.

Keys: the dwords of 16 tokens' rows are transposed in registers. Values: the bytes of a row are
spread over the lanes. An index becomes its centroid by one permutation of the register that holds
the codebook.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from llvmlite import ir

from stillhouse.kernels.paged_attention.cpu_lanes import (
    I8,
    I16,
    I32,
    I64,
    LANES,
    VF,
    VH,
    VI,
    LaneWriter,
)
from stillhouse.kernels.paged_attention.pages import Plane


class UnpackWriter(LaneWriter):
    """permute: `avx512`, `avx2` or `` for how tables are read. books: float32 [groups, 32]."""

    def __init__(self, function: ir.Function, permute: str, books: Any) -> None:
        super().__init__(function)
        self.permute, self.books = permute, books

    # A lane a token

    def columns(self, plane: Plane, base: Any, slot: Any) -> list[Any]:
        """Dwords of 16 tokens' rows, a lane a token; the last may hold fewer bytes."""
        b = self.b
        start = b.add(I64(plane.first), b.mul(slot, I64(plane.stride)))
        row = b.gep(base, [start])
        found: list[Any] = []
        at = 0
        while at < plane.row_bytes:
            left = plane.row_bytes - at
            size = next(n for n in (16, 8, 4, 2, 1) if left >= n)
            if size == 16:
                found += self.transposed(row, plane.stride, at)
            elif size == 8:
                found += self.paired(row, plane.stride, at)
            else:
                found.append(self.gathered(row, plane.stride, at, size))
            at += size
        return found

    def paired(self, row: Any, stride: int, at: int) -> list[Any]:
        """The two dwords from byte `at` on of 16 rows."""
        kind = ir.VectorType(I32, 2)
        if stride == 8:
            halves = [self.load(row, 64 * part, VI) for part in (0, 1)]
        else:
            parts = [self.load(row, lane * stride + at, kind) for lane in range(LANES)]
            while len(parts) > 2:
                size = 2 * parts[0].type.count
                parts = [
                    self.shuffle(parts[i], parts[i + 1], range(size))
                    for i in range(0, len(parts), 2)
                ]
            halves = parts
        return [self.shuffle(halves[0], halves[1], range(first, 32, 2)) for first in (0, 1)]

    def transposed(self, row: Any, stride: int, at: int) -> list[Any]:
        """The four dwords from byte `at` on of 16 rows: register k has rows k, 4 + k, 8 + k, …"""
        b = self.b
        quads = []
        for k in range(4):
            parts = [
                self.load(row, (4 * q + k) * stride + at, ir.VectorType(I32, 4)) for q in range(4)
            ]
            pairs = [self.shuffle(parts[i], parts[i + 1], range(8)) for i in (0, 2)]
            quads.append(self.shuffle(pairs[0], pairs[1], range(16)))
        low = [self.unpacked(quads[0], quads[1], half) for half in (0, 2)]
        high = [self.unpacked(quads[2], quads[3], half) for half in (0, 2)]
        out = []
        for half in (0, 1):
            for first in (0, 2):
                lanes = []
                for lane in range(0, LANES, 4):
                    lanes += [lane + first, lane + first + 1, 16 + lane + first, 17 + lane + first]
                out.append(b.shuffle_vector(low[half], high[half], ir.Constant(VI, lanes)))
        return out

    def unpacked(self, left: Any, right: Any, half: int) -> Any:
        """Dwords `half` and `half` + 1 of each quarter, of left and right in turn."""
        lanes = []
        for lane in range(0, LANES, 4):
            lanes += [lane + half, 16 + lane + half, lane + half + 1, 17 + lane + half]
        return self.b.shuffle_vector(left, right, ir.Constant(VI, lanes))

    def gathered(self, row: Any, stride: int, at: int, size: int) -> Any:
        """`size` bytes of each of 16 rows."""
        b, kind = self.b, ir.IntType(8 * size)
        found = ir.Constant(VI, ir.Undefined)
        for lane in range(LANES):
            part = self.load(row, lane * stride + at, kind)
            found = b.insert_element(found, part if size == 4 else b.zext(part, I32), I32(lane))
        return found

    def token_indices(
        self, planes: Sequence[Plane], columns: Sequence[list[Any]]
    ) -> Iterator[tuple[int, Any]]:
        """Every channel and its index, a lane a token; bits above it are not clear.

        In the order of the bytes, so that few registers are held. Two planes that hold four
        channels in the bytes of one dword each are merged once for the four.
        """
        low = planes[0]
        for first in range(0, low.row_bytes, 4):
            count = min(4, low.row_bytes - first)
            for run in range(8 // low.width):
                channels = [run * low.row_bytes + first + i for i in range(count)]
                dwords = self.four_together(planes, columns, channels)
                for i, c in enumerate(channels):
                    if dwords is None:
                        yield c, self.token_index(planes, columns, c)
                    else:
                        yield c, self.shifted(dwords, 8 * i)

    def four_together(
        self, planes: Sequence[Plane], columns: Sequence[list[Any]], channels: Sequence[int]
    ) -> Any:
        """The indices of four channels in the bytes of a dword; None where they do not lie so."""
        if len(planes) == 1:
            return None
        parts = []
        for plane, dwords in zip(planes, columns, strict=True):
            places = [self.column_of(plane.row_bytes, c % plane.row_bytes) for c in channels]
            runs = {c // plane.row_bytes for c in channels}
            if places != [(places[0][0], i) for i in range(4)] or len(runs) != 1:
                return None
            bit = runs.pop() * plane.width
            parts.append(self.shifted(dwords[places[0][0]], bit - plane.shift))
        mask = (2 ** planes[0].width - 1) * 0x01010101
        return self.merged(parts[0], parts[1], mask)

    def token_index(self, planes: Sequence[Plane], columns: Sequence[list[Any]], c: int) -> Any:
        """The index of a channel, a lane a token; bits above it are not clear."""
        found = None
        for plane, dwords in zip(planes, columns, strict=True):
            byte, bit = c % plane.row_bytes, c // plane.row_bytes * plane.width
            start = self.column_of(plane.row_bytes, byte)
            dword = dwords[start[0]]
            part = self.shifted(dword, 8 * start[1] + bit - plane.shift)
            mask = 2 ** planes[0].width - 1
            found = part if found is None else self.merged(found, part, mask)
        return found

    def column_of(self, row_bytes: int, byte: int) -> tuple[int, int]:
        """Which register of `columns` holds a byte of the row, and where."""
        at, number = 0, 0
        while True:
            size = 4 if row_bytes - at >= 4 else 2 if row_bytes - at >= 2 else 1
            if byte < at + size:
                return number, byte - at
            at, number = at + size, number + 1

    def merged(self, low: Any, high: Any, mask: int) -> Any:
        """The bits of a mask of one, the others of another."""
        b = self.b
        return b.or_(b.and_(low, self.whole(mask)), b.and_(high, self.whole(~mask)))

    def shifted(self, value: Any, right: int) -> Any:
        if right > 0:
            return self.b.lshr(value, self.whole(right))
        return self.b.shl(value, self.whole(-right)) if right else value

    # A lane a channel

    def channel_index(self, rows: Sequence[tuple[Plane, Any]], first: int, channels: int) -> Any:
        """Indices of 16 channels, a lane each; lanes past the last hold the last's."""
        b, found = self.b, None
        for plane, row in rows:
            lanes = [min(first + lane, channels - 1) for lane in range(LANES)]
            byte = [c % plane.row_bytes for c in lanes]
            bits = [c // plane.row_bytes * plane.width - plane.shift for c in lanes]
            low, size = min(byte), max(byte) - min(byte) + 1
            part = self.load(row, low, ir.VectorType(I8, size))
            if byte != list(range(low, low + LANES)):
                undefined = ir.Constant(part.type, ir.Undefined)
                mask = ir.Constant(VI, [at - low for at in byte])
                part = b.shuffle_vector(part, undefined, mask)
            wide = self.by_lane(b.zext(part, VI), bits)
            mask = 2 ** rows[0][0].width - 1
            found = wide if found is None else self.merged(found, wide, mask)
        return found

    def by_lane(self, value: Any, right: Sequence[int]) -> Any:
        """Shifted right, or left where it is negative, each lane by its own number."""
        if len(set(right)) == 1:
            return self.shifted(value, right[0])
        if min(right) >= 0:
            return self.b.lshr(value, ir.Constant(VI, list(right)))
        most = -min(right)
        up = self.b.shl(value, self.whole(most))
        return self.b.lshr(up, ir.Constant(VI, [most + count for count in right]))

    # Centroids

    def book(self, place: int, bits: int) -> list[Any]:
        """A codebook in registers of 16, repeated where it is shorter."""
        if bits > 5:
            return []
        first = [self.load_floats(self.books, 32 * place)]
        return first if bits < 5 else [*first, self.load_floats(self.books, 32 * place + LANES)]

    def look_up(self, book: Sequence[Any], index: Any, bits: int) -> Any:
        """Centroids of indices; shorter tables are repeated, so bits above do not matter."""
        b = self.b
        if len(book) == 2 and self.permute == "avx512":
            return self.call("llvm.x86.avx512.vpermi2var.ps.512", VF, [book[0], index, book[1]])
        found = [self.permuted(table, index) for table in book]
        if len(found) == 1:
            return found[0]
        upper = b.icmp_unsigned("!=", b.and_(index, self.whole(LANES)), self.whole(0))
        return b.select(upper, found[1], found[0])

    def permuted(self, table: Any, index: Any) -> Any:
        """table[index mod 16] of every lane."""
        b = self.b
        if self.permute == "avx512":
            return self.call("llvm.x86.avx512.permvar.sf.512", VF, [table, index])
        if self.permute == "avx2":
            halves = [self.shuffle(table, table, range(at, at + 8)) for at in (0, 8)]
            parts = []
            for at in (0, 8):
                eight = self.shuffle(index, index, range(at, at + 8))
                low, high = (
                    self.call("llvm.x86.avx2.permps", half.type, [half, eight]) for half in halves
                )
                bit = b.and_(eight, ir.Constant(eight.type, [8] * 8))
                zero = ir.Constant(eight.type, [0] * 8)
                parts.append(b.select(b.icmp_unsigned("!=", bit, zero), high, low))
            return self.shuffle(parts[0], parts[1], range(16))
        index = b.and_(index, self.whole(LANES - 1))
        found = ir.Constant(VF, ir.Undefined)
        for lane in range(LANES):
            element = b.extract_element(table, b.extract_element(index, I32(lane)))
            found = b.insert_element(found, element, I32(lane))
        return found

    def fp8(self, index: Any) -> Any:
        """The e4m3 number in the low byte: its bits in a float16, times 2^8.

        Not in a float32, whose subnormal numbers processors trap on.
        """
        b, short = self.b, ir.VectorType(I16, LANES)
        low = b.trunc(index, short)
        sign = b.shl(
            b.and_(low, ir.Constant(short, [0x80] * LANES)), ir.Constant(short, [8] * LANES)
        )
        rest = b.shl(
            b.and_(low, ir.Constant(short, [0x7F] * LANES)), ir.Constant(short, [7] * LANES)
        )
        small = b.fpext(b.bitcast(b.or_(sign, rest), VH), VF)
        nan = b.icmp_unsigned("==", b.and_(index, self.whole(0x7F)), self.whole(0x7F))
        return b.select(nan, self.splat(float("nan")), b.fmul(small, self.splat(2.0**8)))
