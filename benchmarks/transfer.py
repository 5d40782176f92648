"""What each choice of a transfer is worth: one pool, one generator, one budget, several seeds.

    python -m benchmarks.transfer RECIPE --json OUT [--seeds N] [--arms NAME …] [--tau T …]
        [--budget N …] [a.b=c …]

Arms: the target as it is, random choice, no filter, the published criterion (the gap), the recipe's
own, the same with the token mask, and the target trained on the original data (the ceiling). A
base that is shown the list of answers stands beside, because format counts; so does, where target
and base have the same shapes, the target with the specialist's adapter. A seed draws other
rows, other weights of the adapters and another order. Each piece is a stage of a run under
`runs_root`: stopped anywhere, the same command goes on there. Beside OUT a picture (OUT.svg).
"""

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.serving import machine
from benchmarks.transfer_arms import ARMS, MODELS, Arm, budget_arms, recipe_of, tau_arms
from benchmarks.transfer_picture import drawn
from stillhouse.configs.load import load_recipe
from stillhouse.configs.recipe import RecipeConfig
from stillhouse.errors import ModelError
from stillhouse.pipelines.gate import recovery
from stillhouse.pipelines.local import local_runner
from stillhouse.pipelines.observer import Observer
from stillhouse.pipelines.runner import Runner
from stillhouse.pipelines.text import render
from stillhouse.storage.catalog import Catalog
from stillhouse.storage.manifest import Manifest, StageEntry
from stillhouse.workers.evaluation import exact_match
from stillhouse.workers.protocols import Completion, Decoding, ModelSpec

LABELS = "base, given the answers"
WEIGHTS = "weight difference"


@dataclass(frozen=True)
class Row:
    """One arm and seed. examples and tokens are those of the training; of_speciality is the share
    of examples from seeds, from the pool's own part, or made from them."""

    arm: str
    seed: int
    accuracy: float
    recovery: float | None
    examples: int | None = None
    tokens: int | None = None
    of_speciality: float | None = None


