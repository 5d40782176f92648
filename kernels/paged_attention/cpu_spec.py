"""What a function is compiled for, and the words of the job that it reads.

Shape suffixes as in `cpu`.
"""

from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from stillhouse.kernels.paged_attention.cpu_lanes import I8, I64, LANES
from stillhouse.kernels.paged_attention.pages import PageFormat, RecordFormat, VectorFormat

BYTES = I8.as_pointer()
LOWEST = -1e30  # below every score; its difference from itself is 0, not NaN as infinity's
SPLIT_TOKENS = 512  # a thread's work: small enough to balance, large enough to pay
MOST_SPLITS = 16  # of a longer context the splits are longer, so that merging stays cheap
SPAN_WORDS = 6  # of a sequence: packed tokens, then raw tokens of both parts, each [first, last)
HALF_WORDS = ("vectors", "scalars", "row", "scalar_row", "head", "scalar_head", "page")
KEY_WORDS, VALUE_WORDS = (
    tuple(f"{half}_{word}" for word in HALF_WORDS) for half in ("key", "value")
)
RAW_WORDS = ("keys", "key_row", "key_head", "key_token",
             "values", "value_row", "value_head", "value_token")  # fmt: skip
# Of a step, the same for all its layers. done: counters of a head's finished work items.
PLAN_WORDS = ("done", "heads", "items", "splits", "spans", "table", "table_row")
JOB_WORDS = (
    "next",  # counter of work items taken
    *PLAN_WORDS, "threads", "softcap", "books", *KEY_WORDS, *VALUE_WORDS,
    "query", "offset", "acc", "ml", "out",
    *(f"raw{part}_{word}" for part in (0, 1) for word in RAW_WORDS),
    "raw_query", "raw_mean", "raw_out", "scores", "scores_row",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class DecodeSpec:
    """dim: the head size, of tokens in 16 bits. brain: whether their keys, and their values, are
    bfloat16, not float16. permute: `avx512`, `avx2` or `` for how tables are read.
    """

    pages: PageFormat | RecordFormat
    group: int
    dim: int
    softcap: bool
    permute: str
    brain: tuple[bool, bool] = (False, False)


def filled_lanes(channels: int) -> int:
    """The next multiple of 16."""
    return -(-channels // LANES) * LANES


def value_lanes(format: VectorFormat) -> list[int]:
    """Where each channel group begins in the padded accumulators."""
    starts, at = [], 0
    for group in format.groups:
        starts.append(at)
        at += filled_lanes(group.channels)
    return [*starts, at]


def split_size(last: int) -> int:
    """Tokens of a split of a range that ends at `last`, the same for any number of threads."""
    return SPLIT_TOKENS * max(1, -(-last // (SPLIT_TOKENS * MOST_SPLITS)))


def split_count(first: int, last: int) -> int:
    """Splits of a range; they begin at multiples of their size."""
    size = split_size(last)
    return -(-last // size) - first // size if last > first else 0


class JobReader:
    """The words of a job, int64 each, in the order of their names."""

    def __init__(self, builder: ir.IRBuilder, job: Any, names: tuple[str, ...] = JOB_WORDS) -> None:
        self.b, self.job, self.names = builder, job, names

    def place(self, name: str) -> Any:
        """The address of a word."""
        return self.b.gep(self.job, [I64(self.names.index(name))])

    def word(self, name: str) -> Any:
        """Its number."""
        return self.b.load(self.place(name))

    def pointer(self, name: str, kind: Any = BYTES) -> Any:
        """Its number as an address."""
        return self.b.inttoptr(self.word(name), kind)
