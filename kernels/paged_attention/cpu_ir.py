"""LLVM code of packed decode attention on a CPU: one module a page format, head size and group.

`run` is what every thread calls: it takes work items, a split of a head's tokens each, until none
is left, and finishes the heads whose last split it made. No thread returns to Python in between.
"""

from typing import Any

from llvmlite import ir

from stillhouse.kernels.paged_attention.cpu_block import range_function
from stillhouse.kernels.paged_attention.cpu_finish import FLOATS, finish_function
from stillhouse.kernels.paged_attention.cpu_lanes import F32, I32, I64, LaneWriter
from stillhouse.kernels.paged_attention.cpu_spec import (
    MOST_SPLITS,
    SPAN_WORDS,
    SPLIT_TOKENS,
    DecodeSpec,
    JobReader,
    value_lanes,
)

NAME = "run"
_JOB = I64.as_pointer()


def emit(spec: DecodeSpec) -> str:
    """The module's text: void run(int64 *job), its words those of `JOB_WORDS`."""
    module = ir.Module("attention")
    attend, finish = range_function(module, spec), finish_function(module, spec, _JOB)
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [_JOB]), NAME)
    _RunWriter(spec, function, attend, finish).body()
    return str(module)


class _RunWriter(LaneWriter):
    """Writes the body of `run`."""

    def __init__(self, spec: DecodeSpec, function: ir.Function, attend: Any, finish: Any) -> None:
        super().__init__(function)
        self.spec, self.attend, self.finish = spec, attend, finish
        self.job = JobReader(self.b, function.args[0])
        self.width = value_lanes(spec.pages.value.format)[-1]

    def body(self) -> None:
        """Work until none is left."""
        with self.each_item(self.job) as item:
            self.work(item)
        self.b.ret_void()

    def work(self, item: Any) -> None:
        """One split of a head, if the sequence has so many; then the head, if it was the last."""
        b, most = self.b, self.job.word("splits")
        place, split = b.udiv(item, most), b.urem(item, most)
        heads = self.job.word("heads")
        sequence, head = b.udiv(place, heads), b.urem(place, heads)
        spans = self.job.pointer("spans", _JOB)
        at = b.mul(sequence, I64(SPAN_WORDS))
        first, last = (b.load(b.gep(spans, [b.add(at, I64(i))])) for i in (0, 1))
        size = self.split_size(last)
        skipped = b.udiv(first, size)
        start = b.mul(b.add(skipped, split), size)
        begin = self.largest(start, first)
        end = self.smallest(b.add(start, size), last)
        with b.if_then(b.icmp_signed("<", begin, end), likely=True):
            jump = b.mul(b.sub(self.job.word("threads"), I64(1)), size)
            self.attend_split(item, sequence, head, (begin, end, jump, last))
        count = b.sub(b.udiv(b.add(last, b.sub(size, I64(1))), size), skipped)
        count = b.select(b.icmp_signed("<", first, last), count, I64(0))
        done = self.taken(b.gep(self.job.pointer("done", _JOB), [place]))
        with b.if_then(b.icmp_signed("==", done, b.sub(most, I64(1)))):
            b.store(I64(0), b.gep(self.job.pointer("done", _JOB), [place]))  # for the next layer
            b.call(self.finish, [self.function.args[0], sequence, head, place, count])

    def split_size(self, last: Any) -> Any:
        """`cpu_spec.split_size`."""
        b, whole = self.b, SPLIT_TOKENS * MOST_SPLITS
        times = b.udiv(b.add(last, I64(whole - 1)), I64(whole))
        return b.mul(self.largest(times, I64(1)), I64(SPLIT_TOKENS))

    def attend_split(self, item: Any, sequence: Any, head: Any, ends: tuple[Any, ...]) -> None:
        """Where the sequence's head lies, its queries, and where its sums go."""
        b, job, group = self.b, self.job, self.spec.group
        place = b.udiv(item, job.word("splits"))
        halves: list[Any] = []
        for half in ("key", "value"):
            for name, prefix in (("vectors", ""), ("scalars", "scalar_")):
                there = b.add(
                    b.mul(sequence, job.word(f"{half}_{prefix}row")),
                    b.mul(head, job.word(f"{half}_{prefix}head")),
                )
                halves.append(b.gep(job.pointer(f"{half}_{name}"), [there]))
            halves.append(job.word(f"{half}_page"))
        table = b.gep(job.pointer("table"), [b.mul(sequence, job.word("table_row"))])
        channels = self.spec.pages.key.format.channels
        b.call(
            self.attend,
            [
                *halves,
                b.bitcast(table, I32.as_pointer()),
                *ends,
                self.row("query", place, group * channels),
                self.row("offset", place, group),
                job.pointer("books", FLOATS),
                b.bitcast(b.trunc(job.word("softcap"), I32), F32),
                self.row("acc", item, group * self.width),
                self.row("ml", item, group * 2),
            ],
        )

    def row(self, name: str, number: Any, size: int) -> Any:
        """Of an array of rows."""
        return self.b.gep(self.job.pointer(name, FLOATS), [self.b.mul(number, I64(size))])
