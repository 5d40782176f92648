"""Fits a compressed cache to a model: means, balanced maps, channel groups, bits by layer.

The cost of every coding is predicted from the moments (`moments`), in nats of next-token KL a
token, so bits go where they save most of it. Predictions are first order in the codebooks' errors
and second order in the KL: within some percent at 4 bits, too low below 2.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from stillhouse.configs.stages import CompressConfig
from stillhouse.errors import ModelError
from stillhouse.kernels.turboquant import (
    BalancedBasis,
    GroupChoice,
    GroupCount,
    balance,
    fit_heads,
    group_curve,
)
from stillhouse.workers.bits import Part, allocate
from stillhouse.workers.cache import CachePlan, FittedScheme, LayerPlan, layer_windows
from stillhouse.workers.divergence import cache_factory, measure_texts
from stillhouse.workers.models.language_model import LanguageModel
from stillhouse.workers.moments import LayerMoments, VectorMoments, stream_moments
from stillhouse.workers.projection import core
from stillhouse.workers.protocols import CacheMeasure, CalibrateJob
from stillhouse.workers.recall import recalling
from stillhouse.workers.token_windows import windows

RECALL = 0.5  # docs/decisions/0012-recall.md
_ROUNDING = 1e-9  # of sums of bits
_LENGTHS = 256  # texts whose length is taken
ROW = 2048  # tokens of a row at most: its backward pass has to fit into memory
_BITS = tuple(quarters / 4 for quarters in range(4, 21))  # what a quality budget chooses from


@dataclass(frozen=True, slots=True)
class _Fitting:
    """The keys or values of one layer before bits are chosen."""

    moments: VectorMoments
    basis: BalancedBasis
    part: Part

    @classmethod
    def of(cls, moments: VectorMoments, stored: float, groups: GroupCount) -> "_Fitting":
        # ½: what an error costs in nats.
        basis = balance(moments.covariance(), moments.fisher() / 2)
        try:
            curve = group_curve(basis.spread_HD, groups)
        except ValueError as error:
            raise ModelError(f"compress.channel_groups: {error}; allow 3 groups") from error
        return cls(moments, basis, Part(basis.spread_HD.shape[0], curve, stored))

    @property
    def channels(self) -> float:
        """Coordinates kept for a token, on average over the sequence."""
        return self.part.stored * self.basis.spread_HD.numel()


class Calibration:
    """Moments of a corpus, from which plans of any budget follow without another pass.

    stored: of each layer, the share of a sequence's tokens that it packs. tokens: how many were
    read, those that stay in 16 bits and those that came again included. groups: as `group_curve`.
    """

    def __init__(
        self,
        layers: Sequence[LayerMoments],
        stored: Sequence[float],
        tokens: int,
        sinks: int,
        recent: int,
        seed: int,
        groups: GroupCount = 3,
    ) -> None:
        self.tokens, self._sinks, self._recent, self._seed = tokens, sinks, recent, seed
        self._fittings = [
            _Fitting.of(moments, share, groups)
            for layer, share in zip(layers, stored, strict=True)
            for moments in (layer.key, layer.value)
        ]

    @property
    def channels(self) -> float:
        """Coordinates of keys and values kept for a token, on average over the sequence."""
        return sum(fitting.channels for fitting in self._fittings)

    @property
    def least_bits(self) -> float:
        """Of a kept coordinate on average: no plan has fewer."""
        return self._least / self.channels

    @property
    def most_bits(self) -> float:
        """Of a kept coordinate on average: more change nothing."""
        parts = [fitting.part for fitting in self._fittings]
        return sum(part.bits(len(part.curve) - 1) for part in parts) / self.channels

    @property
    def _least(self) -> float:
        return sum(fitting.part.bits(0) for fitting in self._fittings)

    def plan_of_bits(self, bits: float, *, even: bool = False) -> CachePlan:
        """The plan of least expected KL with at most `bits` a kept coordinate on average.

        These are the bytes of a cache with `bits` a coordinate in every layer and equal windows.
        even: every layer has at most those bytes, and shares them out over its own keys and values.
        ModelError for fewer than `least_bits`.
        """
        if bits < self.least_bits - _ROUNDING:
            raise ModelError(
                f"compress: expected {self.least_bits:g} bits a coordinate or more, as few as this "
                f"model's cache may have in these channel groups, found {bits:g}"
            )
        size = 2 if even else len(self._fittings)  # a layer's two stand side by side
        choices = []
        for start in range(0, len(self._fittings), size):
            some = self._fittings[start : start + size]
            parts = [fitting.part for fitting in some]
            least = sum(part.bits(0) for part in parts)
            channels = sum(fitting.channels for fitting in some)
            choices += allocate(parts, max(bits * channels, least))
        return self._plan(choices)

    def _plan(self, choices: Sequence[GroupChoice]) -> CachePlan:
        fits = [
            fit_heads(fitting.moments.mean(), fitting.basis, choice.groups, self._seed)
            for fitting, choice in zip(self._fittings, choices, strict=True)
        ]
        pairs = zip(fits[::2], fits[1::2], strict=True)
        bits = sum(
            fitting.part.stored * fitting.part.copies * choice.bits
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
    context: int,
    seed: int = 0,
    groups: GroupCount = 3,
) -> Calibration:
    """One pass, forward and backward, over token rows and spans of them (see `recalling`).

    context: tokens of the sequences that the cache is for, by which a sliding layer's bytes count
    less. groups: as `group_curve`. Raises as `stream_moments`, and ModelError for a head size that
    these groups cannot have.
    """
    read = 0

    def counted() -> Iterator[list[int]]:
        nonlocal read
        for row in recalling(rows, RECALL, lm.context, seed):
            read += len(row)
            yield row

    moments = stream_moments(lm, counted(), sinks, seed)
    stored = [
        packed_tokens(context, window, sinks, recent) / context
        for window in layer_windows(core(lm).config)
    ]
    return Calibration(moments, stored, read, sinks, recent, seed, groups)


def packed_tokens(context: int, window: int | None, sinks: int, recent: int) -> int:
    """How many tokens of a sequence a layer keeps packed, those in 16 bits left out; 1 at least."""
    if window is None or context < window:
        return max(context - sinks - recent, 1)
    return max(window - 1 - recent, 1)


def calibration_rows(lm: LanguageModel, texts: Iterable[str], tokens: int) -> list[list[int]]:
    """Token rows of the first texts; with what comes again `calibrate` reads about `tokens`."""
    window = max(round(min(lm.context, ROW) * (1 - RECALL)) - 1, 1)
    return windows(lm, texts, window, round(tokens * (1 - RECALL)))


def write_plan(lm: LanguageModel, job: CalibrateJob, notify: Callable[[str], None]) -> int:
    """Calibrate on the job's texts, up to its tokens, and write the plan of its bytes.

    Returns how many tokens the calibration read. With a quality budget some texts are kept apart
    to measure on; ModelError when there is but one.
    """
    config = job.config
    texts, unseen = _apart(job.texts, config.texts if config.budget_kl else 0)
    rows = calibration_rows(lm, texts, config.calibration_tokens)
    notify(f"fitting the cache on {sum(map(len, rows)):,} tokens and as many that come again")
    calibration = calibrate(
        lm,
        rows,
        sinks=config.sinks,
        recent=config.recent,
        context=config.context or _usual_length(lm, job.texts),
        seed=config.seed,
        groups=config.channel_groups,
    )
    if config.budget_kl is None:
        bits = (config.key_bits + config.value_bits) / 2
        plan = calibration.plan_of_bits(bits, even=config.even_layers)
    else:
        plan = plan_of_measured_kl(lm, calibration, unseen, config, notify)
    plan.save(job.folder)
    return calibration.tokens


def _usual_length(lm: LanguageModel, texts: Sequence[str]) -> int:
    """Mean tokens of the texts, or of so many from all over them."""
    some = texts[:: max(len(texts) // _LENGTHS, 1)]
    lengths = [min(len(lm.encode_prompt(text)), lm.context) for text in some]
    return max(round(sum(lengths) / max(len(lengths), 1)), 1)


def _apart(texts: Sequence[str], wanted: int) -> tuple[list[str], list[str]]:
    """Texts to fit on, and others evenly from all of them: `wanted`, a quarter, or at least one."""
    if not wanted:
        return list(texts), []
    if len(texts) < 2:
        raise ModelError(
            "compress.budget_kl: expected two texts at least, to fit on and to measure on, "
            f"found {len(texts)}"
        )
    every = max(math.ceil(len(texts) / wanted), 4)
    return [x for i, x in enumerate(texts) if i % every], list(texts[::every])


def plan_of_measured_kl(
    lm: LanguageModel,
    calibration: Calibration,
    texts: Sequence[str],
    config: CompressConfig,
    notify: Callable[[str], None],
) -> CachePlan:
    """The plan of fewest bits whose mean next-token KL on the texts is at most `budget_kl` nats.

    Found by bisection over quarters of a bit, as if KL fell with every one of them. ModelError when
    the most bits are not enough: then no fitted cache is good enough for this model.
    """
    assert config.budget_kl is not None
    budget = config.budget_kl
    least, most = calibration.least_bits - _ROUNDING, calibration.most_bits + _ROUNDING
    choices = [bits for bits in _BITS if least <= bits <= most]
    low, high = 0, len(choices) - 1
    best: CachePlan | None = None
    found = math.nan
    while low <= high:
        middle = (low + high) // 2 if best else high
        plan = calibration.plan_of_bits(choices[middle], even=config.even_layers)
        found = measured_kl(lm, texts, plan)
        notify(f"{choices[middle]:g} bits: next-token KL {found:.4f} nats, allowed {budget:g}")
        if found <= budget:
            best = replace(plan, facts={**plan.facts, "budget_kl": budget, "measured_kl": found})
            high = middle - 1
        elif best is None:
            raise ModelError(
                f"compress.budget_kl: expected a cache that costs at most {budget:g} nats a token, "
                f"found {found:.4f} at {choices[-1]:g} bits; allow more, or keep the cache in 16 "
                "bits"
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
