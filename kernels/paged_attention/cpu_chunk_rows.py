"""LLVM code of the rows of a chunk: scores, probabilities and sums of matrices in the L1 cache.

Shape suffixes as in `cpu_chunk_ir`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from stillhouse.kernels.paged_attention.cpu_lanes import F32, I32, I64, LANES, VI
from stillhouse.kernels.paged_attention.cpu_multiply import ROWS, Multiplier
from stillhouse.kernels.paged_attention.cpu_paging import PageWriter
from stillhouse.kernels.paged_attention.cpu_spec import (
    KEY_WORDS,
    LOWEST,
    VALUE_WORDS,
    JobReader,
    filled_lanes,
    value_lanes,
)
from stillhouse.kernels.paged_attention.pages import PageFormat, RecordFormat

BLOCK_ROWS = 48  # of a work item, a multiple of ROWS
RAW_STEP = 64  # raw tokens are padded to a multiple
CHUNK_SPAN = 5  # words of a sequence, see `ChunkWriter`
CHUNK_WORDS = (
    "next", "items", "heads", "blocks", "rows", "softcap", "window", "spans",
    *KEY_WORDS, *VALUE_WORDS, "table", "table_row", "books",
    "query", "offset", "raw_query", "raw_keys", "raw_values", "raw_tokens",
    "out", "raw_out", "share",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ChunkSpec:
    """As `DecodeSpec`; raw: D padded to 16."""

    pages: PageFormat | RecordFormat
    group: int
    softcap: bool
    permute: str
    raw: int

    @property
    def tile(self) -> int:
        """History tokens at a time: their keys, and their values, take 32 kB at most."""
        widest = max(
            filled_lanes(self.pages.key.format.channels), value_lanes(self.pages.value.format)[-1]
        )
        return 64 if widest <= 128 else 32


class RowsWriter(PageWriter):
    """Writes what history and raw tokens have in common.

    scores: float32 [rows, 64], then probabilities. maxima, totals, packed_totals: of each row.
    rows: where the item's rows of the job's arrays are. row0, count: its first, and how many.
    """

    scores: Any
    maxima: Any
    totals: Any
    packed_totals: Any
    rows: dict[str, Any]
    row0: Any
    count: Any

    def __init__(self, spec: ChunkSpec, function: ir.Function, multiplier: Multiplier) -> None:
        super().__init__(function, spec.permute, None, spec.pages)
        self.spec, self.multiplier = spec, multiplier
        self.job = JobReader(self.b, function.args[0], CHUNK_WORDS)
        self.width = value_lanes(self.value.format)[-1]
        self.lane_number = ir.Constant(VI, list(range(LANES)))

    def at(self, base: Any, number: Any, size: int = 1) -> Any:
        """Of an array of rows of floats."""
        return self.b.gep(base, [self.b.mul(number, I64(size))])

    def token_of(self, r: Any) -> Any:
        """Of the chunk, the row's."""
        return self.b.udiv(self.b.add(self.row0, r), I64(self.spec.group))

    def sees_from(self, token: Any, position: Any, least: Any) -> Any:
        """The first place that a token's queries see, where the chunk begins at `position`."""
        b, window = self.b, self.job.word("window")
        start = b.add(b.sub(b.add(position, token), window), I64(1))
        unlimited = b.icmp_signed("==", window, I64(0))
        return b.select(unlimited, least, self.largest(start, least))

    def live(self, place: Any, first: Any, last: Any) -> Any:
        """Lanes whose token is in [first, last)."""
        b = self.b
        at = b.add(self.broadcast(b.trunc(place, I32)), self.lane_number)
        low, high = (self.broadcast(b.trunc(end, I32)) for end in (first, last))
        return b.and_(b.icmp_signed(">=", at, low), b.icmp_signed("<", at, high))

    def multiply(
        self, query: tuple[Any, int], keys: Any, keys_row: Any, columns: int, depth: int
    ) -> None:
        """All rows' scores of a tile."""
        with self.loop(I64(0), self.count, ROWS) as r:
            left = self.at(query[0], r, query[1]), I64(query[1])
            out = self.at(self.scores, r, RAW_STEP), I64(RAW_STEP)
            shape = I64(depth), columns, False
            self.multiplier.write_call(self, left, (keys, keys_row), out, shape)

    def add_values(self, values: Any, row: Any, name: str, width: int, tokens: Any) -> None:
        """All rows' probabilities times a tile's values."""
        with self.loop(I64(0), self.count, ROWS) as r:
            left = self.at(self.scores, r, RAW_STEP), I64(RAW_STEP)
            out = self.at(self.rows[name], r, width), I64(width)
            self.multiplier.write_call(self, left, (values, row), out, (tokens, width, True))

    def softmax(self, r: Any, lives: Sequence[Any], offset: Any) -> None:
        """One row's scores to probabilities; what was summed before to a new maximum."""
        b = self.b
        row = self.at(self.scores, r, RAW_STEP)
        scores, top = [], self.splat(LOWEST)
        for v, live in enumerate(lives):
            score = self.load_floats(row, v * LANES)
            if offset is not None:
                score = b.fadd(score, self.broadcast(offset))
            if self.spec.softcap:
                cap = b.bitcast(b.trunc(self.job.word("softcap"), I32), F32)
                score = self.capped(score, cap)
            score = b.select(live, score, self.splat(LOWEST))
            scores.append(score)
            top = b.select(b.fcmp_ordered("<", top, score), score, top)
        old = b.load(self.at(self.maxima, r))
        highest = self.reduce("fmax", top)
        with b.if_then(b.fcmp_ordered(">", highest, old), likely=False):
            self.rescale(r, self.power_of_two(b.fsub(old, highest)))
            b.store(highest, self.at(self.maxima, r))
        maximum = self.broadcast(b.load(self.at(self.maxima, r)))
        total = self.splat(0.0)
        for v, (score, live) in enumerate(zip(scores, lives, strict=True)):
            weight = b.select(live, self.exp2(b.fsub(score, maximum)), self.splat(0.0))
            total = b.fadd(total, weight)
            self.store(weight, row, v * LANES)
        place = self.at(self.totals, r)
        b.store(b.fadd(b.load(place), self.reduce("fadd", total)), place)

    def rescale(self, r: Any, factor: Any) -> None:
        b = self.b
        for totals in (self.totals, self.packed_totals):
            b.store(b.fmul(b.load(self.at(totals, r)), factor), self.at(totals, r))
        self.scale(r, self.broadcast(factor))

    def scale(self, r: Any, factor: Any) -> None:
        """Both sums of a row."""
        for name, size in (("out", self.width), ("raw_out", self.spec.raw)):
            row = self.at(self.rows[name], r, size)
            for c in range(0, size, LANES):
                self.store(self.b.fmul(self.load_floats(row, c), factor), row, c)

    def divide(self, r: Any) -> None:
        """By the sum of the row's probabilities, of which the packed tokens have a share."""
        b = self.b
        one = b.fdiv(ir.Constant(F32, 1.0), b.load(self.at(self.totals, r)))
        self.scale(r, self.broadcast(one))
        packed = b.load(self.at(self.packed_totals, r))
        b.store(b.fmul(packed, one), self.at(self.rows["share"], r))
