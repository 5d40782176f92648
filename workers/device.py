"""Where models of this process run, and how torch computes there."""

import os
from typing import Any

import torch


def prepare_device(threads: int = 0) -> str:
    """Set the process up for torch; `cuda` where there is one, else `cpu`.

    `threads` 0 means OMP_NUM_THREADS, else all cores.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if threads or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    if device == "cpu":
        torch.use_deterministic_algorithms(True)
        # Filling every fresh tensor with NaN finds bugs and costs a pass over memory.
        deterministic: Any = torch.utils.deterministic  # its types miss the attribute
        deterministic.fill_uninitialized_memory = False
    return device
