"""What a run would do, and how far one is, without doing anything."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from stillhouse.pipelines.estimates import Estimate, estimate
from stillhouse.pipelines.last_start import last_start, read_keys
from stillhouse.pipelines.runner import Runner
from stillhouse.storage.layout import RunFolder
from stillhouse.storage.lock import holder_of
from stillhouse.storage.manifest import Manifest, stage_files
from stillhouse.storage.records import RoundRecord


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage: `cached`, `partial` or `run`, why, and what it would cost."""

    stage: str
    state: str
    why: str
    cost: Estimate | None = None


@dataclass(frozen=True, slots=True)
class RunStatus:
    """A run's stages, who holds it, and the rounds of `expand` so far."""

    name: str
    holder: str | None
    stages: tuple[StagePlan, ...]
    rounds: tuple[RoundRecord, ...] = ()


def plan_run(runner: Runner) -> list[StagePlan]:
    """Return what `run` would do, stage by stage."""
    manifest, keys = Manifest(runner.folder), runner.keys()
    last = last_start(runner.folder)
    costs = estimate(runner.recipe, manifest, keys, last)
    plans = []
    for stage in runner.stages():
        plan = _plan(manifest, stage.name, keys[stage.name])
        if plan.state == "run" and last is not None and manifest.stages_history(stage.name):
            why = f"changed: {last.difference(stage, runner.recipe, keys)}"
            plan = replace(plan, why=why)
        plans.append(replace(plan, cost=costs.get(stage.name)))
    return plans


def read_status(folder: RunFolder) -> RunStatus:
    """Return how far the recipe that was last started in a folder is."""
    manifest = Manifest(folder)
    keys = read_keys(folder)
    holder = holder_of(folder)
    who = f"run by process {holder.pid} on {holder.host}" if holder else None
    stages = tuple(_plan(manifest, name, key) for name, key in keys.items())
    return RunStatus(folder.root.name, who, stages, _rounds(folder, manifest, keys))


def _rounds(
    folder: RunFolder, manifest: Manifest, keys: Mapping[str, str]
) -> tuple[RoundRecord, ...]:
    files = stage_files(manifest, keys).get("expand", ())
    rounds = [file for file in files if file.table == RoundRecord.TABLE]
    if not rounds:
        return ()
    from stillhouse.storage.shards import read_rows

    rows = (row for file in rounds for row in read_rows(folder, file, RoundRecord))
    return tuple(sorted(rows, key=lambda row: row.round))


def _plan(manifest: Manifest, stage: str, key: str) -> StagePlan:
    entry = manifest.stage(stage, key)
    if entry is not None:
        counts = entry.counts
        why = f"finished: {counts.kept} of {counts.rows_in} kept"
        return StagePlan(stage, "cached", why)
    shards = manifest.shards(stage, key)
    if shards:
        return StagePlan(stage, "partial", f"{len(shards)} shards are committed")
    if manifest.stages_history(stage):
        return StagePlan(stage, "run", "settings or inputs changed")
    return StagePlan(stage, "run", "never finished")
