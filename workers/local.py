"""The workers of one process: models loaded on first use, torch imported on first use.

At most one model is in memory (two where specialist and base are both whole models): asking for
another frees the former, so stages that use one model after the other fit a small machine.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from stillhouse.configs.endpoint import EndpointConfig
from stillhouse.workers.cache_quality.job import Progress, QualityJob
from stillhouse.workers.cache_quality.report import QualityReport
from stillhouse.workers.models.refs import fingerprint
from stillhouse.workers.models.store import ModelStore, silent
from stillhouse.workers.protocols import (
    CacheBytes,
    CacheMeasure,
    CacheSpec,
    CalibrateJob,
    Completion,
    Decoding,
    ExportJob,
    Failed,
    ModelSpec,
    ModelWorker,
    Pair,
    PairLogp,
    PairWorker,
    ResponseLogp,
    ServedSpec,
    TextGenerator,
    TrainJob,
    TrainOutcome,
    TrainStep,
)

if TYPE_CHECKING:
    from stillhouse.workers.cache import CacheFactory
    from stillhouse.workers.models.language_model import LanguageModel, TextCodec


class LocalWorkers:
    """Implements `Workers`; `notify` hears of slow preparations.

    `threads` 0 means OMP_NUM_THREADS, else all cores.
    """

    def __init__(
        self, cache_root: Path, threads: int = 0, notify: Callable[[str], None] = silent
    ) -> None:
        self._cache_root = cache_root
        self._notify = notify
        self._models = _LoadedModels(ModelStore(cache_root, notify), threads)

    def pair(self, specialist: ModelSpec, base: ModelSpec) -> PairWorker:
        """Specialist and base; one set of weights when their refs are equal."""
        return _LocalPair(self._models, specialist, base)

    def model(self, spec: ModelSpec) -> ModelWorker:
        """One model."""
        return _LocalModel(self._models, spec)

    def endpoint(self, config: EndpointConfig, spending: Path) -> TextGenerator:
        """A server that writes text; `spending` is the file that says what was paid so far."""
        from stillhouse.workers.endpoint import EndpointModel

        return EndpointModel(config, spending)

    def count_tokens(self, ref: str, texts: Sequence[str]) -> list[int]:
        """Tokens of each text under a model's tokenizer, BOS included."""
        if not texts:
            return []  # no tokenizer is loaded for nothing
        return [len(ids) for ids in self._models.codec(ref).encode_prompts(texts)]

    def train(self, job: TrainJob, on_step: Callable[[TrainStep, int], None]) -> TrainOutcome:
        """Train; a job that ran to its end before answers from its record, without torch."""
        from stillhouse.workers.training_record import finished_outcome

        if (done := finished_outcome(job)) is not None:
            return done
        (lm,) = self._models.get(job.model)
        from stillhouse.workers.trainer import train

        try:
            return train(lm, job, on_step, self._notify)
        finally:
            self._models.free()  # the trainer changed its layers

    def calibrate(self, job: CalibrateJob) -> int:
        """Write a cache plan; the number of tokens that went through the model."""
        (lm,) = self._models.get(job.model)
        from stillhouse.workers.calibrator import write_plan

        return write_plan(lm, job, self._notify)

    def measure_cache(
        self, spec: ModelSpec, texts: Sequence[str], cache: CacheSpec
    ) -> tuple[list[CacheMeasure | Failed], CacheBytes]:
        """Compare the compressed cache with the 16-bit one on held-out texts."""
        (lm,) = self._models.get(spec)
        from stillhouse.workers.divergence import measure_cache

        return measure_cache(lm, texts, cache.config, cache.plan)

    def bench_cache(self, spec: ModelSpec, job: QualityJob, progress: Progress) -> QualityReport:
        """Measure cache formats beside each other."""
        (lm,) = self._models.get(spec)
        from stillhouse.workers.cache_quality.bench import bench

        return bench(lm, job, progress)

    def export(self, job: ExportJob) -> tuple[Path, ...]:
        """Write a standalone model folder; return its files."""
        (lm,) = self._models.get(job.model)
        from stillhouse.workers.exporter import export

        try:
            return export(lm, job)
        finally:
            self._models.free()  # the exporter merged and cast its weights

    @contextmanager
    def serve(self, spec: ServedSpec) -> Iterator[ModelWorker]:
        """A model behind an inference server, stopped at the end; it answers over HTTP."""
        self._models.free()
        from stillhouse.workers.serving.http_model import HttpModel
        from stillhouse.workers.serving.local_server import local_job
        from stillhouse.workers.serving.server import ServerProcess

        job = local_job(spec)
        server = ServerProcess(job, spec.log)
        self._notify(f"serving {spec.folder.name} with the cache {spec.cache}: {spec.log}")
        try:
            server.wait_until_ready()
            yield HttpModel(job, self._models.codec(str(spec.folder)))
        finally:
            server.stop()

    def fingerprint(self, ref: str) -> str:
        """A hash of a model's files, without loading them (no torch)."""
        return fingerprint(ref, self._cache_root)


