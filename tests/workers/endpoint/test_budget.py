"""A bound on tokens or money holds whatever is under way, and after any kill."""

import tempfile
import threading
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.configs.endpoint import EndpointConfig
from stillhouse.workers.endpoint_budget import TokenBudget, TokenUse
from stillhouse.workers.protocols import Failed

LIMIT = 100
uses = st.builds(TokenUse, st.integers(0, 40), st.integers(0, 40))


def budget(folder: Path, **bounds: Any) -> TokenBudget:
    config = EndpointConfig(url="http://localhost/v1", model="m", **bounds)
    return TokenBudget(config, folder / "spending.jsonl")


@settings(max_examples=40)
@given(st.lists(st.tuples(uses, st.floats(0, 1), st.booleans()), max_size=12))
def test_no_sequence_of_requests_and_kills_goes_over(
    requests: list[tuple[TokenUse, float, bool]],
) -> None:
    """Each request takes a share of what it reserved, or a kill cuts it off."""
    with tempfile.TemporaryDirectory() as name:
        now = budget(Path(name), max_tokens_spent=LIMIT)
        counted = TokenUse()
        for most, share, is_killed in requests:
            number = now.reserve(most)
            if isinstance(number, Failed):
                assert (counted + most).total > LIMIT or now.reserve(TokenUse()) is number
                continue
            used = TokenUse(int(most.prompt * share), int(most.completion * share))
            counted += most if is_killed else used
            if is_killed:
                now = budget(Path(name), max_tokens_spent=LIMIT)
            else:
                now.settle(number, used)
            assert now.spent == counted
            assert counted.total <= LIMIT


def test_what_may_fit_waits_for_those_under_way(tmp_path: Path) -> None:
    now = budget(tmp_path, max_tokens_spent=LIMIT)
    first = now.reserve(TokenUse(50, 30))
    answers: list[int | Failed] = []
    ask = TokenUse(40, 20)
    waiter = threading.Thread(target=lambda: answers.append(now.reserve(ask)), daemon=True)
    waiter.start()
    waiter.join(0.1)
    assert not answers
    assert isinstance(first, int)
    now.settle(first, TokenUse(20, 20))
    waiter.join(5)
    assert answers == [2]


def test_a_bound_may_be_reached(tmp_path: Path) -> None:
    assert budget(tmp_path, max_tokens_spent=LIMIT).reserve(TokenUse(60, 40)) == 1
    over = budget(tmp_path, max_tokens_spent=LIMIT).reserve(TokenUse(0, 1))
    assert over == Failed("over_budget: spent 100 of 100 tokens; the next request may take 1")


def test_money_is_bounded(tmp_path: Path) -> None:
    prices = {"price_per_million_prompt_tokens": 2, "price_per_million_completion_tokens": 10}
    now = budget(tmp_path, max_cost=0.001, **prices)
    assert now.reserve(TokenUse(0, 100)) == 1
    now.settle(1, TokenUse(100, 70))  # 0.0009
    assert now.reserve(TokenUse(0, 11)) == Failed(
        "over_budget: spent 0.0009 of a max_cost of 0.001; the next request may cost 0.00011"
    )
    assert isinstance(now.reserve(TokenUse(0, 1)), Failed)  # once over, over
