"""Few-shot lists and crossed prompts, by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.pipelines.proposals import Seed, few_shot, mutate


def seeds(*texts: str, answer: str = "A") -> list[Seed]:
    return [Seed(f"id {text}", text, answer) for text in texts]


def test_a_list_by_hand() -> None:
    [shots] = few_shot(seeds("one"), shots=3, count=1, random_seed="s")
    assert shots.prompt == "More of the same kind:\n- one\n-"
    assert shots.parent_id == "id one"
    assert shots.instruction.startswith("- one\n\nWrite one more of the same kind")


def test_a_list_shows_different_seeds_and_ends_with_its_parent() -> None:
    given_seeds = seeds("one", "two", "three", "four")
    for shots in few_shot(given_seeds, shots=3, count=20, random_seed="s"):
        shown = [line.removeprefix("- ") for line in shots.prompt.splitlines()[1:-1]]
        assert len(set(shown)) == 3
        assert shots.parent_id == f"id {shown[-1]}"


def test_a_list_keeps_to_one_answer_where_enough_share_it() -> None:
    both = [*seeds("a1", "a2", "a3", answer="A"), *seeds("b1", "b2", answer="B")]
    for shots in few_shot(both, shots=3, count=20, random_seed="s"):
        assert "b" not in shots.prompt.split("kind:")[1]
    mixed = few_shot(both, shots=4, count=20, random_seed="s")  # no answer has four
    assert any("a" in s.prompt.split("kind:")[1] and "b1" in s.prompt for s in mixed)


def test_two_seeds_cross_in_two_ways() -> None:
    crossed = mutate(seeds("x1, y1", "x2, y2"), count=5, random_seed="s")
    assert {(p.parent_id, p.text) for p in crossed} == {
        ("id x1, y1", "x1, y2"),
        ("id x2, y2", "x2, y1"),
    }


@pytest.mark.parametrize(
    "nothing",
    [
        [],
        seeds("only, one"),
        seeds("no comma", "none here either"),
        [*seeds("x1, y1", answer="A"), *seeds("x2, y2", answer="B")],
    ],
    ids=["no seeds", "one seed", "no part to swap", "no two of an answer"],
)
def test_nothing_to_cross(nothing: list[Seed]) -> None:
    assert mutate(nothing, count=5, random_seed="s") == []


def test_pieces_of_a_stream_are_the_stream() -> None:
    many = seeds(*(f"x{n}, y{n}, z{n}" for n in range(9)), "where is Ada now", "who saw Bob")
    whole = mutate(many, 12, "s")
    assert len({proposal.text for proposal in whole}) == 12
    assert mutate(many, 5, "s") + mutate(many, 7, "s", first=5) == whole


def test_the_same_seed_draws_the_same() -> None:
    many = seeds(*(f"x{n}, y{n}, z{n}" for n in range(9)))
    for make in (lambda s: mutate(many, 10, s), lambda s: few_shot(many, 3, 10, s)):
        assert make("s") == make("s")
        assert make("s") != make("t")


parts = st.text("abc", min_size=1, max_size=2)
texts = st.lists(st.lists(parts, min_size=1, max_size=3).map(", ".join), unique=True, max_size=8)


@given(texts, st.integers(0, 12))
def test_crossed_texts_are_new_different_and_made_of_the_seeds(
    found: list[str], count: int
) -> None:
    proposals = mutate(seeds(*found), count, "s")
    made = [proposal.text for proposal in proposals]
    assert len(made) <= count
    assert len(set(made)) == len(made)
    assert not set(made) & set(found)
    pieces = {piece for text in found for piece in text.split(", ")}
    assert all(piece in pieces for text in made for piece in text.split(", "))
