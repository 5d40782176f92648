"""LLVM code of packed decode attention on a CPU: one function a page format, head size and group.

A block is 16 tokens, the lanes of a vector. Scores: the dwords of 16 tokens' key rows are
transposed in registers, so that a lane is a token; each index becomes its centroid by one
permutation of a register and meets the queries as a broadcast, so no sum crosses lanes. Values: a
lane is a channel; 16 centroids meet the probability of their token. Nothing is written but the
accumulators, and the probabilities of a block: a decoded value lives in a register.

Vectors have 16 lanes on every processor; LLVM splits them where registers are shorter.

Shape suffixes: G queries of the head's group, C coded channels of a key, V of a value, padded to
16.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from stillhouse.kernels.paged_attention.pages import (
    PageFormat,
    Plane,
    RecordFormat,
    VectorFormat,
)

LANES = 16
NAME = "attend"
# A handful of registers stay for indices and centroids.
_ACCUMULATORS = 20
_CHAINS = 8  # sums that run side by side, so that a fused multiply-add's latency does not show

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
VF, VI, VH = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES), ir.VectorType(F16, LANES)
BYTES = I8.as_pointer()
# 2^x on [-1/2, 1/2]: Taylor's terms ln(2)^n / n!, relative error 2e-9 at degree 7
_EXP2 = (1.0, 0.6931471805599453, 0.2402265069591007, 0.05550410866482158, 0.009618129107628477,
         0.0013333558146428443, 0.00015403530393381606, 1.5252733804059841e-05)  # fmt: skip
_LOG2E = 1.4426950408889634
_LOWEST = -1e30  # below every score; its difference from itself is 0, not NaN as infinity's


@dataclass(frozen=True, slots=True)
class DecodeSpec:
    """What a function is compiled for. permute: `avx512`, `avx2` or `` for how tables are read."""

    pages: PageFormat | RecordFormat
    group: int
    softcap: bool
    permute: str


def padded(channels: int) -> int:
    """The next multiple of 16."""
    return -(-channels // LANES) * LANES


def value_lanes(format: VectorFormat) -> list[int]:
    """Where each channel group begins in the padded accumulators."""
    starts, at = [], 0
    for group in format.groups:
        starts.append(at)
        at += padded(group.channels)
    return [*starts, at]


def emit(spec: DecodeSpec) -> str:
    """The module's text. Its one function:

    attend(keys, key_scalars, key_stride, values, value_scalars, value_stride, table, first, last,
        q, offset, books, softcap, acc, ml)

    keys, values and their float16 scalars: the head's bytes of page 0; strides: bytes to those of
    the next page. table: int32 page of each `tokens` tokens. first, last: tokens [first, last).
    q: float32 [G, C], times what makes scores exponents of 2. offset: float32 [G], added to scores.
    books: float32 [groups, 32] of keys, then of values. softcap: in those units. acc: float32
    [G, V], out: Σ 2^(s - m) · value. ml: float32 [G, 2], out: m and Σ 2^(s - m).
    """
    module = ir.Module(NAME)
    floats = F32.as_pointer()
    bases = [BYTES, BYTES, I64, BYTES, BYTES, I64]
    kinds = [*bases, I32.as_pointer(), I64, I64, floats, floats, floats, F32, floats, floats]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), kinds), NAME)
    # No pointer is `noalias`: LLVM would keep a broadcast of every query on the stack.
    _Emitter(spec, function).body()
    return str(module)


class _Emitter:
    """Writes the body of one function."""

    def __init__(self, spec: DecodeSpec, function: ir.Function) -> None:
        self.spec, self.function = spec, function
        self.b = ir.IRBuilder(function.append_basic_block("entry"))
        self.key_parts, self.value_parts = function.args[:3], function.args[3:6]
        self.table, self.first, self.last, self.q, *rest = function.args[6:]
        self.offset, self.book_ptr, self.softcap, self.acc, self.ml = rest
        self.key, self.value = spec.pages.key, spec.pages.value
        self.lane_number = ir.Constant(VI, list(range(LANES)))

    def body(self) -> None:
        """Clear the accumulators, go over the blocks, write what is left."""
        b, group = self.b, self.spec.group
        width = value_lanes(self.value.format)[-1]
        for at in range(0, group * width, LANES):
            self.store(self.splat(0.0), self.acc, at)
        self.maxima = [self.variable(F32) for _ in range(group)]
        self.sums = [self.variable(VF) for _ in range(group)]
        self.weights = self.variable(F32, group * LANES)
        for maximum, total in zip(self.maxima, self.sums, strict=True):
            b.store(ir.Constant(F32, _LOWEST), maximum)
            b.store(self.splat(0.0), total)
        start = b.and_(self.first, ir.Constant(I64, -LANES))
        with self.loop(start, self.last, LANES) as token:
            self.block(token)
        for g in range(group):
            place = b.gep(self.ml, [ir.Constant(I64, 2 * g)])
            b.store(b.load(self.maxima[g]), place)
            total = self.reduce("fadd", b.load(self.sums[g]))
            b.store(total, b.gep(self.ml, [ir.Constant(I64, 2 * g + 1)]))
        b.ret_void()

    def block(self, token: Any) -> None:
        """16 tokens of one page; without pages the last block reaches back, not past the end."""
        b, begin = self.b, token
        begin = self.largest(begin, self.first)
        if not self.spec.pages.tokens:
            token = self.smallest(token, b.sub(self.last, I64(LANES)))
        slot, keys, key_scalars, values, value_scalars = self.page_of(token)
        scores = self.scores(keys, slot)
        if not self.key.format.is_fp8:
            scale = self.halves(key_scalars, slot)
            scores = [b.fmul(score, scale) for score in scores]
        scores = [
            b.fadd(score, self.broadcast(b.load(b.gep(self.offset, [I64(g)]))))
            for g, score in enumerate(scores)
        ]
        if self.spec.softcap:
            scores = [self.capped(score) for score in scores]
        live = self.live(token, begin)
        lowest = self.splat(_LOWEST)
        scores = [b.select(live, score, lowest) for score in scores]
        self.probabilities(scores, live, value_scalars, slot)
        start, stop = b.sub(begin, token), self.smallest(b.sub(self.last, token), I64(LANES))
        self.values(values, slot, start, stop)

    def page_of(self, token: Any) -> tuple[Any, ...]:
        """The token's place in its page, and where that page's keys, values and scalars are."""
        b, tokens = self.b, self.spec.pages.tokens
        if not tokens:
            return (token, *self.key_parts[:2], *self.value_parts[:2])
        page = b.sext(b.load(b.gep(self.table, [b.udiv(token, I64(tokens))])), I64)
        found = []
        for vectors, scalars, stride in (self.key_parts, self.value_parts):
            there = [b.mul(page, stride)]
            found += [b.gep(vectors, there), b.gep(scalars, there)]
        return (b.urem(token, I64(tokens)), *found)

    # Scores

    def scores(self, base: Any, slot: Any) -> list[Any]:
        """q · centroids of each query, a lane a token."""
        key = self.key.format
        chains = max(1, _CHAINS // self.spec.group)
        sums = [[self.splat(0.0) for _ in range(chains)] for _ in range(self.spec.group)]
        channel = 0
        for place, group in enumerate(key.groups):
            planes = [p for p in self.key.planes if p.group == place]
            columns = [self.columns(plane, base, slot) for plane in planes]
            book = self.book(place, group.bits)
            for c in range(group.channels):
                index = self.token_index(planes, columns, c)
                value = self.fp8(index) if key.is_fp8 else self.look_up(book, index, group.bits)
                for g, parts in enumerate(sums):
                    at = g * key.channels + channel
                    query = self.broadcast(self.b.load(self.b.gep(self.q, [I64(at)])))
                    parts[c % chains] = self.fma(query, value, parts[c % chains])
                channel += 1
        return [self.added(parts) for parts in sums]

    def columns(self, plane: Plane, base: Any, slot: Any) -> list[Any]:
        """Dwords of 16 tokens' rows, a lane a token; the last may hold fewer bytes."""
        b = self.b
        start = b.add(I64(plane.first), b.mul(slot, I64(plane.stride)))
        row = b.gep(base, [start])
        found: list[Any] = []
        at = 0
        while at < plane.row_bytes:
            if plane.row_bytes - at >= 16:
                found += self.transposed(row, plane.stride, at)
                at += 16
                continue
            size = next(n for n in (4, 2, 1) if plane.row_bytes - at >= n)
            found.append(self.gathered(row, plane.stride, at, size))
            at += size
        return found

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

    def token_index(self, planes: Sequence[Plane], columns: Sequence[list[Any]], c: int) -> Any:
        """The index of a channel, a lane a token; bits above it are not clear."""
        found = None
        for plane, dwords in zip(planes, columns, strict=True):
            byte, bit = c % plane.row_bytes, c // plane.row_bytes * plane.width
            start = self.column_of(plane.row_bytes, byte)
            dword = dwords[start[0]]
            part = self.shifted(dword, 8 * start[1] + bit - plane.shift)
            found = part if found is None else self.merged(found, part, planes[0].width)
        return found

    def column_of(self, row_bytes: int, byte: int) -> tuple[int, int]:
        """Which register of `columns` holds a byte of the row, and where."""
        at, number = 0, 0
        while True:
            size = 4 if row_bytes - at >= 4 else 2 if row_bytes - at >= 2 else 1
            if byte < at + size:
                return number, byte - at
            at, number = at + size, number + 1

    def merged(self, low: Any, high: Any, width: int) -> Any:
        """The low bits of one, the others of another."""
        b, mask = self.b, 2**width - 1
        return b.or_(b.and_(low, self.whole(mask)), b.and_(high, self.whole(~mask)))

    def shifted(self, value: Any, right: int) -> Any:
        if right > 0:
            return self.b.lshr(value, self.whole(right))
        return self.b.shl(value, self.whole(-right)) if right else value

    def capped(self, score: Any) -> Any:
        """cap · tanh(s / cap), both in exponents of 2; tanh x = 1 - 2 / (2^(2 x log2 e) + 1)."""
        b, cap = self.b, self.broadcast(self.softcap)
        ratio = b.fdiv(score, cap)
        power = self.exp2(self.fminimum(b.fmul(ratio, self.splat(2 * _LOG2E)), 100.0))
        tanh = b.fsub(self.splat(1.0), b.fdiv(self.splat(2.0), b.fadd(power, self.splat(1.0))))
        return b.fmul(cap, tanh)

    def live(self, token: Any, begin: Any) -> Any:
        """Lanes whose token is in [begin, last)."""
        b = self.b
        at = b.add(self.broadcast(b.trunc(token, I32)), self.lane_number)
        first, last = (self.broadcast(b.trunc(end, I32)) for end in (begin, self.last))
        return b.and_(b.icmp_signed(">=", at, first), b.icmp_signed("<", at, last))

    # Softmax

    def probabilities(self, scores: Sequence[Any], live: Any, base: Any, slot: Any) -> None:
        """New maxima and sums; the weights of the block's values, [G, 16]."""
        b = self.b
        scale = None if self.value.format.is_fp8 else self.halves(base, slot)
        # All maxima before the branch: LLVM would move later queries' products past it.
        highest = [self.reduce("fmax", score) for score in scores]
        risen = [
            b.fcmp_ordered(">", new, b.load(old))
            for new, old in zip(highest, self.maxima, strict=True)
        ]
        rises = risen[0]
        for one in risen[1:]:
            rises = b.or_(rises, one)
        with b.if_then(rises, likely=False):
            for g in range(len(scores)):
                self.rescale(g, risen[g], highest[g])
        for g, score in enumerate(scores):
            exponent = b.fsub(score, self.broadcast(b.load(self.maxima[g])))
            weight = b.select(live, self.exp2(exponent), self.splat(0.0))
            b.store(b.fadd(b.load(self.sums[g]), weight), self.sums[g])
            weight = weight if scale is None else b.fmul(weight, scale)
            self.store(weight, self.weights, g * LANES)

    def rescale(self, g: int, risen: Any, highest: Any) -> None:
        """To the new maximum, if there is one."""
        b = self.b
        old = b.load(self.maxima[g])
        new = b.select(risen, highest, old)
        factor = self.exp2(self.broadcast(b.fsub(old, new)))
        b.store(new, self.maxima[g])
        b.store(b.fmul(b.load(self.sums[g]), factor), self.sums[g])
        width = value_lanes(self.value.format)[-1]
        for at in range(g * width, (g + 1) * width, LANES):
            self.store(b.fmul(self.load_floats(self.acc, at), factor), self.acc, at)

    def exp2(self, x: Any) -> Any:
        """2^x for x up to 127; what is below -126 gives 2^-126."""
        b = self.b
        x = self.fmaximum(x, -126.0)
        whole = self.call("llvm.rint.v16f32", VF, [x])
        rest = b.fsub(x, whole)
        power = self.splat(_EXP2[-1])
        for term in reversed(_EXP2[:-1]):
            power = self.fma(power, rest, self.splat(term))
        bits = b.shl(b.add(b.fptosi(whole, VI), self.whole(127)), self.whole(23))
        return b.fmul(power, b.bitcast(bits, VF))

    # Values

    def values(self, base: Any, slot: Any, start: Any, stop: Any) -> None:
        """Add the block's values, as many channels at a time as registers hold sums for."""
        lanes = value_lanes(self.value.format)
        chunks = [
            (place, c)
            for place, group in enumerate(self.value.format.groups)
            for c in range(0, group.channels, LANES)
        ]
        step = max(1, _ACCUMULATORS // self.spec.group)
        for at in range(0, len(chunks), step):
            self.value_chunks(chunks[at : at + step], lanes, base, slot, (start, stop))

    def value_chunks(
        self,
        chunks: Sequence[tuple[int, int]],
        lanes: Sequence[int],
        base: Any,
        slot: Any,
        span: tuple[Any, Any],
    ) -> None:
        """Over the block's live tokens alone: what lies in unused places may be no number."""
        b, value, group = self.b, self.value.format, self.spec.group
        width = lanes[-1]
        sums = [[self.variable(VF) for _ in range(group)] for _ in chunks]
        places = [[g * width + lanes[place] + c for g in range(group)] for place, c in chunks]
        for parts, at in zip(sums, places, strict=True):
            for part, offset in zip(parts, at, strict=True):
                b.store(self.load_floats(self.acc, offset), part)
        books = {place: self.book(len(self.key.format.groups) + place, value.groups[place].bits)
                 for place, _ in chunks}  # fmt: skip
        with self.loop(*span, 1) as token:
            rows = {place: self.value_rows(place, base, b.add(slot, token)) for place, _ in chunks}
            weights = [
                self.broadcast(b.load(b.gep(self.weights, [b.add(token, I64(g * LANES))])))
                for g in range(group)
            ]
            for (place, c), parts in zip(chunks, sums, strict=True):
                bits = value.groups[place].bits
                index = self.channel_index(rows[place], c, value.groups[place].channels)
                found = self.fp8(index) if value.is_fp8 else self.look_up(books[place], index, bits)
                for weight, part in zip(weights, parts, strict=True):
                    b.store(self.fma(weight, found, b.load(part)), part)
        for parts, at in zip(sums, places, strict=True):
            for part, offset in zip(parts, at, strict=True):
                self.store(b.load(part), self.acc, offset)

    def value_rows(self, place: int, base: Any, slot: Any) -> list[tuple[Plane, Any]]:
        """The address of a token's row in each plane of a channel group."""
        b = self.b
        return [
            (plane, b.gep(base, [b.add(I64(plane.first), b.mul(slot, I64(plane.stride)))]))
            for plane in self.value.planes
            if plane.group == place
        ]

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
            found = wide if found is None else self.merged(found, wide, rows[0][0].width)
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
        first = [self.load_floats(self.book_ptr, 32 * place)]
        return first if bits < 5 else [*first, self.load_floats(self.book_ptr, 32 * place + LANES)]

    def look_up(self, book: Sequence[Any], index: Any, bits: int) -> Any:
        """Centroids of indices; shorter tables are repeated, so bits above do not matter."""
        b = self.b
        found = [self.permuted(table, index) for table in book]
        if len(found) == 1:
            return found[0]
        upper = b.icmp_unsigned("!=", b.and_(index, self.whole(LANES)), self.whole(0))
        return b.select(upper, found[1], found[0])

    def permuted(self, table: Any, index: Any) -> Any:
        """table[index mod 16] of every lane."""
        b = self.b
        if self.spec.permute == "avx512":
            return self.call("llvm.x86.avx512.permvar.sf.512", VF, [table, index])
        if self.spec.permute == "avx2":
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

    # Vectors

    def largest(self, one: Any, two: Any) -> Any:
        return self.b.select(self.b.icmp_signed(">", one, two), one, two)

    def smallest(self, one: Any, two: Any) -> Any:
        return self.b.select(self.b.icmp_signed("<", one, two), one, two)

    def variable(self, kind: Any, count: int = 1) -> Any:
        """In the entry block, where LLVM finds what fits into registers."""
        with self.b.goto_entry_block():
            place = self.b.alloca(kind, count)
        place.align = 64
        return place

    def halves(self, base: Any, slot: Any) -> Any:
        """The scalars of 16 tokens, float32."""
        place = self.b.gep(base, [self.b.shl(slot, I64(1))])
        return self.b.fpext(self.load(place, 0, VH), VF)

    def load(self, base: Any, offset: int, kind: Any) -> Any:
        """From a byte's address, of any alignment."""
        place = self.b.bitcast(self.b.gep(base, [I64(offset)]), kind.as_pointer())
        return self.b.load(place, align=1)

    def load_floats(self, base: Any, offset: int) -> Any:
        place = self.b.bitcast(self.b.gep(base, [I64(offset)]), VF.as_pointer())
        return self.b.load(place, align=4)

    def store(self, value: Any, base: Any, offset: int) -> None:
        place = self.b.bitcast(self.b.gep(base, [I64(offset)]), VF.as_pointer())
        self.b.store(value, place, align=4)

    def broadcast(self, scalar: Any) -> Any:
        kind = VF if scalar.type == F32 else VI
        first = self.b.insert_element(ir.Constant(kind, ir.Undefined), scalar, I32(0))
        return self.shuffle(first, first, [0] * LANES)

    def shuffle(self, left: Any, right: Any, lanes: Sequence[int] | range) -> Any:
        mask = ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes))
        return self.b.shuffle_vector(left, right, mask)

    def splat(self, value: float) -> Any:
        return ir.Constant(VF, [value] * LANES)

    def whole(self, value: int) -> Any:
        return ir.Constant(VI, [value & 0xFFFFFFFF] * LANES)

    def fma(self, x: Any, y: Any, z: Any) -> Any:
        return self.call("llvm.fma.v16f32", VF, [x, y, z])

    def fmaximum(self, x: Any, least: float) -> Any:
        b = self.b  # written so that a NaN stays one
        return b.select(b.fcmp_ordered("<", x, self.splat(least)), self.splat(least), x)

    def fminimum(self, x: Any, most: float) -> Any:
        b = self.b
        return b.select(b.fcmp_ordered(">", x, self.splat(most)), self.splat(most), x)

    def added(self, parts: Sequence[Any]) -> Any:
        total = parts[0]
        for part in parts[1:]:
            total = self.b.fadd(total, part)
        return total

    def reduce(self, how: str, value: Any) -> Any:
        """The maximum or the sum of all lanes, pairwise."""
        b = self.b
        width = LANES // 2
        while width:
            other = self.shuffle(value, value, [(i + width) % LANES for i in range(LANES)])
            if how == "fadd":
                value = b.fadd(value, other)
            else:
                value = b.select(b.fcmp_ordered("<", value, other), other, value)
            width //= 2
        return b.extract_element(value, I32(0))

    def call(self, name: str, result: Any, arguments: Sequence[Any]) -> Any:
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        module = self.function.module
        known = module.globals.get(name)
        return self.b.call(known or ir.Function(module, kind, name), arguments)

    @contextmanager
    def loop(self, start: Any, stop: Any, step: int) -> Iterator[Any]:
        """for (at = start; at < stop; at += step)"""
        b = self.b
        before = b.block
        head, inside, after = (self.function.append_basic_block() for _ in range(3))
        b.branch(head)
        b.position_at_end(head)
        at = b.phi(I64)
        at.add_incoming(start, before)
        b.cbranch(b.icmp_signed("<", at, stop), inside, after)
        b.position_at_end(inside)
        yield at
        at.add_incoming(b.add(at, I64(step)), b.block)
        b.branch(head)
        b.position_at_end(after)
