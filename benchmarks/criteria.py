"""How well each signal of selection tells what it should: AUC by signal, recipe and seed.

    python -m benchmarks.criteria --json OUT [--recipes NAME …] [--seeds N]

A specialist is trained and answers a recipe's pool. Told apart are prompts of its speciality from
look-alikes it never learnt, from other prompts in its template, from bare ones, and from all of
these; and its right answers from its wrong ones, by labels that no stage of a run reads. Beside the
AUC, what the recipe's own criteria keep of each. Empty and cut answers are left out: selection
rejects them whatever it is asked. Stopped anywhere, the same command goes on there.
"""

import argparse
import json
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

from benchmarks.serving import machine
from benchmarks.transfer import Progress, spread
from benchmarks.transfer_arms import Arm, recipe_of
from stillhouse.configs.load import check, load_recipe
from stillhouse.configs.recipe import RecipeConfig
from stillhouse.configs.select import Signal
from stillhouse.pipelines.local import local_runner
from stillhouse.pipelines.runner import Runner
from stillhouse.pipelines.selection import ANSWERED
from stillhouse.pipelines.signals import measured
from stillhouse.pipelines.text import normalise
from stillhouse.storage.catalog import Catalog
from stillhouse.storage.manifest import Manifest
from stillhouse.workers.evaluation import exact_match
from stillhouse.workers.sources.reader import MalformedRow, read

RECIPES = ("transfer-icd10", "transfer-banking77", "transfer-handbook")
SIGNALS: tuple[Signal, ...] = tuple(
    signal for signal in get_args(Signal) if signal not in ("target_weakness", "random")
)
FOREIGN = ("look-alike", "template", "bare")  # what the pool holds beside the speciality


@dataclass(frozen=True)
class Row:
    """One AUC; `against` is what is told apart from the speciality, or right from wrong."""

    recipe: str
    seed: int
    signal: str
    against: str
    auc: float | None
    answers: int
    others: int


@dataclass(frozen=True)
class Kept:
    """What the recipe's own criteria keep of a part of the pool."""

    recipe: str
    seed: int
    part: str
    answers: int
    kept: int


Answer = tuple[str, bool | None, bool, Mapping[str, float | None]]  # part, right, kept, signals


def main() -> None:
    """Run, print and write."""
    asked = arguments()
    if not asked.json.parent.is_dir():
        raise SystemExit(f"--json: expected a folder that exists, found {asked.json.parent}")
    rows: list[Row] = []
    kept: list[Kept] = []
    for name in asked.recipes:
        for seed in range(asked.seeds):
            recipe = pooled(load_recipe(name, asked.overrides))
            config = recipe_of(
                recipe, seed, Arm("criteria", {"select": {"budget": None}}), ("student",)
            )
            answers = answered(config, seed)
            rows += aucs(name, seed, answers)
            kept += kept_parts(name, seed, answers)
            out = {
                **machine(),
                "rows": [asdict(r) for r in rows],
                "kept": [asdict(k) for k in kept],
            }
            asked.json.write_text(json.dumps(out, indent=1) + "\n")
    print(table(rows))
    print(kept_table(kept))
    print(f"Everything: {asked.json}")


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--seeds", type=int, default=3)
    return parser.parse_intermixed_args()


def pooled(recipe: RecipeConfig) -> RecipeConfig:
    """A recipe that starts from seeds alone gets the pool that its speciality has."""
    if recipe.data.pool:
        return recipe
    private = recipe.data.private
    assert private is not None
    pool = [
        {"ref": private.ref.replace("split=private", f"split={split}"), "origin_column": "origin"}
        for split in ("pool", "lookalike")
    ]
    pool += [
        {"ref": "builtin:elsewhere?split=pool&count=100&seed=1", "origin_column": "origin"},
        {
            "ref": "builtin:elsewhere?split=pool&count=100&seed=2",
            "origin": "bare",
            "template": "none",
        },
    ]
    tree = recipe.model_dump(mode="json")
    tree["data"]["pool"] = pool
    return check(tree)


def answered(config: RecipeConfig, seed: int) -> list[Answer]:
    """Every scored answer of the pool, with what is known of it."""
    runner = local_runner(config, Progress(config.name, seed))
    runner.run(until="select")
    truth = _truth(config)
    columns = ", ".join(f"signal_{signal}" for signal in SIGNALS)
    sql = (
        f"{ANSWERED}{measured(set(SIGNALS))} SELECT origin, measured.prompt_text, answer, "
        f"selections.status = 'kept', {columns} FROM measured "
        "JOIN prompts USING (prompt_id) JOIN selections USING (completion_id) "
        "WHERE measured.role = 'pool' AND finish <> 'length' ORDER BY completion_id"
    )
    found: list[Answer] = []
    for origin, text, answer, is_kept, *values in _rows(runner, sql):
        reference = truth.get(text)
        right = None if reference is None else exact_match(answer, reference)
        found.append((_part(origin), right, is_kept, dict(zip(SIGNALS, values, strict=True))))
    return found


