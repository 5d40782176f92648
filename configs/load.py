"""From a recipe's name and overrides to a checked `RecipeConfig`."""

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from stillhouse.configs.reading import read_yaml
from stillhouse.configs.recipe import RecipeConfig
from stillhouse.errors import ConfigError

RECIPES = Path(__file__).parent / "recipes"


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name: str, overrides: Sequence[str] = ()) -> RecipeConfig:
    """Read a shipped recipe by name or any YAML file by path, apply `a.b=c` overrides, check it.

    Raises ConfigError, naming the key and the nearest right one.
    """
    path = _find(name)
    tree = _read(path, seen=())
    tree.setdefault("name", path.stem)
    for override in overrides:
        _apply(tree, override)
    return check(tree)


def check(tree: Mapping[str, Any]) -> RecipeConfig:
    """Validate a plain tree; JSON rules, so a list is a tuple and "3" is never 3."""
    try:
        return RecipeConfig.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(item) for item in error.errors())) from error
    except (TypeError, ValueError) as error:  # a date, a ring of aliases, a number too long
        raise ConfigError(f"the recipe holds a value that JSON cannot: {error}") from error


def _find(name: str) -> Path:
    shipped = RECIPES / f"{name}.yaml"
    if shipped.is_file():
        return shipped
    if Path(name).is_file():
        return Path(name)
    close = difflib.get_close_matches(name, recipe_names(), n=1)
    raise ConfigError(
        f"no recipe {name!r}: expected a YAML file or one of {', '.join(recipe_names())}"
        + (f"; did you mean `{close[0]}`?" if close else "")
    )


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: `extends` comes back to itself; remove one of the two")
    try:
        tree = read_yaml(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: expected YAML, found: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, found {type(tree).__name__}")
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    beside = path.parent / f"{parent}"
    base = beside if beside.is_file() else _find(str(parent))
    inherited = _read(base, (*seen, path.resolve()))
    inherited.pop("name", None)  # else two recipes would share a run folder
    return _merge(inherited, tree)


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            value = _merge(old, value)
        merged[key] = value
    return merged


def _apply(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"override {override!r}: expected `section.key=value`")
    if path == "extends":
        raise ConfigError(f"override {override!r}: `extends` stands in a recipe's file only")
    *parents, last = path.split(".")
    node = tree
    for part in parents:
        child = node.setdefault(part, {})
        if isinstance(child, list):
            raise ConfigError(
                f"override {override!r}: `{part}` is a list: give it whole, as `{part}=[…]`"
            )
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: `{part}` is a value, not a section")
        node = child
    try:
        node[last] = read_yaml(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"override {override!r}: the value is not YAML: {error}") from error


def _explain(item: Any) -> str:
    location = [part for part in item["loc"] if isinstance(part, str | int)]
    dotted = ".".join(str(part) for part in location) or "recipe"
    if item["type"] == "extra_forbidden":
        known = _fields_at(location[:-1])
        return f"{dotted}: no such key{_nearest(str(location[-1]), known)}"
    if item["type"] == "missing":
        return f"{dotted}: required, found nothing"
    if item["type"] == "model_type":
        return f"{dotted}: expected a section, found {item['input']!r}"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{message}"
    return f"{dotted}: {message}, found {item['input']!r}"


def _fields_at(location: Sequence[str | int]) -> list[str]:
    model: Any = RecipeConfig
    for part in location:
        if isinstance(part, str) and _is_config(model):
            model = _config_in(model.model_fields[part].annotation)
    return list(model.model_fields) if _is_config(model) else []


def _config_in(annotation: Any) -> Any:
    if _is_config(annotation) or get_origin(annotation) is None:
        return annotation
    return next((_config_in(arg) for arg in get_args(annotation) if _is_config(arg)), None)


def _is_config(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    if close:
        return f"; did you mean `{close[0]}`?"
    return f"; expected one of {', '.join(known)}" if known else ""
