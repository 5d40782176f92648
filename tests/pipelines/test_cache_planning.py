"""The plan of a cache: questions, rows, and the file for programs."""

import json

import pytest

from stillhouse.errors import ConfigError
from stillhouse.pipelines.cache_planning import (
    ask_cache,
    plan_cache,
    plan_target_cache,
    write_cache_plan,
)
from tests.pipelines.conftest import Line

CONFIG = {"num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 64}


def test_a_plan_for_programs(tmp_path):
    path, out = tmp_path / "config.json", tmp_path / "out.json"
    path.write_text(json.dumps(CONFIG))
    question = ask_cache(None, ["10,20", "10"], ["bf16", "k4v4"], 2, 1, 3)
    write_cache_plan(plan_cache(str(path), question), out)
    found = json.loads(out.read_text())
    assert [(row["context"], row["format"]) for row in found["rows"]] == [
        (10, "bf16"), (10, "k4v4"), (20, "bf16"), (20, "k4v4"),
    ]  # fmt: skip
    first, second = found["rows"][:2]
    assert first["bytes"] == 2 * 2 * 10 * 256
    assert (first["gib"], first["gb"]) == (first["bytes"] / 2**30, first["bytes"] / 1e9)
    assert sum(second["parts"].values()) == second["bytes"]
    assert second["parts"]["kept"] == 2 * 2 * 4 * 256
    assert (found["batch"], found["sinks"], found["recent"]) == (2, 1, 3)


def test_a_recipes_target_in_its_own_format(line: Line):
    line.tree["models"]["target"] = "toy:gemma"
    line.tree["compress"] = {"key_bits": 5, "value_bits": 3}
    plan = plan_target_cache(line.recipe)
    assert [(row.context, row.format) for row in plan.rows] == [(512, "bf16"), (512, "k5v3")]
    assert "k5v3" in ask_cache(line.recipe, (), (), 1, 0, 0).formats


@pytest.mark.parametrize("word", ["0", "-1", "12k", "1.5", "x", "9" * 30])
def test_a_context_is_a_number(word):
    with pytest.raises(ConfigError, match="--context: expected whole numbers from 1"):
        ask_cache(None, [word], (), 1, 0, 0)


def test_what_cannot_be_read_or_written(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    with pytest.raises(ConfigError, match="Give --context"):
        plan_cache(str(path), ask_cache(None, (), (), 1, 0, 0))
    plan = plan_cache(str(path), ask_cache(None, ["1"], (), 1, 0, 0))
    with pytest.raises(ConfigError, match="--json: expected a file"):
        write_cache_plan(plan, tmp_path)
