"""Log-probabilities of responses given their prompts (TuneShift-KD §3, without its gap).

Only the positions that predict a response token are projected to the vocabulary.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice

import torch
from peft import PeftModel

from stillhouse.workers.batching import length_buckets, set_broken_aside
from stillhouse.workers.cache import CacheFactory
from stillhouse.workers.models.language_model import LanguageModel
from stillhouse.workers.projection import TargetRow, target_logps
from stillhouse.workers.protocols import Failed, Pair, PairLogp, ResponseLogp


def response_logps(
    lm: LanguageModel,
    pairs: Sequence[Pair],
    batch_size: int,
    cache_factory: CacheFactory | None = None,
) -> list[ResponseLogp | Failed]:
    """Log-probability (nats) of each token of each response, in the order of the pairs; no EOS.

    With `cache_factory`, every attention reads keys and values as that cache gives them back.
    """
    rows = [_row(lm, pair) for pair in pairs]
    scores: dict[int, ResponseLogp | Failed] = {
        index: row for index, row in enumerate(rows) if isinstance(row, Failed)
    }
    fit = [(index, row) for index, row in enumerate(rows) if isinstance(row, TargetRow)]
    for bucket in length_buckets([len(row.ids) for _, row in fit], batch_size):
        members = [fit[position] for position in bucket]
        scored = set_broken_aside(lambda some: _score_batch(lm, some, cache_factory), members)
        scores.update(zip((index for index, _ in members), scored, strict=True))
    return [scores[index] for index in range(len(rows))]


def _row(lm: LanguageModel, pair: Pair) -> TargetRow | Failed:
    prompt, response = lm.encode_prompt(pair.prompt), lm.encode_response(pair.response)
    length = len(prompt) + len(response)
    if not response:
        return Failed("empty_response: no token to score")
    if not prompt:
        return Failed("empty_prompt: the model has no BOS, so nothing predicts the first token")
    if length > lm.context:
        return Failed(f"pair_too_long: {length} tokens, the model's context is {lm.context}")
    return TargetRow([*prompt, *response], len(response))


@torch.inference_mode()
def _score_batch(
    lm: LanguageModel,
    members: Sequence[tuple[int, TargetRow]],
    cache_factory: CacheFactory | None,
) -> list[ResponseLogp | Failed]:
    rows = [row for _, row in members]
    logps = iter(target_logps(lm, rows, cache_factory).tolist())
    return [_scored(row, list(islice(logps, row.targets))) for row in rows]


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
    on = response_logps(specialist, pairs, batch_size)
    with acting_as_base(specialist, base):
        off = response_logps(base, pairs, batch_size)
    return [
        _joined(one, two, specialist.response_ends(pair.response))
        for pair, one, two in zip(pairs, on, off, strict=True)
    ]


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
