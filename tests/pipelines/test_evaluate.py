"""Recovery and the gate, by hand."""

from typing import Any

import pytest

from stillhouse.configs.stages import GateConfig
from stillhouse.pipelines.gate import gate, recovery
from stillhouse.storage.manifest import Counts
from stillhouse.workers.protocols import ModelSpec, TrainJob
from stillhouse.workers.scripted import Script, ScriptedWorkers
from tests.pipelines.conftest import Line, code_of, scripts


def arms(**matches: float) -> dict[str, dict[str, float | int]]:
    return {arm: {"exact_match": match} for arm, match in matches.items()}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (arms(student=0.5, target_before=0.1, specialist=0.9), 0.5),
        (arms(student=0.9, target_before=0.1, specialist=0.9), 1.0),
        (arms(student=0.1, target_before=0.1, specialist=0.9), 0.0),
        (arms(student=0.0, target_before=0.5, specialist=1.0), -1.0),
        (arms(student=1.0, target_before=0.0, specialist=0.5), 2.0),
        (arms(student=0.5, target_before=0.5, specialist=0.5), None),  # nothing to learn
        (arms(student=0.5, target_before=0.6, specialist=0.5), None),
        (arms(student=0.5, target_before=0.1), None),
        (arms(student=0.5, specialist=0.9), None),
        (arms(target_before=0.5, specialist=0.9), None),
        ({}, None),
    ],
)
def test_recovery(found: dict, expected: float | None) -> None:
    got = recovery(found)
    assert got == (None if expected is None else pytest.approx(expected, abs=1e-12))


@pytest.mark.parametrize(
    ("config", "student", "recovered", "reasons"),
    [
        ({}, 1.0, 1.0, 1),  # no threshold: nobody passes
        ({"min_recovery": 0.6}, 0.5, 0.6, 0),
        ({"min_recovery": 0.6}, 0.5, 0.59, 1),
        ({"min_recovery": 0.6}, 0.5, None, 1),
        ({"min_recovery": -1.0}, 0.5, -0.5, 0),
        ({"min_accuracy": 0.5}, 0.5, None, 0),
        ({"min_accuracy": 0.5}, 0.49, None, 1),
        ({"min_accuracy": 0.5, "min_recovery": 0.6}, 0.1, 0.1, 2),
    ],
)
def test_the_gate(config: dict[str, Any], student: float, recovered: Any, reasons: int) -> None:
    verdict = gate(GateConfig(**config), arms(student=student), recovered)
    assert verdict["passed"] == (reasons == 0)
    assert len(verdict["reasons"]) == reasons


def test_the_gate_tells_its_numbers() -> None:
    verdict = gate(GateConfig(min_recovery=0.6), arms(student=0.1), 0.25)
    assert verdict["reasons"] == ["recovery 0.25 is under min_recovery 0.6"]


class Noting(ScriptedWorkers):
    """Notes what is trained and who answers."""

    def into(self, jobs: list[TrainJob], specs: list[ModelSpec]) -> "Noting":
        self.jobs, self.specs = jobs, specs
        return self

    def train(self, job, on_step):
        self.jobs.append(job)
        return super().train(job, on_step)

    def model(self, spec):
        self.specs.append(spec)
        return super().model(spec)


def test_a_perplexity_that_no_float_holds_is_none(line: Line) -> None:
    line.pool("special thing")
    line.questions(**{"two words": "C22"})
    made = scripts()
    made["target"] = Script(code_of, lambda pair: -701.0)
    line.workers = ScriptedWorkers(made)
    line.run("evaluate")
    figures = line.entry("evaluate").facts["arms"]["target_before"]
    assert (figures["perplexity"], figures["exact_match"]) == (None, 1.0)


def test_the_ceiling_is_the_target_on_the_private_pairs(line: Line) -> None:
    line.pool("special thing", "another special thing")
    line.questions(**{"two words": "C22", "one more word": "A00"})
    private: list[Any] = [{"prompt": "a secret", "answer": "S1"}, "{broken"]
    private.append({"prompt": "another", "answer": " "})
    line.tree["data"]["private"] = {"ref": line.jsonl("private", private), "response": "answer"}
    line.tree["evaluate"] = {"arms": ["target_before", "student", "ceiling"]}
    line.tree["distill"] = {"epochs": 3, "batch_size": 1}
    jobs: list[TrainJob] = []
    specs: list[ModelSpec] = []
    line.workers = Noting(scripts()).into(jobs, specs)
    line.run("evaluate")
    student, ceiling = jobs
    pairs = [("a secret", " S1"), ("another", " ")]
    assert [(row.prompt, row.response) for row in ceiling.examples] == pairs
    assert not {row.prompt for row in student.examples} & {"a secret", "another"}
    assert (ceiling.model, ceiling.config) == (student.model, student.config)
    assert specs[-2:] == [
        ModelSpec("target", student.folder / "adapter"),
        ModelSpec("target", ceiling.folder / "adapter"),
    ]
    steps = line.rows("SELECT count(*) FROM train_steps WHERE stage = 'evaluate'")
    assert steps == [(3,)]
    [(reason,)] = line.rows("SELECT reason FROM examples WHERE status = 'failed'")
    assert "private.jsonl:2: expected a JSON object" in reason
    entry = line.entry("evaluate")
    assert entry.facts["arms"]["ceiling"]["items"] == 2
    assert entry.counts == Counts(rows_in=3 + 3 * 2, kept=1 + 3 * 2, rejected=1, failed=1)
    assert any("ceiling/adapter" in file.path for file in entry.files)


def test_the_arms_of_a_line(line: Line) -> None:
    line.pool("special thing", "another special thing")
    line.questions(**{"two words": "C22", "one more word": "A00", "four words are here": "A00"})
    line.run("evaluate")
    facts = line.entry("evaluate").facts
    # code_of: 2 words C22, 3 words A00, 4 words B11; the base says something else.
    assert facts["arms"]["specialist"]["exact_match"] == pytest.approx(2 / 3)
    assert facts["arms"]["base"]["exact_match"] == 0.0
    assert facts["arms"]["student"]["items"] == 3
    variance = 2 / 3 * 1 / 3 / 3
    assert facts["arms"]["specialist"]["standard_error"] == pytest.approx(variance**0.5)
    # every scripted token of the specialist has log-probability -0.1
    assert facts["arms"]["specialist"]["perplexity"] == pytest.approx(2.718281828**0.1)
    assert facts["recovery"] is None  # the scripted target knew as much before
