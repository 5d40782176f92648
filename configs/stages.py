"""One section for each stage, of the stage's name."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from stillhouse.configs.base import Config, knob

# An empty one would end every answer before it begins.
StopStrings = tuple[Annotated[str, Field(min_length=1)], ...]


class LoraConfig(Config):
    """Low-rank adapters (Hu et al., arXiv:2106.09685) on the linear layers named by `targets`."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    targets: Literal["all_linear", "attention"] = "all_linear"
    first_layer: int = Field(0, ge=0)  # layers below it stay frozen and need no backward pass


class TrainConfig(Config):
    """Supervised training on the answers' tokens."""

    lora: LoraConfig = LoraConfig()
    learning_rate: float = Field(1e-3, gt=0)
    warmup_fraction: float = Field(0.05, ge=0, le=0.5)
    epochs: int = Field(3, ge=1)
    batch_size: int = Field(16, ge=1)
    max_tokens: int = Field(256, ge=8)
    max_gradient_norm: float = Field(1.0, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    seed: int = 0
    checkpoint_steps: int = knob(25, ge=1)
    keep_checkpoints: int = knob(2, ge=1)


class SpecializeConfig(TrainConfig):
    """Trains the specialist's adapter on private pairs (demos and benchmarks)."""


class DistillConfig(TrainConfig):
    """Trains the target on the corpus.

    `token_share` < 1 trains on that share of each answer's tokens, those with the largest excess
    log p_specialist - log p_base (TiTok, arXiv:2510.04682), and on its end.
    """

    token_share: float = Field(1.0, gt=0, le=1)


class ScoreConfig(Config):
    """The specialist answers; specialist and base score the answer, and with `target` it too."""

    max_new_tokens: int = Field(16, ge=1)
    target: bool = False  # for the signal `target_weakness`
    stop: StopStrings = ("\n",)
    batch_size: int = knob(32, ge=1)


class CurateConfig(Config):
    """What leaves the corpus: duplicates, degenerate answers, overlap with the evaluation.

    `evaluation_overlap`: a prompt goes whose words have this ROUGE-L (Lin 2004, F-measure) with an
    evaluation question's, or more. 0.7 is usual for free text (Self-Instruct, arXiv:2212.10560,
    §2.2); texts of one template reach it with other facts in them. None: near-duplicates alone.
    """

    near_duplicate: float = Field(0.9, gt=0, le=1)  # Jaccard of word 5-grams by MinHash
    evaluation_overlap: float | None = Field(0.9, gt=0, le=1)
    min_answer_tokens: int = Field(1, ge=1)
    max_repetition: float = Field(0.5, gt=0, le=1)  # share of an answer's token 4-grams seen before
    personal_data: Literal["flag", "reject"] = "flag"  # e-mail addresses, phone numbers and such
    permutations: int = Field(64, ge=16)


class GateConfig(Config):
    """What the student must reach to be promoted to `champion`; without a threshold, nobody is."""

    min_recovery: float | None = None
    min_accuracy: float | None = Field(None, ge=0, le=1)


class EvaluateConfig(Config):
    """Exact match and answer perplexity on the held-out questions, one arm a model."""

    arms: tuple[Literal["base", "specialist", "target_before", "student", "ceiling"], ...] = (
        "base",
        "specialist",
        "target_before",
        "student",
    )
    max_new_tokens: int = Field(16, ge=1)
    stop: StopStrings = ("\n",)
    gate: GateConfig = GateConfig()
    batch_size: int = knob(32, ge=1)


class CompressConfig(Config):
    """The student's key/value cache: TurboQuant (arXiv:2504.19874), fitted to the student.

    The fitted cache shares the bytes of `key_bits` and `value_bits` out anew, over layers, keys,
    values and channels, as they are in sequences of `context` tokens; with `budget_kl` it takes
    the fewest bits that keep to that; with `even_layers` every layer keeps its own bytes. With 1 of
    `channel_groups` a head's coded channels have the same 2, 3 or 4 bits, which costs quality and
    is what the kernels of a GPU read (head sizes 64, 80, … 256). Without `calibrate`, without a
    corpus, and at 8 bits every layer has the paper's Algorithm 1 with these bits and scalars.
    """

    calibrate: bool = True
    calibration_tokens: int = Field(8192, ge=64)  # of the corpus' training part, and spans again
    context: int | None = Field(None, ge=1)  # None: as long as the corpus' texts
    channel_groups: Literal[1, 3] = 3  # at most; 1: what the kernels of a GPU read
    key_bits: Literal[1, 2, 3, 4, 5, 8] = 4
    value_bits: Literal[1, 2, 3, 4, 5, 8] = 4
    key_scalar: Literal["norm", "corrected", "unbiased", "least_squares"] = "unbiased"
    value_scalar: Literal["norm", "corrected", "unbiased", "least_squares"] = "least_squares"
    even_layers: bool = False  # equal bytes in every layer, as a paged server's blocks have them
    sinks: int = Field(4, ge=0)  # first tokens of a sequence, kept in 16 bits
    recent: int = Field(0, ge=0)  # last tokens of a sequence, kept in 16 bits
    seed: int = 0
    texts: int = Field(64, ge=1)  # held-out texts whose next-token divergence is measured
    budget_kl: float | None = Field(None, gt=0)  # nats a token, on training texts kept apart
    max_kl: float | None = Field(0.25, gt=0)  # gate, nats a token, on held-out texts

    @property
    def is_served_unfitted(self) -> bool:
        """Whether servers have the codec of these bits, scalars and seed, nothing fitted."""
        scalars = (self.key_scalar, self.value_scalar, self.seed)
        return self.has_served_form and scalars == ("unbiased", "least_squares", 0)

    @property
    def has_served_form(self) -> bool:
        """Whether servers have caches of so many bits, and of such windows."""
        return max(self.key_bits, self.value_bits) <= 5 and not self.recent

    @model_validator(mode="after")
    def _one_group_is_of_a_fitted_cache(self) -> Self:
        bits = (self.key_bits, self.value_bits)
        if self.channel_groups == 1 and not (self.calibrate and set(bits) <= {2, 3, 4}):
            raise ValueError(
                "compress.channel_groups: one channel group is of a calibrated cache with 2, 3 or "
                f"4 bits, found calibrate={self.calibrate}, key_bits={bits[0]}, "
                f"value_bits={bits[1]}"
            )
        return self


class DeployConfig(Config):
    """The exported student and its name in the registry."""

    model_name: str = Field("stillhouse-student", pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]*$")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    engine: Literal["transformers", "vllm"] = "transformers"  # vllm: a served copy is asked, too
    questions: int = Field(64, ge=1)  # answered again by the reloaded copy
    max_mismatch: float = Field(0.02, ge=0, le=1)  # share of answers that may differ
    batch_size: int = knob(32, ge=1)
