"""Built-in specialities: splits that keep apart, seeded, of the sizes asked for."""

import csv
import re
from pathlib import Path

import pytest

from stillhouse.errors import SourceError
from stillhouse.workers.sources.reader import fingerprint, read

SIZES = (
    "categories=4&train_per_category=3&test_per_category=2&pool_per_category=2&lookalikes=5&seeds=3"
)
SPLITS = ("private", "evaluation", "pool", "lookalike")


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    """Six intents, eight questions each to learn from and three to be asked."""
    for name, count in (("train", 8), ("test", 3)):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "category"])
            for number in range(count):
                for intent in ("Card_lost?", "b_two", "c", "d", "e", "f"):
                    writer.writerow([f"{name}  question {number} on {intent}", intent])
            writer.writerow(["train question 0 on c", "c"])
    return tmp_path


def rows(ref: str, split: str, home: Path) -> list[dict[str, str]]:
    found = read(ref.format(split=split), home)
    return [row.values for row in found]


def refs() -> dict[str, str]:
    return {
        "banking77": f"builtin:banking77?split={{split}}&folder=.&{SIZES}",
        "iso3166": f"builtin:iso3166?split={{split}}&{SIZES}",
        "icd10cm": f"builtin:icd10cm?split={{split}}&elsewhere=0&{SIZES}",
        "handbook": "builtin:handbook?split={split}&services=6&lookalikes=5&seeds=6",
    }


@pytest.mark.parametrize("name", refs())
def test_no_text_is_in_two_splits(name: str, bank: Path) -> None:
    texts = [row["prompt"] for split in SPLITS for row in rows(refs()[name], split, bank)]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("name", ["banking77", "iso3166", "icd10cm"])
def test_the_sizes_are_those_asked_for(name: str, bank: Path) -> None:
    sizes = {split: len(rows(refs()[name], split, bank)) for split in SPLITS}
    assert sizes == {"private": 12, "evaluation": 8, "pool": 8, "lookalike": 5}
    learnt = {row["response"] for row in rows(refs()[name], "private", bank)}
    assert len(learnt) == 4
    assert {row["response"] for row in rows(refs()[name], "evaluation", bank)} == learnt


@pytest.mark.parametrize("name", refs())
def test_the_truth_is_the_pool_with_its_answers(name: str, bank: Path) -> None:
    pool, truth = (rows(refs()[name], split, bank) for split in ("pool", "truth"))
    assert [row["prompt"] for row in truth] == [row["prompt"] for row in pool]
    assert all(set(row) == {"prompt", "response"} for row in truth)
    assert all(set(row) == {"prompt", "origin"} for row in pool)
    seeds = [row["prompt"] for row in rows(refs()[name], "seeds", bank)]
    assert len(set(seeds)) == len(seeds)
    assert set(seeds) <= {row["prompt"] for row in pool}


@pytest.mark.parametrize("name", refs())
def test_the_seed_draws_others(name: str, bank: Path) -> None:
    one, again, other = (
        rows(refs()[name] + seed, "private", bank) for seed in ("", "&seed=0", "&seed=1")
    )
    assert one == again
    assert one != other


@pytest.mark.parametrize("name", refs())
def test_too_much_is_refused(name: str, bank: Path) -> None:
    ref = refs()[name].replace("lookalikes=5", "lookalikes=99999")
    with pytest.raises(SourceError, match=f"builtin:{name}|lookalikes"):
        rows(ref, "lookalike", bank)
    with pytest.raises(SourceError, match=r"unknown split 'pol': expected .*pool"):
        rows(refs()[name], "pol", bank)


def test_intents_are_words_and_questions_of_both_files_are_asked_once(bank: Path) -> None:
    every = (
        refs()["banking77"]
        .replace("categories=4", "categories=6")
        .replace("lookalikes=5", "lookalikes=0")
    )
    assert {row["response"] for row in rows(every, "private", bank)} >= {"card lost", "b two"}
    asked = [row["prompt"] for row in rows(every, "evaluation", bank)]
    assert all(text.startswith("test question") for text in asked)


