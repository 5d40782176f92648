"""Guarantees 1-5 of README.md: the package is the same however it is reached."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from stillhouse import ROOMS, __version__

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SHIPPED = ("stillhouse", *ROOMS)
HEAVY = {"accelerate", "datasets", "duckdb", "mlflow", "peft"}
HEAVY |= {"pyarrow", "ray", "torch", "transformers", "vllm"}


def run_python(*args: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *args],
        cwd=cwd,
        env=clean | env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Every module of a checkout by import name, with its path relative to the root."""
    found = {}
    for top in SHIPPED:
        for file in sorted((root / top).rglob("*.py")):
            relative = file.relative_to(root)
            parts = list(relative.with_suffix("").parts)
            if parts[-1] == "__init__":
                parts.pop()
            name = ".".join(parts if top == "stillhouse" else ["stillhouse", *parts])
            found[name] = relative
    return found


# Prints {import name: file} of all modules; imports packages on the way, as `import` would.
LOCATE = """
import importlib.resources, importlib.util, json, sys
import stillhouse
recipes = importlib.resources.files("stillhouse.configs").joinpath("recipes")
names = json.loads(sys.argv[1])
print(json.dumps({
    "modules": {n: getattr(importlib.util.find_spec(n), "origin", None) for n in names},
    "recipes": sorted(p.name for p in recipes.iterdir() if p.name.endswith(".yaml")),
}))
"""


def locate(root: Path, cwd: Path, **env: str) -> dict[str, Path]:
    """Where a fresh interpreter finds the modules of `root`; checks that it sees its recipes."""
    result = run_python("-c", LOCATE, json.dumps(list(modules(root))), cwd=cwd, **env)
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["recipes"] == sorted(p.name for p in (root / "configs/recipes").glob("*.yaml"))
    missing = [name for name, origin in answer["modules"].items() if origin is None]
    assert not missing
    return {name: Path(origin) for name, origin in answer["modules"].items()}


@pytest.fixture(scope="module")
def installed_wheel(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A copy of the tree, and the folder its wheel, built offline, is installed into."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in SHIPPED:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    built = run_python("-m", "build", "--wheel", "--no-isolation", cwd=source)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = (source / "dist").glob("*.whl")
    target = tmp_path_factory.mktemp("installed")
    install = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target")
    installed = run_python(*install, str(target), str(wheel), cwd=source)
    assert installed.returncode == 0, installed.stderr
    return source, target


def test_a_wheel_holds_every_module_and_recipe(
    installed_wheel: tuple[Path, Path], tmp_path: Path
) -> None:
    source, target = installed_wheel
    found = locate(source, tmp_path, PYTHONPATH=str(target))
    for name, relative in modules(source).items():
        inside = relative if relative.parts[0] == "stillhouse" else Path("stillhouse") / relative
        assert found[name] == target / inside
        assert found[name].read_bytes() == (source / relative).read_bytes()
    top_level = {path.name for path in target.iterdir() if path.suffix != ".dist-info"}
    assert top_level - {"bin"} == {"stillhouse"}


def test_a_checkout_works_without_installation(tmp_path: Path) -> None:
    # -S leaves out site-packages, so nothing that is installed can help; sub-packages that import
    # third-party libraries cannot be asked this way, the rooms and what lies directly in them can
    code = (
        "import json, sys, importlib.util as u; import stillhouse; "
        "print(json.dumps([u.find_spec(n).origin for n in json.loads(sys.argv[1])]))"
    )
    direct = {name: path for name, path in modules().items() if len(path.parts) == 2}
    args = ("-S", "-c", code, json.dumps(list(direct)))
    for cwd, env in ((ROOT, {}), (tmp_path, {"PYTHONPATH": str(ROOT)})):
        result = run_python(*args, cwd=cwd, **env)
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout) == [str(ROOT / path) for path in direct.values()]


