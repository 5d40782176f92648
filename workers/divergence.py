"""What a compressed key/value cache costs in quality and saves in bytes.

Shape letters: T positions of a text, C positions of a chunk, D hidden size, V vocabulary.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from stillhouse.configs.stages import CompressConfig
from stillhouse.kernels.turboquant import NotFiniteError
from stillhouse.workers.batching import pad_right
from stillhouse.workers.cache import (
    CacheFactory,
    CacheFormat,
    CachePlan,
    CacheScheme,
    FittedScheme,
    ObliviousScheme,
    TurboQuantCache,
)
from stillhouse.workers.models.language_model import Head, LanguageModel, decoder_and_head
from stillhouse.workers.projection import core, hidden_states
from stillhouse.workers.protocols import NOT_STORABLE, CacheBytes, CacheMeasure, Failed

NOT_FINITE = "not_finite: the model gives a token of the text no log-probability"
CHUNK = 32  # positions at a time: 64 MiB a matrix in float64 at 262,144 words


def compressed_cache_factory(
    lm: LanguageModel, config: CompressConfig, plan: Path | None = None
) -> CacheFactory:
    """Makes empty caches of the plan in a folder, or of the configured format without one.

    All of them share their tables.
    """
    return cache_factory(
        lm, FittedScheme(CachePlan.load(plan)) if plan else oblivious_scheme(config)
    )


def cache_factory(lm: LanguageModel, scheme: CacheScheme) -> CacheFactory:
    """Makes empty caches of a scheme."""

    def make(padding: Sequence[int] | None = None) -> TurboQuantCache:
        return TurboQuantCache(core(lm).config, scheme, padding)

    return make


def oblivious_scheme(config: CompressConfig) -> CacheScheme:
    """The configured format, which no data shaped."""
    return ObliviousScheme(
        CacheFormat(
            key_bits=config.key_bits,
            value_bits=config.value_bits,
            key_scalar=config.key_scalar,
            value_scalar=config.value_scalar,
            seed=config.seed,
            sinks=config.sinks,
            recent=config.recent,
        )
    )


def measure_cache(
    lm: LanguageModel, texts: Sequence[str], config: CompressConfig, plan: Path | None = None
) -> tuple[list[CacheMeasure | Failed], CacheBytes]:
    """Divergence of each text and bytes a token over all of them: see `measure_texts`."""
    return measure_texts(lm, texts, compressed_cache_factory(lm, config, plan))


def measure_texts(
    lm: LanguageModel, texts: Iterable[str], factory: CacheFactory
) -> tuple[list[CacheMeasure | Failed], CacheBytes]:
    """Full cache against the factory's.

    Every position's attention reads keys and values from the packed storage, its own included. Each
    text runs alone, so that no padding is counted in the bytes; those are what the caches hold
    after each text, without the codecs' tables. A text that cannot be measured is a Failed, and in
    no sum.
    """
    measures: list[CacheMeasure | Failed] = []
    total = _Bytes(0, 0, 0, 0)
    for text in texts:
        ids = lm.encode_prompt(text)
        measured = _unfit(lm, ids) or _measure_text(lm, ids, factory())
        if isinstance(measured, Failed):
            measures.append(measured)
            continue
        measure, size = measured
        measures.append(measure)
        total = total.plus(size)
    tokens = max(total.tokens, 1)
    return measures, CacheBytes(total.packed / tokens, total.full / tokens, total.tables)


def _is_finite(measure: CacheMeasure) -> bool:
    figures = (measure.kl_mean, measure.kl_max, measure.logp_full, measure.logp_compressed)
    return all(map(math.isfinite, figures))


def _unfit(lm: LanguageModel, ids: Sequence[int]) -> Failed | None:
    if len(ids) < 2:
        return Failed(f"too_short: expected at least 2 tokens, found {len(ids)}")
    if len(ids) > lm.context:
        return Failed(f"too_long: {len(ids)} tokens, the model's context is {lm.context}")
    return None


@dataclass(frozen=True, slots=True)
class _Bytes:
    """Sums over texts, but for the tables; tokens are those in the cache."""

    tokens: int
    packed: int
    tables: int
    full: int

    def plus(self, other: "_Bytes") -> "_Bytes":
        return _Bytes(
            tokens=self.tokens + other.tokens,
            packed=self.packed + other.packed,
            tables=max(self.tables, other.tables),
            full=self.full + other.full,
        )


@torch.inference_mode()
def _measure_text(
    lm: LanguageModel, ids: Sequence[int], packed: TurboQuantCache
) -> tuple[CacheMeasure, _Bytes] | Failed:
    batch = pad_right([ids[:-1]], lm.pad, core(lm).device)  # the last token is only predicted
    full = DynamicCache(config=core(lm).config)
    full_TD = hidden_states(lm, batch, full)[0]
    if not bool(torch.isfinite(full_TD).all()):
        return Failed(NOT_FINITE)
    try:
        packed_TD = hidden_states(lm, batch, packed)[0]
    except NotFiniteError as error:
        return Failed(f"{NOT_STORABLE}: {error}")
    target_T = torch.tensor(ids[1:], dtype=torch.long, device=full_TD.device)
    measure = _compare(lm, full_TD, packed_TD, target_T)
    if not _is_finite(measure):
        return Failed(NOT_FINITE)
    tables = packed.table_nbytes
    stored = packed.nbytes - tables
    return measure, _Bytes(len(ids) - 1, stored, tables, bytes_in_16_bits(full))


def bytes_in_16_bits(cache: DynamicCache) -> int:
    """Two bytes for each key and value element that the cache holds."""
    layers: Any = cache.layers  # of one kind: transformers types them as the union of all kinds
    return int(sum(2 * (layer.keys.numel() + layer.values.numel()) for layer in layers))


def _compare(
    lm: LanguageModel, full_TD: Tensor, packed_TD: Tensor, target_T: Tensor
) -> CacheMeasure:
    _, head = decoder_and_head(core(lm))
    kl, sums = [], [0.0, 0.0]
    for start in range(0, len(target_T), CHUNK):
        rows = slice(start, start + CHUNK)
        p_CV = log_probabilities(full_TD[rows], head)
        q_CV = log_probabilities(packed_TD[rows], head)
        kl.append(kl_divergence(p_CV, q_CV))
        for which, logp_CV in enumerate((p_CV, q_CV)):
            sums[which] += logp_CV.gather(1, target_T[rows, None]).sum().item()
    kl_T = torch.cat(kl)
    return CacheMeasure(len(target_T), kl_T.mean().item(), kl_T.max().item(), sums[0], sums[1])


def log_probabilities(hidden_CD: Tensor, head: Head, dtype: torch.dtype = torch.float64) -> Tensor:
    """Log-probabilities `[C, V]` in `dtype`; the product with the head stays in its own dtype."""
    return head.logits(hidden_CD, dtype).log_softmax(-1)


def kl_divergence(log_p_CV: Tensor, log_q_CV: Tensor) -> Tensor:
    """KL(p || q) of each row, nats, `[C]`: the cost of believing q where p holds."""
    return (log_p_CV.exp() * (log_p_CV - log_q_CV)).sum(-1)
