"""Log-probabilities of responses given their prompts (TuneShift-KD §3, without its gap).

Only the positions that predict a response token are projected to the vocabulary; what the rows of
a batch begin with is computed once. docs/decisions/0020 has the measurements.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice

import torch
from peft import PeftModel
from torch import Tensor

from stillhouse.workers.batching import pad_right, set_broken_aside, tight_buckets
from stillhouse.workers.cache import CacheFactory
from stillhouse.workers.linear_mode import fast_linears
from stillhouse.workers.models.language_model import LanguageModel
from stillhouse.workers.projection import (
    TargetRow,
    continued_states,
    core,
    read_targets,
    target_logps,
)
from stillhouse.workers.protocols import Failed, Pair, PairLogp, ResponseLogp
from stillhouse.workers.shared_prefix import PrefixSource

Rows = Sequence[TargetRow | Failed]


def response_logps(
    lm: LanguageModel,
    pairs: Sequence[Pair],
    batch_size: int,
    cache_factory: CacheFactory | None = None,
) -> list[ResponseLogp | Failed]:
    """Log-probability (nats) of each token of each response, in the order of the pairs; no EOS.

    With `cache_factory`, every attention reads keys and values as that cache gives them back.
    """
    rows = _rows(lm, pairs)
    return _scores(lm, rows, _buckets([rows], batch_size), cache_factory)


def _rows(lm: LanguageModel, pairs: Sequence[Pair]) -> list[TargetRow | Failed]:
    prompts = lm.encode_prompts([pair.prompt for pair in pairs]) if pairs else []
    return [
        _row(lm, prompt, lm.encode_response(pair.response))
        for prompt, pair in zip(prompts, pairs, strict=True)
    ]


def _row(lm: LanguageModel, prompt: list[int], response: list[int]) -> TargetRow | Failed:
    length = len(prompt) + len(response)
    if not response:
        return Failed("empty_response: no token to score")
    if not prompt:
        return Failed("empty_prompt: the model has no BOS, so nothing predicts the first token")
    if length > lm.context:
        return Failed(f"pair_too_long: {length} tokens, the model's context is {lm.context}")
    return TargetRow([*prompt, *response], len(response))


def _buckets(models: Sequence[Rows], batch_size: int) -> list[list[int]]:
    """Batches of pairs, by index, for all models: those that at least one of them can score."""
    lengths = {
        index: max(len(row.ids) for row in rows if isinstance(row, TargetRow))
        for index, rows in enumerate(zip(*models, strict=True))
        if any(isinstance(row, TargetRow) for row in rows)
    }
    fit = list(lengths)
    buckets = tight_buckets(list(lengths.values()), batch_size)
    return [[fit[position] for position in bucket] for bucket in buckets]


def _scores(
    lm: LanguageModel,
    rows: Rows,
    buckets: Sequence[Sequence[int]],
    cache_factory: CacheFactory | None = None,
) -> list[ResponseLogp | Failed]:
    """Score every row that can be, in these batches."""
    scores = {index: row for index, row in enumerate(rows) if isinstance(row, Failed)}
    scored: dict[int, ResponseLogp | Failed] = dict(scores)
    logps = _logps_with(lm, cache_factory)
    for bucket in buckets:
        members = {i: row for i in bucket if isinstance(row := rows[i], TargetRow)}
        if members:
            made = set_broken_aside(lambda some: _score_batch(logps, some), [*members.values()])
            scored.update(zip(members, made, strict=True))
    return [scored[index] for index in range(len(rows))]


Logps = Callable[[Sequence[TargetRow]], Tensor]


def _logps_with(lm: LanguageModel, cache_factory: CacheFactory | None) -> Logps:
    """From the rows of a batch to their targets' log-probabilities."""
    if cache_factory is not None:  # a prefix computed apart would be stored apart
        return lambda rows: target_logps(lm, rows, cache_factory)
    prefixes = PrefixSource(lm)

    def logps(rows: Sequence[TargetRow]) -> Tensor:
        skipped, cache = prefixes.shared(rows)
        read = [row.ids[skipped:-1] for row in rows]
        batch = pad_right(read, lm.pad, core(lm).device)
        hidden_BTD = continued_states(lm, batch.ids, cache)
        return read_targets(lm, hidden_BTD, rows, [-skipped] * len(rows))

    return logps


@torch.inference_mode()
def _score_batch(logps: Logps, rows: Sequence[TargetRow]) -> list[ResponseLogp | Failed]:
    with fast_linears():
        found: Iterator[float] = iter(logps(rows).tolist())
    return [_scored(row, list(islice(found, row.targets))) for row in rows]


def _scored(row: TargetRow, logp: list[float]) -> ResponseLogp | Failed:
    if not all(map(math.isfinite, logp)):
        return Failed("not_finite: the model gives a token of the response no log-probability")
    return ResponseLogp(list(row.ids[-row.targets :]), logp, len(row.ids) - row.targets)


def acting_as_base(specialist: LanguageModel, base: LanguageModel) -> AbstractContextManager[None]:
    """Within it `base` is the base. Where both are one model, its adapter lets inputs pass."""
    if base is specialist and isinstance(base.model, PeftModel):
        off: AbstractContextManager[None] = base.model.disable_adapter()
        return off
    return nullcontext()


def pair_logps(
    specialist: LanguageModel, base: LanguageModel, pairs: Sequence[Pair], batch_size: int
) -> list[PairLogp | Failed]:
    """Score each response under both; `base is specialist` means one model, adapter on and off."""
    rows = _rows(specialist, pairs)
    base_rows = rows if base is specialist else _rows(base, pairs)
    buckets = _buckets([rows, base_rows], batch_size)
    on = _scores(specialist, rows, buckets)
    with acting_as_base(specialist, base):
        off = _scores(base, base_rows, buckets)
    ends = specialist.response_ends([pair.response for pair in pairs])
    return [_joined(*row) for row in zip(on, off, ends, strict=True)]


def _joined(
    specialist: ResponseLogp | Failed, base: ResponseLogp | Failed, ends: list[int]
) -> PairLogp | Failed:
    if isinstance(specialist, Failed):
        return specialist
    if isinstance(base, Failed):
        return base
    if specialist.token_ids != base.token_ids:
        return Failed("tokenizers_differ: specialist and base cut the response differently")
    prompt = specialist.prompt_tokens
    return PairLogp(specialist.token_ids, ends, specialist.logp, base.logp, prompt)
