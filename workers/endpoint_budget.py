"""What an endpoint may cost, over all processes of a run, however they ended.

A request is written to the journal before it is sent, with the most that it may take, and again
with what it took; a request's last line counts. So one that a kill cut off counts in full, and what
a crash of the machine may lose is the second line, which only ever lowers the count.
"""

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from stillhouse.configs.endpoint import EndpointConfig
from stillhouse.storage.journal import Journal
from stillhouse.workers.protocols import Failed


@dataclass(frozen=True, slots=True)
class TokenUse:
    """Tokens of a request, or of many."""

    prompt: int = 0
    completion: int = 0

    def __add__(self, other: "TokenUse") -> "TokenUse":
        return TokenUse(self.prompt + other.prompt, self.completion + other.completion)

    @property
    def total(self) -> int:
        """Of prompts and completions."""
        return self.prompt + self.completion


class TokenBudget:
    """Counts tokens and money against the bounds of an endpoint; threads share it.

    One process at a time may have the journal open for this.
    """

    def __init__(self, config: EndpointConfig, path: Path) -> None:
        """Read what earlier processes spent. Raises IntegrityError for a damaged journal."""
        self._config = config
        self._is_bounded = config.max_tokens_spent is not None or config.max_cost is not None
        self._journal = Journal(path)
        self._settled, self._last = _spent_before(self._journal)
        self._reserved: dict[int, TokenUse] = {}  # by number of the request
        self._changed = threading.Condition()
        self._over: Failed | None = None

    @property
    def spent(self) -> TokenUse:
        """Tokens of all requests that are over."""
        with self._changed:
            return self._settled

    def cost(self, use: TokenUse) -> float:
        """Return what these tokens cost; where no price is known, nothing."""
        prompt = use.prompt * (self._config.price_per_million_prompt_tokens or 0)
        completion = use.completion * (self._config.price_per_million_completion_tokens or 0)
        return (prompt + completion) / 1_000_000

    def reserve(self, most: TokenUse) -> int | Failed:
        """Set `most` aside for a request and return its number; Failed once it does not fit.

        What fits only if others take less than they reserved waits for them. After the first
        Failed there is no other answer.
        """
        with self._changed:
            while self._over is None:
                excess = self._excess(most)
                if excess is None:
                    return self._take(most)
                if self._reserved:
                    self._changed.wait()
                else:
                    self._over = Failed(excess)
            return self._over

    def settle(self, number: int, used: TokenUse) -> None:
        """Count what a reserved request took."""
        with self._changed:
            del self._reserved[number]
            self._settled += used
            self._changed.notify_all()  # before the write: a full disk must leave nobody waiting
            self._write(number, used, sync=False)

    def _take(self, most: TokenUse) -> int:
        number = self._last + 1
        self._write(number, most, sync=self._is_bounded)
        self._last = number
        self._reserved[number] = most
        return number

    def _write(self, number: int, use: TokenUse, *, sync: bool) -> None:
        line = {"request": number, "prompt": use.prompt, "completion": use.completion}
        self._journal.append(line, sync=sync)

    def _excess(self, most: TokenUse) -> str | None:
        """Say which bound is in the way of a request, if one is."""
        taken = sum(self._reserved.values(), self._settled)
        tokens, cost = self._config.max_tokens_spent, self._config.max_cost
        if tokens is not None and (taken + most).total > tokens:
            return (
                f"over_budget: spent {taken.total} of {tokens} tokens; the next request may take "
                f"{most.total}"
            )
        if cost is not None and self.cost(taken + most) > cost:
            return (
                f"over_budget: spent {self.cost(taken):.6g} of a max_cost of {cost:.6g}; the next "
                f"request may cost {self.cost(most):.6g}"
            )
        return None


def _spent_before(journal: Journal) -> tuple[TokenUse, int]:
    """Return what all requests in the journal took, and the last one's number."""
    requests: dict[int, TokenUse] = {}
    for line in journal.read():
        number, prompt, completion = (
            cast(int, line.value[name]) for name in ("request", "prompt", "completion")
        )
        requests[number] = TokenUse(prompt, completion)
    return sum(requests.values(), TokenUse()), max(requests, default=0)
