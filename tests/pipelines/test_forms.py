"""Question forms and their fillers."""

from hypothesis import given
from hypothesis import strategies as st

from stillhouse.pipelines.forms import mine, strong

WORDS = st.sampled_from(["the", "Port", "of", "Ada", "Brun7", "is", "open", "where"])
TEXTS = st.lists(st.lists(WORDS, min_size=1, max_size=7).map(" ".join), max_size=12)


def made(*texts: str, further: tuple[str, ...] = ()) -> set[str]:
    """What the forms of texts make, beyond the texts."""
    found = mine(texts, further)
    every = {form.filled(filler) for form in found.forms for filler in found.of_kind(form)}
    return every - set(texts)


def test_two_prompts_that_differ_in_a_word_are_a_form() -> None:
    found = mine(["close the window now", "close the garden now"])
    assert [(form.head, form.tail) for form in found.forms] == [("close the ", " now")]
    assert found.fillers[found.forms[0].kind] == {"window": 1, "garden": 1}
    assert found.forms[0].support == 2


def test_forms_that_share_a_filler_take_the_fillers_of_all() -> None:
    texts = ("open the window now", "open the door now", "paint the door red", "paint the wall red")
    assert made(*texts) == {"open the wall now", "paint the window red"}


def test_forms_that_share_none_do_not() -> None:
    assert (
        made("open the window now", "open the door now", "eat the pie hot", "eat the egg hot")
        == set()
    )


def test_a_slot_is_no_wider_than_what_differs() -> None:
    found = mine(["it was a red house", "it was a red barn"])
    assert [form.head for form in found.forms] == ["it was a red "]


def test_a_name_makes_a_form_wherever_it_stands() -> None:
    texts = ("Which port does Navulm listen on?", "Tell me the team behind Morost.")
    assert made(*texts) == {
        "Which port does Morost listen on?",
        "Tell me the team behind Navulm.",
    }


def test_a_name_may_stand_first_where_another_does() -> None:
    texts = ("Ulmdex owner?", "Navbra owner?", "Is there an owner of Navbra", "what of Wex9")
    assert "what of Ulmdex" in made(*texts)
    assert "Wex9 owner?" in made(*texts)


def test_names_that_only_ever_stand_first() -> None:
    assert made("Ulmdex owner?", "Navbra owner?", "Navbra port?") == {"Ulmdex port?"}
    questions = ("Which port?", "What port?", "Which team?", "Which day?")
    assert made(*questions) == set()


def test_the_first_word_of_a_sentence_and_a_shortened_one_are_no_names() -> None:
    assert mine(["Where is it? Tell me now.", "I am here and it's late, I'm off"]).forms == ()


def test_further_texts_lend_fillers_and_no_forms() -> None:
    texts = ("open the window now", "open the door now")
    further = ("open the gate now", "close the gate then", "close the hatch then")
    assert made(*texts, further=further) == {"open the gate now"}
    assert mine(texts, further).fillers[-1] == {"window": 1, "door": 1, "gate": 0}


def test_what_is_no_accident() -> None:
    """Sixteen forms with twelve fillers each, and seventy-seven with one."""
    assert 1 < strong([12] * 16 + [1] * 77) < 12
    assert strong([1, 1, 1]) < 1
    assert strong([]) == 0


def test_a_form_knows_the_first_text_it_is_in() -> None:
    found = mine(["unlike the others", "close the window now", "close the garden now"])
    assert [form.place for form in found.forms] == [1]


@given(TEXTS)
def test_every_text_of_a_form_is_made_again(texts: list[str]) -> None:
    found = mine(texts)
    for form in found.forms:
        fillers = found.of_kind(form)
        assert len(set(fillers)) == len(fillers)
        assert texts[form.place] in {form.filled(filler) for filler in fillers}
    assert mine(texts) == found
