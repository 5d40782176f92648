"""Workers that answer from a script: strict, deterministic, without torch."""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from stillhouse.configs.endpoint import EndpointConfig
from stillhouse.storage.integrity import sha256_of
from stillhouse.workers.folders import atomic_folder, write_json
from stillhouse.workers.models.model_folder import MANIFEST
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
from stillhouse.workers.schedule import learning_rate, steps_per_epoch
from stillhouse.workers.training_record import finished_outcome, job_key, write_record

Answer = str | Failed
Answers = Mapping[str, Answer] | Callable[[str], Answer]


class UnscriptedError(AssertionError):
    """A worker was asked what its script does not answer: the test or the pipeline is wrong."""


@dataclass(frozen=True, slots=True)
class Script:
    """What one model says and believes.

    `answers`: prompt -> text, or Failed; a prompt not in it is an error. `logp`: pair -> the
    log-probability of each token of its response; without it a hash of both decides.
    """

    answers: Answers
    logp: Callable[[Pair], float] | None = None


@dataclass(slots=True)
class ScriptedWorkers:
    """Implements `Workers`. `scripts`: by model reference, or by reference and `#adapter`.

    A token is a word. `calls` counts the rows that each method was given, for tests of resume.
    """

    scripts: Mapping[str, Script]
    calls: dict[str, int] = field(default_factory=dict)

    def pair(self, specialist: ModelSpec, base: ModelSpec) -> PairWorker:
        """Specialist and base, each with a script of its own."""
        return _ScriptedPair(self._model(specialist), self._model(base))

    def model(self, spec: ModelSpec) -> ModelWorker:
        """One model."""
        return self._model(spec)

    def endpoint(self, config: EndpointConfig, spending: Path) -> TextGenerator:
        """The script named as the endpoint's model."""
        self.count("endpoint", 1)
        return _ScriptedPair(*[self._model(ModelSpec(config.model))] * 2)

    def count_tokens(self, ref: str, texts: Sequence[str]) -> list[int]:
        """Words, and one for BOS."""
        self.count("count_tokens", len(texts))
        return [len(text.split()) + 1 for text in texts]

    def train(self, job: TrainJob, on_step: Callable[[TrainStep, int], None]) -> TrainOutcome:
        """Invent a falling loss; write an adapter folder without weights, and its record."""
        if (done := finished_outcome(job)) is not None:
            return done
        self.count("train", len(job.examples))
        rejected = {e.example_id: "empty_response" for e in job.examples if not e.response.strip()}
        tokens = {e.example_id: len(f"{e.prompt} {e.response}".split()) for e in job.examples}
        steps = _invented_steps(job, len(job.examples) - len(rejected))
        for step in steps:
            on_step(step, len(steps))
        outcome = TrainOutcome(job.folder / "adapter", steps, tokens, rejected)
        with atomic_folder(outcome.adapter) as folder:
            write_json(folder / "adapter_config.json", {"base_model_name_or_path": job.model.ref})
            write_record(folder, job_key(job), outcome)
        return outcome

    def calibrate(self, job: CalibrateJob) -> int:
        """Write a plan's JSON; no tensors."""
        self.count("calibrate", len(job.texts))
        job.folder.mkdir(parents=True, exist_ok=True)
        write_json(job.folder / "cache_plan.json", {"facts": {"expected_kl": 0.0}})
        return sum(len(text.split()) for text in job.texts)

    def measure_cache(
        self, spec: ModelSpec, texts: Sequence[str], cache: CacheSpec
    ) -> tuple[list[CacheMeasure | Failed], CacheBytes]:
        """A divergence that halves with each bit."""
        self.count("measure_cache", len(texts))
        config = cache.config
        kl = 2.0 ** -(config.key_bits + config.value_bits)
        bits = (config.key_bits + config.value_bits) / 2
        return [_invented_measure(text, kl) for text in texts], CacheBytes(64 * bits, 64 * 16.0, 0)

    def export(self, job: ExportJob) -> tuple[Path, ...]:
        """Write a folder with a configuration and the manifest; no weights."""
        self.count("export", 1)
        with atomic_folder(job.folder, seal=False) as folder:
            write_json(folder / "config.json", {"model": job.model.ref, "dtype": job.dtype})
            files = {"config.json": sha256_of(folder / "config.json")}
            write_json(folder / MANIFEST, {**job.manifest, "files": files})
        return tuple(sorted(path for path in job.folder.iterdir()))

    @contextmanager
    def serve(self, spec: ServedSpec) -> Iterator[ModelWorker]:
        """The script named `served`."""
        self.count("serve", 1)
        yield self.model(ModelSpec("served"))

    def fingerprint(self, ref: str) -> str:
        """A hash of the reference."""
        return hashlib.sha256(ref.encode()).hexdigest()

    def count(self, method: str, rows: int) -> None:
        """Note that `method` was given `rows` rows."""
        self.calls[method] = self.calls.get(method, 0) + rows

    def _model(self, spec: ModelSpec) -> "_ScriptedModel":
        names = [spec.ref] if spec.adapter is None else [f"{spec.ref}#adapter", spec.ref]
        for name in names:
            if name in self.scripts:
                return _ScriptedModel(self, name, self.scripts[name])
        raise UnscriptedError(f"expected a script for one of {names}, found {sorted(self.scripts)}")


