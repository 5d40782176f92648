"""A trainer's work as a stage: shared by `specialize`, `distill` and the ceiling arm."""

from collections.abc import Sequence
from pathlib import Path

from stillhouse.configs.stages import TrainConfig
from stillhouse.errors import TrainingError
from stillhouse.pipelines.hints import malformed_note, query_hint
from stillhouse.pipelines.stage import Outcome, Part, Rows
from stillhouse.pipelines.stage_run import StageRun
from stillhouse.pipelines.training_clock import TrainingClock
from stillhouse.storage.manifest import Counts, FileEntry
from stillhouse.storage.records import ExampleRecord, TrainStepRecord, content_id
from stillhouse.workers.protocols import (
    ModelSpec,
    TrainExample,
    TrainJob,
    TrainOutcome,
    TrainStep,
)
from stillhouse.workers.sources.reader import MalformedRow


def train(
    run: StageRun,
    model: ModelSpec,
    examples: Sequence[TrainExample],
    config: TrainConfig,
    folder: Path | None = None,
    malformed: Sequence[MalformedRow] = (),
) -> Part:
    """Train and return `train_steps` and `examples`; a killed job goes on from its checkpoint.

    `malformed` rows are accounted for as failed.
    """
    if malformed:
        run.observer.note(_note(run, malformed))
    if not examples:
        raise TrainingError(
            f"{run.stage}: expected training examples, found none; look at what was rejected: "
            + query_hint(run, "SELECT _stage, reason, count(*) FROM corpus GROUP BY ALL")
        )
    job = TrainJob(model, examples, config, folder or run.directory)
    clock = TrainingClock(run.folder, job.folder)

    def on_step(step: TrainStep, total: int) -> None:
        clock.step(step.step)  # first: an observer may be where the process dies
        run.observer.progress(run.stage, step.step, total, "steps")
        run.observer.metric(run.stage, "loss", step.loss, step.step)
        run.observer.metric(run.stage, "learning_rate", step.learning_rate, step.step)
        run.observer.metric(run.stage, "gradient_norm", step.gradient_norm, step.step)

    outcome = run.workers.train(job, on_step)
    told = [_example(run.stage, example, outcome) for example in examples]
    told += [_malformed(run.stage, row) for row in malformed]
    steps = [_step(run.stage, step) for step in outcome.steps]
    rows: Rows = {"train_steps": steps, "examples": told}
    rejected = sum(row.status == "rejected" for row in told)
    counts = Counts(
        rows_in=len(told),
        kept=len(examples) - rejected,
        rejected=rejected,
        failed=len(malformed),
    )
    return Part(rows, counts, tokens=sum(step.tokens for step in outcome.steps))


def trained(run: StageRun) -> Outcome:
    """The adapter as an artifact of the stage."""
    adapter = run.directory / "adapter"
    files = adapter_files(run, run.directory)
    with run.catalog() as catalog:
        rows = catalog.rows(
            "SELECT step, loss FROM train_steps WHERE stage = ? ORDER BY step DESC LIMIT 1",
            [run.stage],
        )
    [(steps, loss)] = rows
    facts = {"adapter": run.folder.relative(adapter), "steps": steps, "last_loss": loss}
    return Outcome(files, facts)


def adapter_files(run: StageRun, folder: Path) -> tuple[FileEntry, ...]:
    """The files of the adapter that a training left in a folder."""
    from stillhouse.storage.shards import hash_artifacts

    return hash_artifacts(run.folder, folder / "adapter")


def _step(stage: str, step: TrainStep) -> TrainStepRecord:
    return TrainStepRecord(
        stage=stage,
        step=step.step,
        epoch=step.epoch,
        loss=step.loss,
        learning_rate=step.learning_rate,
        gradient_norm=step.gradient_norm,
        response_tokens=step.response_tokens,
        tokens=step.tokens,
    )


def _note(run: StageRun, malformed: Sequence[MalformedRow]) -> str:
    first = malformed[0]
    return malformed_note(run, len(malformed), first.locator, first.reason, "examples")


def _malformed(stage: str, row: MalformedRow) -> ExampleRecord:
    return ExampleRecord(
        stage=stage,
        example_id=content_id("malformed", row.locator),
        tokens=0,
        status="failed",
        reason=f"malformed: {row.locator}: {row.reason}",
    )


def _example(stage: str, example: TrainExample, outcome: TrainOutcome) -> ExampleRecord:
    reason = outcome.rejected.get(example.example_id)
    return ExampleRecord(
        stage=stage,
        example_id=example.example_id,
        tokens=outcome.tokens.get(example.example_id, 0),
        status="kept" if reason is None else "rejected",
        reason=reason,
    )
