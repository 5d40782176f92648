"""Rules across sections: each refusal says why."""

import math
import re
from typing import Any

import pytest

from stillhouse.configs.load import check
from stillhouse.errors import ConfigError


def refused(tree: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        check(tree)
    return str(caught.value)


def test_the_smallest_recipe(tree: dict[str, Any]) -> None:
    recipe = check(tree)
    assert recipe.pipeline == "transfer"
    assert recipe.data.heldout_percent == 5


@pytest.mark.parametrize(
    "models", [{"adapter": None}, {"adapter": "peft:a", "specialist": "toy:llama"}]
)
def test_the_specialist_is_named_once(tree: dict[str, Any], models: dict) -> None:
    tree["models"] |= models
    message = refused(tree)
    assert "exactly one of `adapter`" in message
    assert "because the gap is measured between specialist and base" in message


def test_training_a_specialist_needs_private_data(tree: dict[str, Any]) -> None:
    tree["models"]["adapter"] = "stage:specialize"
    message = refused(tree)
    assert message.startswith("data.private:")
    assert "peft:<folder>" in message


def test_arms_are_different(tree: dict[str, Any]) -> None:
    tree["evaluate"] = {"arms": ["student", "student"]}
    assert "evaluate.arms: expected different arms" in refused(tree)


@pytest.mark.parametrize("section", ["score", "evaluate"])
def test_a_stop_string_is_not_empty(tree: dict[str, Any], section: str) -> None:
    tree[section] = {"stop": ["\n", ""]}
    assert f"{section}.stop" in refused(tree)


@pytest.mark.parametrize("name", ["", "a/b", "o'x", "a:b", "-x"])
def test_a_model_name_is_one_that_a_registry_takes(tree: dict[str, Any], name: str) -> None:
    tree["deploy"] = {"model_name": name}
    assert "deploy.model_name" in refused(tree)


def test_the_ceiling_needs_private_data(tree: dict[str, Any]) -> None:
    tree["evaluate"] = {"arms": ["student", "ceiling"]}
    assert "the ceiling arm train on private pairs" in refused(tree)


def test_an_empty_pool(tree: dict[str, Any]) -> None:
    tree["data"]["pool"] = []
    assert "data.pool, data.seeds: expected at least one source of prompts, found none" in refused(
        tree
    )


def test_a_recovery_gate_needs_its_arms(tree: dict[str, Any]) -> None:
    tree["evaluate"] = {"arms": ["base", "student"], "gate": {"min_recovery": 0.5}}
    message = refused(tree)
    assert "recovery = (student - target_before)" in message
    assert "['specialist', 'target_before']" in message


def test_the_student_is_always_evaluated(tree: dict[str, Any]) -> None:
    tree["evaluate"] = {"arms": ["base"]}
    message = refused(tree)
    assert message.startswith("evaluate.arms: `student` is needed")
    assert "`deploy` compares the exported copy" in message


@pytest.mark.parametrize("part", ["prompt", "response"])
def test_a_template_has_a_place_for_the_text(tree: dict[str, Any], part: str) -> None:
    tree["data"]["template"] = {part: "Diagnosis: {txt}"}
    assert f"data.template.{part}: expected `{{text}}` in it, because" in refused(tree)


@pytest.mark.parametrize(
    "uri", ["http://127.0.0.1:5000", "sqlite:////srv/mlflow.db", "postgresql+psycopg2://a:b@c/d"]
)
def test_a_place_that_mlflow_tracks_to(tree: dict[str, Any], uri: str) -> None:
    assert check(tree | {"tracking": {"uri": uri}}).tracking.uri == uri


@pytest.mark.parametrize(
    "uri", ["./mlruns", "file:///mlruns", "sqlite:///relative.db", "ftp://x", "https://", ""]
)
def test_a_place_that_mlflow_would_refuse(tree: dict[str, Any], uri: str) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.uri: expected http.*found " + re.escape(uri)):
        check(tree | {"tracking": {"uri": uri}})


def test_a_refused_uri_keeps_its_password_to_itself(tree: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="begins with postgres:") as refused:
        check(tree | {"tracking": {"uri": "postgres://user:pa55@host/db"}})
    assert "pa55" not in str(refused.value)


@pytest.mark.parametrize("more", [{"key_bits": 5}, {"value_bits": 1}, {"calibrate": False}])
def test_one_channel_group_is_of_a_fitted_cache(tree: dict[str, Any], more: dict) -> None:
    tree["compress"] = {"channel_groups": 1} | more
    assert "of a calibrated cache with 2, 3 or 4 bits, found" in refused(tree)
    tree["compress"] = {"channel_groups": 1, "key_bits": 3}
    assert check(tree).compress.channel_groups == 1


def selecting(tree: dict[str, Any], **select: Any) -> str:
    tree["select"] = select
    return refused(tree)


def test_a_criterion_has_one_bound(tree: dict[str, Any]) -> None:
    for bounds in ({}, {"at_least": 1.0, "quantile": 0.5}):
        said = selecting(tree, criteria=[{"signal": "gap", **bounds}])
        assert "gap: expected one of at_least, quantile and controls, found" in said


def test_a_signal_is_asked_for_once(tree: dict[str, Any]) -> None:
    criteria = [{"signal": "gap", "at_least": 1.0}, {"signal": "gap", "quantile": 0.5}]
    assert "expected different signals, found ['gap', 'gap']" in selecting(tree, criteria=criteria)


def test_signals_ask_for_what_they_are_measured_on(tree: dict[str, Any]) -> None:
    said = selecting(tree, criteria=[{"signal": "confidence", "controls": 0.1}])
    assert "confidence is measured against control prompts; name some" in said
    assert "likeness to the seeds; name some under data.seeds" in selecting(tree, order="likeness")
    assert "target_weakness needs score.target=true" in selecting(tree, order="target_weakness")


def test_the_published_method_is_one_line(tree: dict[str, Any]) -> None:
    tree["select"] = {"tau": 1.5}
    [criterion] = check(tree).select.all_criteria()
    assert (criterion.signal, criterion.at_least) == ("gap", math.log(1.5))
    assert check({**tree, "select": {"tau": None}}).select.all_criteria() == ()


def test_generators_are_named_or_described(tree: dict[str, Any]) -> None:
    url = "http://127.0.0.1:1/v1"
    tree["expand"] = {
        "generators": [
            "mutate",
            {"kind": "few_shot", "model": "target"},
            {"kind": "few_shot", "endpoint": {"url": url, "model": "big"}},
        ]
    }
    names = [generator.name for generator in check(tree).expand.generators]
    assert names == ["mutate", "few_shot:target", "few_shot:big"]
    tree["expand"] = {"generators": ["mutate", "mutate"]}
    assert "expected different ones, found ['mutate', 'mutate']" in refused(tree)
    tree["expand"] = {"generators": [{"kind": "mutate", "model": "target"}]}
    assert "mutate asks no model" in refused(tree)
    endpoint = {"url": url, "model": "big"}
    both = {"kind": "few_shot", "model": "target", "endpoint": endpoint}
    tree["expand"] = {"generators": [both]}
    assert "expected model or endpoint, found both" in refused(tree)
