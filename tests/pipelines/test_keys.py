"""What changes a stage's key, and what does not (docs/decisions/0004-stage-keys.md)."""

from collections.abc import Callable, Sequence

import pytest

from stillhouse.configs.load import load_recipe
from stillhouse.pipelines.keys import ancestors, stage_keys
from stillhouse.pipelines.presets import chain

STAGES = [stage.name for stage in chain(load_recipe("tiny"))]
LATER = {stage: set(STAGES[STAGES.index(stage) :]) for stage in STAGES}
BEFORE_SCORE = ["models.adapter=stage:specialize"]


def keys(
    overrides: Sequence[str] = (),
    model: Callable[[str], str] = lambda ref: "m",
    data: Callable[[str], str] = lambda ref: "d",
) -> dict[str, str]:
    recipe = load_recipe("tiny", overrides)
    return stage_keys(chain(recipe), recipe, model, data)


def changed(*overrides: str) -> set[str]:
    before, after = keys(), keys(overrides)
    return {stage for stage in before if before[stage] != after[stage]}


@pytest.mark.parametrize(
    ("override", "stages"),
    [
        ("distill.learning_rate=0.5", {"distill", "evaluate", "compress", "deploy"}),
        ("distill.lora.rank=2", {"distill", "evaluate", "compress", "deploy"}),
        ("distill.batch_size=2", {"distill", "evaluate", "compress", "deploy"}),
        ("specialize.seed=5", LATER["specialize"]),
        ("score.max_new_tokens=9", LATER["score"]),
        ("select.tau=3.0", LATER["select"]),
        ("expand.rounds=1", LATER["expand"]),
        ("curate.near_duplicate=0.5", LATER["curate"]),
        ("evaluate.stop=[x]", {"evaluate", "compress", "deploy"}),
        ("evaluate.gate.min_accuracy=0.1", {"deploy"}),
        ("compress.key_bits=3", {"compress", "deploy"}),
        ("deploy.dtype=bfloat16", {"deploy"}),
        ("deploy.engine=vllm", {"deploy"}),
        ("data.shard_rows=7", set(STAGES) - {"specialize"}),
        ("data.template.response=' [{text}]'", set(STAGES)),
        ("data.private.limit=3", LATER["specialize"]),
    ],
)
def test_a_setting_changes_its_stage_and_what_follows(override: str, stages: set[str]) -> None:
    assert changed(override) == stages


@pytest.mark.parametrize(
    "override",
    [
        *(f"{stage}.batch_size=7" for stage in ("score", "expand", "evaluate", "deploy")),
        "distill.checkpoint_steps=7",
        "specialize.keep_checkpoints=7",
        "execution.threads=1",
        "tracking.uri=http://elsewhere",
        "runs_root=elsewhere",
        "name=other",
    ],
)
def test_a_knob_changes_nothing(override: str) -> None:
    assert changed(override) == set()


def test_a_models_content_changes_the_stages_that_load_it() -> None:
    def other(ref: str) -> Callable[[str], str]:
        return lambda asked: "changed" if asked == ref else "m"

    before = keys()
    target, base = keys(model=other("toy:gemma")), keys(model=other("toy:llama"))
    # ingest asks both tokenizers what is too long, so all but the specialist follow
    assert {s for s in STAGES if before[s] == target[s]} == {"specialize"}
    assert {s for s in STAGES if before[s] == base[s]} == set()


def test_data_content_changes_ingest_and_after() -> None:
    before = keys()
    questions = load_recipe("tiny").data.questions.ref
    after = keys(data=lambda ref: "changed" if ref == questions else "d")
    assert {s for s in STAGES if before[s] == after[s]} == {"specialize"}


def test_private_data_changes_specialize_and_after_and_the_ceiling() -> None:
    ref = load_recipe("tiny").data.private.ref

    def other(asked: str) -> str:
        return "changed" if asked == ref else "d"

    assert {s for s in STAGES if keys()[s] == keys(data=other)[s]} == {"ingest"}
    given = ["models.adapter=peft:somewhere"]
    assert keys(given) == keys(given, data=other)  # nobody reads it
    ceiling = [*given, "evaluate.arms=[student, ceiling]", "evaluate.gate.min_recovery=null"]
    one, two = keys(ceiling), keys(ceiling, data=other)
    assert {s for s in one if one[s] != two[s]} == {"evaluate", "deploy"}


def test_a_stages_version_changes_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = keys()
    stage = next(stage for stage in chain(load_recipe("tiny")) if stage.name == "curate")
    monkeypatch.setattr(type(stage), "version", stage.version + 1)
    after = keys()
    assert {s for s in STAGES if before[s] != after[s]} == LATER["curate"]


def test_an_adapter_that_is_given_needs_no_specialize() -> None:
    assert "specialize" not in keys(["models.adapter=peft:somewhere"])


def test_ancestors() -> None:
    stages = chain(load_recipe("tiny"))
    assert ancestors(stages, "score") == ["ingest", "specialize", "score"]
    assert ancestors(stages, "ingest") == ["ingest"]
    assert ancestors(stages, "deploy") == STAGES


@pytest.mark.parametrize("stage", chain(load_recipe("tiny")), ids=lambda stage: stage.name)
def test_a_stage_reads_only_stages_before_it(stage) -> None:
    assert set(stage.after) <= set(STAGES[: STAGES.index(stage.name)])
