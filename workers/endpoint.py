"""A model behind an OpenAI-compatible endpoint, as a generator of text."""

import hashlib
import json
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from stillhouse.configs.endpoint import EndpointConfig
from stillhouse.errors import ModelError
from stillhouse.workers.endpoint_budget import TokenBudget, TokenUse
from stillhouse.workers.endpoint_http import EndpointClient, NoReply
from stillhouse.workers.endpoint_rate import RequestRate
from stillhouse.workers.endpoint_reply import Again, Asked, Outcome, Refused, judged
from stillhouse.workers.protocols import Completion, Decoding, Failed

_LONGEST_BACKOFF = 60.0  # seconds


class EndpointModel:
    """Implements `TextGenerator`.

    A row that cannot be answered is a Failed with its reason: `endpoint: …` (the network or the
    server), `malformed…`, `empty…`, `over_budget: …`. Redirects are not followed. Every request
    that may be billed is counted, repeated ones too; `spending` is the journal of it.
    """

    def __init__(
        self,
        config: EndpointConfig,
        spending: Path,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Read the key and what was spent before. `clock`, `sleep`, `now` are there for tests.

        Raises ConfigError where the environment holds no usable key, IntegrityError where the
        journal is damaged.
        """
        self._config, self._now = config, now
        self._client = EndpointClient(config)
        self._budget = TokenBudget(config, spending)
        self._halt = threading.Event()  # an error that no row outlives
        self._sleep = sleep or self._halt.wait
        self._rate = RequestRate(config.requests_per_minute, self._halt, clock, self._sleep)
        self._jitter = random.Random()
        self._one_call = threading.Lock()

    @property
    def spent(self) -> tuple[int, int, float]:
        """Prompt tokens, completion tokens and their cost, earlier processes included."""
        use = self._budget.spent
        return use.prompt, use.completion, self._budget.cost(use)

    def propose(
        self, prompts: Sequence[str], how: Decoding, *, schema: Mapping[str, Any] | None = None
    ) -> list[Completion | Failed]:
        """Answer each prompt; answers come in the order of the prompts.

        schema: a JSON schema that the server is asked to hold answers to (`strict`: OpenAI wants
        every property required and no additional ones). An answer without its required fields
        gets one more try with another seed, then it is `malformed_json: …`.
        Raises ModelError where the endpoint refuses the key (401, 403): no row can succeed then.
        """

        def row(index: int, prompt: str) -> Completion | Failed:
            try:
                return self._row(index, prompt, how, schema)
            except BaseException:
                self._halt.set()
                raise

        threads = max(1, min(self._config.concurrency, len(prompts)))
        with self._one_call, self._client.threads(threads) as pool:
            self._halt.clear()
            try:
                return list(pool.map(row, range(len(prompts)), prompts))
            finally:
                self._halt.set()

    def _row(
        self, index: int, prompt: str, how: Decoding, schema: Mapping[str, Any] | None
    ) -> Completion | Failed:
        """Ask until there is an answer or no more use in asking."""
        draw = 0
        for repeat in count():
            body = self._body(prompt, how, schema, _seed(how.seed, index, draw))
            outcome = self._counted(body, how, schema)
            match outcome:
                case Refused():
                    raise ModelError(self._refused(outcome))
                case Failed():
                    return Failed(self._client.told(outcome.reason))
                case Completion():
                    return outcome
            is_last = repeat >= self._config.retries or self._halt.is_set()
            if is_last or (outcome.redraws is not None and draw >= outcome.redraws):
                return Failed(self._client.told(outcome.reason))
            if outcome.redraws is None:
                self._back_off(repeat, outcome.wait)
            else:
                draw += 1
        raise AssertionError  # `count` has no end

    def _body(
        self, prompt: str, how: Decoding, schema: Mapping[str, Any] | None, seed: int
    ) -> bytes:
        is_chat = self._config.api == "chat"
        body: dict[str, Any] = {
            "model": self._config.model,
            "max_tokens": how.max_new_tokens,
            "temperature": how.temperature,
            "seed": seed,
        }
        body |= (
            {"messages": [{"role": "user", "content": prompt}]} if is_chat else {"prompt": prompt}
        )
        if how.stop:
            body["stop"] = list(how.stop)
        if schema is not None:
            wanted = {"name": "answer", "schema": schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": wanted}
        return json.dumps(body).encode()

    def _counted(self, body: bytes, how: Decoding, schema: Mapping[str, Any] | None) -> Outcome:
        """Send one request within the budget.

        No tokenizer is known here. Set aside is a token for each byte of the request, which no
        byte-level tokenizer goes beyond (its other bytes stand for the chat template); a third of
        that is the estimate where the server does not say what it took.
        """
        most = TokenUse(len(body), how.max_new_tokens)
        estimate = TokenUse(-(-len(body) // 3), how.max_new_tokens)
        number = self._budget.reserve(most)
        if isinstance(number, Failed):
            return number
        used = most  # unless it turns out to be less
        try:
            outcome, used = self._sent(body, Asked(self._config.api, how, schema, estimate))
            return outcome
        finally:
            self._budget.settle(number, used)

    def _sent(self, body: bytes, asked: Asked) -> tuple[Outcome, TokenUse]:
        self._rate.turn()
        if self._halt.is_set():
            return Failed("endpoint: halted by an error of another row"), TokenUse()
        reply = self._client.post(body)
        if isinstance(reply, NoReply):
            used = asked.estimate if reply.was_sent else TokenUse()
            return Again(f"endpoint: {reply.reason}"), used
        return judged(reply, asked, self._now())

    def _back_off(self, repeat: int, wait: float) -> None:
        """Sleep 0.5 to 1 times 1, 2, 4, … s, or as long as the server asks of all threads."""
        if wait:
            self._rate.hold(wait)
        longest = min(2.0 ** min(repeat, 30), _LONGEST_BACKOFF)
        self._sleep(max(wait, longest * self._jitter.uniform(0.5, 1)))

    def _refused(self, refused: Refused) -> str:
        name = self._config.key_env
        cure = (
            "Set endpoint.key_env to the name of the environment variable that holds the key"
            if name is None
            else f"Put a key into the environment variable {name} that may use the model"
        )
        found = self._client.told(refused.reason)
        return f"{self._config.url} refuses to serve {self._config.model!r}: {found}. {cure}."


def _seed(seed: int, index: int, draw: int) -> int:
    """Hash the three, so that rows share no stream; 31 bits, which every server's integers hold."""
    digest = hashlib.sha256(f"{seed}/{index}/{draw}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
