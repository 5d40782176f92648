"""Writes the list `packages` of pyproject.toml anew from the tree; `make fmt` runs it.

Every folder with Python in it is a package: setuptools takes no wildcard where folders are renamed.
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("configs", "storage", "kernels", "workers", "pipelines")


def packages(root: Path) -> list[str]:
    """Import names of all folders that hold Python files."""
    names = {"stillhouse"} | {f"stillhouse.{room}" for room in ROOMS}
    for top in ("stillhouse", *ROOMS):
        for file in (root / top).rglob("*.py"):
            parts = file.parent.relative_to(root).parts
            names.add(".".join(parts if top == "stillhouse" else ("stillhouse", *parts)))
    return sorted(names)


if __name__ == "__main__":
    pyproject = ROOT / "pyproject.toml"
    text = pyproject.read_text()
    lines = "".join(f'    "{name}",\n' for name in packages(ROOT))
    renewed = re.sub(r"(?m)^packages = \[\n(?: .*\n)*\]", f"packages = [\n{lines}]", text, count=1)
    if renewed != text:
        pyproject.write_text(renewed)
        print("pyproject.toml: the list of packages is renewed")
