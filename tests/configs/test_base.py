"""Sections are frozen and strict; knobs stay out of what decides a key."""

from typing import Any, get_args

import pytest
from pydantic import Field, ValidationError

from stillhouse.configs.base import Config, keyed_values, knob
from stillhouse.configs.load import check, load_recipe
from stillhouse.configs.recipe import RecipeConfig
from stillhouse.errors import ConfigError


class InnerConfig(Config):
    depth: int = 1
    threads: int = knob(2)


class OuterConfig(Config):
    rate: float = Field(0.5, json_schema_extra={"unit": "1/s"})
    batch: int = knob(8, ge=1)
    inner: InnerConfig = InnerConfig()
    many: tuple[InnerConfig, ...] = (InnerConfig(), InnerConfig(depth=3))
    named: dict[str, InnerConfig] = Field({"a": InnerConfig(depth=4)})


def test_knobs_are_left_out_at_every_depth() -> None:
    assert keyed_values(OuterConfig()) == {
        "rate": 0.5,
        "inner": {"depth": 1},
        "many": [{"depth": 1}, {"depth": 3}],
        "named": {"a": {"depth": 4}},
    }


def test_a_knob_keeps_its_constraints() -> None:
    with pytest.raises(ValidationError):
        OuterConfig(batch=0)


def test_sections_are_frozen_and_take_no_other_key() -> None:
    config: Any = OuterConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.rate = 1.0
    with pytest.raises(ValidationError, match="Extra inputs"):
        OuterConfig.model_validate({"rte": 1.0})


def knobs(config: type[Config], path: str = "") -> set[str]:
    """The dotted names of all knobs under a section."""
    found = set()
    for name, field in config.model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("knob"):
            found.add(path + name)
        for section in sections(field.annotation):
            found |= knobs(section, f"{path}{name}.")
    return found


def sections(annotation: Any) -> set[type[Config]]:
    """The sections that a field may hold, one or several."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return {annotation}
    return {found for part in get_args(annotation) for found in sections(part)}


def test_the_knobs_of_a_recipe() -> None:
    """Written down: a new knob is a decision (docs/decisions/0004-stage-keys.md)."""
    assert knobs(RecipeConfig) == {
        "specialize.checkpoint_steps",
        "specialize.keep_checkpoints",
        "distill.checkpoint_steps",
        "distill.keep_checkpoints",
        "score.batch_size",
        "expand.batch_size",
        "expand.generators.endpoint.key_env",
        "expand.generators.endpoint.concurrency",
        "expand.generators.endpoint.requests_per_minute",
        "expand.generators.endpoint.retries",
        "expand.generators.endpoint.timeout",
        "evaluate.batch_size",
        "deploy.batch_size",
        "execution.threads",
    }


def test_what_is_keyed_is_plain_json() -> None:
    recipe = load_recipe("tiny")
    for section in ("data", "distill", "evaluate"):
        assert_plain(keyed_values(getattr(recipe, section)))


def assert_plain(value: Any) -> None:
    if isinstance(value, dict):
        assert all(isinstance(name, str) for name in value)
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            assert_plain(item)
    else:
        assert value is None or isinstance(value, str | int | float | bool)


def test_types_are_not_converted(tree: dict[str, Any]) -> None:
    tree["tracking"] = {"enabled": False}
    assert check(tree).tracking.enabled is False
    for wrong in ("false", 0):
        tree["tracking"] = {"enabled": wrong}
        with pytest.raises(ConfigError, match=r"tracking\.enabled"):
            check(tree)
