"""What MLflow loads of a registered student to score with it: answers on the cache it was
evaluated with.

`storage.tracking.flavour` names this module in the model's MLmodel file.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stillhouse.storage.tracking.flavour import PROMPT, ErrorName, scoring_error
from stillhouse.workers.exported import ExportedModel
from stillhouse.workers.protocols import Completion, Decoding, Failed

_OURS = "not_finite"  # how a Failed's reason begins that is no fault of the prompt


def _load_pyfunc(path: str) -> "RegisteredModel":
    """The name that MLflow calls, with the exported folder."""
    return RegisteredModel(ExportedModel(Path(path)))


class RegisteredModel:
    """Implements MLflow's `predict`."""

    def __init__(self, model: ExportedModel) -> None:
        self._model = model

    def predict(self, data: Any, params: Mapping[str, Any]) -> list[str]:
        """An answer to each row of the data frame's column `prompt`, in order.

        params: all those of the signature. A request is answered whole or not at all: errors name
        its first row that cannot be.
        """
        how = _decoding(params)
        answers = self._model.answer(_prompts(data), how)
        return [_text(row, answer) for row, answer in enumerate(answers)]


def _prompts(data: Any) -> list[str]:
    """MLflow lets lists through where it expects strings, and of data frames numbers and nulls."""
    prompts: list[Any] = data[PROMPT].tolist()
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise scoring_error(
                f"prompt {row}: expected a string, found {prompt!r:.60}", "BAD_REQUEST"
            )
    return prompts


def _decoding(params: Mapping[str, Any]) -> Decoding:
    limit, stop, temperature = params["max_new_tokens"], params["stop"], params["temperature"]
    found = f", found {dict(params)!r:.200}"
    if not isinstance(limit, int) or limit < 1:
        raise scoring_error(f"max_new_tokens: expected 1 or more{found}", "BAD_REQUEST")
    if not isinstance(temperature, float) or not 0 <= temperature < math.inf:
        raise scoring_error(f"temperature: expected 0 (greedy) or more{found}", "BAD_REQUEST")
    if not all(isinstance(mark, str) and mark for mark in stop):
        raise scoring_error(f"stop: expected strings that are not empty{found}", "BAD_REQUEST")
    if not isinstance(params["seed"], int):
        raise scoring_error(f"seed: expected a whole number{found}", "BAD_REQUEST")
    return Decoding(limit, tuple(stop), temperature, params["seed"])


def _text(row: int, answer: Completion | Failed) -> str:
    if isinstance(answer, Completion):
        return answer.text
    ours = answer.reason.startswith(_OURS)
    code: ErrorName = "INTERNAL_ERROR" if ours else "BAD_REQUEST"
    raise scoring_error(f"prompt {row}: {answer.reason}", code)
