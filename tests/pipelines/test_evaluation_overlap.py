"""ROUGE-L against values by hand, and a plain longest common subsequence."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.pipelines.evaluation_overlap import Questions, words


def test_words_are_those_of_any_script_without_punctuation() -> None:
    assert words("Fracture, of the LEFT-hand (Ä1)") == [
        "fracture",
        "of",
        "the",
        "left",
        "hand",
        "ä1",
    ]


def test_by_hand() -> None:
    questions = Questions.of([("a", "police killed the gunman"), ("b", "nothing like it")])
    # Lin 2004, §3: LCS "police the gunman" of 4 and 4 words.
    assert questions.nearest("Police kill the gunman.") == ("a", 0.75)
    assert questions.nearest("the gunman killed police") == ("a", 0.5)
    assert questions.nearest("nothing like it") == ("b", 1.0)


def test_the_first_of_several_and_none() -> None:
    assert Questions.of([("a", "x y"), ("b", "X, y!")]).nearest("x y") == ("a", 1.0)
    assert Questions.of([]).nearest("x") == (None, None)


WORDS = st.lists(st.sampled_from("abcd"), max_size=12)


@given(WORDS, st.lists(WORDS, min_size=1, max_size=4))
def test_it_is_the_f_measure_of_the_longest_common_subsequence(
    text: list[str], others: list[list[str]]
) -> None:
    questions = Questions.of([(str(i), " ".join(other)) for i, other in enumerate(others)])
    expected = [
        2 * common(text, other) / (len(text) + len(other)) if text or other else 1.0
        for other in others
    ]
    name, found = questions.nearest(" ".join(text))
    assert found == pytest.approx(max(expected))
    assert name is not None
    assert expected[int(name)] == pytest.approx(max(expected))


def common(one: list[str], two: list[str]) -> int:
    row = [0] * (len(two) + 1)
    for a in one:
        new = [0]
        for j, b in enumerate(two):
            new.append(row[j] + 1 if a == b else max(row[j + 1], new[-1]))
        row = new
    return row[-1]
