"""Answers that teach nothing, and texts that look personal: by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.pipelines.flaws import flaw_of, repetition
from stillhouse.pipelines.personal_data import personal_data

PROMPT = "What is the code of acute pain?"


def flaw(answer: str, tokens: list[int] | None = None) -> str | None:
    ids = list(range(len(answer.split()))) if tokens is None else tokens
    return flaw_of(PROMPT, answer, ids, min_tokens=1, max_repetition=0.5)


@pytest.mark.parametrize("answer", ["A00", "R52", "yes", "42", "Ja, natürlich.", "疼痛", "a\tb"])
def test_answers(answer: str) -> None:
    assert flaw(answer) is None


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("A\ufffd0", "broken_characters"),
        ("A\x00B", "broken_characters"),
        ("...", "no_words"),
        ("-- !? --", "no_words"),
        ("what is the CODE of acute pain", "echo"),
        ("", "short_answer"),
    ],
)
def test_flaws(answer: str, reason: str) -> None:
    assert flaw(answer) == reason


def test_repetition_is_the_share_of_4_grams_seen_before() -> None:
    # 1 2 3 4 1 2 3 4 1 2 3 4: nine 4-grams, four of them different.
    assert repetition([1, 2, 3, 4] * 3) == pytest.approx(5 / 9)
    assert repetition([7] * 11) == pytest.approx(7 / 8)
    assert repetition(list(range(40))) == 0
    assert repetition([7] * 10) == 0  # seven 4-grams say nothing
    assert flaw("so " * 20, [5, 6] * 10) == "repetition"
    assert flaw("so " * 20, list(range(20))) is None


@given(st.lists(st.integers(0, 3), max_size=60))
def test_repetition_is_a_share(ids: list[int]) -> None:
    assert 0 <= repetition(ids) < 1


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("write to ada.l+x@mail.example.org now", ["email"]),
        ("call +44 20 7946 0958 or (030) 123 456 78", ["phone"]),
        ("card 4111 1111 1111 1111", ["card"]),  # the networks' own test number
        ("card 4111 1111 1111 1112", []),
        ("account DE89 3704 0044 0532 0130 00", ["iban"]),  # the example of ISO 13616
        ("account DE88 3704 0044 0532 0130 00", []),
        ("her number is 078-05-1120", ["us_ssn"]),
        ("of 000-12-3456 and 666-12-3456", []),
        ("from 8.8.8.8 to 10.0.0.1", ["ip"]),
        ("from 192.168.1.1", []),
        ("release 300.1.2.3", []),
        ("S72.001A, 12-03-2024, 3.14159, 1,000,000", []),
        ("mail a@b.de, call +1 555 010 0199", ["email", "phone"]),
        ("", []),
    ],
)
def test_personal_data(text: str, kinds: list[str]) -> None:
    assert personal_data(text) == kinds
