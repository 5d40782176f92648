"""The arms of a transfer benchmark: one recipe, one pool, one budget; another choice each."""

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stillhouse.configs.load import check
from stillhouse.configs.recipe import RecipeConfig

Tree = dict[str, Any]
_NO_CRITERION: Tree = {"tau": None, "criteria": []}


@dataclass(frozen=True)
class Arm:
    """A name in the table, and what it changes of the recipe."""

    name: str
    changes: Mapping[str, Mapping[str, Any]]


ARMS = (
    Arm("random", {"select": _NO_CRITERION | {"order": "random"}}),
    Arm("no filter", {"select": _NO_CRITERION | {"budget": None}}),
    Arm("gap only (published)", {"select": {"tau": 1.5, "criteria": [], "order": "gap"}}),
    Arm("criterion", {}),
    Arm("criterion + token mask", {"distill": {"token_share": 0.7}}),
)
MODELS = ("base", "specialist", "target_before", "ceiling")  # answered once a seed


def tau_arms(values: list[float]) -> tuple[Arm, ...]:
    """The published criterion at other thresholds; of what passes, a random part of the budget."""
    return tuple(
        Arm(f"tau {tau:g}", {"select": {"tau": tau, "criteria": [], "order": "random"}})
        for tau in values
    )


def budget_arms(values: list[int]) -> tuple[Arm, ...]:
    """The recipe's criterion and the published one, with other budgets."""
    published = {"tau": 1.5, "criteria": [], "order": "gap"}
    return tuple(
        Arm(f"{name} {budget}", {"select": select | {"budget": budget}})
        for budget in values
        for name, select in (("criterion", {}), ("gap only", published))
    )


def recipe_of(recipe: RecipeConfig, seed: int, arm: Arm, arms: tuple[str, ...]) -> RecipeConfig:
    """The recipe of one arm and seed, asking `arms`; all arms of a seed share a run's folder."""
    tree: Tree = copy.deepcopy(recipe.model_dump(mode="json"))
    tree["name"] = f"{recipe.name}-seed{seed}"
    for section in ("specialize", "select", "expand", "distill"):
        tree[section]["seed"] = seed
    for sources in ("seeds", "pool", "controls"):
        for source in tree["data"][sources]:
            source["ref"] = _seeded(source["ref"], seed)
    for source in ("private", "questions"):
        tree["data"][source]["ref"] = _seeded(tree["data"][source]["ref"], seed)
    for section, changes in arm.changes.items():
        tree[section] |= changes
    tree["evaluate"] |= {"arms": list(arms), "gate": {}}
    tree["tracking"]["enabled"] = False
    return check(tree)


def _seeded(ref: str, seed: int) -> str:
    """Another draw of a built-in's rows; one that has a seed of its own keeps it apart."""
    if not ref.startswith("builtin:"):
        return ref
    own = re.search(r"&seed=(\d+)", ref)
    number = seed if own is None else 1000 * seed + int(own[1])
    return f"{ref.replace(own[0], '') if own else ref}&seed={number}"
