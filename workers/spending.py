"""What an endpoint was paid so far, over every start of a run, and what may still be."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import cast

from stillhouse.configs.endpoint import EndpointConfig
from stillhouse.storage.journal import Journal


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request or of many."""

    prompt: int
    completion: int

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(self.prompt + other.prompt, self.completion + other.completion)


NOTHING = Usage(0, 0)


class OverBudgetError(Exception):
    """A request that the budget has no room for; its message is the row's reason."""


class Spending:
    """Adds up usage in a journal, and lends out room before it is used. Threads may share it.

    A request reserves the most that it can take, so requests under way together keep to the budget.
    """

    def __init__(self, config: EndpointConfig, path: Path) -> None:
        self._config = config
        self._journal = Journal(path)
        self._lock = Lock()
        self._reserved = NOTHING
        self._spent = NOTHING
        for line in self._journal.read():
            prompt, completion = line.value["prompt_tokens"], line.value["completion_tokens"]
            self._spent += Usage(cast(int, prompt), cast(int, completion))

    @property
    def spent(self) -> Usage:
        """Tokens of all answers so far."""
        return self._spent

    @contextmanager
    def room_for(self, most: Usage) -> Iterator[None]:
        """Hold room for a request that takes `most` tokens; OverBudgetError where there is none."""
        with self._lock:
            self._require(self._spent + self._reserved + most)
            self._reserved += most
        try:
            yield
        finally:
            with self._lock:
                self._reserved += Usage(-most.prompt, -most.completion)

    def add(self, used: Usage) -> None:
        """A request was answered: also one whose answer is of no use has its price."""
        with self._lock:
            self._spent += used
            self._journal.append(
                {"prompt_tokens": used.prompt, "completion_tokens": used.completion}, sync=False
            )

    def _require(self, total: Usage) -> None:
        config, spent = self._config, self._spent
        tokens = total.prompt + total.completion
        if config.max_tokens_spent is not None and tokens > config.max_tokens_spent:
            raise OverBudgetError(
                f"over_budget: {spent.prompt + spent.completion} of {config.max_tokens_spent} "
                "tokens are spent (max_tokens_spent)"
            )
        cost = config.cost(total.prompt, total.completion)
        if config.max_cost is not None and cost > config.max_cost:
            raise OverBudgetError(
                f"over_budget: {config.cost(spent.prompt, spent.completion):.4g} of "
                f"{config.max_cost:g} are spent (max_cost)"
            )
