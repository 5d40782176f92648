"""Export the student, ask the exported copy again, and let it in only if it answers the same."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from stillhouse.configs.base import keyed_values
from stillhouse.configs.recipe import RecipeConfig
from stillhouse.pipelines.answering import answer_tokens
from stillhouse.pipelines.gate import gate
from stillhouse.pipelines.served import compare_served, replay_served
from stillhouse.pipelines.stage import Outcome, Part, Stage, Task
from stillhouse.pipelines.stage_run import StageRun
from stillhouse.storage.manifest import Counts, FileEntry
from stillhouse.storage.records import DeploymentRecord
from stillhouse.workers.protocols import Completion, Decoding, ExportJob, Failed, ModelSpec

EXPECTED = """
SELECT question_id, rendered, prediction FROM evaluations JOIN questions USING (question_id)
WHERE arm = 'student' AND evaluations.status = 'kept' AND questions.status = 'kept'
ORDER BY question_id LIMIT ?
"""


class DeployStage(Stage):
    """`deployments`, and the student as a folder of safetensors with its `stillhouse.json`."""

    name: ClassVar[str] = "deploy"
    after: ClassVar[tuple[str, ...]] = ("ingest", "distill", "evaluate", "compress")

    def settings(self, recipe: RecipeConfig) -> dict[str, Any]:
        return super().settings(recipe) | {"gate": keyed_values(recipe.evaluate.gate)}

    def model_refs(self, recipe: RecipeConfig) -> tuple[str, ...]:
        return (recipe.models.target,)

    def waves(self, run: StageRun) -> Iterator[Sequence[Task]]:
        yield [Task("export")]
        yield [Task("replay")]
        if run.recipe.deploy.engine == "vllm":
            yield [Task("serve")]

    def tasks_due(self, run: StageRun) -> int:
        return 2 + (run.recipe.deploy.engine == "vllm")

    def work(self, task: Task, run: StageRun) -> Iterator[Part]:
        if task.name == "export":
            yield _export(run)
        elif task.name == "replay":
            yield _replay(run)
        else:
            yield replay_served(run, _model_folder(run))

    def finish(self, run: StageRun) -> Outcome:
        with run.catalog() as catalog:
            [(asked, same)] = catalog.rows(
                "SELECT count(*), count(*) FILTER (status = 'kept') FROM deployments"
            )
        allowed = run.recipe.deploy.max_mismatch
        refused = None
        if not asked or (asked - same) / asked > allowed:
            refused = (
                f"the exported copy gave another answer to {asked - same} of {asked} questions, "
                f"allowed is a share of {allowed}; see the table `deployments`"
            )
        refused = refused or run.facts("compress")["refused"]
        served = compare_served(run) if run.recipe.deploy.engine == "vllm" else None
        if served is not None:
            refused = refused or served["refused"]
        verdict = _verdict(run)
        facts = {
            "model": run.folder.relative(_model_folder(run)),
            "name": run.recipe.deploy.model_name,
            "asked": asked,
            "same": same,
            "served": served,
            "refused": refused,
            "gate": verdict,
            "promoted": refused is None and bool(verdict["passed"]),
        }
        return Outcome(_files(run), facts)


def _verdict(run: StageRun) -> dict[str, Any]:
    facts = run.facts("evaluate")
    return gate(run.recipe.evaluate.gate, facts["arms"], facts["recovery"])


def _model_folder(run: StageRun) -> Path:
    return run.directory / "model"


def _export(run: StageRun) -> Part:
    manifest: dict[str, object] = {
        "keys": dict(run.keys),
        "target": run.recipe.models.target,
        "recovery": run.facts("evaluate")["recovery"],
        "gate": _verdict(run),
        "cache": keyed_values(run.recipe.compress),
        "cache_measured": run.facts("compress")["cache"],
        "template": keyed_values(run.recipe.data.template),
    }
    plan = run.facts("compress")["plan"]
    folder = run.folder.root / plan["folder"] if plan else None
    job = ExportJob(run.student, _model_folder(run), run.recipe.deploy.dtype, manifest, folder)
    run.workers.export(job)
    return Part({}, Counts())


def _replay(run: StageRun) -> Part:
    with run.catalog() as catalog:
        rows = catalog.rows(EXPECTED, [run.recipe.deploy.questions])
    config = run.recipe.evaluate
    how = Decoding(config.max_new_tokens, stop=config.stop, batch_size=run.recipe.deploy.batch_size)
    copy = run.workers.model(ModelSpec(str(_model_folder(run))))
    answers = copy.answer([rendered for _, rendered, _ in rows], how)
    records = [
        _record(question_id, expected, answer)
        for (question_id, _, expected), answer in zip(rows, answers, strict=True)
    ]
    statuses = [record.status for record in records]
    counts = Counts(
        rows_in=len(records),
        kept=statuses.count("kept"),
        rejected=statuses.count("rejected"),
        failed=statuses.count("failed"),
    )
    return Part({"deployments": records}, counts, answer_tokens(answers))


def _record(question_id: str, expected: str, answer: Completion | Failed) -> DeploymentRecord:
    if isinstance(answer, Failed):
        return DeploymentRecord(question_id, expected, "", "failed", answer.reason)
    same = answer.text == expected
    reason = None if same else "differs"
    return DeploymentRecord(
        question_id, expected, answer.text, "kept" if same else "rejected", reason
    )


def _files(run: StageRun) -> tuple[FileEntry, ...]:
    from stillhouse.storage.shards import hash_artifacts

    return hash_artifacts(run.folder, _model_folder(run))
