"""A model answers the held-out questions: shared by `evaluate`, `compress` and `deploy`."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from stillhouse.pipelines.stage import Part
from stillhouse.pipelines.stage_run import StageRun
from stillhouse.pipelines.text import render
from stillhouse.storage.manifest import Counts
from stillhouse.storage.records import EvaluationRecord, QuestionRecord
from stillhouse.workers.protocols import (
    CacheSpec,
    Completion,
    Decoding,
    Failed,
    ModelSpec,
    ModelWorker,
    Pair,
    ResponseLogp,
)

if TYPE_CHECKING:
    from stillhouse.storage.catalog import Catalog

Figures = dict[str, Any]  # one arm's: items, failed, exact_match, standard_error, perplexity
MAX_NATS = 700  # a token; exp of more overflows
SUMMARY = """
SELECT count(*), count(*) FILTER (correct), count(*) FILTER (status = 'failed'),
    fsum(reference_logp), sum(reference_tokens) FROM evaluations WHERE arm = ?
"""


def answer_questions(
    run: StageRun,
    arm: str,
    spec: ModelSpec,
    questions: Sequence[QuestionRecord],
    cache: CacheSpec | None = None,
) -> Part:
    """Answer and score questions with one model; with `cache`, on its compressed cache."""
    return answer_with(run, arm, run.workers.model(spec), questions, cache)


def answer_with(
    run: StageRun,
    arm: str,
    worker: ModelWorker,
    questions: Sequence[QuestionRecord],
    cache: CacheSpec | None = None,
) -> Part:
    """As `answer_questions`, with a worker that is there already."""
    config, template = run.recipe.evaluate, run.recipe.data.template.response
    how = Decoding(config.max_new_tokens, stop=config.stop, batch_size=config.batch_size)
    rendered = [question.rendered for question in questions]
    answers = worker.answer(rendered, how, cache)
    pairs = [Pair(item.rendered, render(template, item.reference)) for item in questions]
    logps = worker.logp(pairs, config.batch_size, cache)
    rows = [
        _evaluation(arm, question, answer, logp)
        for question, answer, logp in zip(questions, answers, logps, strict=True)
    ]
    failed = sum(row.status == "failed" for row in rows)
    counts = Counts(rows_in=len(rows), kept=len(rows) - failed, failed=failed)
    return Part({"evaluations": rows}, counts, _tokens(answers, logps))


def _tokens(answers: Sequence[Completion | Failed], logps: Sequence[ResponseLogp | Failed]) -> int:
    scored = (logp for logp in logps if isinstance(logp, ResponseLogp))
    total = sum(logp.prompt_tokens + len(logp.token_ids) for logp in scored)
    return total + answer_tokens(answers)


def answer_tokens(answers: Sequence[Completion | Failed]) -> int:
    """Tokens that went through the model to answer."""
    made = (answer for answer in answers if isinstance(answer, Completion))
    return sum(answer.prompt_tokens + answer.tokens for answer in made)


def _evaluation(
    arm: str,
    question: QuestionRecord,
    answer: Completion | Failed,
    logp: ResponseLogp | Failed,
) -> EvaluationRecord:
    from stillhouse.workers.evaluation import exact_match

    failure = next((item.reason for item in (answer, logp) if isinstance(item, Failed)), None)
    text = answer.text if isinstance(answer, Completion) else ""
    scored = logp if isinstance(logp, ResponseLogp) else None
    return EvaluationRecord(
        arm=arm,
        question_id=question.question_id,
        prediction=text,
        reference=question.reference,
        correct=None if failure else exact_match(text, question.reference),
        reference_logp=None if scored is None else math.fsum(scored.logp),
        reference_tokens=None if scored is None else len(scored.token_ids),
        status="failed" if failure else "kept",
        reason=failure,
    )


def summary(catalog: "Catalog", arm: str) -> Figures:
    """Exact match with its standard error, and answer perplexity, of one arm.

    A question that could not be answered counts as wrong. Perplexity is that of a token of the
    model's own tokenizer; None where no answer could be scored, or where no float holds it.
    """
    [(items, correct, failed, logp, tokens)] = catalog.rows(SUMMARY, [arm])
    accuracy = correct / items if items else 0.0
    return {
        "items": items,
        "failed": failed,
        "exact_match": accuracy,
        "standard_error": math.sqrt(accuracy * (1 - accuracy) / max(items, 1)),
        "perplexity": _perplexity(logp, tokens),
    }


def _perplexity(logp: float | None, tokens: int | None) -> float | None:
    if logp is None or not tokens or -logp / tokens > MAX_NATS:
        return None
    return math.exp(-logp / tokens)
