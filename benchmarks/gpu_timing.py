"""Seconds, memory and bandwidth of steps on a GPU, behind an interface that a test can fake."""

import gc
import re
import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch

Call = Callable[[], Any]
L2_TIMES, MOST_COPIES = 8, 256  # buffers that take turns exceed the L2 cache so many times
SECONDS, LEAST, MOST = 0.1, 7, 50  # of replays that are timed


class StepDevice(Protocol):
    """What the benchmark asks of a device; bytes and seconds. place: where torch puts tensors."""

    place: str
    l2_bytes: int

    def free_bytes(self) -> int:
        """That an allocation may take."""

    def clear(self) -> None:
        """Give back what nobody holds any more."""

    def watch_memory(self) -> int:
        """Begin a new peak; what is allocated now."""

    def peak_bytes(self) -> int:
        """The most that was allocated since."""

    def step_seconds(self, calls: Sequence[Call]) -> float:
        """Of one call, where calls over different buffers take turns."""

    def facts(self) -> dict[str, Any]:
        """What the JSON says of it."""


class CudaDevice:
    """The current CUDA device. SystemExit where torch sees none."""

    place = "cuda"

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise SystemExit(
                f"expected a CUDA device, found none (torch {torch.__version__}): run this on a "
                "machine with an NVIDIA GPU and torch's CUDA build"
            )
        self._properties: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.l2_bytes = int(self._properties.L2_cache_size)

    def free_bytes(self) -> int:
        """As the driver has it, when torch's pool is empty."""
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info()[0])

    def clear(self) -> None:
        """Waits for the device."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def watch_memory(self) -> int:
        """By torch's allocator."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def peak_bytes(self) -> int:
        """By torch's allocator."""
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    def step_seconds(self, calls: Sequence[Call]) -> float:
        """Median of replays of one CUDA graph that holds every call once.

        So no launch from the host is in it. What a call returns is dropped while it is captured:
        the next call writes to the same memory, as the layers of a model do.
        """
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        # This context puts the usual stream back when a capture fails half-way as well.
        with torch.cuda.stream(stream):
            for call in calls:
                call()
            torch.cuda.synchronize()
            # Threads of other libraries may speak to the device meanwhile.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                for call in calls:
                    call()
            first = _event_seconds(graph.replay, 2)[-1]
            times = _event_seconds(graph.replay, replays(first))
        graph.reset()
        return statistics.median(times) / len(calls)

    def facts(self) -> dict[str, Any]:
        """Name, driver, sizes."""
        return {
            "device": self._properties.name,
            "driver": driver_version(),
            "cuda": torch.version.cuda,
            "capability": f"{self._properties.major}.{self._properties.minor}",
            "processors": self._properties.multi_processor_count,
            "memory_bytes": self._properties.total_memory,
            "l2_bytes": self.l2_bytes,
        }


def _event_seconds(call: Call, count: int) -> list[float]:
    """Of each of so many calls, one behind the other: the host runs ahead and waits once."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in pairwise(events)]


def replays(seconds: float) -> int:
    """How many are timed, where one takes so long."""
    return max(LEAST, min(MOST, round(SECONDS / max(seconds, 1e-9))))


def copies(cache_bytes: int, l2_bytes: int) -> int:
    """Caches that take turns, so that none of them is in the L2 cache when its turn comes."""
    return max(1, min(MOST_COPIES, -(-L2_TIMES * l2_bytes // cache_bytes)))


def copy_rate(device: StepDevice) -> float:
    """Bytes a second, read and written, of a copy on the device, far beyond its L2 cache.

    The best of three: a device that has just woken copies more slowly, and all shares rest on this.
    """
    size = 2 * L2_TIMES * device.l2_bytes
    source, target = (torch.ones(size, dtype=torch.uint8, device=device.place) for _ in range(2))
    return 2 * size / min(device.step_seconds([lambda: target.copy_(source)]) for _ in range(3))


def driver_version(file: Path = Path("/proc/driver/nvidia/version")) -> str:
    """Of NVIDIA's kernel module, or "unknown"."""
    text = file.read_text() if file.exists() else ""
    found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", text)
    return found.group() if found else "unknown"


def slug(name: str) -> str:
    """A device's name as part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
