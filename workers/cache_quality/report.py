"""What a measurement of cache formats found: plain data, no torch."""

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from stillhouse.workers.cache_quality.formats import QualityFormat


@dataclass(frozen=True, slots=True)
class QualityFigures:
    """One format with one seed over all windows.

    bytes_per_token: allocated, windows in, without the tables, which are stored once a model.
    perplexity_change: relative. kl_mean, kl_p99: of the next token, nats. needle: of the needles
    that full precision retrieves, at lengths where it does half of them or more, the share that
    this cache gives back; None where there are no such lengths.
    """

    bytes_per_token: float
    table_bytes: int
    perplexity: float
    perplexity_change: float
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    needle: float | None


NAMES = tuple(field.name for field in fields(QualityFigures))


@dataclass(frozen=True, slots=True)
class QualityRow:
    """A format's figures, one entry a seed; `note` says why there are none."""

    form: QualityFormat
    figures: tuple[QualityFigures, ...]
    note: str | None = None

    def mean(self, name: str) -> float | None:
        """Over seeds; None where there is no figure."""
        found = self._found(name)
        return statistics.fmean(found) if found else None

    def spread(self, name: str) -> float | None:
        """Sample standard deviation over seeds; None of fewer than two."""
        found = self._found(name)
        return statistics.stdev(found) if len(found) > 1 else None

    def _found(self, name: str) -> list[float]:
        values: Iterable[float | None] = (getattr(figures, name) for figures in self.figures)
        return [value for value in values if value is not None]

    def as_json(self) -> dict[str, Any]:
        """Means over seeds under the figures' own names, deviations under `spread`."""
        head = {
            "format": self.form.name,
            "family": self.form.family,
            "calibrated": self.form.calibrated,
            "seeds": len(self.figures),
        }
        means = {name: self.mean(name) for name in NAMES}
        return {
            **head,
            **means,
            "spread": {name: self.spread(name) for name in NAMES},
            "note": self.note,
        }


@dataclass(frozen=True, slots=True)
class QualityReport:
    """All rows, and what they were measured on.

    needle_full: by length, the share that full precision retrieves.
    """

    rows: tuple[QualityRow, ...]
    windows: int
    tokens: int
    calibration_tokens: int
    perplexity: float
    needle_full: Mapping[int, float]

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        head = {
            "windows": self.windows,
            "tokens": self.tokens,
            "calibration_tokens": self.calibration_tokens,
            "perplexity": self.perplexity,
            "needle_full": {str(length): share for length, share in self.needle_full.items()},
        }
        return {**head, "rows": [row.as_json() for row in self.rows]}


def quantile(values: Iterable[float], share: float) -> float:
    """The least of the values that at least `share` of them do not exceed."""
    ranked = sorted(values)
    return ranked[max(math.ceil(share * len(ranked)) - 1, 0)]
