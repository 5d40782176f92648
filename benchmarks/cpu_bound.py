"""What bounds decode attention on a CPU: how fast its threads read, and do what its loop must do.

The second is measured, not reckoned from a processor's ports: the multiply-adds, table reads and
shifts of 16 decoded values, in their proportions and in registers alone, no one waiting for
another. That takes the 32 registers of AVX-512: without them there is no such bound.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from time import perf_counter
from typing import Any

import torch
from llvmlite import ir

from stillhouse.kernels.paged_attention import cpu_compile
from stillhouse.kernels.paged_attention.cpu_lanes import F32, I64, LANES, VF, VI
from stillhouse.kernels.paged_attention.cpu_threads import run_together
from stillhouse.kernels.paged_attention.cpu_unpack import UnpackWriter

ENOUGH = 256 << 20  # bytes that no cache of a processor holds
SECONDS, CALLS = 0.7, 5
_TURNS, _VALUES = 1 << 17, 16  # of the loop; times 16 values in each
_CHAINS = (10, 6, 4)  # independent ones of each kind: as many as registers hold beside operands


@dataclass(frozen=True, slots=True)
class Mix:
    """Instructions on 16 lanes for 16 values: multiply-adds, reads of a table, shifts and such."""

    products: float
    reads: float
    integers: float

    @classmethod
    def of(cls, bits: int, group: int, dim: int) -> "Mix":
        """What decoding and multiplying takes at least, of keys and of values on average.

        Each: `group` multiply-adds and one read of the table. Keys: a shift for all but one index
        of a dword, and 5 instructions to transpose each dword of 16 tokens. Values: a plane's bytes
        are widened once for all its indices, and shifted for all but the first. 3 and 5 bits are
        two planes: a merge, one for four keys. Beside these, for each query and token, 33 / 16 for
        the greatest score and the exponential (counted in the loop's assembly).
        """
        low, second = bits - (bits in (3, 5)), bits in (3, 5)
        transposed, widened = 5 * bits / 32, low / 8
        key = 3 / 4 + 1 - 1 / 4 if second else 1 - bits / 32
        value = 1 - low / 8 + 2 * second
        products = group + 33 * group / (2 * dim)
        return cls(products, 1 + (transposed + widened) / 2, (key + value) / 2)


def read_rate() -> float:
    """Bytes a second that the threads read."""
    numbers = torch.ones(ENOUGH // 4)
    return ENOUGH / best([numbers.sum])


def least_seconds(values: float, mix: Mix, threads: int) -> float | None:
    """In which all threads together do the mix for so many values; None without AVX-512."""
    if cpu_compile.processor().permute != "avx512":
        return None
    return values / LANES / mix_rate(mix, threads)


@cache
def mix_rate(mix: Mix, threads: int) -> float:
    """How many times 16 values a second all threads together do the mix."""
    code = cpu_compile.compiled_text(mix_text(mix))
    numbers = torch.ones(3 * LANES)
    numbers[2 * LANES :].view(torch.int32).fill_(1)
    job = numbers.data_ptr()
    done = threads * _TURNS * _VALUES
    return done / best([lambda: run_together(code, job, threads, numbers)])


def mix_text(mix: Mix) -> str:
    """LLVM code of a loop that does the mix for 16 times 16 values."""
    counts = [round(_VALUES * part) for part in (mix.products, mix.reads, mix.integers)]
    module = ir.Module("mix")
    pointer = I64.as_pointer()
    _emit(ir.Function(module, ir.FunctionType(ir.VoidType(), [pointer]), "run"), counts)
    return str(module)


def _emit(function: ir.Function, counts: Sequence[int]) -> None:
    """A loop of so many products, reads and shifts, evenly mixed, on chains of their own.

    The function's argument: 16 floats, room for 16, 16 counts of a shift.
    """
    permute = cpu_compile.processor().permute
    write = UnpackWriter(function, permute, None)
    room = write.b.bitcast(function.args[0], F32.as_pointer())
    factor = write.load_floats(room, 0)
    index = write.b.bitcast(write.load_floats(room, 2 * LANES), VI)
    chains = [[write.variable(VF) for _ in range(number)] for number in _CHAINS]
    steps: tuple[Callable[[Any], Any], ...] = (
        lambda x: write.fma(factor, factor, x),
        lambda x: write.permuted(x, index),
        lambda x: write.b.bitcast(write.b.lshr(write.b.bitcast(x, VI), index), VF),
    )
    for chain in chains:
        for place in chain:
            write.b.store(factor, place)
    order = sorted(
        ((n + 0.5) / count, kind, n) for kind, count in enumerate(counts) for n in range(count)
    )
    with write.loop(I64(0), I64(_TURNS), 1):
        for _, kind, n in order:
            place = chains[kind][n % len(chains[kind])]
            write.b.store(steps[kind](write.b.load(place)), place)
    # Written somewhere, so that no chain is left out.
    total = write.added([write.b.load(place) for chain in chains for place in chain])
    write.store(total, room, LANES)
    write.b.ret_void()


def best(calls: Sequence[Callable[[], Any]]) -> float:
    """Seconds of the fastest of calls that take turns."""
    for call in calls:
        call()
    times: list[float] = []
    began = perf_counter()
    while len(times) < CALLS * len(calls) or perf_counter() - began < SECONDS:
        at = perf_counter()
        calls[len(times) % len(calls)]()
        times.append(perf_counter() - at)
    return min(times)
