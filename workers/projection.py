"""From token rows to log-probabilities, projecting to the vocabulary only where one is asked for.

Shape letters: B rows of a batch, T positions, N chosen positions of the whole batch, D hidden size,
V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import Cache, PreTrainedModel

from stillhouse.kernels.token_logprob import token_logprob
from stillhouse.workers.batching import PaddedBatch, pad_left, pad_right
from stillhouse.workers.cache import CacheFactory
from stillhouse.workers.models.language_model import LanguageModel, decoder_and_head


@dataclass(frozen=True, slots=True)
class TargetRow:
    """Token ids and how many of the last ones are targets; at least one token precedes them."""

    ids: Sequence[int]
    targets: int


def core(lm: LanguageModel) -> PreTrainedModel:
    """The transformers model itself; PEFT's layers sit inside it, so adapters act all the same."""
    model = lm.model
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


def hidden_states(lm: LanguageModel, batch: PaddedBatch, cache: Cache | None = None) -> Tensor:
    """Hidden states `[B, T, D]` after the last norm; attention reads what `cache` returns."""
    decoder, _ = decoder_and_head(core(lm))
    hidden_BTD: Tensor = decoder(
        input_ids=batch.ids,
        attention_mask=batch.mask,
        position_ids=batch.positions,
        past_key_values=cache,
        use_cache=cache is not None,
    )
    return hidden_BTD


def continued_states(lm: LanguageModel, ids_BT: Tensor, cache: Cache | None) -> Tensor:
    """Hidden states `[B, T, D]` of rows padded on the right, which go on where `cache` ends.

    No mask is made: a causal model lets no token see the padding that comes after it.
    """
    decoder, _ = decoder_and_head(core(lm))
    return decoder(input_ids=ids_BT, past_key_values=cache, use_cache=cache is not None)


def target_logps(
    lm: LanguageModel, rows: Sequence[TargetRow], cache_factory: CacheFactory | None = None
) -> Tensor:
    """Log-probabilities (nats) of every row's targets, one row after the other: float32 `[N]`.

    The last token of a row is predicted and never read, so it is not sent through the model.
    With a cache, rows end together, as when they are generated: its windows count from both ends.
    """
    device = core(lm).device
    read = [row.ids[:-1] for row in rows]
    batch = (pad_left if cache_factory else pad_right)(read, lm.pad, device)
    width = batch.ids.shape[1]
    gaps = [width - len(ids) if cache_factory else 0 for ids in read]
    cache = cache_factory(gaps) if cache_factory else None
    return read_targets(lm, hidden_states(lm, batch, cache), rows, gaps)


def read_targets(
    lm: LanguageModel, hidden_BTD: Tensor, rows: Sequence[TargetRow], gaps: Sequence[int]
) -> Tensor:
    """Log-probabilities of every row's targets, float32 `[N]`, from their hidden states.

    gaps: positions before each row's first token; below 0, so many of its tokens are in a cache.
    """
    width, device = hidden_BTD.shape[1], hidden_BTD.device
    at: list[int] = []
    targets: list[int] = []
    for index, (row, gap) in enumerate(zip(rows, gaps, strict=True)):
        begin = index * width + gap
        first = len(row.ids) - row.targets
        at.extend(range(begin + first - 1, begin + len(row.ids) - 1))
        targets.extend(row.ids[first:])
    hidden_ND = hidden_BTD.flatten(0, 1)[torch.tensor(at, device=device)]
    target_N = torch.tensor(targets, dtype=torch.long, device=device)
    _, head = decoder_and_head(core(lm))
    return token_logprob(
        hidden_ND, head.weight_VD, target_N, bias_V=head.bias_V, softcap=head.softcap
    )
