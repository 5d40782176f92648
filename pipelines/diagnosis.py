"""What this machine has of what a recipe needs; each check names its cure."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from stillhouse.configs.recipe import RecipeConfig
from stillhouse.errors import StillhouseError
from stillhouse.workers.models.cache_folder import default_cache_root
from stillhouse.workers.models.refs import fingerprint, is_here
from stillhouse.workers.sources import reader

NEEDED = ("torch", "transformers", "peft", "pyarrow", "duckdb", "mlflow", "triton", "datasketch")
SPACE_GB = 6.0  # dequantised models, an exported student and its copy in the registry


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at."""

    name: str
    passed: bool
    found: str
    cure: str = ""


def diagnose(recipe: RecipeConfig) -> Iterator[Check]:
    """Check Python, packages, cores, space, and the recipe's models and data."""
    release = ".".join(map(str, sys.version_info[:3]))
    supported = (3, 11) <= sys.version_info < (3, 14)
    yield Check("python", supported, release, "install Python 3.11, 3.12 or 3.13")
    for package in NEEDED:
        yield _package(package)
    yield Check("cores", True, str(len(os.sched_getaffinity(0))))
    yield _space("runs", Path(recipe.runs_root))
    yield _space("cache", default_cache_root())
    models = recipe.models
    refs = [models.base, models.target, models.specialist, models.adapter]
    for ref in refs:
        if ref is not None and ref != "stage:specialize":
            yield _reference("model", ref)
    yield from _kernels()
    for source in (*recipe.data.pool, recipe.data.questions, recipe.data.private):
        if source is not None:
            yield _reference("data", source.ref)


def _kernels() -> Iterator[Check]:
    # In a process of its own: this one loads nothing heavy.
    command = [sys.executable, "-m", "stillhouse.workers.serving.machine"]
    return kernel_checks(subprocess.run(command, capture_output=True, text=True, check=False))


def kernel_checks(done: "subprocess.CompletedProcess[str]") -> Iterator[Check]:
    """Of what `workers.serving.machine` said, and whether it came to its end."""
    for line in done.stdout.splitlines():
        found = json.loads(line)
        name = "attention kernels" + (f" of {found['gpu']}" if found["gpu"] else "")
        text = f"within {found['error']:.1g} of float64 over packed pages (worst: {found['name']})"
        yield Check(name, found["error"] <= found["allowed"], text, "report this output")
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or ["nothing"]
        cure = "run `make setup`; if that does not help, report this output"
        yield Check("attention kernels", False, said[0], cure)


def _package(name: str) -> Check:
    cure = "run `make setup`, or `pip install stillhouse`"
    try:
        found = version(name)
    except PackageNotFoundError:
        return Check(name, False, "not installed", cure)
    return Check(name, importlib.util.find_spec(name) is not None, found, cure)


def _space(name: str, folder: Path) -> Check:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free / 1e9
    found = f"{free:.1f} GB free at {folder}"
    return Check(f"space for {name}", free >= SPACE_GB, found, f"free {SPACE_GB} GB there")


def _reference(kind: str, ref: str) -> Check:
    cache_root = default_cache_root()
    try:
        if kind == "model":
            fingerprint(ref, cache_root)
            if not is_here(ref):
                return Check(f"{kind} {ref}", True, "not here yet: the run fetches it")
        else:
            reader.fingerprint(ref, cache_root, Path.cwd())
    except StillhouseError as error:
        return Check(f"{kind} {ref}", False, "cannot be used", str(error))
    return Check(f"{kind} {ref}", True, "found")
