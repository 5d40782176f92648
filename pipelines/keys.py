"""Stage keys: what decides whether a stage must run again (docs/decisions/0004-stage-keys.md)."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stillhouse.configs.recipe import RecipeConfig
from stillhouse.pipelines.stage import Stage

Fingerprint = Callable[[str], str]


def stage_keys(
    chain: Sequence[Stage], recipe: RecipeConfig, model: Fingerprint, data: Fingerprint
) -> dict[str, str]:
    """Return each stage's key.

    A key is a hash of the stage's name and version, its own slice of the recipe, the keys of the
    stages it reads, and the fingerprints of its models and data. Nothing heavy is imported.
    """
    keys: dict[str, str] = {}
    for stage in chain:
        keys[stage.name] = _digest(
            {
                "stage": stage.name,
                "version": stage.version,
                "settings": stage.settings(recipe),
                "inputs": {name: keys[name] for name in stage.after if name in keys},
                "models": {ref: model(ref) for ref in stage.model_refs(recipe)},
                "data": {ref: data(ref) for ref in stage.data_refs(recipe)},
            }
        )
    return keys


def ancestors(chain: Sequence[Stage], name: str) -> list[str]:
    """Return the stages that a stage depends on, at any distance, and itself; in order."""
    stages = {stage.name: stage for stage in chain}
    wanted = {name}
    for stage in reversed(chain):
        if stage.name in wanted:
            wanted.update(parent for parent in stage.after if parent in stages)
    return [stage.name for stage in chain if stage.name in wanted]


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