class _LocalPair:
    """Implements `PairWorker`; an adapter on the base's own weights is switched on and off."""

    def __init__(self, models: "_LoadedModels", specialist: ModelSpec, base: ModelSpec):
        self._models = models
        self._specialist = specialist
        self._base = base

    def answer(self, prompts: Sequence[str], how: Decoding) -> list[Completion | Failed]:
        """The specialist's answers."""
        specialist, _ = self._loaded()
        from stillhouse.workers.generator import generate

        return generate(specialist, prompts, how)

    def propose(self, prompts: Sequence[str], how: Decoding) -> list[Completion | Failed]:
        """The base's continuations."""
        specialist, base = self._loaded()
        from stillhouse.workers.generator import generate
        from stillhouse.workers.scorer import acting_as_base

        with acting_as_base(specialist, base):
            return generate(base, prompts, how)

    def score(self, pairs: Sequence[Pair], batch_size: int) -> list[PairLogp | Failed]:
        """Both models' log-probabilities of the responses."""
        specialist, base = self._loaded()
        from stillhouse.workers.scorer import pair_logps

        return pair_logps(specialist, base, pairs, batch_size)

    def _loaded(self) -> "tuple[LanguageModel, LanguageModel]":
        if self._specialist.ref == self._base.ref and self._base.adapter is None:
            (both,) = self._models.get(self._specialist)
            return both, both
        specialist, base = self._models.get(self._specialist, self._base)
        return specialist, base


class _LocalModel:
    """Implements `ModelWorker`."""

    def __init__(self, models: "_LoadedModels", spec: ModelSpec):
        self._models = models
        self._spec = spec

    def answer(
        self, prompts: Sequence[str], how: Decoding, cache: CacheSpec | None = None
    ) -> list[Completion | Failed]:
        """The model's answers."""
        (lm,) = self._models.get(self._spec)
        from stillhouse.workers.generator import generate

        return generate(lm, prompts, how, _cache_factory(lm, cache))

    def logp(
        self, pairs: Sequence[Pair], batch_size: int, cache: CacheSpec | None = None
    ) -> list[ResponseLogp | Failed]:
        """The model's log-probabilities of the responses."""
        (lm,) = self._models.get(self._spec)
        from stillhouse.workers.scorer import response_logps

        return response_logps(lm, pairs, batch_size, _cache_factory(lm, cache))


class _LoadedModels:
    """The models in memory: those that the last caller asked for, and no others."""

    def __init__(self, store: ModelStore, threads: int):
        self._store = store
        self._threads = threads
        self._device: str | None = None
        self._loaded: dict[ModelSpec, LanguageModel] = {}
        self._codecs: dict[str, TextCodec] = {}

    def get(self, *specs: ModelSpec) -> "list[LanguageModel]":
        """These models, loaded; every other one is freed first."""
        if any(spec not in specs for spec in self._loaded):
            self._loaded = {spec: lm for spec, lm in self._loaded.items() if spec in specs}
            gc.collect()  # models hold cycles: without it the old weights outlive the new load
        device = self._prepared_device()
        from stillhouse.workers.models.language_model import load

        for spec in specs:
            if spec not in self._loaded:
                self._loaded[spec] = load(self._store, spec, device)
        return [self._loaded[spec] for spec in specs]

    def free(self) -> None:
        """Forget every model."""
        self._loaded = {}
        gc.collect()

    def codec(self, ref: str) -> "TextCodec":
        """A model's tokenizer, without its weights."""
        if ref not in self._codecs:
            _silence_progress_bars()
            from stillhouse.workers.models.language_model import load_codec

            self._codecs[ref] = load_codec(self._store, ref)
        return self._codecs[ref]

    def _prepared_device(self) -> str:
        """Set the process up for torch once; the device to load on."""
        if self._device is None:
            from stillhouse.workers.device import prepare_device

            _silence_progress_bars()
            self._device = prepare_device(self._threads)
        return self._device


def _silence_progress_bars() -> None:
    """The run has a display of its own; two on one terminal garble each other."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _cache_factory(lm: "LanguageModel", cache: CacheSpec | None) -> "CacheFactory | None":
    if cache is None:
        return None
    from stillhouse.workers.divergence import compressed_cache_factory

    return compressed_cache_factory(lm, cache.config, cache.plan)
