"""What is known, one frozen record a row; each table's columns are declared here and only here.

A record's annotations are its schema: `storage.schema` renders the Arrow schema from them.
Ids are derived from content (`content_id`), so the same row made twice has the same id.
Every table that decides something carries `status` and `reason`: `kept`, `rejected` (a rule said
no) or `failed` (it could not be processed); `in == kept + rejected + failed` holds in each stage.
"""

import hashlib
from dataclasses import dataclass
from typing import ClassVar, Literal

Status = Literal["kept", "rejected", "failed"]
Split = Literal["train", "heldout"]
Role = Literal["seed", "pool", "control", "generated"]


def content_id(kind: str, *parts: str) -> str:
    """Return the id of `parts`: `kind`, an underscore and 20 hex digits (80 bits) of SHA-256."""
    digest = hashlib.sha256("\x1f".join((kind, *parts)).encode()).hexdigest()
    return f"{kind}_{digest[:20]}"


@dataclass(frozen=True, slots=True)
class Record:
    """A row of a table; `TABLE` is the table's name."""

    TABLE: ClassVar[str] = ""


@dataclass(frozen=True, slots=True)
class RawRecord(Record):
    """A row as read from a source or proposed by a generator, before duplicates are known."""

    TABLE: ClassVar[str] = "raw"
    kind: Literal["seed", "pool", "control", "question", "generated"]
    source: int  # position of the source in the recipe; of a proposal, its round
    row: int
    text: str  # whitespace-normalised
    rendered: str
    origin: str
    reference: str | None
    parent_id: str | None
    locator: str
    status: Status
    reason: str | None


@dataclass(frozen=True, slots=True)
class PromptRecord(Record):
    """A prompt: read by `ingest` (round 0) or made by `expand` (round 1 and up).

    A seed is known to be of the speciality, a control not to be: it is scored, never selected.
    """

    TABLE: ClassVar[str] = "prompts"
    prompt_id: str
    text: str  # as read, whitespace-normalised, before the template
    rendered: str  # what the model sees
    origin: str  # the recipe's label of the source it came from
    role: Role
    split: Split
    round: int
    parent_id: str | None  # the prompt a generator made this one from
    locator: str  # source and line, or generator and index
    status: Status
    reason: str | None


@dataclass(frozen=True, slots=True)
class QuestionRecord(Record):
    """A held-out evaluation item; never trained on, never shown to a generator."""

    TABLE: ClassVar[str] = "questions"
    question_id: str
    text: str
    rendered: str
    reference: str
    locator: str
    status: Status
    reason: str | None


@dataclass(frozen=True, slots=True)
class CompletionRecord(Record):
    """The specialist's answer to a prompt."""

    TABLE: ClassVar[str] = "completions"
    completion_id: str
    prompt_id: str
    text: str
    finish: str  # "stop" or "length"
    round: int


@dataclass(frozen=True, slots=True)
class ScoreRecord(Record):
    """Per-token log-probabilities (nats) of one answer under specialist and base.

    `gap` is their mean difference, log(PPL_base / PPL_specialist) (TuneShift-KD, §3);
    `confidence` the specialist's mean log-probability. Lists have one entry a response token;
    `token_ends` is where it ends in the rendered response, in characters.
    """

    TABLE: ClassVar[str] = "scores"
    completion_id: str | None  # none where the specialist gave no answer
    prompt_id: str
    round: int
    prompt_tokens: int | None
    token_ids: list[int] | None
    token_ends: list[int] | None
    logp_specialist: list[float] | None
    logp_base: list[float] | None
    gap: float | None
    confidence: float | None
    status: Status
    reason: str | None


@dataclass(frozen=True, slots=True)
class TargetScoreRecord(Record):
    """What the target thinks of one answer before it learns: its mean log-probability, nats."""

    TABLE: ClassVar[str] = "target_scores"
    completion_id: str
    prompt_id: str
    round: int
    confidence: float | None
    status: Status
    reason: str | None


@dataclass(frozen=True, slots=True)
class SelectionRecord(Record):
    """What a selection said of one scored answer."""

    TABLE: ClassVar[str] = "selections"
    completion_id: str
    prompt_id: str
    round: int
    gap: float | None
    confidence: float | None
    status: Status
    reason: str | None


