"""What a finished training leaves beside its adapter, readable without torch."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stillhouse.configs.base import keyed_values
from stillhouse.errors import ConfigError
from stillhouse.workers.folders import is_sealed, write_json
from stillhouse.workers.protocols import TrainJob, TrainOutcome, TrainStep

RECORD = "training.json"
VERSION = 2  # raise when the same job would train differently


def job_key(job: TrainJob) -> str:
    """A hash of all that decides the adapter: model reference, configuration, examples in order."""
    parts = (
        VERSION,
        job.model.ref,
        keyed_values(job.config),
        [(e.example_id, e.prompt, e.response, e.token_ends, e.excess) for e in job.examples],
    )
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def refuse_other_job(found: str, key: str, folder: Path) -> None:
    """Raise `ConfigError` when `folder` holds the work of another job."""
    if found != key:
        raise ConfigError(
            f"{folder} holds another training: expected key {key[:12]}, found {found[:12]} (its "
            "model, configuration or examples differ); train into another folder or remove this one"
        )


def write_record(folder: Path, key: str, outcome: TrainOutcome) -> None:
    """Write the outcome beside the adapter in `folder`."""
    write_json(
        folder / RECORD,
        {
            "key": key,
            "steps": steps_to_json(outcome.steps),
            "tokens": outcome.tokens,
            "rejected": outcome.rejected,
        },
    )


def finished_outcome(job: TrainJob) -> TrainOutcome | None:
    """The outcome of a job that ran to its end before, or None; loads no model."""
    adapter = job.folder / "adapter"
    if not is_sealed(adapter):
        return None
    stored = json.loads((adapter / RECORD).read_text(encoding="utf-8"))
    refuse_other_job(stored["key"], job_key(job), adapter)
    return TrainOutcome(
        adapter=adapter,
        steps=steps_from_json(stored["steps"]),
        tokens=stored["tokens"],
        rejected=stored["rejected"],
    )


def steps_to_json(steps: Sequence[TrainStep]) -> list[dict[str, Any]]:
    """Plain values; JSON keeps every bit of a float."""
    return [dataclasses.asdict(step) for step in steps]


def steps_from_json(values: Sequence[dict[str, Any]]) -> tuple[TrainStep, ...]:
    """The inverse of `steps_to_json`."""
    return tuple(TrainStep(**value) for value in values)
