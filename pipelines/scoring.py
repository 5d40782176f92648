"""The specialist answers, both models score: shared by `score` and by each round of `expand`."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from stillhouse.configs.data import TemplateConfig
from stillhouse.configs.stages import ScoreConfig
from stillhouse.pipelines.text import render
from stillhouse.storage.records import (
    CompletionRecord,
    PromptRecord,
    ScoreRecord,
    Status,
    TargetScoreRecord,
    content_id,
)
from stillhouse.workers.protocols import (
    Completion,
    Decoding,
    Failed,
    ModelWorker,
    Pair,
    PairLogp,
    PairWorker,
    ResponseLogp,
)


@dataclass(frozen=True, slots=True)
class Scored:
    """A shard's answers and scores; one score a prompt, also for those that failed."""

    completions: list[CompletionRecord]
    scores: list[ScoreRecord]
    tokens: int

    def count(self, status: Status) -> int:
        """How many prompts ended so."""
        return sum(score.status == status for score in self.scores)


def score_prompts(
    prompts: Sequence[PromptRecord],
    worker: PairWorker,
    config: ScoreConfig,
    template: TemplateConfig,
) -> Scored:
    """Answer each prompt with the specialist and score the answer with both models."""
    how = Decoding(config.max_new_tokens, stop=config.stop, batch_size=config.batch_size)
    answers = worker.answer([prompt.rendered for prompt in prompts], how)
    answered: list[tuple[CompletionRecord, PromptRecord]] = []
    scores: list[ScoreRecord] = []
    for prompt, answer in zip(prompts, answers, strict=True):
        if isinstance(answer, Failed):
            scores.append(_unscored(prompt, "failed", answer.reason))
        elif not answer.text:
            scores.append(_unscored(prompt, "rejected", "empty_answer"))
        else:
            answered.append((_completion(prompt, answer), prompt))
    pairs = [
        Pair(prompt.rendered, render(template.response, completion.text))
        for completion, prompt in answered
    ]
    logps = worker.score(pairs, config.batch_size)
    for (completion, prompt), logp in zip(answered, logps, strict=True):
        scores.append(_score(completion, prompt, logp))
    order = {prompt.prompt_id: index for index, prompt in enumerate(prompts)}
    scores.sort(key=lambda score: order[score.prompt_id])
    return Scored([completion for completion, _ in answered], scores, _tokens(answers, logps))


def score_under_target(
    completions: Sequence[CompletionRecord],
    prompts: Mapping[str, str],
    worker: ModelWorker,
    batch_size: int,
    template: TemplateConfig,
) -> tuple[list[TargetScoreRecord], int]:
    """What the target thinks of answers; prompts: rendered, by id. Also the tokens it read."""
    pairs = [
        Pair(prompts[item.prompt_id], render(template.response, item.text)) for item in completions
    ]
    rows, tokens = [], 0
    for item, logp in zip(completions, worker.logp(pairs, batch_size), strict=True):
        failed = logp.reason if isinstance(logp, Failed) else None
        mean = None if isinstance(logp, Failed) else fmean(logp.logp)
        status: Status = "kept" if failed is None else "failed"
        about = (item.completion_id, item.prompt_id, item.round)
        rows.append(TargetScoreRecord(*about, mean, status, failed))
        if isinstance(logp, ResponseLogp):
            tokens += logp.prompt_tokens + len(logp.token_ids)
    return rows, tokens


def _completion(prompt: PromptRecord, answer: Completion) -> CompletionRecord:
    return CompletionRecord(
        completion_id=content_id("completion", prompt.prompt_id, answer.text),
        prompt_id=prompt.prompt_id,
        text=answer.text,
        finish=answer.finish,
        round=prompt.round,
    )


def _score(
    completion: CompletionRecord, prompt: PromptRecord, logp: PairLogp | Failed
) -> ScoreRecord:
    if isinstance(logp, Failed):
        return _unscored(prompt, "failed", logp.reason)
    excess = [s - b for s, b in zip(logp.logp_specialist, logp.logp_base, strict=True)]
    if not all(math.isfinite(value) for value in excess):  # NaN would win every comparison
        return _unscored(prompt, "failed", "not_finite")
    return ScoreRecord(
        completion_id=completion.completion_id,
        prompt_id=prompt.prompt_id,
        round=prompt.round,
        prompt_tokens=logp.prompt_tokens,
        token_ids=logp.token_ids,
        token_ends=logp.token_ends,
        logp_specialist=logp.logp_specialist,
        logp_base=logp.logp_base,
        gap=fmean(excess),
        confidence=fmean(logp.logp_specialist),
        status="kept",
        reason=None,
    )


def _unscored(prompt: PromptRecord, status: Status, reason: str) -> ScoreRecord:
    return ScoreRecord(
        completion_id=None,
        prompt_id=prompt.prompt_id,
        round=prompt.round,
        prompt_tokens=None,
        token_ids=None,
        token_ends=None,
        logp_specialist=None,
        logp_base=None,
        gap=None,
        confidence=None,
        status=status,
        reason=reason,
    )


def _tokens(answers: Iterable[Completion | Failed], logps: Iterable[PairLogp | Failed]) -> int:
    """Tokens that went through a model: once to answer, twice to score."""
    made = (answer for answer in answers if isinstance(answer, Completion))
    scored = (logp for logp in logps if isinstance(logp, PairLogp))
    total = sum(answer.prompt_tokens + answer.tokens for answer in made)
    return total + 2 * sum(logp.prompt_tokens + len(logp.token_ids) for logp in scored)
