"""Text from a server that speaks OpenAI's protocol; a bad row costs retries, never the run."""

import hashlib
import os
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from threading import Lock
from typing import Any

import requests

from stillhouse.configs.endpoint import EndpointConfig
from stillhouse.errors import ConfigError, ModelError
from stillhouse.workers.protocols import Completion, Decoding, Failed
from stillhouse.workers.spending import OverBudgetError, Spending, Usage

FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds; each wait is twice the one before, more or less
_BUSY = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_LOCKED = frozenset({401, 403})


@dataclass(frozen=True, slots=True)
class _Again:
    """An answer that another try may better; after the last try its reason is the row's."""

    reason: str
    wait: float | None = None  # seconds that the server asks for


class EndpointModel:
    """Implements `TextGenerator`. Its answers differ from one asking to the next, seeds or not.

    `spending` is a journal of what was paid: a later start of the run reads it. Usage that a server
    does not tell is taken to be the most that it can be: a token each byte of the prompt, and all
    new tokens. Raises ConfigError where the key's variable is not set.
    """

    def __init__(
        self, config: EndpointConfig, spending: Path, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._config = config
        self._key = _key_of(config)
        self._sleep = sleep
        self.spending = Spending(config, spending)
        self._rate = _Rate(config.requests_per_minute, sleep)

    def propose(self, prompts: Sequence[str], how: Decoding) -> list[Completion | Failed]:
        """Continue each prompt; answers come in the order of the prompts.

        Raises ModelError where the server refuses the key: no request can succeed.
        """
        numbered = enumerate(prompts)
        with requests.Session() as session, ThreadPoolExecutor(self._config.concurrency) as pool:
            session.trust_env = False  # no key of a .netrc, for no other host
            rows = [pool.submit(self._row, session, text, how, place) for place, text in numbered]
            return [row.result() for row in rows]

    def _row(
        self, session: requests.Session, prompt: str, how: Decoding, place: int
    ) -> Completion | Failed:
        found: Completion | Failed | _Again = _Again("not asked")
        for attempt in range(self._config.retries + 1):
            if isinstance(found, _Again) and attempt:
                self._sleep(_wait(attempt, found.wait))
            most = Usage(len(prompt.encode()), how.max_new_tokens)
            try:
                with self.spending.room_for(most):
                    self._rate.wait()
                    seed = _seed(how.seed, place, attempt)
                    found = self._asked(session, self._body(prompt, how, seed), most)
            except OverBudgetError as error:
                return Failed(str(error))
            if not isinstance(found, _Again):
                return found
        assert isinstance(found, _Again)
        return Failed(self._without_key(found.reason))

    def _body(self, prompt: str, how: Decoding, seed: int) -> dict[str, Any]:
        chat = self._config.api == "chat"
        asked = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
        stop = {"stop": list(how.stop)} if how.stop else {}
        return {
            "model": self._config.model,
            **asked,
            **stop,
            "max_tokens": how.max_new_tokens,
            "temperature": how.temperature,
            "seed": seed,
        }

    def _asked(
        self, session: requests.Session, body: dict[str, Any], most: Usage
    ) -> Completion | Failed | _Again:
        path = "/chat/completions" if self._config.api == "chat" else "/completions"
        head = {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
        try:
            answer = session.post(
                self._config.url + path,
                json=body,
                headers=head,
                timeout=self._config.timeout,
                allow_redirects=False,  # the key is for this host
            )
        except requests.RequestException as error:
            return _Again(f"endpoint: {type(error).__name__}")
        if answer.status_code in _LOCKED:
            raise ModelError(self._refused(answer.status_code))
        if answer.status_code in _BUSY:
            wait = _asked_wait(answer.headers.get("Retry-After"))
            return _Again(f"endpoint: {answer.status_code} {answer.text[:200]}", wait)
        if answer.status_code != 200:
            text = f"endpoint: {answer.status_code} {answer.text[:200]}"
            return Failed(self._without_key(text))
        return self._read(answer, most)

    def _read(self, answer: requests.Response, most: Usage) -> Completion | _Again:
        try:
            found = answer.json()
            usage = _usage(found, most)
            self.spending.add(usage)
            [choice] = found["choices"]
            chat = self._config.api == "chat"
            text, finish = choice["message"]["content"] if chat else choice["text"], "stop"
            finish = choice["finish_reason"]
        except (ValueError, KeyError, TypeError) as error:
            return _Again(f"malformed: {type(error).__name__} in {answer.text[:100]!r}")
        if not isinstance(text, str) or not text.strip():
            return _Again("empty")
        cut = finish == "length"
        first = text.strip().partition("\n")[0] if chat else text.strip()
        return Completion(first, "length" if cut else "stop", usage.completion, usage.prompt)

    def _refused(self, status: int) -> str:
        key = self._config.key_env
        cure = (
            f"check the key in ${key}" if key else "name the variable that holds a key as key_env"
        )
        return f"{self._config.url}: expected to be let in, found {status}; {cure}"

    def _without_key(self, text: str) -> str:
        return text if self._key is None else text.replace(self._key, "***")


class _Rate:
    """Lets so many requests a minute through, evenly; threads share it."""

    def __init__(self, a_minute: int | None, sleep: Callable[[float], None]) -> None:
        self._gap = 0.0 if a_minute is None else 60 / a_minute
        self._sleep = sleep
        self._lock = Lock()
        self._next = time.monotonic()

    def wait(self) -> None:
        """Return when it is this request's turn."""
        if not self._gap:
            return
        with self._lock:
            now = time.monotonic()
            turn = max(self._next, now)
            self._next = turn + self._gap
        if turn > now:
            self._sleep(turn - now)


def _key_of(config: EndpointConfig) -> str | None:
    if config.key_env is None:
        return None
    key = os.environ.get(config.key_env, "").strip()
    if not key:
        raise ConfigError(
            f"expand.generators.endpoint.key_env: expected a key in the environment variable "
            f"{config.key_env}, found none; export it before the run starts"
        )
    return key


def _usage(found: dict[str, Any], most: Usage) -> Usage:
    told = found.get("usage")
    if not isinstance(told, dict):
        return most
    return Usage(int(told["prompt_tokens"]), int(told.get("completion_tokens", 0)))


def _wait(attempt: int, asked: float | None) -> float:
    """Seconds before a try: what the server asks for, else twice as long each time, jittered."""
    if asked is not None:
        return min(asked, LONGEST_WAIT)
    backoff = min(FIRST_WAIT * 2 ** (attempt - 1), LONGEST_WAIT)
    return backoff * random.uniform(0.5, 1.0)  # no two threads come back together


def _asked_wait(header: str | None) -> float | None:
    """Retry-After in seconds: a number, or a date (RFC 9110, 10.2.3)."""
    if header is None:
        return None
    if header.strip().isdecimal():
        return float(header)
    try:
        return max(0.0, (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None


def _seed(seed: int, place: int, attempt: int) -> int:
    """Another stream for each row and try, in 31 bits."""
    digest = hashlib.sha256(f"{seed}/{place}/{attempt}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
