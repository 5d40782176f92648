"""LLVM code of one head's attention over a range of packed tokens.

16 tokens are the lanes of a vector, 64 a block. For scores a lane is a token, so no sum crosses
lanes, and each decoded value meets all queries of the group as a broadcast. For values a lane is a
channel; 16 centroids meet the probability of their token. Nothing is written but the accumulators,
and a block's scores and probabilities: a decoded value lives in a register (`cpu_unpack`). The
softmax of a whole block at once hides the latency of its maxima; the next block's bytes are asked
for meanwhile.

Shape suffixes: G queries of the head's group, C coded channels of a key, V of a value, padded to
16.
"""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from stillhouse.kernels.paged_attention.cpu_lanes import F32, I32, I64, LANES, VF, VI
from stillhouse.kernels.paged_attention.cpu_paging import PageWriter
from stillhouse.kernels.paged_attention.cpu_spec import BYTES, LOWEST, DecodeSpec, value_lanes

_BLOCK = 64  # tokens
_AHEAD = 48  # tokens; bytes are asked for so much early (more is slower: they would be lost again)
# A handful of registers stay for indices and centroids.
_ACCUMULATORS = 20
_CHAINS = 8  # sums that run side by side, so that a fused multiply-add's latency does not show


def range_function(module: ir.Module, spec: DecodeSpec) -> ir.Function:
    """attend(keys, key_scalars, key_stride, values, value_scalars, value_stride, table, first,
        last, jump, final, q, offset, books, softcap, acc, ml)

    keys, values and their float16 scalars: the head's bytes of page 0; strides: bytes to those of
    the next page. table: int32 page of each `tokens` tokens. first, last: tokens [first, last).
    jump, final: the thread's next tokens are most likely so many past `last`, up to `final`.
    q: float32 [G, C], times what makes scores exponents of 2. offset: float32 [G], added to scores.
    books: float32 [groups, 32] of keys, then of values. softcap: in those units. acc: float32
    [G, V], out: Σ 2^(s - m) · value. ml: float32 [G, 2], out: m and Σ 2^(s - m).
    """
    floats = F32.as_pointer()
    bases = [BYTES, BYTES, I64, BYTES, BYTES, I64]
    ends = [I64, I64, I64, I64]
    kinds = [*bases, I32.as_pointer(), *ends, floats, floats, floats, F32, floats, floats]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), kinds), "attend")
    function.linkage = "internal"
    # No pointer is `noalias`: LLVM would keep a broadcast of every query on the stack.
    _RangeWriter(spec, function).body()
    return function


