"""LLVM code of continued prefill: a chunk of queries over packed history and its own raw tokens.

A work item is up to 48 rows (queries of the chunk, G of each token) of one head. 64 history tokens
at a time (32 of wide heads) are decoded into one buffer that stays in the L1 cache, keys first,
then values; their products are those of small matrices in registers (`cpu_multiply`). The chunk's
own keys lie transposed, so that they are multiplied where they are.

Shape suffixes: M rows, row t·G + g of token t; R raw tokens, the last of them the chunk's; C coded
channels, V of a value, padded to 16, D head size.
"""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from stillhouse.kernels.paged_attention.cpu_chunk_rows import (
    BLOCK_ROWS,
    CHUNK_SPAN,
    CHUNK_WORDS,
    RAW_STEP,
    ChunkSpec,
    RowsWriter,
)
from stillhouse.kernels.paged_attention.cpu_lanes import F32, I32, I64, LANES, LaneWriter
from stillhouse.kernels.paged_attention.cpu_multiply import Multiplier
from stillhouse.kernels.paged_attention.cpu_spec import LOWEST, JobReader, value_lanes

_FLOATS, _JOB = F32.as_pointer(), I64.as_pointer()


def emit_chunk(spec: ChunkSpec) -> str:
    """The module's text: void run(int64 *job), its words those of `CHUNK_WORDS`."""
    module = ir.Module("chunk")
    kind = ir.FunctionType(ir.VoidType(), [_JOB, I64, I64, I64])
    item = ir.Function(module, kind, "rows")
    item.linkage = "internal"
    ChunkWriter(spec, item, Multiplier(module)).body()
    run = ir.Function(module, ir.FunctionType(ir.VoidType(), [_JOB]), "run")
    writer = LaneWriter(run)
    job = JobReader(writer.b, run.args[0], CHUNK_WORDS)
    with writer.each_item(job) as number:
        b, blocks, heads = writer.b, job.word("blocks"), job.word("heads")
        place = b.udiv(number, blocks)
        at = b.udiv(place, heads), b.urem(place, heads), b.urem(number, blocks)
        b.call(item, [run.args[0], *at])
    writer.b.ret_void()
    return str(module)


