"""The smallest recipe that loads, as a plain tree to vary."""

from typing import Any

import pytest


@pytest.fixture
def tree() -> dict[str, Any]:
    return {
        "name": "small",
        "models": {"base": "toy:llama", "target": "toy:gemma", "adapter": "peft:adapter"},
        "data": {
            "pool": [{"ref": "jsonl:pool.jsonl"}],
            "questions": {"ref": "jsonl:questions.jsonl", "response": "answer"},
        },
    }
