"""LLVM code of packed decode attention on a CPU: one function a page format, head size and group.

A block is 16 tokens, the lanes of a vector. For scores a lane is a token, so no sum crosses lanes,
and each decoded value meets all queries of the group as a broadcast. For values a lane is a
channel; 16 centroids meet the probability of their token. Nothing is written but the accumulators,
and the probabilities of a block: a decoded value lives in a register (`cpu_unpack`).

Shape suffixes: G queries of the head's group, C coded channels of a key, V of a value, padded to
16.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from stillhouse.kernels.paged_attention.cpu_lanes import F32, I8, I32, I64, LANES, VF, VI
from stillhouse.kernels.paged_attention.cpu_unpack import UnpackWriter
from stillhouse.kernels.paged_attention.pages import (
    PageFormat,
    Plane,
    RecordFormat,
    VectorFormat,
)

NAME = "attend"
# A handful of registers stay for indices and centroids.
_ACCUMULATORS = 20
_CHAINS = 8  # sums that run side by side, so that a fused multiply-add's latency does not show
_LOG2E = 1.4426950408889634
BYTES = I8.as_pointer()
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


class _Emitter(UnpackWriter):
    """Writes the body of one function."""

    def __init__(self, spec: DecodeSpec, function: ir.Function) -> None:
        super().__init__(function, spec.permute, books=function.args[11])
        self.spec = spec
        self.key_parts, self.value_parts = function.args[:3], function.args[3:6]
        self.table, self.first, self.last, self.q, *rest = function.args[6:]
        self.offset, _, self.softcap, self.acc, self.ml = rest
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
