import hashlib
import json
from collections import Counter
from dataclasses import replace

import pytest

from stillhouse.errors import ConfigError, SourceError
from stillhouse.workers.sources.icd10cm import (
    Icd10Config,
    _descriptions,
    build,
    concept,
    normalise,
)
from stillhouse.workers.sources.refs import BUILDER

SPLITS = ("private", "evaluation", "pool", "lookalike", "elsewhere")
CONFIG = Icd10Config(
    categories=25,
    pool_per_category=16,
    lookalikes=60,
    elsewhere=80,
    train_per_category=16,
    test_per_category=8,
)


def rows(split: str, config: Icd10Config = CONFIG) -> list[dict[str, str]]:
    return list(build(split, config))


def prompts(split: str, config: Icd10Config = CONFIG) -> list[str]:
    return [row["prompt"] for row in rows(split, config)]


@pytest.mark.parametrize(
    ("split", "count", "columns"),
    [
        ("private", 25 * 16, {"prompt", "response"}),
        ("evaluation", 25 * 8, {"prompt", "response"}),
        ("pool", 25 * 16, {"prompt", "origin"}),
        ("lookalike", 60, {"prompt", "origin"}),
        ("elsewhere", 80, {"prompt", "origin"}),
    ],
)
def test_split_has_its_rows_and_columns(split: str, count: int, columns: set[str]) -> None:
    found = rows(split)
    assert len(found) == count
    assert all(set(row) == columns for row in found)


def test_no_text_occurs_twice_in_any_split() -> None:
    texts = [text for split in SPLITS for text in prompts(split)]
    assert len(texts) == len(set(texts))


CLAVICLE = "displaced fracture of shaft of clavicle"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Displaced fracture of shaft of left clavicle, sequela", CLAVICLE),
        ("Displaced fracture of shaft of clavicle, initial encounter for open fracture", CLAVICLE),
        ("Displaced fracture of shaft of unspecified clavicle, subsequent encounter", CLAVICLE),
        (
            "Displaced fracture of shaft of right ulna, sequela",
            "displaced fracture of shaft of ulna",
        ),
        ("Senile ectropion of right eye, upper eyelid", "senile ectropion of upper eyelid"),
    ],
)
def test_concept_forgets_side_and_encounter(text: str, expected: str) -> None:
    assert concept(text) == expected


def test_no_concept_of_an_evaluation_text_is_seen_elsewhere_in_its_category() -> None:
    owner = {text: code for code, texts in _descriptions().items() for text in texts}

    def concepts(split: str) -> list[tuple[str, str]]:
        return [(owner[text], concept(text)) for text in prompts(split)]

    held_out = concepts("evaluation")
    assert len(held_out) == len(set(held_out))
    assert not set(held_out) & {*concepts("private"), *concepts("pool"), *concepts("lookalike")}


def test_every_text_is_normalised() -> None:
    assert all(text and text == normalise(text) for split in SPLITS for text in prompts(split))


@pytest.mark.parametrize("split", SPLITS)
def test_same_seed_same_rows_other_seed_other_rows(split: str) -> None:
    assert rows(split) == rows(split)
    assert rows(split) != rows(split, replace(CONFIG, seed=1))


def test_each_category_has_its_share() -> None:
    private = Counter(row["response"] for row in rows("private"))
    evaluation = Counter(row["response"] for row in rows("evaluation"))
    assert set(private.values()) == {16}
    assert set(evaluation.values()) == {8}
    assert private.keys() == evaluation.keys()


def test_labels_are_those_of_the_book() -> None:
    # By hand: N80 endometriosis, H26 other cataract, T23 burn and corrosion of wrist and hand,
    # S52 fracture of forearm (its shaft of radius is S52.3).
    whole = Icd10Config(
        categories=505,
        train_per_category=24,
        pool_per_category=0,
        lookalikes=0,
        elsewhere=0,
        test_per_category=0,
    )
    labels = {row["prompt"]: row["response"] for row in rows("private", whole)}
    endometriosis = {labels[text] for text in labels if text.startswith("Endometriosis")}
    cataract = {labels[text] for text in labels if "juvenile nuclear cataract" in text}
    burns = {
        labels[text]
        for text in labels
        if text.startswith("Burn of first degree of") and "palm" in text
    }
    radius = {labels[text] for text in labels if "of shaft of left radius" in text}
    assert (endometriosis, cataract, burns, radius) == ({"N80"}, {"H26"}, {"T23"}, {"S52"})


def test_unlabelled_descriptions_belong_to_the_right_categories() -> None:
    owner = {text: code for code, texts in _descriptions().items() for text in texts}
    trained = {row["response"] for row in rows("private")}
    assert {owner[text] for text in prompts("pool")} == trained
    assert not {owner[text] for text in prompts("lookalike")} & trained
    assert not set(prompts("elsewhere")) & owner.keys()


def test_the_rows_are_those_of_this_builder() -> None:
    """Other rows need another BUILDER: it is the fingerprint of what stages have read."""
    made = json.dumps([rows(split) for split in SPLITS]).encode()
    assert (BUILDER, hashlib.sha256(made).hexdigest()[:16]) == (2, "28b3812431562591")


def test_origins() -> None:
    assert {row["origin"] for row in rows("pool")} == {"icd_same"}
    assert {row["origin"] for row in rows("lookalike")} == {"icd_other"}
    assert Counter(row["origin"] for row in rows("elsewhere")) == {"arithmetic": 40, "everyday": 40}


def test_a_prefix_of_the_pool_is_a_sample_of_it() -> None:
    owner = {text: code for code, texts in _descriptions().items() for text in texts}
    assert len({owner[text] for text in prompts("pool")[:50]}) > 10


def test_a_larger_mix_leaves_the_labelled_splits_alone() -> None:
    more = replace(CONFIG, lookalikes=200, elsewhere=300)
    assert rows("private") == rows("private", more)
    assert rows("evaluation") == rows("evaluation", more)


def test_asking_for_too_much_says_what_there_is() -> None:
    with pytest.raises(
        SourceError,
        match=r"asked for 2000 with 8 concepts .* 32 other descriptions, ICD-10-CM has \d+:",
    ):
        build("private", replace(CONFIG, categories=2000))
    with pytest.raises(SourceError, match="the untrained categories have"):
        build("lookalike", replace(CONFIG, lookalikes=10**6))
    with pytest.raises(SourceError, match="ask for fewer"):
        build("elsewhere", replace(CONFIG, elsewhere=10**6))


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown split 'train'"):
        build("train", CONFIG)
    with pytest.raises(ConfigError, match="lookalikes must be 0 or more"):
        Icd10Config(categories=1, pool_per_category=1, lookalikes=-1, elsewhere=0)
