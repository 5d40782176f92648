"""From a recipe's name to a checked configuration: files, inheritance, overrides, refusals."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.configs.load import check, load_recipe, recipe_names
from stillhouse.configs.recipe import RecipeConfig
from stillhouse.errors import ConfigError


def write(folder: Path, name: str, text: str) -> str:
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_load(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert check(recipe.model_dump(mode="json")) == recipe  # what the run folder keeps loads too


def test_demo_and_tiny_ship() -> None:
    assert {"demo", "tiny"} <= set(recipe_names())


def test_a_recipe_of_ones_own(tmp_path: Path, tree: dict[str, Any]) -> None:
    del tree["name"]
    path = write(tmp_path, "mine", yaml.safe_dump(tree))
    assert load_recipe(path).name == "mine"  # a recipe without a name has its file's


def test_extends_merges_sections_and_replaces_values(tmp_path: Path) -> None:
    path = write(tmp_path, "slow", "extends: tiny\ndistill:\n  learning_rate: 0.5\n")
    recipe, tiny = load_recipe(path), load_recipe("tiny")
    assert recipe.distill.learning_rate == 0.5
    assert recipe.distill.epochs == tiny.distill.epochs  # beside it in the parent's section
    assert recipe.data == tiny.data


def test_extends_replaces_lists_whole(tmp_path: Path) -> None:
    path = write(tmp_path, "one", "extends: tiny\ndata:\n  pool:\n    - ref: jsonl:a.jsonl\n")
    assert [source.ref for source in load_recipe(path).data.pool] == ["jsonl:a.jsonl"]


def test_extends_does_not_inherit_the_name(tmp_path: Path) -> None:
    """Two recipes of one name would share a run folder and overwrite each other's report."""
    assert load_recipe(write(tmp_path, "slow", "extends: tiny\n")).name == "slow"
    named = write(tmp_path, "other", "extends: tiny\nname: given\n")
    assert load_recipe(named).name == "given"


def test_extends_chains_and_names_files_beside(tmp_path: Path) -> None:
    write(tmp_path, "parent", "extends: tiny\nscore:\n  max_new_tokens: 3\n")
    path = write(tmp_path, "child", "extends: parent.yaml\nselect:\n  tau: 2.5\n")
    recipe = load_recipe(path)
    assert (recipe.score.max_new_tokens, recipe.select.tau) == (3, 2.5)


def test_a_circle_of_extends_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "a", "extends: b.yaml\n")
    path = write(tmp_path, "b", "extends: a.yaml\n")
    with pytest.raises(ConfigError, match="comes back to itself"):
        load_recipe(path)


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no recipe 'tinny'.*did you mean `tiny`\?"):
        load_recipe("tinny")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "expected a mapping of sections, found list"),
        ("a: [1\n", "expected YAML"),
        ("? [a, b]\n: 1\n", "expected YAML"),
        ("name: x\nname: y\n", "key 'name' is given twice"),
        ("data: {shard_rows: 2024-01-01}\n", "a value that JSON cannot"),
        ("name: 2024-13-45\n", "expected YAML, found: month must be in 1..12"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(write(tmp_path, "broken", text))


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("distill.learning_rate=0.25", "distill", "learning_rate", 0.25),
        ("distill.learning_rate=1e-3", "distill", "learning_rate", 1e-3),
        ("distill.learning_rate=2E5", "distill", "learning_rate", 2e5),
        ("select.budget=null", "select", "budget", None),
        ("score.stop=[a, b]", "score", "stop", ("a", "b")),
        ("tracking.experiment=a=b", "tracking", "experiment", "a=b"),
        ("deploy.model_name='1'", "deploy", "model_name", "1"),
    ],
)
def test_overrides(override: str, section: str, key: str, value: Any) -> None:
    recipe = load_recipe("tiny", [override])
    assert getattr(getattr(recipe, section), key) == value


