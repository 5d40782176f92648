"""Guarantees 6-9 of README.md: who may import whom, and that the rules can fail."""

import importlib.metadata
import shutil
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
CONTRACTS = {
    contract["id"]: contract["name"]
    for contract in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"][
        "contracts"
    ]
}
LINT = "from importlinter.cli import lint_imports_command as run; run()"


def lint(root: Path) -> tuple[bool, str]:
    """Run the rules of this checkout's pyproject.toml on the tree at `root`."""
    subprocess.run([sys.executable, ROOT / "tools/typing_tree.py", root], check=True)
    result = subprocess.run(
        [sys.executable, "-c", LINT, "--config", ROOT / "pyproject.toml", "--no-cache"],
        cwd=root / ".typing",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return result.returncode == 0, result.stdout + result.stderr


def plant(root: Path, module: str, code: str) -> None:
    file = root / module
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(code)


@pytest.fixture
def sound_tree(tmp_path: Path) -> Path:
    """A small tree that keeps every rule, with one import for each that is allowed."""
    plant(tmp_path, "stillhouse/__init__.py", "")
    plant(tmp_path, "stillhouse/errors.py", "")
    plant(
        tmp_path,
        "stillhouse/cli.py",
        "import typer, rich\nimport stillhouse.pipelines.plan, stillhouse.configs.recipe\n",
    )
    plant(tmp_path, "stillhouse/__main__.py", "import stillhouse.cli\n")
    plant(
        tmp_path,
        "pipelines/plan.py",
        "import stillhouse.workers.trainer\n"
        "import stillhouse.storage.catalog, stillhouse.configs.recipe\n",
    )
    plant(
        tmp_path,
        "workers/trainer.py",
        "import torch, transformers, peft\nimport stillhouse.kernels.codec.fast\n"
        "import stillhouse.storage.records, stillhouse.configs.recipe, stillhouse.errors\n",
    )
    plant(tmp_path, "workers/actors.py", "import ray\n")
    plant(tmp_path, "workers/serving/vllm_cpu.py", "import vllm\n")
    plant(tmp_path, "kernels/codec/fast.py", "import torch, triton\nimport stillhouse.errors\n")
    plant(tmp_path, "storage/catalog.py", "import duckdb, pyarrow\nimport stillhouse.errors\n")
    plant(tmp_path, "storage/tracking/upload.py", "import mlflow\n")
    plant(tmp_path, "storage/records.py", "")
    plant(tmp_path, "configs/recipe.py", "import pydantic, yaml\nimport stillhouse.errors\n")
    return tmp_path


def test_this_checkout_keeps_the_rules(tmp_path: Path) -> None:
    for name in ("stillhouse", "configs", "storage", "kernels", "workers", "pipelines"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    kept, output = lint(tmp_path)
    assert kept, output


def test_a_sound_tree_is_green(sound_tree: Path) -> None:
    kept, output = lint(sound_tree)
    assert kept, output


@pytest.mark.parametrize(
    ("broken", "module", "code"),
    [
        ("layers", "configs/bad.py", "import stillhouse.storage.records"),
        ("layers", "storage/bad.py", "import stillhouse.configs.recipe"),
        ("layers kernels-behind-workers", "storage/bad.py", "import stillhouse.kernels.codec.fast"),
        (
            "layers workers-behind-pipelines",
            "kernels/deep/er/bad.py",
            "import stillhouse.workers.trainer",
        ),
        ("layers", "workers/bad.py", "def late():\n    import stillhouse.pipelines.plan"),
        ("layers", "pipelines/stages/bad.py", "import stillhouse.cli"),
        ("layers", "stillhouse/errors.py", "import stillhouse.storage.records"),
        ("layers", "stillhouse/surprise.py", ""),
        ("workers-behind-pipelines", "stillhouse/cli.py", "import stillhouse.workers.trainer"),
        ("kernels-behind-workers", "pipelines/bad.py", "import stillhouse.kernels.codec.fast"),
        ("only-schema", "storage/bad.py", "import pydantic"),
        ("only-schema", "workers/bad.py", "from yaml import safe_load"),
        ("only-arrow", "pipelines/stages/bad.py", "import pyarrow.parquet"),
        ("only-duckdb", "storage/records.py", "def late():\n    import duckdb"),
        ("only-mlflow", "storage/catalog.py", "import mlflow"),
        ("only-torch", "pipelines/bad.py", "import torch"),
        ("only-torch", "storage/bad.py", "from torch.utils import data"),
        ("only-triton", "workers/bad.py", "import triton"),
        ("only-triton", "workers/bad.py", "import numba"),
        ("only-models", "kernels/codec/bad.py", "from transformers import Cache"),
        ("only-models", "pipelines/bad.py", "import safetensors.torch"),
        ("only-ray", "workers/trainer.py", "import ray"),
        ("only-vllm", "workers/trainer.py", "import vllm"),
        ("only-terminal", "pipelines/bad.py", "from rich.progress import Progress"),
        ("only-terminal", "configs/bad.py", "import typer"),
    ],
)
def test_a_planted_import_is_red(sound_tree: Path, broken: str, module: str, code: str) -> None:
    plant(sound_tree, module, code + "\n")
    kept, output = lint(sound_tree)
    assert not kept
    red = {contract for contract, name in CONTRACTS.items() if f"{name} BROKEN" in output}
    assert red == set(broken.split())


def test_what_is_imported_is_declared() -> None:
    import_names = importlib.metadata.packages_distributions()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = chain(project["dependencies"], *project["optional-dependencies"].values())
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    for name in third_party_imports():
        owners = {canonicalize_name(owner) for owner in import_names.get(name, [name])}
        assert owners & declared, f"no dependency in pyproject.toml brings {name}"


def third_party_imports() -> set[str]:
    code = (
        "import grimp, sys; sys.path.insert(0, '');"
        "g = grimp.build_graph('stillhouse', include_external_packages=True, cache_dir=None);"
        "print(*(m for m in g.modules if g.is_module_squashed(m)))"
    )
    subprocess.run([sys.executable, ROOT / "tools/typing_tree.py", ROOT], check=True)
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT / ".typing",
        capture_output=True,
        text=True,
        check=True,
    )
    return set(result.stdout.split()) - sys.stdlib_module_names