class Progress(Observer):
    """One line a stage."""

    def __init__(self, arm: str, seed: int) -> None:
        self._about = f"seed {seed}, {arm}"

    def stage_finished(self, entry: StageEntry) -> None:
        print(f"{self._about}: {entry.stage} {entry.seconds:.0f} s", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print and write."""
    asked = parsed(arguments)
    if not asked.json.parent.is_dir():
        raise SystemExit(f"--json: expected a folder that exists, found {asked.json.parent}")
    recipe = load_recipe(asked.recipe, asked.overrides)
    known = [*ARMS, *tau_arms(asked.tau), *budget_arms(asked.budget)]
    names = [arm.name for arm in known]
    if unknown := set(asked.arms or ()) - set(names):
        raise SystemExit(f"--arms: expected some of {names}, found {sorted(unknown)}")
    arms = [arm for arm in known if asked.arms is None or arm.name in asked.arms]
    rows: list[Row] = []
    for seed in range(asked.seeds):
        rows += seed_rows(recipe, seed, arms)
        write(asked.json, recipe, rows)
    print(table(rows))
    print(f"Everything: {asked.json}, {asked.json.with_suffix('.svg')}")


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", help="some of them, by name")
    parser.add_argument("--tau", type=float, nargs="*", default=[], help="thresholds to sweep")
    parser.add_argument("--budget", type=int, nargs="*", default=[], help="budgets to sweep")
    return parser.parse_intermixed_args(arguments)


def seed_rows(recipe: RecipeConfig, seed: int, arms: Sequence[Arm]) -> Iterator[Row]:
    """All rows of one seed."""
    models = _models(recipe, seed)
    ends = (models["specialist"], models["target_before"])
    yield Row("target, untouched", seed, models["target_before"], 0.0)
    for arm in arms:
        yield student_row(recipe_of(recipe, seed, arm, ("student",)), arm, seed, ends)
    yield Row(
        "ceiling (original data)", seed, models["ceiling"], recovered(models["ceiling"], ends)
    )
    if WEIGHTS in models:
        yield Row(WEIGHTS, seed, models[WEIGHTS], recovered(models[WEIGHTS], ends))
    yield Row("specialist", seed, models["specialist"], None)
    yield Row("base", seed, models["base"], None)
    yield Row(LABELS, seed, models[LABELS], None)


def _models(recipe: RecipeConfig, seed: int) -> dict[str, float]:
    """Accuracy of the models that no arm changes."""
    arm = Arm("models", {})
    config = recipe_of(recipe, seed, arm, (*MODELS, "student"))
    runner = local_runner(config, Progress(arm.name, seed))
    models: dict[str, float] = runner.run(until="evaluate")["accuracy"]
    models[LABELS] = with_labels(runner)
    weights = weight_difference(runner)
    return models if weights is None else models | {WEIGHTS: weights}


def student_row(config: RecipeConfig, arm: Arm, seed: int, ends: tuple[float, float]) -> Row:
    """Train and ask one arm's student."""
    runner = local_runner(config, Progress(arm.name, seed))
    report = runner.run(until="evaluate")
    accuracy = report["accuracy"]["student"]
    with Catalog(runner.folder, Manifest(runner.folder), runner.keys()) as catalog:
        [(mine, every)] = catalog.rows(
            "WITH RECURSIVE root AS ("
            "SELECT prompt_id, origin FROM prompts WHERE status = 'kept' AND parent_id IS NULL "
            "UNION ALL SELECT made.prompt_id, root.origin FROM prompts made "
            "JOIN root ON made.parent_id = root.prompt_id WHERE made.status = 'kept') "
            "SELECT count(*) FILTER (origin LIKE '%_same'), count(*) "
            "FROM corpus JOIN root USING (prompt_id) "
            "WHERE corpus.status = 'kept' AND corpus.split = 'train'"
        )
    return Row(
        arm.name,
        seed,
        accuracy,
        recovered(accuracy, ends),
        report["stages"]["distill"]["kept"],
        report["stages"]["distill"]["tokens"],
        mine / every,
    )


def recovered(accuracy: float, ends: tuple[float, float]) -> float | None:
    """(student - target before) / (specialist - target before)."""
    arms = dict(zip(("specialist", "target_before"), ends, strict=True)) | {"student": accuracy}
    return recovery({name: {"exact_match": value} for name, value in arms.items()})


def with_labels(runner: Runner) -> float:
    """Exact match of the base when the prompt lists every answer there is."""
    asked = questions(runner)
    answers = ", ".join(sorted({reference for _, reference in asked}))
    listed = f"Answer with one of: {answers}.\n\n"
    return exact_matches(runner, ModelSpec(runner.recipe.models.base), asked, listed)


def weight_difference(runner: Runner) -> float | None:
    """Exact match of the target with the specialist's adapter; None where its shapes do not fit."""
    entry = Manifest(runner.folder).stage("specialize", runner.keys()["specialize"])
    assert entry is not None
    adapter = runner.folder.root / str(entry.facts["adapter"])
    try:
        target = ModelSpec(runner.recipe.models.target, adapter)
        return exact_matches(runner, target, questions(runner))
    except ModelError:  # the target by itself has just answered: it is the adapter
        return None


def questions(runner: Runner) -> list[tuple[str, str]]:
    """Texts and right answers of the evaluation."""
    with Catalog(runner.folder, Manifest(runner.folder), runner.keys()) as catalog:
        return catalog.rows("SELECT text, reference FROM questions WHERE status = 'kept'")


def exact_matches(
    runner: Runner, model: ModelSpec, asked: Sequence[tuple[str, str]], before: str = ""
) -> float:
    """Share of questions that a model answers; `before` stands before each prompt."""
    template, config = runner.recipe.data.template.prompt, runner.recipe.evaluate
    prompts = [before + render(template, text) for text, _ in asked]
    how = Decoding(config.max_new_tokens, config.stop, batch_size=config.batch_size)
    said = runner.workers.model(model).answer(prompts, how)
    right = [
        isinstance(answer, Completion) and exact_match(answer.text, reference)
        for answer, (_, reference) in zip(said, asked, strict=True)
    ]
    return sum(right) / len(right)


def by_arm(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of each arm, in the order of the arms."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.arm, []).append(row)
    return found


def table(rows: Sequence[Row]) -> str:
    """Markdown: mean and standard deviation over seeds."""
    lines = [
        "| arm | exact match | recovery | examples | tokens | of the speciality |",
        "|---|---|---|---|---|---|",
    ]
    for arm, mine in by_arm(rows).items():
        cells = (
            spread([row.accuracy for row in mine], "{:.1%}"),
            spread([row.recovery for row in mine], "{:.2f}"),
            spread([row.examples for row in mine], "{:.0f}"),
            spread([row.tokens for row in mine], "{:.0f}"),
            spread([row.of_speciality for row in mine], "{:.0%}"),
        )
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: Sequence[float | None], form: str) -> str:
    """Mean ± standard deviation; empty where there is no value."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean = form.format(statistics.fmean(known))
    return mean if len(known) < 2 else f"{mean} ± {form.format(statistics.stdev(known))}"


def write(path: Path, recipe: RecipeConfig, rows: Sequence[Row]) -> None:
    """JSON, and the picture beside it."""
    settings: Mapping[str, Any] = recipe.model_dump(mode="json", exclude={"runs_root", "tracking"})
    out = {**machine(), "recipe": settings, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(out, indent=1) + "\n")
    found = {
        arm: [row.recovery for row in mine if row.recovery is not None]
        for arm, mine in by_arm(rows).items()
    }
    path.with_suffix(".svg").write_text(drawn(found, recipe.name))


if __name__ == "__main__":
    main()