def _rows(runner: Runner, sql: str) -> list[tuple]:
    with Catalog(runner.folder, Manifest(runner.folder), runner.keys()) as catalog:
        return catalog.rows(sql, {"round": 0})


def _truth(config: RecipeConfig) -> dict[str, str]:
    """The right answer to each prompt of the speciality in the pool."""
    assert config.data.private is not None
    ref = config.data.private.ref.replace("split=private", "split=truth")
    rows = (row for row in read(ref, Path.cwd()) if not isinstance(row, MalformedRow))
    return {normalise(row.values["prompt"]): row.values["response"] for row in rows}


def _part(origin: str) -> str:
    if origin.endswith("_same"):
        return "speciality"
    return "look-alike" if origin.endswith("_other") else "bare" if origin == "bare" else "template"


def aucs(recipe: str, seed: int, answers: Sequence[Answer]) -> list[Row]:
    """The AUC of each signal against each part, and of right against wrong answers."""
    rows = []
    for signal in SIGNALS:
        parts = {part: _values(answers, signal, part) for part in ("speciality", *FOREIGN)}
        mine = parts.pop("speciality")
        against = parts | {"all": [value for values in parts.values() for value in values]}
        rows += [
            Row(recipe, seed, signal, part, auc(mine, others), len(mine), len(others))
            for part, others in against.items()
        ]
        right, wrong = (
            _values(answers, signal, "speciality", is_right) for is_right in (True, False)
        )
        rows.append(Row(recipe, seed, signal, "wrong", auc(right, wrong), len(right), len(wrong)))
    return rows


def _values(
    answers: Sequence[Answer], signal: str, part: str, right: bool | None = None
) -> list[float]:
    return [
        float("-inf") if (value := signals[signal]) is None else value
        for of, is_right, _, signals in answers
        if of == part and right in (None, is_right)
    ]


def auc(higher: Sequence[float], lower: Sequence[float]) -> float | None:
    """Share of pairs in which the first is higher, ties as a half; None without a pair."""
    if not higher or not lower:
        return None
    order = sorted(lower)
    won = sum(bisect_left(order, value) + bisect_right(order, value) for value in higher)
    return won / (2 * len(higher) * len(lower))


def kept_parts(recipe: str, seed: int, answers: Sequence[Answer]) -> list[Kept]:
    """What selection kept of each part, and of right and wrong answers."""
    groups: dict[str, list[bool]] = {}
    for part, right, is_kept, _ in answers:
        groups.setdefault(part, []).append(is_kept)
        if part == "speciality" and right is not None:
            groups.setdefault("right" if right else "wrong", []).append(is_kept)
    return [Kept(recipe, seed, part, len(kept), sum(kept)) for part, kept in groups.items()]


def table(rows: Sequence[Row]) -> str:
    """Markdown: mean and standard deviation over seeds, a line a recipe and signal."""
    against = (*FOREIGN, "all", "wrong")
    lines = [f"| recipe | signal | {' | '.join(against)} |", "|---" * (2 + len(against)) + "|"]
    for recipe in dict.fromkeys(row.recipe for row in rows):
        for signal in SIGNALS:
            mine = [row for row in rows if (row.recipe, row.signal) == (recipe, signal)]
            cells = (
                spread([row.auc for row in mine if row.against == part], "{:.2f}")
                for part in against
            )
            lines.append(f"| {recipe} | {signal} | {' | '.join(cells)} |")
    return "\n".join(lines)


def kept_table(kept: Sequence[Kept]) -> str:
    """Markdown: what share of each part the recipe's criteria keep."""
    parts = tuple(dict.fromkeys(row.part for row in kept))
    lines = [f"| kept by the recipe | {' | '.join(parts)} |", "|---" * (1 + len(parts)) + "|"]
    for recipe in dict.fromkeys(row.recipe for row in kept):
        cells = []
        for part in parts:
            mine = [row for row in kept if (row.recipe, row.part) == (recipe, part)]
            asked = sum(row.answers for row in mine)
            cells.append(f"{sum(row.kept for row in mine) / asked:.0%} of {asked}" if asked else "")
        lines.append(f"| {recipe} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