class _RangeWriter(PageWriter):
    """Writes the body of the function."""

    def __init__(self, spec: DecodeSpec, function: ir.Function) -> None:
        super().__init__(function, spec.permute, function.args[13], spec.pages)
        self.spec = spec
        self.key_parts, self.value_parts = function.args[:3], function.args[3:6]
        self.table, self.first, self.last, self.jump, self.final, self.q, *rest = function.args[6:]
        self.offset, _, self.softcap, self.acc, self.ml = rest
        self.width = value_lanes(self.value.format)[-1]
        self.lane_number = ir.Constant(VI, list(range(LANES)))

    def body(self) -> None:
        """Clear the accumulators, go over the blocks, write what is left."""
        b, group = self.b, self.spec.group
        for at in range(0, group * self.width, LANES):
            self.store(self.splat(0.0), self.acc, at)
        self.maxima = [self.variable(F32) for _ in range(group)]
        self.tops = [self.variable(VF) for _ in range(group)]
        self.sums = [self.variable(VF) for _ in range(group)]
        self.scores = self.variable(F32, group * _BLOCK)  # then probabilities
        for maximum, total in zip(self.maxima, self.sums, strict=True):
            b.store(ir.Constant(F32, LOWEST), maximum)
            b.store(self.splat(0.0), total)
        start = b.and_(self.first, ir.Constant(I64, -LANES))
        soon = self.smallest(b.add(start, I64(_AHEAD)), self.last)
        with self.loop(start, soon, LANES) as at:
            for line in self.lines_of(at, self.last):
                self.prefetch(*line)
        with self.loop(start, self.last, _BLOCK) as token:
            self.block(token)
        for g in range(group):
            b.store(b.load(self.maxima[g]), b.gep(self.ml, [I64(2 * g)]))
            total = self.reduce("fadd", b.load(self.sums[g]))
            b.store(total, b.gep(self.ml, [I64(2 * g + 1)]))
        b.ret_void()

    def block(self, token: Any) -> None:
        """Scores of 64 tokens, their probabilities, their values."""
        b = self.b
        stop = self.smallest(b.add(token, I64(_BLOCK)), self.last)
        for top in self.tops:
            b.store(self.splat(LOWEST), top)
        with self.loop(token, stop, LANES) as at:
            self.score_lanes(at, b.sub(at, token))
        self.raise_maxima()
        with self.loop(token, stop, LANES) as at:
            self.weigh_lanes(at, b.sub(at, token))
        self.values(token, stop)

    def lanes_at(self, at: Any) -> tuple[Any, Any, tuple[Any, ...]]:
        """16 tokens of one page: where they begin, where live ones do, and `page_of`.

        Without pages the last ones reach back, not past the end.
        """
        begin, place = self.largest(at, self.first), at
        if not self.pages.tokens:
            place = self.smallest(at, self.b.sub(self.last, I64(LANES)))
        return place, begin, self.page_of(place)

    def live(self, place: Any, begin: Any) -> Any:
        """Lanes whose token is in [begin, last)."""
        b = self.b
        at = b.add(self.broadcast(b.trunc(place, I32)), self.lane_number)
        first, last = (self.broadcast(b.trunc(end, I32)) for end in (begin, self.last))
        return b.and_(b.icmp_signed(">=", at, first), b.icmp_signed("<", at, last))

    def lines_ahead(self, at: Any) -> list[tuple[Any, int]]:
        """Those of 16 tokens from `at` on, which past the end is where the thread goes on."""
        b = self.b
        beyond = b.icmp_signed(">=", at, self.last)
        return self.lines_of(b.select(beyond, b.add(at, self.jump), at), self.final)

    # Scores

    def score_lanes(self, at: Any, row: Any) -> None:
        """Scores of 16 tokens, and the greatest of the block in each lane."""
        b = self.b
        place, begin, (slot, keys, key_scalars, _, _) = self.lanes_at(at)
        scores = self.products(keys, slot, self.lines_ahead(self.b.add(at, I64(_AHEAD))))
        if not self.key.format.is_fp8:
            scale = self.halves(key_scalars, slot)
            scores = [b.fmul(score, scale) for score in scores]
        live, lowest = self.live(place, begin), self.splat(LOWEST)
        for g, score in enumerate(scores):
            score = b.fadd(score, self.broadcast(b.load(b.gep(self.offset, [I64(g)]))))
            if self.spec.softcap:
                score = self.capped(score, self.softcap)
            score = b.select(live, score, lowest)
            self.put(score, g, row)
            top = b.load(self.tops[g])
            b.store(b.select(b.fcmp_ordered("<", top, score), score, top), self.tops[g])

    def products(self, base: Any, slot: Any, lines: list[tuple[Any, int]]) -> list[Any]:
        """q · centroids of each query, a lane a token.

        lines: prefetched one by one meanwhile; a processor keeps track of a dozen at a time.
        """
        key = self.key.format
        chains = max(1, _CHAINS // self.spec.group)
        sums: list[list[Any]] = [[None] * chains for _ in range(self.spec.group)]
        # Else LLVM keeps a broadcast of every query value on the stack, before the loop.
        queries = self.unknown(self.q)
        first = count = 0
        total = len(lines)
        for place, group in enumerate(key.groups):
            planes = [p for p in self.key.planes if p.group == place]
            columns = [self.columns(plane, base, slot) for plane in planes]
            book = self.book(place, group.bits)
            for c, index in self.token_indices(planes, columns):
                value = self.fp8(index) if key.is_fp8 else self.look_up(book, index, group.bits)
                for g, parts in enumerate(sums):
                    place_of_query = self.b.gep(queries, [I64(g * key.channels + first + c)])
                    query, part = self.broadcast(self.b.load(place_of_query)), parts[count % chains]
                    start = self.splat(0.0) if part is None else part
                    parts[count % chains] = self.fma(query, value, start)
                count += 1
                while lines and len(lines) * key.channels > (key.channels - count) * total:
                    self.prefetch(*lines.pop(0))
            first += group.channels
        return [self.added(parts) for parts in sums]

    # Softmax

    def raise_maxima(self) -> None:
        """To those of the block, with what was summed before."""
        b = self.b
        highest = [self.reduce("fmax", b.load(top)) for top in self.tops]
        risen = [
            b.fcmp_ordered(">", new, b.load(old))
            for new, old in zip(highest, self.maxima, strict=True)
        ]
        rises = risen[0]
        for one in risen[1:]:
            rises = b.or_(rises, one)
        with b.if_then(rises, likely=False):
            for g in range(self.spec.group):
                self.rescale(g, risen[g], highest[g])

    def rescale(self, g: int, risen: Any, highest: Any) -> None:
        """To the new maximum, if there is one."""
        b = self.b
        old = b.load(self.maxima[g])
        new = b.select(risen, highest, old)
        factor = self.exp2(self.broadcast(b.fsub(old, new)))
        b.store(new, self.maxima[g])
        b.store(b.fmul(b.load(self.sums[g]), factor), self.sums[g])
        for at in range(g * self.width, (g + 1) * self.width, LANES):
            self.store(b.fmul(self.load_floats(self.acc, at), factor), self.acc, at)

    def weigh_lanes(self, at: Any, row: Any) -> None:
        """Scores of 16 tokens to probabilities, times the values' scalars."""
        b = self.b
        place, begin, (slot, _, _, _, scalars) = self.lanes_at(at)
        scale = None if self.value.format.is_fp8 else self.halves(scalars, slot)
        live = self.live(place, begin)
        for g in range(self.spec.group):
            exponent = b.fsub(self.taken_back(g, row), self.broadcast(b.load(self.maxima[g])))
            weight = b.select(live, self.exp2(exponent), self.splat(0.0))
            b.store(b.fadd(b.load(self.sums[g]), weight), self.sums[g])
            self.put(weight if scale is None else b.fmul(weight, scale), g, row)

    def put(self, value: Any, g: int, row: Any) -> None:
        """16 scores or probabilities of a query."""
        self.store(value, self.b.gep(self.scores, [row]), g * _BLOCK)

    def taken_back(self, g: int, row: Any) -> Any:
        """What was put."""
        return self.load_floats(self.b.gep(self.scores, [row]), g * _BLOCK)

    # Values

    def values(self, token: Any, stop: Any) -> None:
        """Add the block's values, as many channels at a time as registers hold sums for.

        Channels that share bytes go together.
        """
        groups, planes = self.value.format.groups, self.value.planes
        chunks = [(p, c) for p, group in enumerate(groups) for c in range(0, group.channels, LANES)]
        bytes_of = [next(p for p in planes if p.group == place) for place in range(len(groups))]
        chunks.sort(key=lambda one: (one[0], one[1] % bytes_of[one[0]].row_bytes, one[1]))
        passes = -(-len(chunks) // max(1, _ACCUMULATORS // self.spec.group))
        step = -(-len(chunks) // passes)
        for at in range(0, len(chunks), step):
            self.value_chunks(chunks[at : at + step], token, stop)

    def value_chunks(self, chunks: Sequence[tuple[int, int]], token: Any, stop: Any) -> None:
        """Over the block's live tokens alone: what lies in unused places may be no number."""
        b, value, group = self.b, self.value.format, self.spec.group
        lanes = value_lanes(value)
        places = [[g * self.width + lanes[place] + c for g in range(group)] for place, c in chunks]
        sums = [[self.variable(VF) for _ in range(group)] for _ in chunks]
        for parts, offsets in zip(sums, places, strict=True):
            for part, offset in zip(parts, offsets, strict=True):
                b.store(self.load_floats(self.acc, offset), part)
        books = {place: self.book(len(self.key.format.groups) + place, value.groups[place].bits)
                 for place, _ in chunks}  # fmt: skip
        with self.loop(token, stop, LANES) as at:
            place, begin, (slot, _, _, base, _) = self.lanes_at(at)
            end = self.smallest(b.sub(self.last, place), I64(LANES))
            weights = b.gep(self.scores, [b.sub(at, token)])
            with self.loop(b.sub(begin, place), end, 1) as lane:
                self.value_token(chunks, sums, books, base, b.add(slot, lane),
                                 b.gep(weights, [lane]))  # fmt: skip
        for parts, offsets in zip(sums, places, strict=True):
            for part, offset in zip(parts, offsets, strict=True):
                self.store(b.load(part), self.acc, offset)

    def value_token(
        self,
        chunks: Sequence[tuple[int, int]],
        sums: Sequence[Sequence[Any]],
        books: dict[int, list[Any]],
        base: Any,
        slot: Any,
        weights: Any,
    ) -> None:
        """Add one token's channels, each times the probability of every query."""
        b, value = self.b, self.value.format
        rows = {place: self.value_rows(place, base, slot) for place in books}
        each = [
            self.broadcast(b.load(b.gep(weights, [I64(g * _BLOCK)])))
            for g in range(self.spec.group)
        ]
        for (place, c), parts in zip(chunks, sums, strict=True):
            bits = value.groups[place].bits
            index = self.channel_index(rows[place], c, value.groups[place].channels)
            found = self.fp8(index) if value.is_fp8 else self.look_up(books[place], index, bits)
            for weight, part in zip(each, parts, strict=True):
                b.store(self.fma(weight, found, b.load(part)), part)