class ChunkWriter(RowsWriter):
    """Writes the function of one item: rows(job, sequence, head, block).

    Words of a sequence (`spans`): history tokens [first, last); the place that the chunk's first
    token has among them, last or later; raw tokens before the chunk's first; how many of these no
    query sees.
    """

    def __init__(self, spec: ChunkSpec, function: ir.Function, multiplier: Multiplier) -> None:
        super().__init__(spec, function, multiplier)
        _, self.sequence, self.head, self.block = function.args
        self.books = self.job.pointer("books", _FLOATS)

    def body(self) -> None:
        """History, raw tokens, division by the sums."""
        self.find_places()
        tile, rows = self.spec.tile, BLOCK_ROWS
        widest = max(self.key.format.channels, self.width)
        self.tile = self.variable(F32, tile * widest)
        self.scores = self.variable(F32, rows * RAW_STEP)
        self.maxima, self.totals = self.variable(F32, rows), self.variable(F32, rows)
        self.packed_totals = self.variable(F32, rows)
        with self.loop(I64(0), self.count, 1) as r:
            self.clear(r)
        self.history()
        with self.loop(I64(0), self.count, 1) as r:
            self.b.store(self.b.load(self.at(self.totals, r)), self.at(self.packed_totals, r))
        self.raw()
        with self.loop(I64(0), self.count, 1) as r:
            self.divide(r)
        self.b.ret_void()

    def find_places(self) -> None:
        """Addresses and ends of this item."""
        b, job, spec = self.b, self.job, self.spec
        for half in ("key", "value"):
            parts = []
            for name, prefix in (("vectors", ""), ("scalars", "scalar_")):
                row = b.mul(self.sequence, job.word(f"{half}_{prefix}row"))
                there = b.add(row, b.mul(self.head, job.word(f"{half}_{prefix}head")))
                parts.append(b.gep(job.pointer(f"{half}_{name}"), [there]))
            setattr(self, f"{half}_parts", (*parts, job.word(f"{half}_page")))
        table = b.gep(job.pointer("table"), [b.mul(self.sequence, job.word("table_row"))])
        self.table = b.bitcast(table, I32.as_pointer())
        spans = self.at(job.pointer("spans", _JOB), self.sequence, CHUNK_SPAN)
        ends = [b.load(b.gep(spans, [I64(i)])) for i in range(CHUNK_SPAN)]
        self.first, self.last, self.position, self.before, self.hidden = ends
        self.row0 = b.mul(self.block, I64(BLOCK_ROWS))
        self.count = self.smallest(b.sub(job.word("rows"), self.row0), I64(BLOCK_ROWS))
        place = b.add(b.mul(self.sequence, job.word("heads")), self.head)
        row = b.add(b.mul(place, job.word("rows")), self.row0)
        sizes = {"query": self.key.format.channels, "offset": 1, "raw_query": spec.raw,
                 "out": self.width, "raw_out": spec.raw, "share": 1}  # fmt: skip
        self.rows = {
            name: self.at(job.pointer(name, _FLOATS), row, size) for name, size in sizes.items()
        }
        self.raw_tokens = job.word("raw_tokens")
        there = b.mul(b.mul(place, self.raw_tokens), I64(spec.raw))
        self.raw_keys, self.raw_values = (
            b.gep(job.pointer(name, _FLOATS), [there]) for name in ("raw_keys", "raw_values")
        )

    def clear(self, r: Any) -> None:
        """A row without tokens."""
        b = self.b
        b.store(ir.Constant(F32, LOWEST), self.at(self.maxima, r))
        b.store(ir.Constant(F32, 0.0), self.at(self.totals, r))
        for name, size in (("out", self.width), ("raw_out", self.spec.raw)):
            for c in range(0, size, LANES):
                self.store(self.splat(0.0), self.at(self.rows[name], r, size), c)

    # History

    def history(self) -> None:
        """A tile after the other."""
        b, tile = self.b, self.spec.tile
        start = self.sees_from(self.token_of(I64(0)), self.position, self.first)
        start = b.and_(start, ir.Constant(I64, -LANES))
        with self.loop(start, self.last, tile) as token:
            places = [b.add(token, I64(at)) for at in range(0, tile, LANES)]
            with self.loop(I64(0), I64(tile), LANES) as column:
                self.decode_keys(b.add(token, column), column)
            channels = self.key.format.channels
            self.multiply((self.rows["query"], channels), self.tile, I64(tile), tile, channels)
            with self.loop(I64(0), self.count, 1) as r:
                least = self.sees_from(self.token_of(r), self.position, self.first)
                lives = [self.live(self.place_of(at), self.largest(at, least), self.last)
                         for at in places]  # fmt: skip
                self.softmax(r, lives, b.load(self.at(self.rows["offset"], r)))
            with self.loop(I64(0), I64(tile), LANES) as column:
                self.decode_values(b.add(token, column), column)
            self.add_values(self.tile, I64(self.width), "out", self.width, I64(tile))

    def place_of(self, at: Any) -> Any:
        """Where 16 tokens are read: within what there is, even past the last."""
        b = self.b
        if self.pages.tokens:
            return self.smallest(at, b.and_(b.sub(self.last, I64(1)), ir.Constant(I64, -LANES)))
        return self.smallest(at, b.sub(self.last, I64(LANES)))

    def decode_keys(self, at: Any, column: Any) -> None:
        """16 columns of the tile: a row a channel."""
        slot, base, scalars, _, _ = self.page_of(self.place_of(at))
        key = self.key.format
        scale = None if key.is_fp8 else self.halves(scalars, slot)
        there, first = self.b.gep(self.tile, [column]), 0
        for number, group in enumerate(key.groups):
            planes = [p for p in self.key.planes if p.group == number]
            columns = [self.columns(plane, base, slot) for plane in planes]
            book = self.book(number, group.bits)
            for c, index in self.token_indices(planes, columns):
                found = self.fp8(index) if key.is_fp8 else self.look_up(book, index, group.bits)
                found = found if scale is None else self.b.fmul(found, scale)
                self.store(found, there, (first + c) * self.spec.tile)
            first += group.channels

    def decode_values(self, at: Any, column: Any) -> None:
        """16 rows of the tile, zeros for tokens that no query sees: theirs may be no numbers."""
        b = self.b
        place = self.place_of(at)
        page = self.page_of(place)
        begin = self.smallest(b.sub(self.largest(at, self.first), place), I64(LANES))
        end = self.largest(self.smallest(b.sub(self.last, place), I64(LANES)), begin)
        for start, stop in ((I64(0), begin), (end, I64(LANES))):
            with self.loop(start, stop, 1) as lane:
                there = self.at(self.tile, b.add(column, lane), self.width)
                for c in range(0, self.width, LANES):
                    self.store(self.splat(0.0), there, c)
        with self.loop(begin, end, 1) as lane:
            self.decode_value(page, lane, self.at(self.tile, b.add(column, lane), self.width))

    def decode_value(self, page: Sequence[Any], lane: Any, there: Any) -> None:
        """One token's channels, times its scalar."""
        b, value = self.b, self.value.format
        slot, _, _, base, scalars = page
        slot = b.add(slot, lane)
        scale = None
        if not value.is_fp8:
            place = b.bitcast(b.gep(scalars, [b.shl(slot, I64(1))]), ir.HalfType().as_pointer())
            scale = self.broadcast(b.fpext(b.load(place, align=2), F32))
        for number, (group, start) in enumerate(
            zip(value.groups, value_lanes(value), strict=False)
        ):
            book = self.book(len(self.key.format.groups) + number, group.bits)
            rows = self.value_rows(number, base, slot)
            for c in range(0, group.channels, LANES):
                index = self.channel_index(rows, c, group.channels)
                found = self.fp8(index) if value.is_fp8 else self.look_up(book, index, group.bits)
                self.store(found if scale is None else b.fmul(found, scale), there, start + c)

    # Raw tokens

    def raw(self) -> None:
        """64 at a time, up to the last that the item's last row sees."""
        b = self.b
        last_token = self.token_of(b.sub(self.count, I64(1)))
        stop = b.add(b.add(self.before, last_token), I64(1))
        stop = self.smallest(stop, self.raw_tokens)  # rows that only fill a block see no more
        start = self.sees_from(self.token_of(I64(0)), self.before, self.hidden)
        start = b.and_(start, ir.Constant(I64, -RAW_STEP))
        with self.loop(start, stop, RAW_STEP) as token:
            keys = b.gep(self.raw_keys, [token])
            query = self.rows["raw_query"], self.spec.raw
            self.multiply(query, keys, self.raw_tokens, RAW_STEP, self.spec.raw)
            with self.loop(I64(0), self.count, 1) as r:
                mine = self.token_of(r)
                least = self.sees_from(mine, self.before, self.hidden)
                end = b.add(b.add(self.before, mine), I64(1))
                lives = [self.live(b.add(token, I64(at)), least, end)
                         for at in range(0, RAW_STEP, LANES)]  # fmt: skip
                self.softmax(r, lives, None)
            values = self.at(self.raw_values, token, self.spec.raw)
            row = self.spec.raw
            self.add_values(values, I64(row), "raw_out", row, I64(RAW_STEP))
