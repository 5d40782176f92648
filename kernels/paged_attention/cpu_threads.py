"""Threads that run compiled code together, without a return to Python in between.

torch's OpenMP threads where there are some: they are awake after torch's last operation, and no
second set of threads fights with them. Otherwise, and in a forked child, which has none of its
parent's threads, a pool of Python's.
"""

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch

from stillhouse.kernels.paged_attention.cpu_compile import Compiled


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


@cache
def _team() -> Any:
    """libgomp's `GOMP_parallel(function, data, threads, flags)`; None where torch has another."""
    folder = Path(torch.__file__).parent / "lib"
    found = sorted(folder.glob("libgomp*.so*"))
    if not found:
        return None
    parallel = ctypes.CDLL(str(found[0])).GOMP_parallel
    parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    parallel.restype = None
    return parallel


_forked: list[bool] = []


def _after_fork() -> None:
    _pool.cache_clear()
    _forked.append(True)


os.register_at_fork(after_in_child=_after_fork)


def run_together(code: Compiled, job: int, threads: int, kept: object) -> None:
    """Call the code on so many threads, with the address of a job that they share.

    kept: what the job points to; a thread of a pool may still write there when its caller was
    interrupted.
    """
    if threads <= 1:
        code.call(job)
        return
    team = None if _forked else _team()
    if team is not None:
        team(code.address, job, threads, 0)
        return

    def work(_number: int, _kept: object = kept) -> None:
        code.call(job)

    list(_pool(threads).map(work, range(threads)))
