"""What is asked of a measurement of cache formats; no torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stillhouse.workers.cache_quality.formats import QualityFormat

Progress = Callable[[str, int, int], None]  # what is done now, how much is done, of how much


@dataclass(frozen=True, slots=True)
class QualityJob:
    """What to measure, and on what.

    heldout, calibration: texts, none in both. tokens: about so many to measure on, in whole
    windows. calibration_tokens: to calibrate on, about half of them read a second time.
    window: tokens that are read at once, at most the model's context. seeds: 0 … seeds - 1 for
    formats that draw; sinks, recent: tokens that ours keep in 16 bits.
    """

    heldout: Sequence[str]
    calibration: Sequence[str]
    formats: Sequence[QualityFormat]
    seeds: int = 1
    window: int = 1024
    tokens: int = 8192
    calibration_tokens: int = 16384
    sinks: int = 4
    recent: int = 0