@dataclass(frozen=True, slots=True)
class RoundRecord(Record):
    """What a round of `expand` brought, and what all rounds so far cover; 0: seeds and pool."""

    TABLE: ClassVar[str] = "rounds"
    round: int
    proposed: int
    duplicates: int  # of a prompt that was there, or of another proposal
    new: int  # neither that nor malformed: what the specialist was asked
    kept: int
    kept_so_far: int
    gap_p10: float | None  # quantiles of the gap among what was scored, nats a token
    gap_p50: float | None
    gap_p90: float | None
    answers: int  # different ones among what is kept so far
    new_answers: int  # of them, those that no earlier round had
    forms: int  # question forms and their fillers in what is kept so far (pipelines/forms.py)
    entities: int


@dataclass(frozen=True, slots=True)
class SketchRecord(Record):
    """A text's MinHash, for near-duplicates (Broder 1997)."""

    TABLE: ClassVar[str] = "sketches"
    text_id: str
    kind: str  # "candidate" or "question"
    bands: list[int]  # equal entries at one place make two texts candidates
    shingles: list[int]  # hashes of its word n-grams: the exact Jaccard index is taken from these
    question_id: str | None  # of the evaluation question that a candidate is most like
    rouge_l: float | None  # with that question: F-measure of their longest common subsequence


@dataclass(frozen=True, slots=True)
class CorpusRecord(Record):
    """A training example for the target, or the reason why it is not one."""

    TABLE: ClassVar[str] = "corpus"
    example_id: str
    prompt_id: str
    completion_id: str
    prompt: str  # rendered
    response: str
    token_ends: list[int]  # of the response's tokens in the base's tokenizer, in characters
    excess: list[float]  # nats of each: log p_specialist - log p_base (TiTok, arXiv:2510.04682)
    split: Split
    personal_data: list[str]  # kinds of it that prompt or response look to have
    status: Status
    reason: str | None


@dataclass(frozen=True, slots=True)
class TrainStepRecord(Record):
    """One optimizer step. Loss in nats per response token; no wall-clock times, so it is exact."""

    TABLE: ClassVar[str] = "train_steps"
    stage: str
    step: int
    epoch: int
    loss: float
    learning_rate: float
    gradient_norm: float
    response_tokens: int
    tokens: int


@dataclass(frozen=True, slots=True)
class ExampleRecord(Record):
    """What a trainer did with one example it was given."""

    TABLE: ClassVar[str] = "examples"
    stage: str
    example_id: str
    tokens: int
    status: Status
    reason: str | None


@dataclass(frozen=True, slots=True)
class EvaluationRecord(Record):
    """One arm's answer to one question."""

    TABLE: ClassVar[str] = "evaluations"
    arm: str
    question_id: str
    prediction: str
    reference: str
    correct: bool | None
    reference_logp: float | None  # sum over the reference's tokens, nats
    reference_tokens: int | None
    status: Status
    reason: str | None


@dataclass(frozen=True, slots=True)
class CacheMeasureRecord(Record):
    """Next-token divergence of one held-out text, 16-bit cache against compressed cache."""

    TABLE: ClassVar[str] = "cache_measures"
    text_id: str
    tokens: int
    kl_mean: float | None  # nats a token, KL(full || compressed)
    kl_max: float | None
    logp_full: float | None  # sum over the text's tokens, nats
    logp_compressed: float | None
    bytes_per_token: float | None  # over all texts: allocated, windows in, tables beside
    bytes_per_token_16bit: float | None
    table_bytes: int | None
    status: Status
    reason: str | None


@dataclass(frozen=True, slots=True)
class DeploymentRecord(Record):
    """One question answered by the exported copy, beside what the evaluation saw."""

    TABLE: ClassVar[str] = "deployments"
    question_id: str
    expected: str
    served: str
    status: Status
    reason: str | None


TABLES: dict[str, type[Record]] = {
    record.TABLE: record
    for record in (
        RawRecord,
        PromptRecord,
        QuestionRecord,
        CompletionRecord,
        ScoreRecord,
        TargetScoreRecord,
        SelectionRecord,
        RoundRecord,
        SketchRecord,
        CorpusRecord,
        TrainStepRecord,
        ExampleRecord,
        EvaluationRecord,
        CacheMeasureRecord,
        DeploymentRecord,
    )
}
