"""The benchmark of a transfer's arms: their recipes, its table, and a run in small."""

import json
from pathlib import Path

import pytest

from benchmarks import criteria, transfer
from benchmarks.transfer_arms import ARMS, Arm, budget_arms, recipe_of, tau_arms
from benchmarks.transfer_picture import by_sweep, drawn
from stillhouse.configs.load import load_recipe

ROW = transfer.Row("random", 0, 0.5, 0.25, 10, 200, 0.5)


def arm(name: str) -> Arm:
    return next(arm for arm in ARMS if arm.name == name)


def test_an_arm_changes_what_it_says() -> None:
    recipe = load_recipe("transfer-icd10")
    own = recipe_of(recipe, 0, arm("criterion"), ("student",))
    assert own.select == recipe.select
    random = recipe_of(recipe, 2, arm("random"), ("student",))
    assert (random.select.order, random.select.all_criteria()) == ("random", ())
    assert random.select.budget == recipe.select.budget
    published = recipe_of(recipe, 0, arm("gap only (published)"), ("student",)).select
    assert [item.signal for item in published.all_criteria()] == ["gap"]
    masked = recipe_of(recipe, 0, arm("criterion + token mask"), ("student",))
    assert masked.distill.token_share < 1
    assert recipe_of(recipe, 0, arm("no filter"), ("student",)).select.budget is None
    taus = [recipe_of(recipe, 0, item, ("student",)).select.tau for item in tau_arms([1.2, 3.0])]
    assert taus == [1.2, 3.0]
    budgets = [recipe_of(recipe, 0, item, ("student",)).select.budget for item in budget_arms([50])]
    assert budgets == [50, 50]


def test_a_seed_draws_other_rows_and_keeps_draws_apart() -> None:
    recipe = load_recipe("transfer-icd10")
    two = recipe_of(recipe, 2, arm("criterion"), ("student",))
    assert two.name == "transfer-icd10-seed2"
    assert two.specialize.seed == two.distill.seed == two.select.seed == 2
    refs = [source.ref for source in (*two.data.seeds, *two.data.pool, *two.data.controls)]
    assert len(set(refs)) == len(refs)
    assert all(ref.count("&seed=") == 1 for ref in refs)
    assert two.data.questions.ref.endswith("&seed=2")
    assert refs[-1].endswith("&seed=2003")  # the recipe's own seed of it is 3


def test_an_arm_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"expected some of .*'criterion'.*found .*'criterium'"):
        transfer.main(["tiny", "--json", str(tmp_path / "o.json"), "--arms", "criterium"])


def test_the_table_has_mean_and_deviation() -> None:
    rows = [ROW, transfer.Row("random", 1, 0.7, 0.75, 10, 220, 0.7)]
    rows.append(transfer.Row("base", 0, 0.0, None))
    lines = transfer.table(rows).splitlines()
    assert lines[2] == "| random | 60.0% ± 14.1% | 0.50 ± 0.35 | 10 ± 0 | 210 ± 14 | 60% ± 14% |"
    assert lines[3] == "| base | 0.0% |  |  |  |  |"


def test_recovery_is_nothing_where_there_is_nothing_to_recover() -> None:
    assert transfer.recovered(0.5, (0.9, 0.1)) == pytest.approx(0.5)
    assert transfer.recovered(0.5, (0.1, 0.1)) is None


def test_a_sweep_is_a_line_and_an_arm_a_bar() -> None:
    found = {"random": [0.1, 0.2], "tau 1.5": [0.5], "tau 3": [0.4], "criterion 200": [0.7]}
    assert by_sweep(found) == {"tau": {1.5: [0.5], 3.0: [0.4]}, "criterion": {200.0: [0.7]}}
    assert drawn(found, "title") == drawn(found, "title")
    assert len(drawn(found, "title")) > len(drawn({"random": [0.1, 0.2]}, "title"))


@pytest.mark.parametrize(
    ("higher", "lower", "expected"),
    [([1.0], [0.0], 1.0), ([0.0], [1.0], 0.0), ([1.0, 2.0], [1.0], 0.75), ([], [1.0], None)],
)
def test_auc(higher: list[float], lower: list[float], expected: float | None) -> None:
    assert criteria.auc(higher, lower) == expected


def test_what_selection_keeps_by_part() -> None:
    answers: list[criteria.Answer] = [
        ("speciality", True, True, {}),
        ("speciality", False, False, {}),
        ("bare", None, False, {}),
    ]
    found = {row.part: (row.kept, row.answers) for row in criteria.kept_parts("r", 0, answers)}
    assert found == {"speciality": (1, 2), "right": (1, 1), "wrong": (0, 1), "bare": (0, 1)}
    assert "| r | 50% of 2 |" in criteria.kept_table(criteria.kept_parts("r", 0, answers))


def test_a_recipe_without_a_pool_gets_that_of_its_speciality() -> None:
    recipe = criteria.pooled(load_recipe("transfer-handbook"))
    assert recipe.data.seeds  # likeness is to them
    splits = [source.ref.partition("split=")[2].partition("&")[0] for source in recipe.data.pool]
    assert splits[:2] == ["pool", "lookalike"]


def test_a_benchmark_in_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two arms on toy models of one shape, and again from what is there."""
    out = tmp_path / "small.json"
    asked = ["tiny", f"runs_root={tmp_path}", "select.tau=1.01", "models.target=toy:llama"]
    asked += ["--json", str(out), "--seeds", "1", "--arms", "random", "criterion + token mask"]
    transfer.main(asked)
    rows = json.loads(out.read_text())["rows"]
    assert [row["arm"] for row in rows] == [
        "target, untouched",
        "random",
        "criterion + token mask",
        "ceiling (original data)",
        transfer.WEIGHTS,
        "specialist",
        "base",
        transfer.LABELS,
    ]
    assert out.with_suffix(".svg").read_text().startswith("<?xml")
    assert all(row["examples"] > 0 for row in rows[1:3])
    found = {row["arm"]: row["accuracy"] for row in rows}
    assert found[transfer.WEIGHTS] == found["specialist"]  # the target is the base itself
    capsys.readouterr()
    transfer.main(asked)
    assert "seed 0" not in capsys.readouterr().out  # no stage ran
    assert json.loads(out.read_text())["rows"] == rows
