"""A served model as a worker: the same questions as in this process, over HTTP."""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import requests

from stillhouse.errors import ModelError
from stillhouse.workers.protocols import (
    CacheSpec,
    Completion,
    Decoding,
    Failed,
    Pair,
    ResponseLogp,
)
from stillhouse.workers.serving.serve_job import ServeJob

if TYPE_CHECKING:
    from stillhouse.workers.models.language_model import TextCodec

_TIMEOUT = 600  # seconds, of one answer
Result = TypeVar("Result")


class HttpModel:
    """Implements `ModelWorker`. Prompts go as ids, since a server's tokenizer may add others."""

    def __init__(self, job: ServeJob, codec: "TextCodec") -> None:
        self._job, self._codec = job, codec

    def answer(
        self, prompts: Sequence[str], how: Decoding, cache: CacheSpec | None = None
    ) -> list[Completion | Failed]:
        """Its answers; `cache` is the server's own, whatever is given."""
        rows = self._codec.encode_prompts(prompts)
        body = {
            "max_tokens": how.max_new_tokens,
            "stop": list(how.stop),
            "temperature": how.temperature,
            "seed": how.seed,
        }
        return self._each(rows, lambda ids: _completion(self._asked(ids, body), len(ids)))

    def logp(
        self, pairs: Sequence[Pair], batch_size: int, cache: CacheSpec | None = None
    ) -> list[ResponseLogp | Failed]:
        """Its log-probabilities of the responses."""
        prompts = self._codec.encode_prompts([pair.prompt for pair in pairs])
        responses = [self._codec.encode_response(pair.response) for pair in pairs]

        def scored(row: tuple[list[int], list[int]]) -> ResponseLogp | Failed:
            prompt, response = row
            if not response:
                return Failed("empty_response: no token to score")
            answer = self._asked([*prompt, *response], {"max_tokens": 1, "prompt_logprobs": 0})
            return answer if isinstance(answer, Failed) else _logps(answer, len(prompt), response)

        return self._each(list(zip(prompts, responses, strict=True)), scored)

    def _each(self, rows: Sequence[Any], ask: Callable[[Any], Result]) -> list[Result]:
        with ThreadPoolExecutor(32) as pool:
            return list(pool.map(ask, rows))

    def _asked(self, ids: list[int], body: dict[str, Any]) -> dict[str, Any] | Failed:
        """The server's answer; Failed where it refuses the request, ModelError where it is gone."""
        key = {} if self._job.key is None else {"Authorization": f"Bearer {self._job.key}"}
        body = {"model": self._job.name, "prompt": ids, **body}
        try:
            answer = requests.post(
                f"{self._job.url}/v1/completions", json=body, headers=key, timeout=_TIMEOUT
            )
        except requests.RequestException as error:
            raise ModelError(f"the server at {self._job.url} does not answer: {error}") from error
        if not answer.ok:
            return Failed(f"server: {answer.status_code} {answer.text[:200]}")
        try:
            found: dict[str, Any] = answer.json()
        except ValueError as error:
            raise ModelError(f"the server at {self._job.url} answers no JSON: {error}") from error
        return found


def _completion(answer: dict[str, Any] | Failed, prompt_tokens: int) -> Completion | Failed:
    if isinstance(answer, Failed):
        return answer
    [choice] = answer["choices"]
    finish = choice["finish_reason"]
    if finish not in ("stop", "length"):
        return Failed(f"server: the answer ended with {finish!r}")
    return Completion(
        choice["text"].strip(),
        "length" if finish == "length" else "stop",
        answer["usage"]["completion_tokens"],
        prompt_tokens,
    )


def _logps(answer: dict[str, Any], prompt: int, response: list[int]) -> ResponseLogp | Failed:
    [choice] = answer["choices"]
    found = choice["prompt_logprobs"][prompt:]
    logp = [entry[str(token)]["logprob"] for entry, token in zip(found, response, strict=True)]
    if not all(map(math.isfinite, logp)):
        return Failed("not_finite: the model gives a token of the response no log-probability")
    return ResponseLogp(response, logp, prompt)
