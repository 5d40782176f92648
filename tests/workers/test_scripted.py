import subprocess
import sys

import pytest

from stillhouse.configs.stages import CompressConfig, TrainConfig
from stillhouse.workers.protocols import (
    CacheSpec,
    Completion,
    Decoding,
    ExportJob,
    Failed,
    ModelSpec,
    Pair,
    TrainExample,
    TrainJob,
)
from stillhouse.workers.scripted import Script, ScriptedWorkers, UnscriptedError

HOW = Decoding(max_new_tokens=3, stop=("\n",))
BASE = ModelSpec("base")


@pytest.fixture
def workers():
    return ScriptedWorkers(
        {
            "base": Script({"a": "A1\nrest", "long": "1 2 3 4", "bad": Failed("no")}),
            "base#adapter": Script(str.upper, logp=lambda pair: -0.5),
        }
    )


def test_answers_come_from_the_script(workers):
    assert workers.model(BASE).answer(["a", "long", "bad"], HOW) == [
        Completion("A1", "stop", 1, 1),
        Completion("1 2 3", "length", 3, 1),
        Failed("no"),
    ]
    assert workers.calls == {"answer": 3}


def test_an_unknown_prompt_or_model_is_an_error(workers):
    with pytest.raises(UnscriptedError, match="'what'"):
        workers.model(BASE).answer(["what"], HOW)
    with pytest.raises(UnscriptedError, match="other"):
        workers.model(ModelSpec("other"))


def test_the_adapter_has_a_script_of_its_own(workers, tmp_path):
    pair = workers.pair(ModelSpec("base", tmp_path), BASE)
    assert pair.answer(["x"], HOW) == [Completion("X", "stop", 1, 1)]
    assert pair.propose(["a"], HOW) == [Completion("A1", "stop", 1, 1)]
    scored, empty = pair.score([Pair("a", "b c"), Pair("a", " ")], 4)
    assert scored.logp_specialist == [-0.5, -0.5]
    assert len(scored.logp_base) == len(scored.token_ids) == 2
    assert isinstance(empty, Failed)


def test_invented_log_probabilities_are_the_same_each_time(workers):
    pairs = [Pair("a", "b c"), Pair("a", "d")]
    first = workers.model(BASE).logp(pairs, 1)
    assert first == workers.model(BASE).logp(pairs, 8)
    assert first[0].logp[0] != first[1].logp[0]
    assert all(-4 <= value < 0 for one in first for value in one.logp)


def test_training_writes_a_record_and_answers_from_it(workers, tmp_path):
    examples = [TrainExample(f"e{i}", "a b", "c") for i in range(5)] + [TrainExample("x", "a", "")]
    job = TrainJob(BASE, examples, TrainConfig(batch_size=2, epochs=2), tmp_path)
    heard = []
    outcome = workers.train(job, lambda step, total: heard.append((step.step, total)))
    assert heard == [(step, 6) for step in range(1, 7)]
    assert outcome.rejected == {"x": "empty_response"}
    assert workers.train(job, lambda step, total: pytest.fail("again")) == outcome


def test_measures_and_export(workers, tmp_path):
    measures, size = workers.measure_cache(BASE, ["a b", ""], CacheSpec(CompressConfig()))
    assert measures[0].kl_mean == 2.0**-8
    assert isinstance(measures[1], Failed)
    assert size.bytes_per_token == size.bytes_per_token_16bit / 4
    files = workers.export(ExportJob(BASE, tmp_path / "out", "float32", {"run": "r"}))
    assert [file.name for file in files] == ["config.json", "stillhouse.json"]
    assert workers.count_tokens("base", ["a b"]) == [3]


@pytest.mark.parametrize("module", ["scripted", "local", "evaluation", "folders"])
def test_importing_loads_no_torch(module):
    code = f"import sys, stillhouse.workers.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
