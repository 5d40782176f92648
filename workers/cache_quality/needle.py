"""Retrieval of facts from a long text through a cache.

Eight codes are spread over a text and asked for at its end, one after another in the same text; a
code counts when each of its tokens is the most likely one after those before it, which is what
greedy generation would write. (The idea is Kamradt's "Needle In A Haystack", 2023; eight needles
at a time are "Multi-Needle".)

Shape suffixes: T tokens, D hidden size, V vocabulary.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import Cache

from stillhouse.workers.batching import pad_right
from stillhouse.workers.models.language_model import LanguageModel, decoder_and_head
from stillhouse.workers.projection import core, hidden_states

LENGTHS = (512, 1024, 2048, 4096)
NEEDLES = 8
_PLACES = (
    "Amsterdam", "Bergen", "Cairo", "Dublin", "Edinburgh", "Florence", "Geneva", "Hamburg",
    "Istanbul", "Jakarta", "Kyoto", "Lisbon", "Madrid", "Nairobi", "Oslo", "Prague", "Quito",
    "Rome", "Sydney", "Toronto", "Utrecht", "Vienna", "Warsaw", "Zurich",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Haystack:
    """Token ids, and where in them each answer stands."""

    ids: Sequence[int]
    answers: Sequence[slice]


def haystack(lm: LanguageModel, filler: Sequence[int], length: int, seed: int) -> Haystack | None:
    """A text of `length` tokens, filler and all; None where needles and questions leave no room.

    filler: token ids without BOS, repeated as needed.
    """
    draw = random.Random(f"{seed} {length}")
    places = draw.sample(_PLACES, NEEDLES)
    codes = {place: str(draw.randrange(10_000, 100_000)) for place in places}
    facts = [lm.encode_response(f"\nThe code of {at} is {code}.\n") for at, code in codes.items()]
    asked = draw.sample(places, NEEDLES)
    questions = [
        (lm.encode_response(f"\nThe code of {at} is"), lm.encode_response(f" {codes[at]}"))
        for at in asked
    ]
    start = [] if lm.bos is None else [lm.bos]
    taken = sum(map(len, facts)) + sum(len(q) + len(a) for q, a in questions) + len(start)
    room = length - taken
    if room < taken or not filler:
        return None
    ids = list(start)
    cuts = [round(room * (number + 0.5) / NEEDLES) for number in range(NEEDLES)]
    text = [filler[index % len(filler)] for index in range(room)]
    for begin, end, fact in zip([0, *cuts], cuts, facts, strict=False):
        ids += [*text[begin:end], *fact]
    ids += text[cuts[-1] :]
    answers = []
    for question, answer in questions:
        ids += question
        answers.append(slice(len(ids), len(ids) + len(answer)))
        ids += answer
    return Haystack(ids, answers)


@torch.inference_mode()
def retrieved(lm: LanguageModel, stack: Haystack, cache: Cache) -> list[bool]:
    """Of each answer, whether every token of it is the most likely."""
    batch = pad_right([stack.ids], lm.pad, core(lm).device)
    hidden_TD = hidden_states(lm, batch, cache)[0]
    _, head = decoder_and_head(core(lm))
    found = []
    for where in stack.answers:
        read_TD = hidden_TD[where.start - 1 : where.stop - 1]
        likely = head.logits(read_TD, torch.float32).argmax(-1)
        found.append(likely.tolist() == list(stack.ids[where]))
    return found