def test_a_folder_without_the_files(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"expected train\.csv, test\.csv in folder="):
        rows(refs()["banking77"], "pool", tmp_path)


def test_other_columns(bank: Path) -> None:
    (bank / "test.csv").write_text("question,intent\na,b\n")
    with pytest.raises(SourceError, match="expected the columns text and category"):
        rows(refs()["banking77"], "pool", bank)


def test_a_short_row(bank: Path) -> None:
    with (bank / "test.csv").open("a") as file:
        file.write("no category\n")
    with pytest.raises(SourceError, match="columns text and category in every row"):
        rows(refs()["banking77"], "pool", bank)


@pytest.mark.parametrize("name", refs())
def test_more_seeds_than_there_are_prompts(name: str, bank: Path) -> None:
    ref = re.sub(r"seeds=\d+", "seeds=9999", refs()[name])
    with pytest.raises(SourceError, match="seeds: asked for 9999, the pool has"):
        rows(ref, "seeds", bank)


def test_the_fingerprint_is_of_what_the_files_hold_and_not_of_where(
    bank: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cache = tmp_path_factory.mktemp("cache")
    ref = refs()["banking77"].format(split="pool")
    one = fingerprint(ref, cache, bank)
    moved = bank / "there"
    moved.mkdir()
    for name in ("train.csv", "test.csv"):
        (bank / name).rename(moved / name)
    assert fingerprint(ref.replace("folder=.", "folder=there"), cache, bank) == one
    with (moved / "test.csv").open("a") as file:
        file.write("another question,c\n")
    assert fingerprint(ref.replace("folder=.", "folder=there"), cache, bank) != one


def test_the_handbook_asks_in_forms_that_nobody_shows(tmp_path: Path) -> None:
    ref = refs()["handbook"]
    private = {row["prompt"] for row in rows(ref, "private", tmp_path)}
    asked = [row["prompt"] for row in rows(ref, "evaluation", tmp_path)]
    shown = [row["prompt"] for split in ("pool", "seeds") for row in rows(ref, split, tmp_path)]
    unseen = ("Tell me", "I want", "I have")
    assert len(private) == 6 * 4 * 4
    assert all(text.startswith(unseen) for text in asked)
    assert not any(text.startswith(unseen) for text in shown)
    assert any(text.startswith(unseen) for text in private)


def test_the_handbooks_seeds_name_every_service(tmp_path: Path) -> None:
    seeds = rows(refs()["handbook"], "seeds", tmp_path)
    facts = rows(refs()["handbook"], "truth", tmp_path)
    named = {word.rstrip("?,") for row in facts for word in row["prompt"].split() if len(word) > 1}
    services = {word for word in named if word[:1].isupper() and word not in _FIRST_WORDS}
    assert len(services) == 6
    assert all(any(service in row["prompt"] for row in seeds) for service in services)


_FIRST_WORDS = {"Which", "What", "On", "By", "In"}


def test_a_handbook_of_a_wrong_size(tmp_path: Path) -> None:
    for wrong in ("services=0&lookalikes=1", "services=3&lookalikes=1&forms=6"):
        with pytest.raises(SourceError, match="expected 1 to"):
            rows(f"builtin:handbook?split=pool&{wrong}", "pool", tmp_path)


def test_a_region_is_of_one_country_and_does_not_name_it(tmp_path: Path) -> None:
    for row in rows(refs()["iso3166"], "private", tmp_path):
        assert row["response"].lower() not in row["prompt"].lower()


def test_prompts_from_elsewhere(tmp_path: Path) -> None:
    found = rows("builtin:elsewhere?split=pool&count=6", "pool", tmp_path)
    assert [row["origin"] for row in found] == ["arithmetic", "everyday"] * 3
