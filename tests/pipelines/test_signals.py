"""Each signal against its formula, by hand."""

import math
import sys
from typing import Any

import pytest

from stillhouse.configs.select import Signal
from stillhouse.pipelines.signals import measured
from tests.pipelines.conftest import Line

# id, role, token ids, log-probabilities of specialist and base, of the target
ANSWERS: list[tuple[str, str, list[int], list[float], list[float], float | None]] = [
    ("a", "pool", [1, 2], [-0.5, -1.0], [-2.0, -1.5], -3.0),
    ("b", "pool", [1, 3, 4, 5], [-0.25, -0.25, -0.5, 0.0], [-0.5, -1.0, -1.5, -1.0], None),
    ("k", "control", [1], [-2.0], [-3.0], -1.0),
    ("l", "control", [1, 6, 7, 8], [-1.0] * 4, [-4.0] * 4, -1.0),
]


def values(line: Line, *signals: Signal) -> dict[str, tuple[Any, ...]]:
    rows = []
    for name, role, ids, on, off, target in ANSWERS:
        gap = sum(s - b for s, b in zip(on, off, strict=True)) / len(ids)
        sure = sum(on) / len(on)
        known = "NULL" if target is None else target
        rows.append(
            f"('{name}', 'p{name}', '{role}', 'stop', {ids}, {on}, {off}, {gap}, {sure}, "
            f"{len(ids)}, {known})"
        )
    names = "completion_id, prompt_id, role, finish, token_ids, logp_specialist, logp_base, gap, "
    names += "confidence, tokens, target_confidence"
    columns = ", ".join(f"signal_{name}" for name in signals)
    sql = (
        f"WITH answered AS (SELECT * FROM (VALUES {', '.join(rows)}) AS t({names}))"
        f"{measured(set(signals))} SELECT completion_id, {columns} FROM measured ORDER BY 1"
    )
    with line.stage("select").catalog() as catalog:
        return {row[0]: row[1:] for row in catalog.rows(sql)}


def test_gap_confidence_and_what_follows_from_them(line: Line) -> None:
    found = values(line, "gap", "confidence", "surprise", "quotient", "weakest_token")
    assert found["a"] == pytest.approx((1.0, -0.75, 1.75, 1.75 / 0.75, -1.0))
    assert found["b"] == pytest.approx((0.75, -0.25, 1.0, 4.0, -0.5))


def test_a_certain_specialist_divides_by_something(line: Line) -> None:
    ANSWERS.append(("sure", "pool", [9], [0.0], [-2.0], None))
    try:
        assert values(line, "quotient")["sure"] == (pytest.approx(2e6),)
    finally:
        ANSWERS.pop()


def test_the_controlled_gap_is_what_length_does_not_explain(line: Line) -> None:
    """The controls' gaps are 1 at one token and 3 at four: 1 + 2 ln n / ln 4."""
    found = values(line, "controlled_gap")
    assert found["k"] == (pytest.approx(0),)
    assert found["l"] == (pytest.approx(0),)
    assert found["a"] == (pytest.approx(1.0 - (1 + 2 * math.log(2) / math.log(4))),)
    assert found["b"] == (pytest.approx(0.75 - 3.0),)


@pytest.mark.parametrize("left", [["k"], ["k", "m"]])
def test_controls_of_one_length_say_their_mean(
    line: Line, left: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """DuckDB's slope is no number there, and NaN passes every bound."""
    same = [*ANSWERS, ("m", "control", [2], [-1.0], [-4.0], None)]
    kept = [row for row in same if row[1] == "pool" or row[0] in left]
    monkeypatch.setattr(sys.modules[__name__], "ANSWERS", kept)
    level = 1.0 if left == ["k"] else 2.0
    assert values(line, "controlled_gap")["a"] == (pytest.approx(1.0 - level),)


def test_the_content_gap_counts_what_few_answers_hold(line: Line) -> None:
    """Token 1 is in all four answers and weighs nothing."""
    found = values(line, "content_gap")
    assert found["a"] == (pytest.approx(0.5),)
    assert found["b"] == (pytest.approx((0.75 + 1.0 + 1.0) / 3),)
    assert found["k"] == (None,)


def test_likeness_is_to_the_seeds_and_not_to_the_controls(line: Line) -> None:
    """Trigrams of ` ab `: ` ab` and `ab `; of ` xy `: two others. Each prompt counts the others."""
    texts = {"s": "ab", "t": "ab", "k": "xy", "p": "AB", "q": "xy"}
    roles = {"s": "seed", "t": "seed", "k": "control"}
    rows = ", ".join(
        f"('{name}', '{roles.get(name, 'pool')}', '{text}')" for name, text in texts.items()
    )
    sql = (
        f"WITH answered AS (SELECT * FROM (VALUES {rows}) AS t(completion_id, role, prompt_text))"
        f"{measured({'likeness'})} SELECT completion_id, signal_likeness FROM measured"
    )
    with line.stage("select").catalog() as catalog:
        found = dict(catalog.rows(sql))
    kinds = 5  # four trigrams, and one for all that nobody has seen
    like = math.log(2.5 / (4 + kinds / 2)) - math.log(0.5 / (2 + kinds / 2))
    unlike = math.log(0.5 / (4 + kinds / 2)) - math.log(1.5 / (2 + kinds / 2))
    assert found["p"] == pytest.approx(like)
    assert found["q"] == pytest.approx(unlike)
    alone = math.log(1.5 / (2 + kinds / 2)) - math.log(0.5 / (2 + kinds / 2))
    assert found["s"] == found["t"] == pytest.approx(alone)
    assert found["k"] == pytest.approx(
        math.log(0.5 / (4 + kinds / 2)) - math.log(0.5 / (kinds / 2))
    )


def test_what_the_target_knows(line: Line) -> None:
    found = values(line, "target_weakness")
    assert found["a"] == (3.0,)
    assert found["b"] == (None,)


def test_random_is_a_share_of_one_and_of_the_seed(line: Line) -> None:
    line.tree["select"] = {"order": "random"}
    sql = "md5_number_lower('x/7') / 18446744073709551616.0"
    with line.stage("select").catalog() as catalog:
        [(value,)] = catalog.rows(f"SELECT {sql}")
    assert 0 <= value < 1
