"""Text from a model: greedy or sampled, cut at stop strings.

Shape letters: B rows of a batch, T positions, V vocabulary.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from stillhouse.workers.batching import length_buckets, pad_left, set_broken_aside
from stillhouse.workers.cache import CacheFactory
from stillhouse.workers.linear_mode import fast_linears
from stillhouse.workers.models.language_model import LanguageModel
from stillhouse.workers.projection import core
from stillhouse.workers.protocols import Completion, Decoding, Failed

NOT_FINITE = "not_finite: the model gives the next token no number"


def generate(
    lm: LanguageModel,
    prompts: Sequence[str],
    how: Decoding,
    cache_factory: CacheFactory | None = None,
) -> list[Completion | Failed]:
    """Continue each prompt; answers come in the order of the prompts.

    A sampled answer depends on `how.seed` and its prompt's index, not on its batch: the same shard
    gives the same text whatever the batch size, and no global random state is read or moved.
    """
    rows = [lm.encode_prompt(prompt) for prompt in prompts]
    answers: dict[int, Completion | Failed] = {}
    for index, row in enumerate(rows):
        if (problem := _unfit(lm, row, how)) is not None:
            answers[index] = Failed(problem)
    fit = [index for index in range(len(rows)) if index not in answers]
    for bucket in length_buckets([len(rows[index]) for index in fit], how.batch_size):
        members = [fit[position] for position in bucket]

        def made(some: Sequence[int]) -> list[Completion | Failed]:
            return _generate_batch(lm, [rows[m] for m in some], some, how, cache_factory)

        answers.update(zip(members, set_broken_aside(made, members), strict=True))
    return [answers[index] for index in range(len(rows))]


def _unfit(lm: LanguageModel, row: Sequence[int], how: Decoding) -> str | None:
    room = lm.context - how.max_new_tokens
    if len(row) > room:
        return (
            f"prompt_too_long: {len(row)} tokens, room for {room} (context {lm.context} less "
            f"{how.max_new_tokens} new tokens)"
        )
    return None if row else "empty_prompt: no token to continue, and the model has no BOS"


@torch.inference_mode()
def _generate_batch(
    lm: LanguageModel,
    rows: Sequence[Sequence[int]],
    members: Sequence[int],
    how: Decoding,
    cache_factory: CacheFactory | None,
) -> list[Completion | Failed]:
    model: Any = core(lm)
    batch = pad_left(rows, lm.pad, model.device)
    end = _EndOfAnswer(lm, how.stop, batch.ids.shape[1], len(rows))
    finite = _FiniteRows(len(rows), model.device)
    processors = LogitsProcessorList([finite])
    if how.temperature > 0:
        processors.append(_GumbelNoise(how, members, model.device))
    padding = [batch.ids.shape[1] - len(row) for row in rows]
    cache = None if cache_factory is None else cache_factory(padding)
    with _no_inherited_decoding(model), fast_linears():
        output_BT = model.generate(
            batch.ids,
            attention_mask=batch.mask,
            generation_config=_greedy(lm, how),
            logits_processor=processors,
            stopping_criteria=StoppingCriteriaList([end]),
            past_key_values=cache,
        )
    new_BT = output_BT[:, batch.ids.shape[1] :].tolist()
    return [
        _completion(lm, ids, ended, how.stop, len(row)) if is_finite else Failed(NOT_FINITE)
        for ids, ended, row, is_finite in zip(
            new_BT, end.ended_at, rows, finite.rows.tolist(), strict=True
        )
    ]


def _greedy(lm: LanguageModel, how: Decoding) -> GenerationConfig:
    """Every knob that could change the text is at its neutral value; noise makes the samples."""
    return GenerationConfig(
        max_new_tokens=how.max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=list(lm.eos_ids) or None,
        pad_token_id=lm.pad,
        use_cache=True,
    )


@contextmanager
def _no_inherited_decoding(model: PreTrainedModel) -> Iterator[None]:
    """Set the model's own defaults aside: `generate` fills every unset knob from them."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _completion(
    lm: LanguageModel, ids: Sequence[int], ended: int | None, stop: Sequence[str], prompt: int
) -> Completion:
    kept = list(ids[: ended if ended is not None else len(ids)])
    tokens = len(kept)
    if kept and kept[-1] in lm.eos_ids:
        kept.pop()
    text = lm.decode(kept)
    cut = min((at for mark in stop if (at := text.find(mark)) >= 0), default=len(text))
    finish: Literal["stop", "length"] = "length" if ended is None else "stop"
    return Completion(text[:cut].strip(), finish, tokens, prompt)


class _EndOfAnswer(StoppingCriteria):
    """Ends a row at its EOS or first stop string; remembers after how many new tokens.

    Only the tail of a row is decoded: a stop string of n bytes lies within the last n tokens. That
    is one call of the tokenizer a row and step, some microseconds; transformers' own
    `stop_strings` first walks the whole vocabulary.
    """

    def __init__(self, lm: LanguageModel, stop: Sequence[str], prompt_width: int, rows: int):
        self._lm = lm
        self._stop = tuple(stop)
        self._width = prompt_width
        # Tokenizers drop a first token's blank, so the tail keeps some tokens more.
        self._tail = max((len(mark.encode()) for mark in stop), default=0) + 4
        self.ended_at: list[int | None] = [None] * rows

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        count = input_ids.shape[1] - self._width
        tails = input_ids[:, self._width :][:, -self._tail :].tolist()
        for row, tail in enumerate(tails):
            if self.ended_at[row] is None and self._ends(tail):
                self.ended_at[row] = count
        ended = [at is not None for at in self.ended_at]
        return torch.tensor(ended, dtype=torch.bool, device=input_ids.device)

    def _ends(self, tail: list[int]) -> bool:
        if tail[-1] in self._lm.eos_ids:
            return True
        if not self._stop:
            return False
        text = self._lm.decode(tail)
        return any(mark in text for mark in self._stop)


class _FiniteRows(LogitsProcessor):
    """Notes which rows have had a number for their best next token at every step."""

    def __init__(self, rows: int, device: torch.device):
        self.rows = torch.ones(rows, dtype=torch.bool, device=device)

    def __call__(self, input_ids: Tensor, scores_BV: Tensor) -> Tensor:
        self.rows &= torch.isfinite(scores_BV.amax(dim=1))
        return scores_BV


class _GumbelNoise(LogitsProcessor):
    """Makes the greedy choice a sample: argmax(logits / temperature + Gumbel noise).

    Each row draws from a generator of its own.
    """

    def __init__(self, how: Decoding, members: Sequence[int], device: torch.device):
        self._temperature = how.temperature
        self._generators = [
            torch.Generator(device=device).manual_seed(_row_seed(how.seed, member))
            for member in members
        ]

    def __call__(self, input_ids: Tensor, scores_BV: Tensor) -> Tensor:
        noise_BV = torch.empty_like(scores_BV, dtype=torch.float32)
        for noise_V, generator in zip(noise_BV, self._generators, strict=True):
            noise_V.exponential_(generator=generator)
        return scores_BV / self._temperature - noise_BV.log_()


def _row_seed(seed: int, index: int) -> int:
    """Hash the pair, so that neighbouring seeds and rows share no stream."""
    digest = hashlib.sha256(f"{seed}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
