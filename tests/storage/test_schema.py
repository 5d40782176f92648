"""The Arrow schema that a record's annotations give."""

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa
import pytest

from stillhouse.storage.records import (
    TABLES,
    PromptRecord,
    RawRecord,
    Record,
    ScoreRecord,
    TrainStepRecord,
    content_id,
)
from stillhouse.storage.schema import schema_of, table_of


def test_scores_have_these_columns() -> None:
    fields = {field.name: (str(field.type), field.nullable) for field in schema_of(ScoreRecord)}
    assert fields == {
        "completion_id": ("string", True),
        "prompt_id": ("string", False),
        "round": ("int64", False),
        "prompt_tokens": ("int64", True),
        "token_ids": ("list<item: int64 not null>", True),
        "token_ends": ("list<item: int64 not null>", True),
        "logp_specialist": ("list<item: float not null>", True),
        "logp_base": ("list<item: float not null>", True),
        "gap": ("double", True),
        "confidence": ("double", True),
        "status": ("string", False),
        "reason": ("string", True),
    }


@pytest.mark.parametrize("record_type", TABLES.values(), ids=list(TABLES))
def test_every_table_has_a_schema_and_an_empty_table(record_type: type[Record]) -> None:
    assert table_of(record_type, []).schema == schema_of(record_type)


def test_an_annotation_without_a_column_type_is_refused() -> None:
    @dataclass(frozen=True, slots=True)
    class OddRecord(Record):
        TABLE: ClassVar[str] = "odd"
        payload: dict[str, int]

    with pytest.raises(TypeError, match=r"OddRecord\.payload: no column type for dict"):
        schema_of(OddRecord)


def prompt(**changes: object) -> PromptRecord:
    values: dict[str, Any] = {
        "prompt_id": "p", "text": "t", "rendered": "r", "origin": "o", "role": "pool",
        "split": "train", "round": 0,
        "parent_id": None, "locator": "l", "status": "kept", "reason": None,
    }  # fmt: skip
    return PromptRecord(**(values | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": None}, r"prompts\.text: expected a value in every row, found None"),
        ({"status": "lost"}, r"prompts\.status: expected one of .*'rejected'.*found \['lost'\]"),
        ({"round": "one"}, r"prompts\.round: expected int64"),
        ({"text": "\ud800"}, r"prompts\.text: expected string"),
    ],
)
def test_a_row_that_does_not_fit_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        table_of(PromptRecord, [prompt(), prompt(**changes)])


def test_an_id_is_its_kind_and_twenty_hex_digits() -> None:
    assert re.fullmatch("completion_[0-9a-f]{20}", content_id("completion", "p", "text"))
    assert content_id("completion", "pt", "ext") != content_id("completion", "p", "text")


def test_a_raw_row_is_of_a_declared_kind() -> None:
    kind: Any = "answer"
    row = RawRecord(kind, 0, 0, "t", "r", "o", None, None, "l", "kept", None)
    with pytest.raises(ValueError, match=r"raw\.kind: expected one of .*found \['answer'\]"):
        table_of(RawRecord, [row])


def test_a_row_of_another_table_is_refused() -> None:
    step = TrainStepRecord("distill", 1, 0, 1.0, 1e-3, 0.5, 10, 12)
    with pytest.raises(ValueError, match="table prompts: expected PromptRecord, found TrainStep"):
        table_of(PromptRecord, [step])


def test_values_keep_their_precision() -> None:
    step = TrainStepRecord("distill", 1, 0, 0.1, 1e-3, 1 / 3, 2**53, 12)
    table = table_of(TrainStepRecord, [step])
    assert table["loss"].type == pa.float64()
    assert table.to_pylist()[0]["gradient_norm"] == 1 / 3
