"""Intents of a bank's customers (Casanueva et al., arXiv:2003.04807): 77 of them, from CSV files.

The user's own copy: `train.csv` and `test.csv` with the columns `text` and `category`, CC-BY-4.0.
Splits are those of `labelled`; evaluation texts are of `test.csv`, all others of `train.csv`.
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stillhouse.errors import SourceError
from stillhouse.workers.sources.labelled import LabelledConfig, Row, Texts, divide


@dataclass(frozen=True, slots=True, kw_only=True)
class Banking77Config(LabelledConfig):
    """`folder` holds the two files."""

    folder: str


CONFIG = Banking77Config


def build(split: str, config: Banking77Config) -> Iterator[Row]:
    """Yield the rows of one split; SourceError where the files have too few."""
    folder = Path(config.folder)
    texts = _texts(folder / "train.csv", {})
    known = {text: label for label, found in texts.items() for text in found}
    return divide("bank", texts, _texts(folder / "test.csv", known), config).rows(split)


def _texts(path: Path, known: dict[str, str]) -> Texts:
    """Texts by label, in the file's order; a text that is known already is left out."""
    by_label: dict[str, list[str]] = {}
    seen = set(known)
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if not row.get("text") or not row.get("category"):
                raise SourceError(f"{path}: expected the columns text and category in every row")
            text = " ".join(row["text"].split())
            if text not in seen:
                seen.add(text)
                by_label.setdefault(_words(row["category"]), []).append(text)
    return by_label


def _words(category: str) -> str:
    """`Refund_not_showing_up` as words, which models write more readily than underscores."""
    return category.replace("_", " ").rstrip("?").lower()
