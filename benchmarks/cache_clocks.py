"""Time and memory of a step of generation, on a CPU and on a CUDA device."""

import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Wait = Callable[[], object]


@dataclass
class Clock:
    """Seconds spent inside the functions it wraps, step by step.

    wait: for a device, before and after; None while nothing is timed.
    """

    wait: Wait | None = None
    now: float = 0.0
    steps: list[float] = field(default_factory=list)

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.wait is None:
                return function(*args, **kwargs)
            self.wait()
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.wait()
                self.now += time.perf_counter() - began

        return timed

    def step(self) -> None:
        """One generated token more."""
        self.steps.append(self.now)
        self.now = 0.0

    @property
    def median(self) -> float:
        """Seconds a step."""
        return statistics.median(self.steps)


@dataclass
class Clocks:
    """Of the cache as a whole, and of its codecs."""

    cache: Clock = field(default_factory=Clock)
    encode: Clock = field(default_factory=Clock)
    decode: Clock = field(default_factory=Clock)

    def step(self) -> None:
        """One generated token more."""
        for clock in (self.cache, self.encode, self.decode):
            clock.step()

    def start(self, wait: Wait) -> None:
        """From here on functions are timed."""
        for clock in (self.cache, self.encode, self.decode):
            clock.wait = wait


class Host:
    """Memory that is resident, and a processor that nobody has to wait for."""

    cuda = False

    def __init__(self) -> None:
        self._before = 0

    def wait(self) -> None:
        """For nothing."""

    def watch(self) -> None:
        """Begin a new peak."""
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        self._before = resident("VmRSS")

    def grown(self) -> int:
        """Bytes of the peak above where it began."""
        return resident("VmHWM") - self._before


class Cuda:
    """The same of the current CUDA device."""

    cuda = True

    def __init__(self) -> None:
        self._before = 0

    def wait(self) -> None:
        """For all that was launched."""
        import torch

        torch.cuda.synchronize()

    def watch(self) -> None:
        """Begin a new peak."""
        import torch

        self.wait()
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()

    def grown(self) -> int:
        """Bytes of the peak above where it began."""
        import torch

        self.wait()
        return torch.cuda.max_memory_allocated() - self._before


def resident(name: str) -> int:
    """Bytes: VmRSS now, or VmHWM, the highest since the last reset."""
    for row in Path("/proc/self/status").read_text().splitlines():
        if row.startswith(f"{name}:"):
            return int(row.split()[1]) * 1024
    raise SystemExit(f"expected {name} in /proc/self/status: this benchmark needs Linux")
