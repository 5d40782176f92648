"""Divergence of many caches from full precision, over the same positions of the same windows.

The reference is projected to the vocabulary once for all of them.

Shape suffixes: T positions of a window, C positions of a chunk, D hidden size, V vocabulary.
"""

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from stillhouse.workers.cache_quality.report import quantile
from stillhouse.workers.divergence import kl_divergence, log_probabilities
from stillhouse.workers.models.language_model import LanguageModel, decoder_and_head
from stillhouse.workers.projection import core

CHUNK = 64  # positions: 64 MiB a matrix in float32 at 262,144 words
Name = TypeVar("Name", bound=Hashable)


@dataclass(slots=True)
class Tally:
    """Sums over windows. logp: nats. cached: tokens in the caches, whose bytes are `stored`."""

    kl: list[float] = field(default_factory=list)
    logp: float = 0.0
    agreed: int = 0
    stored: int = 0
    cached: int = 0
    tables: int = 0

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability."""
        return math.exp(-self.logp / len(self.kl))

    @property
    def kl_p99(self) -> float:
        """The KL that 99 % of the tokens do not exceed."""
        return quantile(self.kl, 0.99)


@torch.inference_mode()
def compare(
    lm: LanguageModel,
    full_TD: Tensor,
    others: Mapping[Name, Tensor],
    target_T: Tensor,
    tallies: Mapping[Name, Tally],
) -> float:
    """Add a window to each tally; returns full precision's sum of log-probabilities.

    full_TD, others: hidden states [T, D] after the last norm, whose next tokens are target_T.
    Log-probabilities in float32.
    """
    _, head = decoder_and_head(core(lm))
    total = 0.0
    for start in range(0, len(target_T), CHUNK):
        rows = slice(start, start + CHUNK)
        target_C1 = target_T[rows, None]
        p_CV = log_probabilities(full_TD[rows], head, torch.float32)
        best_C = p_CV.argmax(-1)
        total += p_CV.gather(1, target_C1).double().sum().item()
        for name, hidden_TD in others.items():
            q_CV = log_probabilities(hidden_TD[rows], head, torch.float32)
            tally = tallies[name]
            tally.kl += kl_divergence(p_CV, q_CV).tolist()
            tally.logp += q_CV.gather(1, target_C1).double().sum().item()
            tally.agreed += int((q_CV.argmax(-1) == best_C).sum())
    return total
