"""Calls of one compiled function, shared out over threads."""

import ctypes
from collections.abc import Sequence
from functools import cache

import torch
from llvmlite import ir

from stillhouse.kernels.paged_attention.cpu_compile import Compiled, compiled_text
from stillhouse.kernels.paged_attention.cpu_ir import NAME
from stillhouse.kernels.paged_attention.cpu_lanes import I64, LaneWriter
from stillhouse.kernels.paged_attention.cpu_spec import JobReader
from stillhouse.kernels.paged_attention.cpu_threads import run_together

_WORDS = ("next", "items", "function", "total", "calls")


def run_calls(function: int, calls: Sequence[Sequence[int]], kept: object) -> int:
    """The sum of what a function returns, called with each of these arguments.

    function: its address; integers and pointers in, an int64 out. It runs on torch's threads, so it
    must need no lock of Python's. kept: what the arguments point to.
    """
    width, count = len(calls[0]), len(calls)
    flat = (ctypes.c_int64 * (width * count))(*(word for call in calls for word in call))
    job = (ctypes.c_int64 * len(_WORDS))(0, count, function, 0, ctypes.addressof(flat))
    threads = min(torch.get_num_threads(), count)
    run_together(_caller(width), ctypes.addressof(job), threads, (kept, flat, job))
    return job[_WORDS.index("total")]


@cache
def _caller(width: int) -> Compiled:
    """void run(int64 *job): takes calls of so many arguments until none is left."""
    module = ir.Module("calls")
    pointer = I64.as_pointer()
    run = ir.Function(module, ir.FunctionType(ir.VoidType(), [pointer]), NAME)
    write = LaneWriter(run)
    b, job = write.b, JobReader(write.b, run.args[0], _WORDS)
    function = job.pointer("function", ir.FunctionType(I64, [I64] * width).as_pointer())
    calls = job.pointer("calls", pointer)
    with write.each_item(job) as item:
        first = b.mul(item, I64(width))
        words = [b.load(b.gep(calls, [b.add(first, I64(i))])) for i in range(width)]
        b.atomic_rmw("add", job.place("total"), b.call(function, words), "acq_rel")
    b.ret_void()
    return compiled_text(str(module))
