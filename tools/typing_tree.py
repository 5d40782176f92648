"""Lays the checkout out as the one package `stillhouse`, for tools that read files.

mypy and import-linter find packages by folder, and in a checkout `stillhouse.kernels` is
`kernels/`. Writes `.typing/`: folders with an `__init__.py` each (an empty one where the checkout
has none) and links to the files of the checkout. What is unchanged stays untouched, so that the
caches of the tools hold.
"""

import os
import sys
from pathlib import Path

ROOMS = ("configs", "storage", "kernels", "workers", "pipelines")
PLACES = {place: place for place in ("stillhouse", "tests", "tools", "benchmarks")}
PLACES |= {room: f"stillhouse/{room}" for room in ROOMS}


def planned(root: Path) -> dict[Path, Path | None]:
    """Path in the tree -> file of the checkout, or None for an empty `__init__.py`."""
    plan: dict[Path, Path | None] = {}
    for source, place in PLACES.items():
        for file in (root / source).rglob("*.py*"):
            if file.suffix in {".py", ".pyi"} or file.name == "py.typed":
                plan[Path(place) / file.relative_to(root / source)] = file
    folders = {folder for path in plan for folder in path.parents if folder != Path()}
    for folder in folders:
        plan.setdefault(folder / "__init__.py", None)
    return plan


def write(root: Path, tree: Path) -> None:
    """Bring `tree` in line with the checkout at `root`."""
    plan = planned(root)
    for path in [p for p in tree.rglob("*") if not p.is_dir() or p.is_symlink()]:
        relative = path.relative_to(tree)
        if relative not in plan or path.is_symlink() != (plan[relative] is not None):
            path.unlink()
    for relative, file in plan.items():
        path = tree / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        if file is None:
            path.touch()
        elif not path.is_symlink():
            path.symlink_to(os.path.relpath(file, path.parent))


if __name__ == "__main__":
    checkout = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent).resolve()
    write(checkout, checkout / ".typing")
