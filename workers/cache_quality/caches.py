"""From a format's name to empty caches of that format.

Shape suffixes as in `workers.cache`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import Cache, PreTrainedConfig

from stillhouse.kernels.turboquant import (
    Fp8Codec,
    HalfCodec,
    MseCodec,
    PolarCodec,
    ProdCodec,
    ScalarKind,
    SplitCodec,
    VectorCodec,
)
from stillhouse.workers.cache import (
    CacheKind,
    CacheScheme,
    FittedScheme,
    SameCodecScheme,
    TurboQuantCache,
    VllmScheme,
)
from stillhouse.workers.cache.vllm_presets import BOUNDARY_LAYERS
from stillhouse.workers.cache_quality.formats import QualityFormat
from stillhouse.workers.calibrator import Calibration


class SizedCache(Protocol):
    """A transformers Cache that knows its bytes."""

    @property
    def nbytes(self) -> int:
        """Allocated; with the tables where there are any."""
        ...

    @property
    def table_nbytes(self) -> int:
        """Of tables that all caches of a model share."""
        ...


MakeCache = Callable[[], Cache]


@dataclass(frozen=True, slots=True)
class CacheSource:
    """What the caches of a model are made of: windows in 16 bits, seed, calibration if any."""

    config: PreTrainedConfig
    sinks: int
    recent: int
    seed: int
    calibration: Calibration | None

    def maker(self, form: QualityFormat) -> MakeCache:
        """Makes empty caches of a format, which share its tables.

        ImportError when a peer's package is missing; ValueError when the model cannot have it.
        """
        if form.family in ("quanto", "hqq"):
            return self._peer(form)
        scheme = self._scheme(form)
        return lambda: TurboQuantCache(self.config, scheme)

    def _peer(self, form: QualityFormat) -> MakeCache:
        from stillhouse.workers.cache_quality.peers import ReadBackCache

        bits = int(_bits(form)[0])
        ReadBackCache(form.family, self.config, bits)  # what is wrong shows now
        return lambda: ReadBackCache(form.family, self.config, bits)

    def _scheme(self, form: QualityFormat) -> CacheScheme:
        if form.preset is not None:
            layers = self.config.get_text_config(decoder=True).num_hidden_layers
            return VllmScheme(form.preset, layers, 0 if form.all_layers else BOUNDARY_LAYERS)
        if form.calibrated:
            if self.calibration is None:
                raise ValueError(f"expected a calibration for {form.name}, found none")
            return FittedScheme(self.calibration.plan_of_bits(_bits(form)[0]))
        windows = (self.sinks, self.recent) if form.seeded else (0, 0)
        return SameCodecScheme(_codecs(form, self.seed), *windows)


def _bits(form: QualityFormat) -> tuple[float, float]:
    if form.bits is None:
        raise ValueError(f"expected bits in the name of a format, found {form.name}")
    return form.bits


def _codecs(
    form: QualityFormat, seed: int
) -> Callable[[int, CacheKind, torch.device], VectorCodec]:
    def make(dim: int, kind: CacheKind, device: torch.device) -> VectorCodec:
        if form.family == "bf16":
            return HalfCodec(dim, torch.bfloat16)
        if form.family == "fp8":
            return Fp8Codec(dim, device=device)
        if form.family == "polar":
            return PolarCodec(dim, seed, device=device)
        bits = _bits(form)[kind == "value"]
        if form.family == "prod" and kind == "key":
            return ProdCodec(dim, int(bits), seed=seed, device=device)
        scalar: ScalarKind = "unbiased" if kind == "key" else "least_squares"
        if bits != int(bits):
            return SplitCodec(dim, int(bits) + 1, int(bits), scalar, seed, device=device)
        return MseCodec(dim, int(bits), scalar, seed, device=device)

    return make
