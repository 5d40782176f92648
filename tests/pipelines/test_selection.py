"""The selection query on scores made by hand."""

import math
from dataclasses import replace

import pytest

from stillhouse.errors import SourceError
from stillhouse.pipelines.selection import judge
from stillhouse.storage.records import (
    CompletionRecord,
    PromptRecord,
    Role,
    ScoreRecord,
    Status,
)
from stillhouse.workers.scripted import Script
from tests.pipelines.conftest import Line, code_of, scripts

TAU = 1.5
THRESHOLD = math.log(TAU)


def score(
    name: str, gap: float, confidence: float = -1.0, status: Status = "kept", round_: int = 0
) -> ScoreRecord:
    logp = [confidence]
    return ScoreRecord(
        completion_id=name,
        prompt_id=f"prompt {name}",
        round=round_,
        prompt_tokens=2,
        token_ids=[1],
        token_ends=[1],
        logp_specialist=logp,
        logp_base=logp,
        gap=gap,
        confidence=confidence,
        status=status,
        reason=None if status == "kept" else "empty_answer",
    )


def verdicts(
    line: Line,
    scores: list[ScoreRecord],
    answers: dict[str, str] | None = None,
    finish: dict[str, str] | None = None,
    round_: int = 0,
    roles: dict[str, Role] | None = None,
    texts: dict[str, str] | None = None,
    **select,
) -> dict[str, str | None]:
    """Commit scores, select, and return the reason against each (None: kept)."""
    line.tree["select"] = {"tau": TAU, **select}
    line.tree["data"]["controls"] = line.tree["data"]["pool"]
    completions = [
        CompletionRecord(
            completion_id=item.completion_id,
            prompt_id=item.prompt_id,
            text=(answers or {}).get(item.completion_id, f"answer {item.completion_id}"),
            finish=(finish or {}).get(item.completion_id, "stop"),
            round=item.round,
        )
        for item in scores
        if item.completion_id is not None
    ]
    prompts = [
        PromptRecord(
            prompt_id=item.prompt_id,
            text=(texts or {}).get(item.completion_id or "", item.prompt_id),
            rendered=item.prompt_id,
            origin="pool",
            role=(roles or {}).get(item.completion_id or "", "pool"),
            split="train",
            round=item.round,
            parent_id=None,
            locator="",
            status="kept",
            reason=None,
        )
        for item in scores
    ]
    line.commit("ingest", "00000", prompts=prompts)
    line.commit("score", "00000", scores=scores, completions=completions)
    rows = [row for part in judge(line.stage("select"), round_) for row in part]
    assert [row.completion_id for row in rows] == sorted(row.completion_id for row in rows)
    assert all((row.status == "kept") == (row.reason is None) for row in rows)
    return {row.completion_id: row.reason for row in rows}


def test_the_threshold_is_the_logarithm_of_tau(line: Line) -> None:
    below, above = (math.nextafter(THRESHOLD, side) for side in (-math.inf, math.inf))
    scores = [score("a", THRESHOLD), score("b", below), score("c", above), score("d", -3.0)]
    assert verdicts(line, scores) == {
        "a": None,
        "b": "low_gap",
        "c": None,
        "d": "low_gap",
    }


def test_confidence(line: Line) -> None:
    scores = [score("a", 9, -2.0), score("b", 9, -2.001), score("c", 0, -9)]
    assert verdicts(line, scores, criteria=[{"signal": "confidence", "at_least": -2.0}]) == {
        "a": None,
        "b": "low_confidence",
        "c": "low_gap",  # the first objection is the one that is told
    }


def test_a_cut_answer_is_not_one(line: Line) -> None:
    assert verdicts(line, [score("a", 9)], finish={"a": "length"}) == {"a": "truncated"}


def test_the_quota_of_an_answer_goes_to_the_widest_gaps(line: Line) -> None:
    scores = [score("a", 1.0), score("b", 3.0), score("c", 2.0), score("d", 1.0), score("e", 0.0)]
    answers = {"a": "X", "b": "X", "c": "X", "d": "Y", "e": "X"}
    assert verdicts(line, scores, answers, max_per_answer=2) == {
        "a": "over_answer_quota",
        "b": None,
        "c": None,
        "d": None,
        "e": "low_gap",
    }


def test_the_budget_goes_to_the_widest_gaps_and_ties_to_the_lower_id(line: Line) -> None:
    scores = [score("d", 2.0), score("b", 1.0), score("c", 1.0), score("a", 1.0), score("e", 0.1)]
    assert verdicts(line, scores, budget=3) == {
        "a": None,
        "b": None,
        "c": "over_budget",
        "d": None,
        "e": "low_gap",
    }


