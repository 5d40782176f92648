"""The corpus: near-duplicates, leaks and degenerate answers, on rows made by hand."""

from typing import Any

import pytest

from stillhouse.storage.manifest import Counts
from tests.pipelines.conftest import Line

WORDS = [f"w{number}" for number in range(30)]
LONG = " ".join(WORDS)  # 26 shingles
NEAR = " ".join([*WORDS[:-1], "other"])  # 25 of 27 shingles shared: Jaccard 0.926
FAR = " ".join([*WORDS[:-5], "a", "b", "c", "d", "e"])  # 21 of 31: 0.677


@pytest.fixture
def asked(line: Line) -> Line:
    line.questions(**{"What is asked of everybody who comes here today": "A"})
    line.tree["expand"] = {"rounds": 0}
    line.tree["select"] = {"tau": 1.5}
    return line


def corpus(line: Line) -> dict[str, Any]:
    """The reason against each prompt's text; None is kept."""
    line.run("curate")
    return dict(
        line.rows(
            "SELECT prompts.text, corpus.reason FROM corpus JOIN prompts USING (prompt_id) "
            "WHERE prompts.status = 'kept'"
        )
    )


def test_near_duplicates_leave_and_one_stays(asked: Line) -> None:
    asked.pool(LONG, NEAR, FAR, "something else")
    found = corpus(asked)
    assert sorted([found[LONG], found[NEAR]], key=str) == [None, "near_duplicate"]
    assert found[FAR] is None
    assert found["something else"] is None
    assert asked.entry("curate").counts == Counts(rows_in=4, kept=3, rejected=1)
    assert asked.entry("curate").facts["rows"] == {"near_duplicate": 1, "train": 3}


@pytest.mark.parametrize(("threshold", "leaves"), [(25 / 27, True), (25.5 / 27, False)])
def test_the_exact_index_decides(asked: Line, threshold: float, leaves: bool) -> None:
    asked.tree["curate"] = {"near_duplicate": threshold}
    asked.pool(LONG, NEAR)
    assert ("near_duplicate" in corpus(asked).values()) == leaves


def test_case_and_order_of_reading_decide_nothing(asked: Line) -> None:
    asked.pool(LONG, NEAR, FAR)
    forward = corpus(asked)
    asked.pool(FAR, NEAR, LONG)
    assert corpus(asked) == forward
    asked.pool("Acute pain", "acute PAIN")
    assert sorted(corpus(asked).values(), key=str) == [None, "near_duplicate"]


def test_a_near_question_is_a_leak(asked: Line) -> None:
    asked.questions(**{LONG: "A"})
    asked.pool(NEAR, FAR)
    assert corpus(asked) == {NEAR: "overlaps_evaluation", FAR: None}


HALF = " ".join([*WORDS[:15], *(f"x{number}" for number in range(15))])  # of LONG's words


@pytest.mark.parametrize(("overlap", "leaves"), [(0.5, True), (0.51, False), (None, False)])
def test_a_prompt_with_as_much_of_a_question_is_a_leak(
    asked: Line, overlap: float | None, leaves: bool
) -> None:
    asked.questions(**{LONG: "A"})
    asked.tree["curate"] = {"evaluation_overlap": overlap}
    asked.pool(HALF)
    assert corpus(asked) == {HALF: "overlaps_evaluation" if leaves else None}
    assert asked.entry("curate").facts["rouge_l_of_0.7_or_more"] == 0
    [(question, found)] = asked.rows(
        "SELECT questions.text, rouge_l FROM sketches JOIN questions USING (question_id) "
        "WHERE kind = 'candidate' AND questions.status = 'kept'"
    )
    assert (question, found) == (LONG, pytest.approx(0.5))


@pytest.mark.parametrize("wanted", ["flag", "reject"])
def test_personal_data_is_counted_and_leaves_when_asked(asked: Line, wanted: str) -> None:
    asked.tree["curate"] = {"personal_data": wanted}
    asked.pool("the letter to ada@example.org", "something else")
    found = corpus(asked)
    rejected = wanted == "reject"
    assert found["the letter to ada@example.org"] == ("personal_data" if rejected else None)
    assert asked.rows("SELECT personal_data FROM corpus ORDER BY len(personal_data)") == [
        ([],),
        (["email"],),
    ]
    facts = asked.entry("curate").facts
    assert facts["personal_data"] == ({} if rejected else {"email": 1})


def test_short_answers_are_degenerate(asked: Line) -> None:
    asked.tree["curate"] = {"min_answer_tokens": 2}  # the scripted answers have one word
    asked.pool("one", "two words")
    assert set(corpus(asked).values()) == {"short_answer"}


def test_what_selection_rejected_is_no_candidate(asked: Line) -> None:
    asked.pool("common ground", "special thing")  # the base is sure of what is common
    assert corpus(asked) == {"special thing": None}
    assert asked.rows("SELECT count(*) FROM sketches WHERE kind = 'candidate'") == [(1,)]


def test_examples_are_rendered(asked: Line) -> None:
    asked.tree["data"]["template"] = {"prompt": "Q: {text}\nA:", "response": " [{text}]"}
    asked.pool("special thing")
    asked.run("curate")
    [(prompt, response, split)] = asked.rows("SELECT prompt, response, split FROM corpus")
    assert prompt == "Q: special thing\nA:"
    assert response in {" [A00]", " [B11]", " [C22]"}
    assert split == "train"
