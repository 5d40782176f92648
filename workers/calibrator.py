"""Fits a compressed cache to a model: means, balanced maps, channel groups, bits by layer.

The cost of every coding is predicted from the moments (`moments`), in nats of next-token KL a
token, so bits go where they save most of it. Predictions are first order in the codebooks' errors
and second order in the KL: within some percent at 4 bits, too low below 2.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from stillhouse.errors import ModelError
from stillhouse.kernels.turboquant import (
    BalancedBasis,
    GroupChoice,
    balance,
    fit_heads,
    group_curve,
)
from stillhouse.workers.bits import Part, allocate, reach
from stillhouse.workers.cache import CachePlan, FittedScheme, LayerPlan
from stillhouse.workers.divergence import cache_factory, measure_texts
from stillhouse.workers.models.language_model import LanguageModel
from stillhouse.workers.moments import LayerMoments, VectorMoments, stream_moments
from stillhouse.workers.protocols import CacheMeasure, CalibrateJob
from stillhouse.workers.recall import recalling

RECALL = 0.5  # docs/decisions/0012: what it is worth
_BITS = tuple(quarters / 4 for quarters in range(4, 21))  # what a quality budget chooses from


@dataclass(frozen=True, slots=True)
class _Fitting:
    """The keys or values of one layer before bits are chosen."""

    moments: VectorMoments
    basis: BalancedBasis
    part: Part

    @classmethod
    def of(cls, moments: VectorMoments) -> "_Fitting":
        # ½: what an error costs in nats.
        basis = balance(moments.covariance(), moments.fisher() / 2)
        return cls(moments, basis, Part(basis.spread_HD.shape[0], group_curve(basis.spread_HD)))


class Calibration:
    """Moments of a corpus, from which plans of any budget follow without another pass."""

    def __init__(self, layers: Sequence[LayerMoments], sinks: int, recent: int, seed: int) -> None:
        self._sinks, self._recent, self._seed = sinks, recent, seed
        self._fittings = [
            _Fitting.of(moments) for layer in layers for moments in (layer.key, layer.value)
        ]
        self.tokens = self._fittings[0].moments.tokens

    @property
    def channels(self) -> int:
        """Coordinates of all keys and values of a token."""
        return sum(fitting.basis.spread_HD.numel() for fitting in self._fittings)

    def plan_of_bits(self, bits: float) -> CachePlan:
        """The plan of least expected KL with at most `bits` a coordinate on average."""
        parts = [fitting.part for fitting in self._fittings]
        return self._plan(allocate(parts, int(bits * self.channels)))

    def plan_of_kl(self, kl: float) -> CachePlan:
        """The plan of fewest bits whose expected KL is at most `kl` nats a token."""
        return self._plan(reach([fitting.part for fitting in self._fittings], kl))

    def _plan(self, choices: Sequence[GroupChoice]) -> CachePlan:
        fits = [
            fit_heads(fitting.moments.mean(), fitting.basis, choice.groups, self._seed)
            for fitting, choice in zip(self._fittings, choices, strict=True)
        ]
        pairs = zip(fits[::2], fits[1::2], strict=True)
        bits = sum(
            fitting.part.copies * choice.bits
            for fitting, choice in zip(self._fittings, choices, strict=True)
        )
        facts = {
            "bits_per_coordinate": bits / self.channels,
            "expected_kl": sum(choice.cost for choice in choices),
            "calibration_tokens": self.tokens,
        }
        layers = tuple(LayerPlan(key, value) for key, value in pairs)
        return CachePlan(layers, self._sinks, self._recent, facts)


def calibrate(
    lm: LanguageModel,
    rows: Iterable[Sequence[int]],
    *,
    sinks: int,
    recent: int,
    seed: int = 0,
    recall: float = RECALL,
) -> Calibration:
    """One pass, forward and backward, over token rows; see `stream_moments`.

    recall: share of spans that come again; the rows make the rest (see `recalling`).
    """
    rows = recalling(rows, recall, lm.context, seed)
    return Calibration(stream_moments(lm, rows, sinks, seed), sinks, recent, seed)


def write_plan(lm: LanguageModel, job: CalibrateJob, notify: Callable[[str], None]) -> int:
    """Calibrate on the job's texts, up to its tokens, and write the plan of its bytes.

    Returns how many tokens went through the model.
    """
    config = job.config
    rows: list[list[int]] = []
    tokens = 0
    for text in job.texts:
        rows.append(lm.encode_prompt(text))
        tokens += round(len(rows[-1]) / (1 - RECALL))
        if tokens >= config.calibration_tokens:
            break
    notify(f"fitting the cache on {tokens:,} tokens of {len(rows):,} texts")
    calibration = calibrate(lm, rows, sinks=config.sinks, recent=config.recent, seed=config.seed)
    if config.budget_kl is None:
        plan = calibration.plan_of_bits((config.key_bits + config.value_bits) / 2)
    else:
        unseen = job.texts[len(rows) :][: config.texts] or job.texts[: config.texts]
        plan = plan_of_measured_kl(lm, calibration, unseen, config.budget_kl, notify)
    plan.save(job.folder)
    return tokens


def plan_of_measured_kl(
    lm: LanguageModel,
    calibration: Calibration,
    texts: Sequence[str],
    budget: float,
    notify: Callable[[str], None],
) -> CachePlan:
    """The plan of fewest bits whose mean next-token KL on the texts is at most `budget` nats.

    Found by bisection over quarters of a bit. ModelError when the most bits are not enough: then no
    fitted cache is good enough for this model.
    """
    low, high = 0, len(_BITS) - 1
    best: CachePlan | None = None
    found = math.nan
    while low <= high:
        middle = (low + high) // 2 if best else high
        plan = calibration.plan_of_bits(_BITS[middle])
        found = measured_kl(lm, texts, plan)
        notify(f"{_BITS[middle]:g} bits: next-token KL {found:.4f} nats, allowed {budget:g}")
        if found <= budget:
            best = replace(plan, facts={**plan.facts, "budget_kl": budget, "measured_kl": found})
            high = middle - 1
        elif best is None:
            raise ModelError(
                f"compress.budget_kl: expected a cache that costs at most {budget:g} nats a token, "
                f"found {found:.4f} at {_BITS[-1]:g} bits; allow more, or keep the cache in 16 bits"
            )
        else:
            low = middle + 1
    assert best is not None
    return best


def measured_kl(lm: LanguageModel, texts: Sequence[str], plan: CachePlan) -> float:
    """Mean next-token KL a token, nats; ModelError when no text can be measured."""
    measures, _ = measure_texts(lm, texts, cache_factory(lm, FittedScheme(plan)))
    kept = [measure for measure in measures if isinstance(measure, CacheMeasure)]
    tokens = sum(measure.tokens for measure in kept)
    if not tokens:
        raise ModelError(f"expected texts to measure a cache on, found none of {len(texts)} fit")
    return math.fsum(measure.kl_mean * measure.tokens for measure in kept) / tokens
