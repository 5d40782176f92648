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


def test_a_fitted_plan_tells_what_values_that_do_not_fold_take(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    rows = plan_cache(str(path), ask_cache(None, ["10"], ["k3v3", "fitted:3"])).as_json()["rows"]
    assert [row["value_maps"] for row in rows] == [0, 2 * 2 * 64 * 64 * 4]
    assert rows[1]["parts"]["stored"] == rows[0]["parts"]["stored"] == 2 * 10 * 52


@pytest.mark.parametrize(
    ("compress", "name"),
    [
        ({"key_bits": 5, "value_bits": 3}, "fitted:4"),
        ({"key_bits": 4, "value_bits": 3}, "fitted:3.5"),
        ({"key_bits": 5, "value_bits": 3, "calibrate": False}, "k5v3"),
        ({"key_bits": 8, "value_bits": 3}, "k8v3"),
        ({"budget_kl": 0.1}, "fitted:5"),
        ({"budget_kl": 0.1, "channel_groups": 1}, "fitted:4"),
        ({"key_bits": 4, "value_bits": 3, "channel_groups": 1}, "fitted:3.5"),
    ],
)
def test_a_recipes_target_in_its_own_format(line: Line, compress, name):
    line.tree["models"]["target"] = "toy:gemma"
    line.tree["compress"] = compress
    plan = plan_target_cache(line.recipe)
    assert [(row.context, row.format) for row in plan.rows] == [(512, "bf16"), (512, name)]
    assert ask_cache(line.recipe, (), ()).formats[-1] == name


def test_both_plans_of_a_recipe_have_its_windows(line: Line):
    line.tree["models"]["target"] = "toy:gemma"
    line.tree["compress"] = {"sinks": 3, "recent": 7}
    target = plan_target_cache(line.recipe)
    asked = ask_cache(line.recipe, (), ())
    assert (asked.sinks, asked.recent) == (3, 7)
    assert plan_cache(line.recipe.models.target, asked).rows[-1] == target.rows[-1]
    other = ask_cache(line.recipe, (), (), sinks=0, recent=1)
    assert (other.sinks, other.recent) == (0, 1)


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
