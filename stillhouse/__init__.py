"""Stillhouse: distil a model into another one and give it a compressed cache.

The rooms (`configs/`, `storage/`, `kernels/`, `workers/`, `pipelines/`) lie beside this folder in
a checkout and inside it in a wheel; either way their import name is `stillhouse.<room>`. In a
checkout this module binds them, because a top-level `kernels` package would hide Hugging Face's.
See docs/decisions/0001-import-binding.md.
"""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

__version__ = "0.1.0"
ROOMS = ("configs", "storage", "kernels", "workers", "pipelines")


def _bind(room: str) -> None:
    """Make the folder beside this package known as `stillhouse.<room>`; load nothing in it."""
    name = f"{__name__}.{room}"
    if PathFinder.find_spec(name, __path__) is not None:
        return  # installed from a wheel: the room lies inside the package
    spec = PathFinder.find_spec(name, [str(Path(__file__).resolve().parent.parent)])
    if spec is not None:
        sys.modules[name] = globals()[room] = module_from_spec(spec)


for _room in ROOMS:
    _bind(_room)
