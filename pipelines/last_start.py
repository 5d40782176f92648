"""What a run folder was last started with, for a plan to compare with."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stillhouse.configs.load import check
from stillhouse.configs.recipe import RecipeConfig
from stillhouse.errors import ConfigError, IntegrityError
from stillhouse.pipelines.stage import Stage
from stillhouse.storage.layout import RunFolder

_TOLD = 3  # differences


@dataclass(frozen=True, slots=True)
class LastStart:
    """The recipe and the keys of a run folder's last start."""

    recipe: RecipeConfig
    keys: Mapping[str, str]

    def difference(self, stage: Stage, recipe: RecipeConfig, keys: Mapping[str, str]) -> str:
        """Say why a stage has another key than it had."""
        old, new = _flat(stage.settings(self.recipe)), _flat(stage.settings(recipe))
        found = [
            f"{name} {old.get(name)} → {new.get(name)}"
            for name in dict.fromkeys([*new, *old])
            if old.get(name) != new.get(name)
        ]
        if len(found) > _TOLD:
            found[_TOLD:] = [f"{len(found) - _TOLD} more settings"]
        inputs = [name for name in stage.after if self.keys.get(name) != keys.get(name)]
        if inputs:
            found.append(f"its input: {', '.join(inputs)}")
        return ", ".join(found) or "its models, its data, or this software's way of doing it"


def last_start(folder: RunFolder) -> LastStart | None:
    """Read it; None where there is none that this version understands."""
    try:
        return LastStart(check(json.loads(folder.recipe.read_bytes())), read_keys(folder))
    except (OSError, ValueError, ConfigError, IntegrityError):
        return None


def read_keys(folder: RunFolder) -> dict[str, str]:
    """Return the keys of the recipe that was last started in a folder, by stage."""
    try:
        keys = json.loads(folder.plan.read_text(encoding="utf-8"))
        return {str(stage): str(key) for stage, key in keys.items()}
    except (ValueError, AttributeError) as error:
        raise IntegrityError(
            f"{folder.plan}: expected the keys of the stages in JSON, found {error}; run the "
            "recipe again: that writes it anew and keeps what is finished"
        ) from error


def _flat(settings: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Settings by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{path}{name}.")
        else:
            flat[path + name] = value
    return flat
