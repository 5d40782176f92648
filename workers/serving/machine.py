"""The server's self-check without a server: does this machine compute what it should?

`python -m stillhouse.workers.serving.machine` prints a line of JSON for the CPU's kernels, and one
for a GPU's where torch sees one.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

from stillhouse.workers.serving.cpu_layer import CpuLayer
from stillhouse.workers.serving.gpu_layer import GpuLayer
from stillhouse.workers.serving.packed_layer import PackedLayer
from stillhouse.workers.serving.self_check import WITHIN, worst_error
from stillhouse.workers.serving.served_cache import ServedCache

_FORMATS, _DIMS, _HEADS, _GROUP, _BLOCK = ("k4v4", "k3v3", "fp8"), (64, 128, 256), 2, 4, 128


@dataclass(frozen=True, slots=True)
class Finding:
    """gpu: its name, None of the CPU. name: format and head size of the worst error, relative."""

    gpu: str | None
    name: str
    error: float
    allowed: float


def kernel_errors(
    kind: type[PackedLayer], dtype: torch.dtype, device: str
) -> Iterator[tuple[str, float]]:
    """Formats and head sizes, and the worst relative error of attention over their packed pages.

    dtype: of the states.
    """
    for name in _FORMATS:
        for dim in _DIMS:
            found = ServedCache(name, sinks=1).layer(0, _HEADS, dim, _BLOCK, device)
            assert found is not None
            layer = kind(found.codecs, found.layout, _GROUP, dim**-0.5)
            yield f"{name} D={dim}", worst_error(layer, _HEADS, dtype=dtype, device=device)


def worst(kind: type[PackedLayer], dtype: torch.dtype, device: str = "cpu") -> Finding:
    """Of all formats and head sizes."""
    name, error = max(kernel_errors(kind, dtype, device), key=lambda found: found[1])
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return Finding(gpu, name, error, WITHIN[dtype])


def main() -> None:
    """A line as soon as it is found: a GPU's kernels that do not compile do not hide the CPU's."""
    _say(worst(CpuLayer, torch.float32))
    if torch.cuda.is_available():
        _say(worst(GpuLayer, torch.float16, "cuda"))


def _say(found: Finding) -> None:
    sys.stdout.write(json.dumps(asdict(found)) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
