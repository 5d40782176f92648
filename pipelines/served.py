"""A served copy of the student answers the evaluation again, and must say the same."""

from pathlib import Path
from typing import Any

from stillhouse.errors import ConfigError
from stillhouse.pipelines.answering import answer_with, summary
from stillhouse.pipelines.stage import Part
from stillhouse.pipelines.stage_run import StageRun
from stillhouse.pipelines.stages.compress import ARM
from stillhouse.storage.records import QuestionRecord
from stillhouse.workers.protocols import ServedSpec

SERVED_ARM = "student_served"
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
    room = (
        max(len(question.rendered) for question in questions) + run.recipe.evaluate.max_new_tokens
    )
    spec = ServedSpec(
        folder=folder,
        cache=_cache(run),
        dtype=run.recipe.deploy.dtype,
        context=max(512, room),  # a token has a character at least
        log=run.directory / "server.log",
        sinks=run.recipe.compress.sinks,
    )
    with run.workers.serve(spec) as model:
        return answer_with(run, SERVED_ARM, model, questions)


def _cache(run: StageRun) -> str:
    """ConfigError for scalars that no server has: without a corpus nothing was fitted."""
    if run.facts("compress")["plan"]:
        return "plan"
    config = run.recipe.compress
    scalars = (config.key_scalar, config.value_scalar, config.seed)
    if scalars != ("unbiased", "least_squares", 0):
        raise ConfigError(
            "deploy.engine: expected a fitted cache, or the scalars and the seed that are the "
            f"default, found no corpus to fit it on, and {scalars}; deploy with engine: "
            "transformers"
        )
    return f"k{config.key_bits}v{config.value_bits}"


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
    elif apart > own["standard_error"]:
        refused = (
            f"the served copy answers {served['exact_match']:.1%} of the questions, the evaluation "
            f"{own['exact_match']:.1%} ± {own['standard_error']:.1%}"
        )
    run.observer.note(
        f"served: exact match {served['exact_match']:.1%}, in process {own['exact_match']:.1%}; "
        f"mean |Δ log p| {moved or 0:.2g} nats a token"
    )
    return {"arm": served, "in_process": own, "logp_moved": moved, "refused": refused}
