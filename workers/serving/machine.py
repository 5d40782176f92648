"""The server's self-check without a server: does this machine compute what it should?

`python -m stillhouse.workers.serving.machine` prints the errors as JSON.
"""

import json
import sys
from collections.abc import Iterator

import torch

from stillhouse.workers.serving.cpu_layer import CpuLayer
from stillhouse.workers.serving.self_check import WITHIN, worst_error
from stillhouse.workers.serving.served_cache import ServedCache

_FORMATS, _DIMS, _HEADS, _GROUP, _BLOCK = ("k4v4", "k3v3", "fp8"), (64, 128, 256), 2, 4, 128


def kernel_errors() -> Iterator[tuple[str, float]]:
    """Formats and head sizes, and the worst relative error of attention over their packed pages."""
    for name in _FORMATS:
        for dim in _DIMS:
            found = ServedCache(name, sinks=1).layer(0, _HEADS, dim, _BLOCK)
            assert found is not None
            layer = CpuLayer(found.codecs, found.layout, _GROUP, dim**-0.5)
            yield f"{name} D={dim}", worst_error(layer, _HEADS)


def main() -> None:
    """The worst of them, and what is allowed."""
    name, error = max(kernel_errors(), key=lambda found: found[1])
    json.dump({"name": name, "error": error, "allowed": WITHIN[torch.float32]}, sys.stdout)


if __name__ == "__main__":
    main()
