"""A served copy of the student answers the evaluation again, and must say the same."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stillhouse.pipelines.answering import answer_with, summary
from stillhouse.pipelines.evaluated_cache import evaluated_cache
from stillhouse.pipelines.stage import Part
from stillhouse.pipelines.stage_run import StageRun
from stillhouse.pipelines.stages.compress import ARM
from stillhouse.pipelines.text import render
from stillhouse.storage.records import QuestionRecord
from stillhouse.workers.protocols import ServedSpec

SERVED_ARM = "student_served"
_JOINT = 4  # tokens more, where prompt and reference are encoded apart
MOVED = """
SELECT count(*), fsum(abs(served.reference_logp - own.reference_logp)) / sum(own.reference_tokens)
FROM evaluations AS served JOIN evaluations AS own USING (question_id)
WHERE served.arm = ? AND own.arm = ? AND served.status = 'kept' AND own.status = 'kept'
"""


def replay_served(run: StageRun, folder: Path) -> Part:
    """`evaluations` of the served copy, on the cache that `compress` made.

    ConfigError for a cache that no server has.
    """
    questions = [
        row
        for row in run.rows(tuple(run.files("ingest", "questions")), QuestionRecord)
        if row.status == "kept"
    ]
    spec = ServedSpec(
        folder=folder,
        cache=evaluated_cache(run.recipe.compress, bool(run.facts("compress")["plan"])),
        dtype=run.recipe.deploy.dtype,
        context=_context(run, folder, questions),
        log=run.directory / "server.log",
        sinks=run.recipe.compress.sinks,
    )
    with run.workers.serve(spec) as model:
        return answer_with(run, SERVED_ARM, model, questions)


def _context(run: StageRun, folder: Path, questions: Sequence[QuestionRecord]) -> int:
    """Tokens of the longest question with its answer, or with its reference."""
    template = run.recipe.data.template.response
    prompts = [question.rendered for question in questions]
    whole = [one.rendered + render(template, one.reference) for one in questions]
    ref, new = str(folder), run.recipe.evaluate.max_new_tokens
    lengths = [
        *(count + new for count in run.workers.count_tokens(ref, prompts)),
        *(count + _JOINT for count in run.workers.count_tokens(ref, whole)),
    ]
    return max(lengths, default=new) + 1


def compare_served(run: StageRun) -> dict[str, Any]:
    """The served copy's figures beside those of the compressed cache in process; `refused` says
    why it does not reproduce them, None where it does."""
    with run.catalog() as catalog:
        served, own = summary(catalog, SERVED_ARM), summary(catalog, ARM)
        [(compared, moved)] = catalog.rows(MOVED, [SERVED_ARM, ARM])
    apart = abs(served["exact_match"] - own["exact_match"])
    refused = None
    if not compared or served["failed"] > own["failed"]:
        refused = f"the served copy failed on {served['failed']} of {served['items']} questions"
    elif apart > max(own["standard_error"], 1 / max(own["items"], 1)):  # one answer is no verdict
        refused = (
            f"the served copy answers {served['exact_match']:.1%} of the questions, the evaluation "
            f"{own['exact_match']:.1%} ± {own['standard_error']:.1%}"
        )
    run.observer.note(
        f"served: exact match {served['exact_match']:.1%}, in process {own['exact_match']:.1%}; "
        + ("" if moved is None else f"log p of a reference moved by {moved:.2g} nats a token")
    )
    return {"arm": served, "in_process": own, "logp_moved": moved, "refused": refused}
