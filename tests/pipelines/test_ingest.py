"""Reading sources: duplicates, leaks, lengths, malformed lines, and every row accounted for."""

import re
from typing import Any

import pytest

from stillhouse.errors import SourceError
from stillhouse.storage.manifest import Counts
from tests.pipelines.conftest import Line, Notes


def prompts(line: Line) -> list[tuple[Any, ...]]:
    return line.rows("SELECT text, status, reason FROM prompts ORDER BY locator, text")


@pytest.fixture
def asked(line: Line) -> Line:
    line.questions(**{"What is asked": "A"})
    return line


def test_prompts_are_normalised_and_rendered(asked: Line) -> None:
    asked.tree["data"]["template"] = {"prompt": "Q: {text}\nA:"}
    asked.pool("  one\t two ", "three")
    asked.run("ingest")
    rows = asked.rows("SELECT text, rendered, status, round, parent_id FROM prompts ORDER BY text")
    assert rows == [
        ("one two", "Q: one two\nA:", "kept", 0, None),
        ("three", "Q: three\nA:", "kept", 0, None),
    ]


def test_a_source_may_go_without_the_template(asked: Line) -> None:
    asked.tree["data"]["template"] = {"prompt": "Q: {text}"}
    asked.tree["data"]["pool"][0]["template"] = "none"
    asked.pool("bare")
    asked.run("ingest")
    assert asked.rows("SELECT rendered FROM prompts") == [("bare",)]


def test_the_first_of_each_text_stays_whichever_source_it_comes_from(asked: Line) -> None:
    second = asked.jsonl("second", [{"prompt": "twice"}, {"prompt": "alone"}])
    asked.tree["data"]["pool"].append({"ref": second, "origin": "second"})
    asked.pool("twice", "once", " twice")
    asked.run("ingest")
    rows = asked.rows("SELECT text, origin, status, reason FROM prompts ORDER BY ALL")
    assert rows == [
        ("alone", "second", "kept", None),
        ("once", "pool", "kept", None),
        ("twice", "pool", "kept", None),
        ("twice", "pool", "rejected", "duplicate"),
        ("twice", "second", "rejected", "duplicate"),
    ]
    assert asked.entry("ingest").counts == Counts(rows_in=6, kept=4, rejected=2)
    assert asked.entry("ingest").facts["origins"] == {
        "pool": {"rows": 3, "kept": 2},
        "second": {"rows": 2, "kept": 1},
    }


def test_a_question_in_the_pool_is_a_leak(asked: Line) -> None:
    asked.pool("What  is asked", "fine", "What is asked")
    asked.run("ingest")
    assert sorted(prompts(asked)) == [
        ("What is asked", "rejected", "overlaps_evaluation"),
        ("What is asked", "rejected", "overlaps_evaluation"),
        ("fine", "kept", None),
    ]
    assert asked.rows("SELECT status FROM questions") == [("kept",)]


def test_a_prompt_that_is_too_long(asked: Line) -> None:
    asked.tree["data"]["max_prompt_tokens"] = 4  # three words and BOS
    asked.pool("one two three", "one two three four", "What is asked")
    asked.run("ingest")
    assert prompts(asked)[1:2] == [
        ("one two three four", "rejected", "too_long: 5 tokens, limit 4")
    ]


def test_a_question_that_is_too_long_is_no_leak(line: Line) -> None:
    line.tree["data"]["max_prompt_tokens"] = 4
    line.questions(**{"a b c d": "A", "short": "B"})
    line.pool("a b c d", "x")
    line.run("ingest")
    assert sorted(prompts(line)) == [
        ("a b c d", "rejected", "too_long: 5 tokens, limit 4"),
        ("x", "kept", None),
    ]


def test_a_question_that_is_set_aside_for_its_form_is_no_leak(line: Line) -> None:
    """With the template it is too long; the same text without the template is a prompt."""
    line.tree["data"] |= {"max_prompt_tokens": 3, "template": {"prompt": "Q: {text}"}}
    line.tree["data"]["pool"][0]["template"] = "none"
    line.questions(**{"a b": "A", "c": "B"})
    line.pool("a b")
    line.run("ingest")
    assert prompts(line) == [("a b", "kept", None)]
    assert line.rows("SELECT text FROM questions WHERE status = 'kept'") == [("c",)]


def test_a_question_without_an_answer_is_set_aside(line: Line) -> None:
    line.pool("a thing")
    line.questions(asked="A", open="", blank="  ")
    line.run("ingest")
    rows = line.rows("SELECT text, status, reason FROM questions ORDER BY locator")
    aside = ("rejected", "empty_reference")
    assert rows == [("asked", "kept", None), ("open", *aside), ("blank", *aside)]


