"""The served copy answers the evaluation again; only one that says the same is promoted."""

import pytest

from stillhouse.errors import ConfigError
from stillhouse.pipelines import local
from stillhouse.workers.protocols import Failed
from stillhouse.workers.scripted import Script
from tests.pipelines.conftest import Line, Notes, code_of

QUESTIONS = {"two words": "C22", "one more word": "A00", "a": "B11", "b": "B11"}


@pytest.fixture
def served(line: Line) -> Line:
    line.pool("special thing", "another special thing", "common ground")
    line.questions(**QUESTIONS)
    line.tree["expand"] = {"rounds": 1, "prompts_per_round": 4}
    line.tree["evaluate"] = {"gate": {"min_accuracy": 0.5}}
    line.tree["deploy"] = {"engine": "vllm"}
    return line


def test_a_served_copy_that_says_the_same_is_promoted(served: Line) -> None:
    notes = Notes()
    deployment = served.run(observer=notes)["deployment"]
    assert deployment["promoted"]
    assert deployment["served"]["arm"]["exact_match"] == 1
    assert deployment["served"]["logp_moved"] == 0
    said = "served: exact match 100.0%, in process 100.0%; log p of a reference moved by 0 nats"
    assert f"{said} a token" in notes.heard
    assert served.rows("SELECT count(*) FROM evaluations WHERE arm = 'student_served'") == [(4,)]
    assert served.workers.calls["serve"] == 1


def test_one_that_answers_otherwise_is_not(served: Line) -> None:
    served.workers.scripts["served"] = Script(lambda _prompt: "A00")
    deployment = served.run()["deployment"]
    assert not deployment["promoted"]
    assert deployment["refused"] == (
        "the served copy answers 25.0% of the questions, the evaluation 100.0% ± 0.0%"
    )


def test_one_that_fails_is_not(served: Line) -> None:
    served.workers.scripts["served"] = Script(
        lambda prompt: Failed("server: 500") if "word" in prompt else code_of(prompt)
    )
    refused = served.run()["deployment"]["refused"]
    assert refused == "the served copy failed on 2 of 4 questions"


def test_without_an_engine_nothing_is_served(served: Line) -> None:
    served.tree["deploy"] = {}
    assert served.run()["deployment"]["served"] is None
    assert "serve" not in served.workers.calls


def test_a_cache_that_no_server_has_is_refused(served: Line) -> None:
    """Before anything is run."""
    for other in ({"recent": 8}, {"calibrate": False, "seed": 3}, {"key_bits": 8}):
        served.tree["compress"] = other
        with pytest.raises(ConfigError, match=r"deploy\.engine: vllm serves a calibrated cache"):
            _ = served.recipe


def test_an_engine_that_is_not_there_is_said_at_the_start(
    served: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=r"deploy\.engine: expected vLLM, found none"):
        local.local_runner(served.recipe)