def test_an_editable_install_is_the_checkout(tmp_path: Path) -> None:
    try:
        origin = importlib.metadata.distribution("stillhouse").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("stillhouse is not installed here; `make setup` installs it")
    if origin is None or json.loads(origin)["url"] != ROOT.as_uri():
        pytest.skip("the installed stillhouse belongs to another checkout")
    assert locate(ROOT, tmp_path) == {name: ROOT / path for name, path in modules().items()}


def test_this_very_process_sees_the_checkout() -> None:
    for room in ROOMS:
        (place,) = sys.modules[f"stillhouse.{room}"].__path__
        assert Path(place) == ROOT / room


@pytest.mark.parametrize("room", [*ROOMS, "tests", "infra"])
def test_a_room_has_no_init(room: str) -> None:
    assert not (ROOT / room / "__init__.py").exists(), (
        f"{room}/__init__.py would make `{room}` importable by itself and hide others of its name"
    )


def test_transformers_imports_beside_hf_kernels() -> None:
    hf_kernels = Path(sys.prefix) / "hf-kernels"
    assert (hf_kernels / "kernels").is_dir(), "run `make setup`: it puts HF kernels there"
    code = (
        "import sys, transformers, kernels, stillhouse.kernels\n"
        "assert sys.path[0] == ''\n"
        "from transformers import LlamaForCausalLM\n"
        "from transformers.utils.import_utils import is_kernels_available\n"
        "assert is_kernels_available()\n"
        "print(kernels.__file__, *stillhouse.kernels.__path__, sep='\\n')\n"
    )
    result = run_python("-c", code, cwd=ROOT, PYTHONPATH=str(hf_kernels))
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-2:] == [
        str(hf_kernels / "kernels" / "__init__.py"),
        str(ROOT / "kernels"),
    ]


def test_the_listed_packages_are_the_tree() -> None:
    folders = {path.parent for path in modules().values()} | {Path(top) for top in SHIPPED}
    names = {
        ".".join(f.parts if f.parts[0] == "stillhouse" else ("stillhouse", *f.parts))
        for f in folders
    }
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == names, "`make fmt` renews the list"
    places = {"stillhouse": "stillhouse"} | {f"stillhouse.{room}": room for room in ROOMS}
    assert PYPROJECT["tool"]["setuptools"]["package-dir"] == places


def test_versions_agree() -> None:
    assert PYPROJECT["project"]["version"] == __version__


def requirements() -> list[Requirement]:
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"]]
    for extra, wanted in extras.items():
        if extra not in ("vllm", "bench"):  # not part of the environment
            lines += wanted
    return [r for r in map(Requirement, lines) if r.name != "stillhouse"]


def pins(file: str) -> dict[str, Version]:
    lines = [line.split("#")[0].strip() for line in (ROOT / file).read_text().splitlines()]
    found: dict[str, Version] = {}
    for line in filter(None, lines):
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.]+)", line)
        assert match, f"{file}: {line!r} is not `name==version`"
        found[canonicalize_name(match[1])] = Version(match[2])
    return found


def test_every_dependency_has_a_fitting_pin() -> None:
    pinned = pins("constraints.txt")
    for requirement in requirements():
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"constraints.txt lacks {requirement.name}"
        assert pinned[name] in requirement.specifier, f"{requirement} against {pinned[name]}"


@pytest.mark.parametrize("file", ["models.txt", "hf-kernels.txt", "peers.txt"])
def test_other_requirements_are_pinned(file: str) -> None:
    assert pins(f"requirements/{file}")


def imported_by(*args: str) -> set[str]:
    """Top-level names of all that `python ARGS` imports."""
    result = run_python("-X", "importtime", *args, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("import time:")]
    return {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines}


def test_importing_the_package_is_light() -> None:
    names = imported_by("-c", "import stillhouse")
    assert "stillhouse" in names
    assert names.isdisjoint(HEAVY | {"pydantic", "typer", "rich", "numpy"})


def test_help_is_light() -> None:
    names = imported_by("-m", "stillhouse", "--help")
    assert "stillhouse" in names
    assert names.isdisjoint(HEAVY)