@dataclass(frozen=True, slots=True)
class _ScriptedModel:
    """Implements `ModelWorker`."""

    workers: ScriptedWorkers
    name: str
    script: Script

    def answer(
        self, prompts: Sequence[str], how: Decoding, cache: CacheSpec | None = None
    ) -> list[Completion | Failed]:
        """The scripted answers; the cache changes nothing."""
        self.workers.count("answer", len(prompts))
        return [self._answer(prompt, how) for prompt in prompts]

    def logp(
        self, pairs: Sequence[Pair], batch_size: int, cache: CacheSpec | None = None
    ) -> list[ResponseLogp | Failed]:
        """One log-probability, the same for each word of a response."""
        self.workers.count("logp", len(pairs))
        return [self._logp(pair) for pair in pairs]

    def _answer(self, prompt: str, how: Decoding) -> Completion | Failed:
        answers = self.script.answers
        said = answers(prompt) if callable(answers) else answers.get(prompt)
        if said is None:
            raise UnscriptedError(f"{self.name}: no answer in the script to {prompt!r}")
        if isinstance(said, Failed):
            return said
        cut = min((at for mark in how.stop if (at := said.find(mark)) >= 0), default=len(said))
        words = said[:cut].split(" ")
        kept = words[: how.max_new_tokens]
        ended = len(words) == len(kept)
        finish: Literal["stop", "length"] = "stop" if ended else "length"
        return Completion(" ".join(kept).strip(), finish, len(kept), len(prompt.split()))

    def _logp(self, pair: Pair) -> ResponseLogp | Failed:
        words = pair.response.split()
        if not words:
            return Failed("empty_response: no token to score")
        value = self._invented_logp(pair) if self.script.logp is None else self.script.logp(pair)
        token_ids = [_hash(word) % 50_000 for word in words]
        return ResponseLogp(token_ids, [value] * len(words), len(pair.prompt.split()))

    def _invented_logp(self, pair: Pair) -> float:
        return -(1 + _hash(f"{self.name}\x1f{pair.prompt}\x1f{pair.response}") % 1000) / 250


@dataclass(frozen=True, slots=True)
class _ScriptedPair:
    """Implements `PairWorker`."""

    specialist: _ScriptedModel
    base: _ScriptedModel

    def answer(self, prompts: Sequence[str], how: Decoding) -> list[Completion | Failed]:
        """The specialist's script."""
        return self.specialist.answer(prompts, how)

    def propose(self, prompts: Sequence[str], how: Decoding) -> list[Completion | Failed]:
        """The base's script."""
        return self.base.answer(prompts, how)

    def score(self, pairs: Sequence[Pair], batch_size: int) -> list[PairLogp | Failed]:
        """Both scripts' log-probabilities."""
        both = zip(
            self.specialist.logp(pairs, batch_size), self.base.logp(pairs, batch_size), strict=True
        )
        return [
            PairLogp(on.token_ids, _word_ends(pair.response), on.logp, off.logp, on.prompt_tokens)
            if isinstance(on, ResponseLogp) and isinstance(off, ResponseLogp)
            else Failed("empty_response: no token to score")
            for pair, (on, off) in zip(pairs, both, strict=True)
        ]


def _word_ends(text: str) -> list[int]:
    return [match.end() for match in re.finditer(r"\S+", text)]


def _invented_steps(job: TrainJob, examples: int) -> tuple[TrainStep, ...]:
    config = job.config
    per_epoch = steps_per_epoch(examples, config.batch_size)
    total = per_epoch * config.epochs
    return tuple(
        TrainStep(
            step=step,
            epoch=(step - 1) // per_epoch,
            loss=4.0 / step,
            learning_rate=learning_rate(step, total, config.learning_rate, config.warmup_fraction),
            gradient_norm=1.0,
            response_tokens=config.batch_size,
            tokens=config.batch_size * 8,
        )
        for step in range(1, total + 1)
    )


def _invented_measure(text: str, kl: float) -> CacheMeasure | Failed:
    tokens = len(text.split())
    if tokens == 0:
        return Failed("too_short: expected at least 2 tokens, found 1")
    return CacheMeasure(tokens, kl, 2 * kl, -2.0 * tokens, -(2.0 + kl) * tokens)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