def test_malformed_lines_are_set_aside_with_their_numbers(asked: Line) -> None:
    asked.jsonl(
        "pool", [{"prompt": "good"}, "{broken", "[1]", {"other": 1}, {"prompt": ""}, {"prompt": 5}]
    )
    notes = Notes()
    asked.run("ingest", notes)
    [note] = notes.heard
    assert re.search(r"3 malformed rows were set aside, the first at .*pool.jsonl:2 \(malf", note)
    rows = asked.rows("SELECT locator, text, status, reason FROM prompts ORDER BY locator")
    numbers = [int(locator.rpartition(":")[2]) for locator, *_ in rows]
    assert numbers == [1, 2, 3, 4, 5, 6]
    assert [(text, status) for _, text, status, _ in rows] == [
        ("good", "kept"),
        ("", "failed"),
        ("", "failed"),
        ("", "failed"),
        ("", "rejected"),
        ("5", "kept"),
    ]
    reasons = [reason for *_, reason in rows[1:5]]
    assert reasons[0].startswith("malformed: expected a JSON object, found invalid JSON")
    assert reasons[1] == "malformed: expected a JSON object, found an array"
    assert reasons[2] == "malformed: expected a value in 'prompt', found none"
    assert reasons[3] == "empty"
    assert asked.entry("ingest").counts == Counts(rows_in=7, kept=3, rejected=1, failed=3)
    assert len(set(asked.rows("SELECT prompt_id FROM prompts"))) == 6


def test_a_limit_counts_lines(asked: Line) -> None:
    asked.tree["data"]["pool"][0]["limit"] = 2
    asked.pool("one", "two", "three")
    asked.run("ingest")
    assert [text for text, *_ in prompts(asked)] == ["one", "two"]


@pytest.mark.parametrize("rows", [[], ["{broken"], [{"prompt": "What is asked"}]])
def test_a_pool_without_a_usable_row(asked: Line, rows: list) -> None:
    asked.jsonl("pool", rows)
    for _ in range(2):  # and again, when the rows are cached
        with pytest.raises(
            SourceError, match="one usable row in the seeds and the pool, found none"
        ):
            asked.run("ingest")
    asked.pool("now there is one")
    asked.run("ingest")


def test_questions_without_a_usable_row(line: Line) -> None:
    line.pool("one")
    with pytest.raises(SourceError, match="one usable row in the questions, found none"):
        line.run("ingest")


def test_a_column_that_is_not_there(asked: Line) -> None:
    asked.jsonl("pool", [{"promt": "one"}])
    with pytest.raises(SourceError, match=r"expected a column 'prompt'.*did you mean 'promt'"):
        asked.run("ingest")


def test_origin_may_be_a_column(asked: Line) -> None:
    asked.tree["data"]["pool"][0]["origin_column"] = "kind"
    rows = [{"prompt": "one", "kind": "x"}, {"prompt": "two", "kind": "y"}]
    asked.jsonl("pool", rows)
    asked.run("ingest")
    assert asked.rows("SELECT text, origin FROM prompts ORDER BY text") == [
        ("one", "x"),
        ("two", "y"),
    ]


def test_the_split_is_by_text(asked: Line) -> None:
    asked.tree["data"]["heldout_percent"] = 50
    texts = [f"text number {number}" for number in range(40)]
    asked.pool(*texts)
    asked.run("ingest")
    heldout = asked.rows("SELECT text FROM prompts WHERE split = 'heldout'")
    assert 8 < len(heldout) < 32
    asked.pool(*texts[::-1], "one more")
    asked.run("ingest")
    again = asked.rows("SELECT text FROM prompts WHERE split = 'heldout'")
    assert set(heldout) <= set(again)


def test_questions_keep_their_reference(line: Line) -> None:
    line.jsonl(
        "questions",
        [{"prompt": "q1", "answer": " A "}, {"prompt": "q1", "answer": "B"}, {"prompt": "q2"}],
    )
    line.pool("one")
    line.run("ingest")
    rows = line.rows("SELECT text, reference, status, reason FROM questions ORDER BY locator")
    assert rows == [
        ("q1", "A", "kept", None),
        ("q1", "B", "rejected", "duplicate"),
        ("", "", "failed", "malformed: expected a value in 'answer', found none"),
    ]


def test_of_equal_prompts_a_seed_comes_before_a_control_and_that_before_the_pool(
    line: Line,
) -> None:
    line.pool("one", "two", "three")
    line.questions(**{"What is asked": "A"})
    for name, texts in (("seeds", ["one", "What is asked"]), ("controls", ["one", "two"])):
        rows = ({"prompt": text} for text in texts)
        line.tree["data"][name] = [{"ref": line.jsonl(name, rows)}]
    line.run("ingest")
    kept = line.rows("SELECT text, role, origin FROM prompts WHERE status = 'kept' ORDER BY 1")
    assert kept == [
        ("one", "seed", "seed"),
        ("three", "pool", "pool"),
        ("two", "control", "control"),
    ]
    assert line.rows("SELECT reason FROM prompts WHERE role = 'seed' AND status <> 'kept'") == [
        ("overlaps_evaluation",)
    ]
