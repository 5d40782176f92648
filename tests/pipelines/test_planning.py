"""What would run and why, what it would cost, and how far a run is."""

import math

import pytest

from stillhouse.pipelines.planning import StagePlan, plan_run, read_status
from stillhouse.storage.lock import RunLock
from tests.pipelines.conftest import Line

PARAMETERS = 1_000


@pytest.fixture
def planned(line: Line, monkeypatch: pytest.MonkeyPatch) -> Line:
    monkeypatch.setattr("stillhouse.pipelines.estimates.parameters", lambda ref: PARAMETERS)
    line.pool(*(f"special thing number {number}" for number in range(10)))
    line.questions(**{"two words": "C22", "one more word": "A00"})
    line.tree["expand"] = {"rounds": 1, "prompts_per_round": 4}
    return line


def states(plans: list[StagePlan]) -> dict[str, str]:
    return {plan.stage: plan.state for plan in plans}


def test_a_new_run(planned: Line) -> None:
    plans = plan_run(planned.runner())
    assert set(states(plans).values()) == {"run"}
    assert {plan.why for plan in plans} == {"never finished"}
    assert not planned.runner().folder.root.exists()  # looking changes nothing


def test_cached_partial_and_changed(planned: Line) -> None:
    planned.run("select")
    folder = planned.runner().folder
    lines = folder.manifest.read_text().splitlines(keepends=True)
    kept = [line for line in lines if '"kind":"stage","stage":"select"' not in line]
    folder.manifest.write_text("".join(kept))
    plans = {plan.stage: plan for plan in plan_run(planned.runner())}
    assert plans["ingest"].state == "cached"
    assert plans["ingest"].why == "finished: 12 of 12 kept"
    assert plans["select"].state == "partial"
    assert plans["select"].why == "4 shards are committed"
    assert plans["expand"].why == "never finished"
    planned.tree["score"] = {"max_new_tokens": 3}
    plans = {plan.stage: plan for plan in plan_run(planned.runner())}
    assert plans["score"].state == "run"
    assert plans["score"].why == "changed: max_new_tokens 16 → 3"
    assert plans["select"].why == "never finished"  # its line is gone
    assert plans["ingest"].state == "cached"


def test_costs_by_hand(planned: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1})
    costs = {plan.stage: plan.cost for plan in plan_run(planned.runner())}
    assert (costs["ingest"].rows, costs["ingest"].tokens) == (12, 0)
    # 10 prompts: answer, specialist and base see 30 + 5 tokens, 2 FLOP a parameter and token
    assert costs["score"].tokens == 10 * 3 * 35
    assert costs["score"].seconds == pytest.approx(1050 * 2 * PARAMETERS / (2 * 70e9))
    assert costs["score"].bytes == 10 * 300
    # 10 + 4 examples, 3 epochs
    assert costs["distill"].tokens == 14 * 3 * 35
    assert costs["distill"].seconds == pytest.approx(1470 * 5 * PARAMETERS / (2 * 70e9))
    assert costs["evaluate"].rows == 2 * 4


def test_a_model_that_is_not_here_yet_has_no_size(planned: Line) -> None:
    planned.tree["models"]["target"] = f"hf:some/model@{'0' * 40}"
    costs = {plan.stage: plan.cost for plan in plan_run(planned.runner())}
    assert costs["distill"] is not None
    assert math.isnan(costs["distill"].seconds)
    assert costs["distill"].tokens > 0
    assert costs["score"] is not None
    assert costs["score"].seconds > 0


def test_a_budget_and_a_limit_bound_the_costs(planned: Line) -> None:
    planned.tree["select"] = {"budget": 3}
    planned.tree["data"]["pool"][0]["limit"] = 6
    costs = {plan.stage: plan.cost for plan in plan_run(planned.runner())}
    assert costs["score"].rows == 6
    assert costs["distill"].rows == 3 + 4


def test_a_stage_that_ran_before_costs_the_same_again(planned: Line) -> None:
    planned.run("score")
    former = planned.entry("score")
    planned.tree["score"] = {"max_new_tokens": 3}
    cost = {plan.stage: plan.cost for plan in plan_run(planned.runner())}["score"]
    assert (cost.rows, cost.tokens, cost.seconds) == (
        former.counts.rows_in,
        former.tokens,
        former.seconds,
    )
    written = planned.runner().folder.root.glob("stages/score/*/*/*.parquet")
    assert cost.bytes == sum(path.stat().st_size for path in written)


def test_why_names_a_few_settings_and_counts_the_rest(planned: Line) -> None:
    planned.run("score")
    planned.tree["data"] |= {"shard_rows": 5, "heldout_percent": 7, "max_prompt_tokens": 99}
    planned.tree["data"]["template"] = {"prompt": "Q {text}", "response": " -> {text}"}
    why = {plan.stage: plan.why for plan in plan_run(planned.runner())}
    assert why["ingest"] == (
        "changed: template.prompt {text} → Q {text}, template.response  {text} →  -> {text}, "
        "heldout_percent 0 → 7, 2 more settings"
    )
    planned.jsonl("pool", [{"prompt": "other data"}])
    planned.tree["data"] |= {"shard_rows": 4, "heldout_percent": 0, "max_prompt_tokens": 256}
    del planned.tree["data"]["template"]
    why = {plan.stage: plan.why for plan in plan_run(planned.runner())}
    assert why["ingest"] == "changed: its models, its data, or this software's way of doing it"


def test_a_cost_is_scaled_by_what_changed(planned: Line) -> None:
    planned.run("distill")
    former = planned.entry("distill")
    planned.tree["select"] = {"tau": 1.2}
    plans = {plan.stage: plan for plan in plan_run(planned.runner())}
    assert plans["select"].why == "changed: tau 1.5 → 1.2"
    assert plans["distill"].why == "changed: its input: curate"
    del planned.tree["select"]
    planned.tree["distill"] = {"epochs": 30}  # ten times the default
    cost = {plan.stage: plan.cost for plan in plan_run(planned.runner())}["distill"]
    assert cost.rows == former.counts.rows_in
    assert cost.tokens == 10 * former.tokens
    assert cost.seconds == pytest.approx(10 * former.seconds)


def test_cached_stages_cost_nothing(planned: Line) -> None:
    planned.run("score")
    plans = plan_run(planned.runner())
    assert [plan.stage for plan in plans if plan.cost is None] == ["ingest", "score"]


def test_status(planned: Line) -> None:
    planned.run("ingest")
    folder = planned.runner().folder
    status = read_status(folder)
    assert (status.name, status.holder) == ("line", None)
    assert status.stages[0].state == "cached"
    assert {stage.state for stage in status.stages[1:]} == {"run"}
    with RunLock(folder):
        assert "run by process" in (read_status(folder).holder or "")


def test_status_is_of_the_recipe_last_started(planned: Line) -> None:
    planned.run("select")
    planned.tree["score"] = {"max_new_tokens": 3}
    planned.run("ingest")
    states = [stage.state for stage in read_status(planned.runner().folder).stages]
    assert states[:3] == ["cached", "run", "run"]
