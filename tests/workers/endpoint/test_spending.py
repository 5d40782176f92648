"""What an endpoint may cost, over processes and however they ended."""

from pathlib import Path

import pytest

from stillhouse.errors import IntegrityError
from tests.workers.endpoint.conftest import GOOD, HOW, Make, Serve, reasons, texts
from tests.workers.endpoint.server import (
    Behaviour,
    Handler,
    Request,
    hangs,
    says,
    status,
    truncated,
)


def test_spending_is_what_the_server_says(serve: Serve, make: Make) -> None:
    prices = {"price_per_million_prompt_tokens": 2, "price_per_million_completion_tokens": 10}
    hidden = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 18}  # 3 of reasoning
    server = serve(says("x", usage=hidden), says(" "), status(500), status(422))
    model = make(server, **prices)
    model.propose(["a", "b"], HOW)
    prompt, completion, cost = model.spent
    assert (prompt, completion) == (20, 13)
    assert cost == pytest.approx((20 * 2 + 13 * 10) / 1e6)


@pytest.mark.parametrize(
    "behaviour",
    [
        says("x", usage=None),
        says("x", usage={"prompt_tokens": "10", "completion_tokens": -1}),
        hangs,
        truncated,
        status(502),
    ],
)
def test_what_nobody_counted_counts_as_the_most(
    behaviour: Behaviour, serve: Serve, make: Make
) -> None:
    model = make(serve(behaviour), retries=0, timeout=0.15)
    model.propose(["a" * 300], HOW)
    prompt, completion, cost = model.spent
    assert 100 < prompt < 200
    assert (completion, cost) == (20, 0)


def test_a_budget_holds_over_processes(serve: Serve, make: Make) -> None:
    server = serve(then=says("x", usage=(40, 20)))
    first = make(server, max_tokens_spent=350)
    assert texts(first.propose(["a"] * 3, HOW)) == ["x"] * 3
    second = make(server, max_tokens_spent=350)
    assert second.spent == (120, 60, 0.0)
    answers = second.propose(["b"] * 3, HOW)
    # 180 of 350 are spent, and one request may take some 160.
    assert texts(answers) == ["x", None, None]
    for reason in reasons([*answers[1:], *second.propose(["c"], HOW)]):
        assert (reason or "").startswith("over_budget: spent 240 of 350 tokens; the next request")
    assert len(server.requests) == 4


def test_a_request_that_a_kill_cut_off_is_counted(serve: Serve, make: Make, tmp_path: Path) -> None:
    killed: list[str] = []

    def behave(handler: Handler, request: Request) -> None:
        killed.append((tmp_path / "spending.jsonl").read_text())
        GOOD(handler, request)

    server = serve(then=behave)
    make(server).propose(["a"], HOW)
    (tmp_path / "spending.jsonl").write_text(killed[0])  # as it lay while the request was under way
    model = make(server)
    assert model.spent[0] > 100
    assert model.spent[1:] == (20, 0)
    model.propose(["a"], HOW)
    assert make(server).spent == (model.spent[0], 25, 0) == model.spent


def test_a_damaged_journal_is_refused(serve: Serve, make: Make, tmp_path: Path) -> None:
    (tmp_path / "spending.jsonl").write_text("edited\n{}\n")
    with pytest.raises(IntegrityError, match="line 1"):
        make(serve())


@pytest.mark.parametrize("bound", [{"max_tokens_spent": 400}, {"max_cost": 0.0004}])
def test_requests_at_once_do_not_overshoot(
    bound: dict[str, float], serve: Serve, make: Make
) -> None:
    prices = {"price_per_million_prompt_tokens": 1, "price_per_million_completion_tokens": 1}
    server = serve(then=says("x", usage=(40, 20)))
    model = make(server, concurrency=8, **bound, **prices)
    answers = model.propose(["a"] * 30, HOW)
    prompt, completion, _ = model.spent
    assert prompt + completion <= 400
    # One that would fit when others took less than they reserved waits for them.
    assert texts(answers).count("x") == len(server.requests) == 5
    assert reasons(answers).count(None) == 5