def test_what_the_quota_takes_away_leaves_its_place_in_the_budget(line: Line) -> None:
    scores = [score("a", 3.0), score("b", 2.0), score("c", 1.0)]
    answers = {"a": "X", "b": "X", "c": "Y"}
    assert verdicts(line, scores, answers, max_per_answer=1, budget=2) == {
        "a": None,
        "b": "over_answer_quota",
        "c": None,
    }


def test_the_budget_is_for_the_pool(line: Line) -> None:
    scores = [score("a", 3.0, round_=1), score("b", 2.0, round_=1), score("c", 2.0)]
    assert verdicts(line, scores, budget=1, round_=1) == {"a": None, "b": None}


def test_unscored_prompts_are_no_candidates(line: Line) -> None:
    failed = replace(score("b", 9.0, status="failed"), completion_id=None, gap=None)
    assert verdicts(line, [score("a", 9.0), failed]) == {"a": None}


def test_the_order_of_rows_and_shards_changes_nothing(line: Line) -> None:
    scores = [score(name, gap) for name, gap in zip("abcdef", (1, 2, 1, 2, 1, 2), strict=True)]
    assert verdicts(line, scores, budget=4) == verdicts(line, scores[::-1], budget=4)


@pytest.mark.parametrize("count", [3, 4, 5, 9])
def test_verdicts_come_in_shards(line: Line, count: int) -> None:
    assert len(verdicts(line, [score(f"{n}", 9.0) for n in range(count)])) == count
    parts = [len(part) for part in judge(line.stage("select"), 0)]
    assert sum(parts) == count
    assert all(size == 4 for size in parts[:-1])


CONTROLS: dict[str, Role] = dict.fromkeys(("k1", "k2", "k3", "k4"), "control")


def controls(*confidences: float) -> list[ScoreRecord]:
    return [score(f"k{place}", 9.0, value) for place, value in enumerate(confidences, start=1)]


@pytest.mark.parametrize(("share", "passing"), [(0.0, 0), (0.24, 0), (0.25, 1), (0.5, 2)])
def test_controls_calibrate_a_bound(line: Line, share: float, passing: int) -> None:
    """The first control that may not pass is the bound, and is not passed."""
    scores = [*controls(-1.0, -2.0, -3.0, -4.0), score("a", 9, -0.9), score("b", 9, -1.5)]
    scores += [score("c", 9, -2.5), score("d", 9, -3.5)]
    found = verdicts(
        line, scores, roles=CONTROLS, criteria=[{"signal": "confidence", "controls": share}]
    )
    told = [found[name] for name in CONTROLS]
    assert told == ["control"] * passing + ["low_confidence"] * (4 - passing)
    kept = [name for name in "abcd" if found[name] is None]
    assert kept == list("abcd"[: passing + 1])


def test_controls_calibrate_later_rounds(line: Line) -> None:
    scores = [*controls(-1.0), score("a", 9, -0.5, round_=1), score("b", 9, -1.0, round_=1)]
    criteria = [{"signal": "confidence", "controls": 0.0}]
    found = verdicts(line, scores, roles=CONTROLS, criteria=criteria, round_=1)
    assert found == {"a": None, "b": "low_confidence"}


def test_without_a_control_nothing_is_calibrated(line: Line) -> None:
    with pytest.raises(SourceError, match=r"confidence is calibrated .* data\.controls"):
        verdicts(line, [score("a", 9)], criteria=[{"signal": "confidence", "controls": 0.1}])
    with pytest.raises(SourceError, match="no control prompt has a whole answer"):
        verdicts(
            line,
            [score("a", 9), score("k1", 9)],
            roles=CONTROLS,
            finish={"k1": "length"},
            criteria=[{"signal": "confidence", "controls": 0.1}],
        )


def test_what_could_not_be_measured_is_neither_low_nor_a_bound(line: Line) -> None:
    """No target answered: there is no score of it, of controls neither."""
    line.tree["score"] = {"target": True}
    found = verdicts(
        line,
        [score("a", 9), *controls(-1.0)],
        roles=CONTROLS,
        criteria=[{"signal": "target_weakness", "controls": 0.4}],
    )
    assert found == {"a": "unmeasured_target_weakness", "k1": "unmeasured_target_weakness"}


def test_a_quantile_is_of_the_round_without_controls_and_seeds(line: Line) -> None:
    scores = [score(name, gap) for name, gap in zip("abcde", (1, 2, 3, 4, 5), strict=True)]
    scores += [score("k1", 99.0), score("s", -1.0)]
    found = verdicts(
        line,
        scores,
        roles={"k1": "control", "s": "seed"},
        tau=None,
        criteria=[{"signal": "gap", "quantile": 0.5}],
    )
    assert found == {
        "a": "low_gap",
        "b": "low_gap",
        "c": None,
        "d": None,
        "e": None,
        "k1": "control",
        "s": None,
    }


