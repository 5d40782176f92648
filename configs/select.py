"""What selection asks of a scored answer."""

import math
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from stillhouse.configs.base import Config

# pipelines/signals.py has the formula of each.
Signal = Literal[
    "gap",
    "controlled_gap",
    "content_gap",
    "confidence",
    "weakest_token",
    "surprise",
    "quotient",
    "likeness",
    "target_weakness",
    "random",
]


class CriterionConfig(Config):
    """An answer passes when its signal reaches a bound, which is given in one of three ways.

    `at_least`: the bound itself. `quantile`: the bound is this quantile of the round's answers.
    `controls`: this share of the controls' answers passes, at most (`data.controls`).
    """

    signal: Signal
    at_least: float | None = None
    quantile: float | None = Field(None, ge=0, lt=1)
    controls: float | None = Field(None, ge=0, lt=1)

    @model_validator(mode="after")
    def _has_one_bound(self) -> Self:
        given = [name for name in ("at_least", "quantile", "controls") if self._of(name)]
        if len(given) != 1:
            raise ValueError(
                f"select.criteria: {self.signal}: expected one of at_least, quantile and controls, "
                f"found {given or 'none'}"
            )
        return self

    def _of(self, name: str) -> bool:
        return getattr(self, name) is not None


class SelectConfig(Config):
    """Which scored answers are special.

    `tau` is the published method: PPL_base / PPL_specialist of the answer, given its prompt, is at
    least that (TuneShift-KD §3); None switches it off. `criteria` come on top, and an answer must
    pass all of them. Seeds pass. What passes competes for quotas and budget by `order`.
    """

    tau: float | None = Field(1.5, gt=0)
    criteria: tuple[CriterionConfig, ...] = ()
    order: Signal = "gap"  # the higher, the sooner kept
    budget: int | None = Field(None, ge=1)  # examples, of seeds and pool; `expand` has its own
    budget_tokens: int | None = Field(None, ge=1)  # the same in tokens of prompts and answers
    max_per_answer: int | None = Field(None, ge=1)  # diversity: of one answer, in each round
    max_per_cluster: int | None = Field(None, ge=1)  # of one bucket of like prompts, in each round
    seed: int = 0  # of the signal `random`

    @field_validator("criteria")
    @classmethod
    def _each_signal_once(cls, criteria: tuple[CriterionConfig, ...]) -> object:
        signals = [criterion.signal for criterion in criteria]
        if len(set(signals)) != len(signals):
            raise ValueError(f"select.criteria: expected different signals, found {signals}")
        return criteria

    def all_criteria(self) -> tuple[CriterionConfig, ...]:
        """`tau` as a criterion, then the others."""
        if self.tau is None:
            return self.criteria
        return (CriterionConfig(signal="gap", at_least=math.log(self.tau)), *self.criteria)

    def signals(self) -> set[Signal]:
        """Every signal that is asked for."""
        return {self.order, *(criterion.signal for criterion in self.all_criteria())}
