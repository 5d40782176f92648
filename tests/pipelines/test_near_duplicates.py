"""Shingles and sketches, against sets made by hand."""

import math

from hypothesis import given
from hypothesis import strategies as st

from stillhouse.pipelines.near_duplicates import ROWS, shingles, sketch


def jaccard(left: list[int], right: list[int]) -> float:
    return len(set(left) & set(right)) / len(set(left) | set(right))


def test_shingles_by_hand() -> None:
    assert shingles("a b C d e f g") == ["a b c d e", "b c d e f", "c d e f g"]
    assert shingles("a b c d e") == ["a b c d e"]
    assert shingles("Short  text") == ["short text"]
    assert shingles("") == [""]


def test_a_shingle_that_comes_again_counts_once() -> None:
    # 11 words, 7 places, and "a b c d e" starts at 0 and 5.
    assert len(shingles("a b c d e a b c d e f")) == 6


def test_the_jaccard_index_by_hand() -> None:
    # 8 and 8 words: 4 shingles each. They differ in the last word: 3 shared, 5 in all.
    one, other = sketch("candidate", [("1", "a b c d e f g h"), ("2", "a b c d e f g x")], 64)
    assert jaccard(one.shingles, other.shingles) == 3 / 5


def test_identical_texts_share_everything() -> None:
    one, other = sketch("candidate", [("1", "Acute pain of Hand"), ("2", "acute pain OF hand")], 64)
    assert one.bands == other.bands
    assert one.shingles == other.shingles
    assert (one.text_id, other.text_id, one.kind) == ("1", "2", "candidate")


def test_disjoint_texts_share_nothing() -> None:
    texts = [("1", "a b c d e f g h i j"), ("2", "q r s t u v w x y z")]
    one, other = sketch("question", texts, 64)
    assert not set(one.bands) & set(other.bands)
    assert jaccard(one.shingles, other.shingles) == 0


def test_a_sketch_depends_on_its_text_alone() -> None:
    [alone] = sketch("candidate", [("1", "a b c d e f g")], 64)
    _, second = sketch("candidate", [("0", "something else"), ("1", "a b c d e f g")], 64)
    assert alone == second
    # Written down: stored sketches are compared with new ones.
    assert (len(alone.bands), len(alone.shingles)) == (64 // ROWS, 3)


def test_near_texts_meet_in_a_band() -> None:
    """At J = 0.9, 1 - (1 - J^4)^16 > 0.999999: of 40 such pairs none may be missed."""
    for number in range(40):
        words = [f"w{number}-{place}" for place in range(64)]
        changed = [*words[:-3], "x", "y", "z"]  # 57 shared shingles of 63
        one, other = sketch("candidate", [("1", " ".join(words)), ("2", " ".join(changed))], 64)
        assert math.isclose(jaccard(one.shingles, other.shingles), 57 / 63)
        assert set(one.bands) & set(other.bands)


@given(st.lists(st.text(min_size=1), min_size=1, max_size=5))
def test_any_text_has_a_sketch_a_column_can_hold(texts: list[str]) -> None:
    records = sketch("candidate", [(str(n), text) for n, text in enumerate(texts)], 16)
    for record in records:
        assert len(record.bands) == 4
        assert all(0 <= value < 2**63 for value in (*record.bands, *record.shingles))