def test_seeds_pass_and_come_first_in_the_budget(line: Line) -> None:
    scores = [score("a", 3.0), score("s", 0.0), score("t", 0.0)]
    roles: dict[str, Role] = {"s": "seed", "t": "seed"}
    found = verdicts(line, scores, roles=roles, finish={"t": "length"}, budget=1)
    assert found == {"a": "over_budget", "s": None, "t": "truncated"}


def test_the_budget_in_tokens_counts_prompts_and_answers(line: Line) -> None:
    scores = [score(name, gap) for name, gap in zip("abc", (3, 2, 1), strict=True)]
    found = verdicts(line, scores, budget_tokens=6)  # 2 of the prompt and 1 of the answer, each
    assert found == {"a": None, "b": None, "c": "over_budget"}


def test_a_cluster_of_like_prompts_has_a_quota(line: Line) -> None:
    texts = {"a": "one two", "b": "Two one one", "c": "three"}
    scores = [score("a", 1.0), score("b", 2.0), score("c", 3.0)]
    found = verdicts(line, scores, texts=texts, max_per_cluster=1)
    assert found == {"a": "over_cluster_quota", "b": None, "c": None}


def test_without_tau_and_criteria_all_pass(line: Line) -> None:
    assert verdicts(line, [score("a", -5.0)], tau=None) == {"a": None}


def test_a_random_order_is_of_the_seed(line: Line) -> None:
    scores = [score(f"{number}", float(number)) for number in range(20)]
    kept = {
        seed: {
            name
            for name, reason in verdicts(
                line, scores, tau=None, order="random", seed=seed, budget=8
            ).items()
            if reason is None
        }
        for seed in (0, 1)
    }
    assert kept[0] != kept[1]
    assert all(kept[seed] != {str(number) for number in range(12, 20)} for seed in kept)


def test_the_reject_rate_of_an_origin_counts_answers_that_could_not_be_scored(line: Line) -> None:
    made = scripts()
    codes = made["base#adapter"]
    made["base#adapter"] = Script(
        lambda prompt: "" if "mute" in prompt else code_of(prompt), codes.logp
    )
    line.workers.scripts = made
    rows = [
        ("here", "special"),
        ("here", "common ground"),
        ("there", "mute"),
        ("there", "mute too"),
    ]
    pool = line.jsonl("pool", ({"prompt": text, "origin": origin} for origin, text in rows))
    line.tree["data"]["pool"] = [{"ref": pool, "origin_column": "origin"}]
    line.questions(**{"two words": "C22"})
    line.run("select")
    assert line.entry("select").facts["origins"] == {
        "here": {"rows": 2, "rejected": 1, "reject_rate": 0.5},
        "there": {"rows": 2, "rejected": 2, "reject_rate": 1.0},
    }


def test_the_facts_say_what_was_asked_and_how_many_controls_passed(line: Line) -> None:
    line.tree["data"]["controls"] = [
        {"ref": line.jsonl("controls", [{"prompt": "special too"}, {"prompt": "common thing"}])}
    ]
    line.pool("special", "common ground")
    line.questions(**{"two words": "C22"})
    line.run("select")
    asked = {"signal": "gap", "bound": math.log(1.5), "controls_passed": 0.5}
    assert line.entry("select").facts["criteria"] == [asked]
    assert line.rows(
        "SELECT selections.reason FROM selections JOIN prompts USING (prompt_id) "
        "WHERE role = 'control' ORDER BY 1"
    ) == [("control",), ("low_gap",)]


def test_the_target_is_asked_too(line: Line) -> None:
    """It knows what is common: only the other answer is worth training on."""
    made = scripts()
    made["target"] = Script(str, lambda pair: -0.1 if "known" in pair.prompt else -3.0)
    line.workers.scripts = made
    line.tree["score"] = {"target": True}
    line.tree["select"] = {"criteria": [{"signal": "target_weakness", "at_least": 1.0}]}
    line.tree["expand"] = {"rounds": 1, "generators": ["few_shot"], "prompts_per_round": 2}
    line.pool("special", "special known")
    line.questions(**{"two words": "C22"})
    line.run("expand")
    sql = (
        "SELECT text, selections.reason FROM selections JOIN prompts USING (prompt_id) "
        "WHERE selections.round = 0 ORDER BY 1"
    )
    assert line.rows(sql) == [("special", None), ("special known", "low_target_weakness")]
    [(scores, targets)] = line.rows(
        "SELECT (SELECT count(*) FROM scores WHERE status = 'kept'), count(*) FROM target_scores"
    )
    assert scores == targets > 2
