"""What a run would do, and how far one is, without doing anything."""

import json
from dataclasses import dataclass, replace

from stillhouse.errors import IntegrityError
from stillhouse.pipelines.estimates import Estimate, estimate
from stillhouse.pipelines.runner import Runner
from stillhouse.storage.layout import RunFolder
from stillhouse.storage.lock import holder_of
from stillhouse.storage.manifest import Manifest


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage: `cached`, `partial` or `run`, why, and what it would cost."""

    stage: str
    state: str
    why: str
    cost: Estimate | None = None


@dataclass(frozen=True, slots=True)
class RunStatus:
    """A run's stages, and who holds it."""

    name: str
    holder: str | None
    stages: tuple[StagePlan, ...]


def plan_run(runner: Runner) -> list[StagePlan]:
    """Return what `run` would do, stage by stage."""
    manifest, keys = Manifest(runner.folder), runner.keys()
    plans = [_plan(manifest, name, key) for name, key in keys.items()]
    costs = estimate(runner.recipe, manifest, keys)
    return [
        plan if plan.state == "cached" else replace(plan, cost=costs.get(plan.stage))
        for plan in plans
    ]


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


def read_status(folder: RunFolder) -> RunStatus:
    """Return how far the recipe that was last started in a folder is."""
    manifest = Manifest(folder)
    keys = read_keys(folder)
    holder = holder_of(folder)
    who = f"run by process {holder.pid} on {holder.host}" if holder else None
    stages = tuple(_plan(manifest, name, key) for name, key in keys.items())
    return RunStatus(folder.root.name, who, stages)


def _plan(manifest: Manifest, stage: str, key: str) -> StagePlan:
    entry = manifest.stage(stage, key)
    if entry is not None:
        counts = entry.counts
        why = f"key {key} is finished: {counts.kept} of {counts.rows_in} kept"
        return StagePlan(stage, "cached", why)
    shards = manifest.shards(stage, key)
    if shards:
        return StagePlan(stage, "partial", f"{len(shards)} shards of key {key} are committed")
    if manifest.stages_history(stage):
        return StagePlan(stage, "run", f"settings or inputs changed: key {key} is new")
    return StagePlan(stage, "run", "never finished")
