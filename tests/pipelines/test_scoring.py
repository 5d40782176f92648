"""Answers and scores: the gap by hand, and every prompt in exactly one state."""

import pytest

from stillhouse.configs.data import TemplateConfig
from stillhouse.configs.stages import ScoreConfig
from stillhouse.pipelines.scoring import score_prompts
from stillhouse.storage.records import PromptRecord
from stillhouse.workers.protocols import Completion, Decoding, Failed, Pair, PairLogp


def prompt(name: str) -> PromptRecord:
    return PromptRecord(
        name, name, f"Q: {name}\nA:", "pool", "pool", "train", 0, None, "file:1", "kept", None
    )


class TwoModels:
    """Answers by prompt; two tokens an answer, with the log-probabilities of the case below."""

    def __init__(self, **answers: Completion | Failed) -> None:
        self.answers = answers
        self.scored: list[Pair] = []

    def answer(self, prompts, how: Decoding) -> list[Completion | Failed]:
        assert (how.max_new_tokens, how.temperature) == (16, 0.0)
        return [self.answers[text[3:].split("\n")[0]] for text in prompts]

    def propose(self, prompts, how: Decoding) -> list[Completion | Failed]:
        raise AssertionError("scoring proposes nothing")

    def score(self, pairs, batch_size: int) -> list[PairLogp | Failed]:
        self.scored += pairs
        return [
            Failed("too_long")
            if "bad" in pair.response
            else PairLogp([7, 8], [3, 7], [-0.5, -1.5], [-3, -2], 5)
            for pair in pairs
        ]


def test_the_gap_is_the_mean_difference_and_order_is_kept() -> None:
    models = TwoModels(
        a=Completion("good", "stop", 2, 5),
        b=Failed("engine died"),
        c=Completion("", "stop", 1, 5),
        d=Completion("bad", "length", 16, 5),
        e=Completion("good", "stop", 2, 5),
    )
    prompts = [prompt(name) for name in "abcde"]
    scored = score_prompts(prompts, models, ScoreConfig(), TemplateConfig(response=" [{text}]"))
    assert [(row.prompt_id, row.status, row.reason) for row in scored.scores] == [
        ("a", "kept", None),
        ("b", "failed", "engine died"),
        ("c", "rejected", "empty_answer"),
        ("d", "failed", "too_long"),
        ("e", "kept", None),
    ]
    first = scored.scores[0]
    assert first.gap == pytest.approx(((3 - 0.5) + (2 - 1.5)) / 2)
    assert first.confidence == pytest.approx(-1.0)
    assert [row.prompt_id for row in scored.completions] == ["a", "d", "e"]
    assert scored.completions[1].finish == "length"
    assert models.scored[0] == Pair("Q: a\nA:", " [good]")
    # answering: 4 prompts of 5 tokens and what was generated; scoring: 2 pairs of 5 + 2, twice
    assert scored.tokens == (4 * 5 + 2 + 1 + 16 + 2) + 2 * 2 * 7
    assert (scored.count("kept"), scored.count("rejected"), scored.count("failed")) == (2, 1, 2)


def test_nothing_to_score() -> None:
    scored = score_prompts([], TwoModels(), ScoreConfig(), TemplateConfig())
    assert (scored.scores, scored.completions, scored.tokens) == ([], [], 0)
