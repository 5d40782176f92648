"""LLVM code that merges a head's splits, and the tokens in 16 bits.

Run by the thread that finished the head's last split. Splits are merged in their order, whoever
made them.

Shape suffixes: G queries of the head's group, V channels of a value, padded to 16, D head size, R
tokens in 16 bits.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from llvmlite import ir

from stillhouse.kernels.paged_attention.cpu_lanes import (
    F32,
    I16,
    I32,
    I64,
    LANES,
    VF,
    VH,
    VI,
    LaneWriter,
)
from stillhouse.kernels.paged_attention.cpu_spec import (
    LOWEST,
    SPAN_WORDS,
    DecodeSpec,
    JobReader,
    value_lanes,
)

FLOATS = F32.as_pointer()


def finish_function(module: ir.Module, spec: DecodeSpec, job: Any) -> ir.Function:
    """finish(job, sequence, head, place, splits): place = sequence · heads + head.

    out, float32 [places, G, coded channels], and raw_out, [places, G, D], are shares of the softmax
    over all tokens, the values' mean (raw_mean, [heads, D], or none) included in raw_out by the
    packed tokens' share; zeros where no token is seen.
    """
    kind = ir.FunctionType(ir.VoidType(), [job, I64, I64, I64, I64])
    function = ir.Function(module, kind, "finish")
    function.linkage = "internal"
    _FinishWriter(spec, function).body()
    return function


class _FinishWriter(LaneWriter):
    """Writes the body of the function."""

    def __init__(self, spec: DecodeSpec, function: ir.Function) -> None:
        super().__init__(function)
        self.spec = spec
        job, self.sequence, self.head, self.at, self.splits = function.args
        self.job = JobReader(self.b, job)
        self.width = value_lanes(spec.pages.value.format)[-1]
        self.lane_number = ir.Constant(VI, list(range(LANES)))

    def body(self) -> None:
        """A query after the other."""
        b = self.b
        self.most = self.job.word("splits")
        with self.loop(I64(0), I64(self.spec.group), 1) as g:
            self.query(g)
        b.ret_void()

    def query(self, g: Any) -> None:
        """Greatest score, weights of the splits, their sums."""
        b = self.b
        row = b.add(b.mul(self.at, I64(self.spec.group)), g)
        top = self.variable(F32)
        total = self.variable(F32)
        b.store(ir.Constant(F32, LOWEST), top)
        with self.loop(I64(0), self.splits, 1) as s:
            self.raise_to(b.load(self.ml(s, g)), top)
        self.raw_scores(g, row, top)
        b.store(ir.Constant(F32, 0.0), total)
        with self.loop(I64(0), self.splits, 1) as s:
            place = self.ml(s, g)
            weight = self.power_of_two(b.fsub(b.load(place), b.load(top)))
            b.store(weight, place)  # in the maximum's place
            more = b.fmul(weight, b.load(b.gep(place, [I64(1)])))
            b.store(b.fadd(b.load(total), more), total)
        packed = b.load(total)
        count = self.raw_weights(row, top, total)
        one = ir.Constant(F32, 1.0)
        empty = b.fcmp_ordered("==", b.load(total), ir.Constant(F32, 0.0))  # a NaN is none
        share = b.fdiv(one, b.select(empty, one, b.load(total)))
        self.merge(g, row, self.broadcast(share))
        self.raw_values(row, count, share, b.fmul(packed, share))

    def raise_to(self, score: Any, top: Any) -> None:
        b = self.b
        old = b.load(top)
        b.store(b.select(b.fcmp_ordered("<", old, score), score, old), top)

    def ml(self, split: Any, g: Any) -> Any:
        """Where a split's m and l of a query are."""
        return self.of_split("ml", split, g, 2)

    def of_split(self, name: str, split: Any, g: Any, size: int) -> Any:
        b = self.b
        number = b.add(b.mul(self.at, self.most), split)
        number = b.add(b.mul(number, I64(self.spec.group)), g)
        return b.gep(self.job.pointer(name, FLOATS), [b.mul(number, I64(size))])

    def merge(self, g: Any, row: Any, share: Any) -> None:
        """The splits' shares of the values, without the lanes that pad channel groups."""
        b, value = self.b, self.spec.pages.value.format
        out = b.gep(self.job.pointer("out", FLOATS), [b.mul(row, I64(value.channels))])
        channel = 0
        for start, group in zip(value_lanes(value), value.groups, strict=False):
            for c in range(0, group.channels, LANES):
                part = self.variable(VF)
                b.store(self.splat(0.0), part)
                with self.loop(I64(0), self.splits, 1) as s:
                    sums = self.load_floats(self.of_split("acc", s, g, self.width), start + c)
                    weight = self.broadcast(b.load(self.ml(s, g)))
                    b.store(self.fma(weight, sums, b.load(part)), part)
                self.store_first(
                    b.fmul(b.load(part), share), out, channel + c, min(LANES, group.channels - c)
                )
            channel += group.channels

    def store_first(self, value: Any, base: Any, offset: int, count: int) -> None:
        """The first lanes."""
        if count < LANES:
            value = self.shuffle(value, value, range(count))
        place = self.b.bitcast(self.b.gep(base, [I64(offset)]), value.type.as_pointer())
        self.b.store(value, place, align=4)

    # Tokens in 16 bits

    def raw_parts(self, kind: str) -> Iterator[tuple[Any, Any, Any, Any]]:
        """Of both parts: the address of token 0, bytes from token to token, and the range."""
        b = self.b
        spans = self.job.pointer("spans", I64.as_pointer())
        for part in (0, 1):
            word = f"raw{part}_{kind}"
            there = b.add(
                b.mul(self.sequence, self.job.word(f"{word}_row")),
                b.mul(self.head, self.job.word(f"{word}_head")),
            )
            base = b.gep(self.job.pointer(f"{word}s"), [there])
            number = b.mul(self.sequence, I64(SPAN_WORDS))
            ends = [b.load(b.gep(spans, [b.add(number, I64(2 + 2 * part + i))])) for i in (0, 1)]
            yield base, self.job.word(f"{word}_token"), ends[0], ends[1]

    def raw_row(self) -> Any:
        """Where the head's raw scores are."""
        place = self.b.mul(self.at, self.job.word("scores_row"))
        return self.b.gep(self.job.pointer("scores", FLOATS), [place])

    def chunks(self) -> Sequence[int]:
        """16 channels each; the last ones overlap where D is no multiple of 16."""
        dim = self.spec.dim
        return [min(c, dim - LANES) for c in range(0, dim, LANES)]

    def widened(self, base: Any, channel: int, brain: bool) -> Any:
        """16 channels of a raw token, float32."""
        if not brain:
            return self.b.fpext(self.load(base, 2 * channel, VH), VF)
        bits = self.b.zext(self.load(base, 2 * channel, ir.VectorType(I16, LANES)), VI)
        return self.b.bitcast(self.b.shl(bits, self.whole(16)), VF)

    def raw_scores(self, g: Any, row: Any, top: Any) -> None:
        """All scores into their row, capped, and the greatest."""
        b, scores = self.b, self.raw_row()
        query = b.gep(self.job.pointer("raw_query", FLOATS), [b.mul(row, I64(self.spec.dim))])
        queries, seen = [], 0
        for c in self.chunks():
            lanes = self.load_floats(query, c)
            new = [1.0 if c + lane >= seen else 0.0 for lane in range(LANES)]
            queries.append((c, lanes if all(new) else b.fmul(lanes, ir.Constant(VF, new))))
            seen = c + LANES
        count = self.variable(I64)
        b.store(I64(0), count)
        for base, stride, first, last in self.raw_parts("key"):
            with self.loop(first, last, 1) as token:
                place = b.gep(base, [b.mul(token, stride)])
                total = self.splat(0.0)
                for c, lanes in queries:
                    total = self.fma(lanes, self.widened(place, c, self.spec.brain[0]), total)
                score = self.reduce("fadd", total)
                if self.spec.softcap:
                    cap = b.bitcast(b.trunc(self.job.word("softcap"), I32), F32)
                    score = b.extract_element(self.capped(self.broadcast(score), cap), I32(0))
                b.store(score, b.gep(scores, [b.load(count)]))
                b.store(b.add(b.load(count), I64(1)), count)
                self.raise_to(score, top)

    def raw_weights(self, row: Any, top: Any, total: Any) -> Any:
        """Scores to 2^(s - m), their sum added to the total; how many there are."""
        b, scores = self.b, self.raw_row()
        count: Any = I64(0)
        for _, _, first, last in self.raw_parts("key"):
            count = b.add(count, self.largest(b.sub(last, first), I64(0)))
        highest = self.broadcast(b.load(top))
        with self.loop(I64(0), count, LANES) as at:
            place = b.gep(scores, [at])
            weight = self.exp2(b.fsub(self.load_floats(place, 0), highest))
            number = b.add(self.broadcast(b.trunc(at, I32)), self.lane_number)
            live = b.icmp_signed("<", number, self.broadcast(b.trunc(count, I32)))
            weight = b.select(live, weight, self.splat(0.0))
            self.store(weight, place, 0)
            b.store(b.fadd(b.load(total), self.reduce("fadd", weight)), total)
        return count

    def raw_values(self, row: Any, count: Any, share: Any, packed: Any) -> None:
        """Sums of values by the weights' shares, and the mean by that of the packed tokens."""
        b, scores = self.b, self.raw_row()
        parts = [(c, self.variable(VF)) for c in self.chunks()]
        for _, part in parts:
            b.store(self.splat(0.0), part)
        mean = self.job.word("raw_mean")
        with b.if_then(b.icmp_unsigned("!=", mean, I64(0))):
            means = b.inttoptr(mean, FLOATS)
            means = b.gep(means, [b.mul(self.head, I64(self.spec.dim))])
            for c, part in parts:
                b.store(b.fmul(self.load_floats(means, c), self.broadcast(packed)), part)
        at = self.variable(I64)
        b.store(I64(0), at)
        for base, stride, first, last in self.raw_parts("value"):
            with self.loop(first, last, 1) as token:
                place = b.gep(base, [b.mul(token, stride)])
                weight = b.fmul(b.load(b.gep(scores, [b.load(at)])), share)
                b.store(b.add(b.load(at), I64(1)), at)
                for c, part in parts:
                    numbers = self.widened(place, c, self.spec.brain[1])
                    b.store(self.fma(self.broadcast(weight), numbers, b.load(part)), part)
        out = b.gep(self.job.pointer("raw_out", FLOATS), [b.mul(row, I64(self.spec.dim))])
        for c, part in parts:
            self.store(b.load(part), out, c)
