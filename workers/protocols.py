"""What the pipelines ask of a worker, and the records that pass between them.

Plain data in, plain data out: no tensors, no framework types, so a worker may live in this
process, in an actor or on another machine. `workers.local` is the real one; `workers.scripted`
answers from a script, for tests.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from stillhouse.configs.endpoint import EndpointConfig
from stillhouse.configs.stages import CompressConfig, TrainConfig


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model reference and, where it has one, the folder of its LoRA adapter."""

    ref: str
    adapter: Path | None = None


@dataclass(frozen=True, slots=True)
class Decoding:
    """How text is generated. `temperature` 0 is greedy; `stop` strings end an answer."""

    max_new_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    seed: int = 0
    batch_size: int = 32


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer, without its stop string and surrounding white space."""

    text: str
    finish: Literal["stop", "length"]
    tokens: int  # generated
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Pair:
    """A rendered prompt and the rendered response that follows it."""

    prompt: str
    response: str


@dataclass(frozen=True, slots=True)
class ResponseLogp:
    """Log-probability (nats) of each token of a response given its prompt; no EOS."""

    token_ids: list[int]
    logp: list[float]
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class PairLogp:
    """One response under specialist and base; every list has one entry a token.

    token_ends: where each ends in the response, in characters; a character of several tokens ends
    with the first of them. Empty where the tokenizer cannot tell.
    """

    token_ids: list[int]
    token_ends: list[int]
    logp_specialist: list[float]
    logp_base: list[float]
    prompt_tokens: int


NOT_STORABLE = "not_storable"  # how a Failed's reason begins where a cache cannot hold its vectors


@dataclass(frozen=True, slots=True)
class Failed:
    """A row a worker could not process, and why; it takes the row's place in the answer."""

    reason: str


class TextGenerator(Protocol):
    """Whatever continues prompts: a base model in this process, an endpoint elsewhere."""

    def propose(self, prompts: Sequence[str], how: Decoding) -> list[Completion | Failed]:
        """Continuations, in the order of the prompts."""


class PairWorker(Protocol):
    """Specialist and base, over one set of weights where the specialist is an adapter."""

    def answer(self, prompts: Sequence[str], how: Decoding) -> list[Completion | Failed]:
        """The specialist's answers."""

    def propose(self, prompts: Sequence[str], how: Decoding) -> list[Completion | Failed]:
        """The base's continuations."""

    def score(self, pairs: Sequence[Pair], batch_size: int) -> list[PairLogp | Failed]:
        """Both models' log-probabilities of the responses."""


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """How a key/value cache is stored; `plan` is the folder of what was fitted to the model."""

    config: CompressConfig
    plan: Path | None = None


class ModelWorker(Protocol):
    """One model; with `cache`, its key/value cache is stored in that format."""

    def answer(
        self, prompts: Sequence[str], how: Decoding, cache: CacheSpec | None = None
    ) -> list[Completion | Failed]:
        """The model's answers."""

    def logp(
        self, pairs: Sequence[Pair], batch_size: int, cache: CacheSpec | None = None
    ) -> list[ResponseLogp | Failed]:
        """The model's log-probabilities of the responses."""


@dataclass(frozen=True, slots=True)
class TrainExample:
    """A rendered prompt and the rendered response to learn.

    token_ends and excess: how much more specialist than base believes each piece of the response
    (nats), and where it ends, in characters; empty where nobody measured it.
    """

    example_id: str
    prompt: str
    response: str
    token_ends: Sequence[int] = ()
    excess: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class TrainStep:
    """One optimizer step; loss in nats per response token."""

    step: int
    epoch: int
    loss: float
    learning_rate: float
    gradient_norm: float
    response_tokens: int
    tokens: int


@dataclass(frozen=True, slots=True)
class TrainJob:
    """What to train, and where its checkpoints and its adapter go.

    `folder/checkpoints/step_N` are written on the way, `folder/adapter` at the end; a job that
    finds checkpoints goes on from the last good one.
    """

    model: ModelSpec
    examples: Sequence[TrainExample]
    config: TrainConfig
    folder: Path


@dataclass(frozen=True, slots=True)
class TrainOutcome:
    """The adapter's folder, every step from the first, and why examples were left out."""

    adapter: Path
    steps: tuple[TrainStep, ...]
    tokens: dict[str, int]  # by example_id
    rejected: dict[str, str]  # example_id -> reason


@dataclass(frozen=True, slots=True)
class CacheMeasure:
    """Next-token divergence over one text, full cache against compressed; nats."""

    tokens: int
    kl_mean: float
    kl_max: float
    logp_full: float
    logp_compressed: float


@dataclass(frozen=True, slots=True)
class CacheBytes:
    """Bytes of cache a token, allocated, windows in; the same in 16 bits; and the codecs' tables.

    Tables are stored once a model, however many sequences and tokens there are.
    """

    bytes_per_token: float
    bytes_per_token_16bit: float
    table_bytes: int


@dataclass(frozen=True, slots=True)
class CalibrateJob:
    """Fit a cache to the model on these texts and write its plan to `folder`."""

    model: ModelSpec
    texts: Sequence[str]
    config: CompressConfig
    folder: Path


@dataclass(frozen=True, slots=True)
class ExportJob:
    """Merge the adapter into the model and write it as safetensors with its tokenizer.

    cache_plan: the folder of a plan, which goes with the weights, in a folder of its own.
    """

    model: ModelSpec
    folder: Path
    dtype: str
    manifest: dict[str, object]  # written as stillhouse.json beside the weights
    cache_plan: Path | None = None


@dataclass(frozen=True, slots=True)
class ServedSpec:
    """An exported model behind a server of its own. cache: plan, kAvB, fp8 or bf16, with the first
    `sinks` tokens in 16 bits where it is not a plan's; context: tokens of a request at most."""

    folder: Path
    cache: str
    dtype: str
    context: int
    log: Path
    sinks: int = 0


class Workers(Protocol):
    """The workers of a run. Loading is lazy: asking for one costs nothing until it works."""

    def pair(self, specialist: ModelSpec, base: ModelSpec) -> PairWorker:
        """Specialist and base; one set of weights when their refs are equal."""

    def model(self, spec: ModelSpec) -> ModelWorker:
        """One model."""

    def endpoint(self, config: EndpointConfig, spending: Path) -> TextGenerator:
        """A server that writes text; `spending` is the file that says what was paid so far."""

    def count_tokens(self, ref: str, texts: Sequence[str]) -> list[int]:
        """Tokens of each text under a model's tokenizer, BOS included."""

    def train(self, job: TrainJob, on_step: Callable[[TrainStep, int], None]) -> TrainOutcome:
        """Train; `on_step` hears of each new step and the number of steps in all."""

    def calibrate(self, job: CalibrateJob) -> int:
        """Write a cache plan; the number of tokens that went through the model."""

    def measure_cache(
        self, spec: ModelSpec, texts: Sequence[str], cache: CacheSpec
    ) -> tuple[list[CacheMeasure | Failed], CacheBytes]:
        """Compare the compressed cache with the 16-bit one on held-out texts."""

    def export(self, job: ExportJob) -> tuple[Path, ...]:
        """Write a standalone model folder; return its files."""

    def serve(self, spec: ServedSpec) -> AbstractContextManager[ModelWorker]:
        """A model behind an inference server, stopped at the end; it answers over HTTP."""

    def fingerprint(self, ref: str) -> str:
        """A hash of a model's files, without loading them (no torch)."""