def test_overrides_reach_any_depth_and_the_last_one_wins() -> None:
    recipe = load_recipe("tiny", ["distill.lora.rank=2", "distill.lora.rank=4"])
    assert recipe.distill.lora.rank == 4
    assert recipe.distill.lora.alpha == 32.0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("distill.learning_rate", "expected `section.key=value`"),
        ("=3", "expected `section.key=value`"),
        ("data.pool.0.ref=x", r"`pool` is a list: give it whole, as `pool=\[…\]`"),
        ("extends=demo", "`extends` stands in a recipe's file only"),
        ("distill=3", "distill: expected a section, found 3"),
        ("name.first=3", "`name` is a value, not a section"),
        ("score.stop=[a", "the value is not YAML"),
        ("name=2024-13-45", "'name=2024-13-45': the value is not YAML: month must be in 1..12"),
        ("distill.epochs=" + "7" * 4_301, "the value is not YAML: Exceeds the limit"),
        ("distill.epochs=0x" + "7" * 4_301, "a value that JSON cannot: Exceeds the limit"),
        ("score.stop=&a [*a]", "a value that JSON cannot: Circular"),
        ("distil.epochs=3", r"distil: no such key; did you mean `distill`\?"),
        ("distill.learning_rat=3", r"distill.learning_rat: .* `learning_rate`\?"),
        ("distill.lora.ranks=3", r"distill.lora.ranks: .* `rank`\?"),
        ("evaluate.gate.min_recoverry=1", r"evaluate.gate.min_recoverry: .* `min_recovery`\?"),
        ("data.private.respons=x", r"data.private.respons: .* `response`\?"),
        ("zzz=1", r"zzz: no such key; expected one of name, pipeline"),
        ("distill.epochs=two", "distill.epochs: .* found 'two'"),
        ("distill.epochs='3'", "distill.epochs: .* found '3'"),
        ("distill.epochs=0", "distill.epochs: .*greater than or equal to 1, found 0"),
        ("compress.key_bits=6", "compress.key_bits: .* found 6"),
        ("name=a/b", "name: .* found 'a/b'"),
        ("name=..", "name: "),
        ("distill.learning_rate=.nan", "distill.learning_rate: "),
        ("distill.learning_rate=.inf", "distill.learning_rate: "),
    ],
)
def test_refused_overrides(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe("tiny", [override])


def test_an_unknown_key_in_a_list_names_the_nearest(tree: dict[str, Any]) -> None:
    tree["data"]["pool"][0]["orgin"] = "x"
    with pytest.raises(ConfigError, match=r"data.pool.0.orgin: .* `origin`\?"):
        check(tree)


def test_a_missing_key_is_named(tree: dict[str, Any]) -> None:
    del tree["data"]["questions"]["ref"]
    with pytest.raises(ConfigError, match=r"data\.questions\.ref: required, found nothing"):
        check(tree)


def test_every_error_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("tiny", ["distill.epochs=0", "scoore.x=1"])
    assert len(str(caught.value).splitlines()) == 2


@given(st.floats(min_value=1e-8, max_value=10), st.integers(1, 10**6), st.text(min_size=1))
def test_any_value_survives_an_override(rate: float, epochs: int, name: str) -> None:
    quoted = yaml.safe_dump(name, default_style='"', allow_unicode=True, width=10**6).strip()
    overrides = [
        f"distill.learning_rate={rate!r}",
        f"distill.epochs={epochs}",
        f"tracking.experiment={quoted}",
    ]
    recipe = load_recipe("tiny", overrides)
    assert recipe.distill.learning_rate == rate
    assert recipe.distill.epochs == epochs
    assert recipe.tracking.experiment == name


@given(st.sampled_from(sorted(RecipeConfig.model_fields)), st.integers(0, 20))
def test_one_wrong_letter_is_always_set_right(section: str, place: int) -> None:
    place = min(place, len(section) - 1)
    wrong = f"{section[:place]}_x{section[place + 1 :]}"
    with pytest.raises(ConfigError, match=r"no such key; (did you mean|expected one of)"):
        load_recipe("tiny", [f"{wrong}.a=1"])
