"""What the tests ask a server."""

import re
from typing import Any

import requests

from stillhouse.workers.serving.server import ServerProcess

# Between a token and the next best, nats. Where a batch rounds another way than a single request a
# code may fall on the other side of a boundary, and with it all that follows moves a little, as it
# does in `TurboQuantCache` when a prompt comes in two pieces.
NEAR_TIE = 0.3


def headers(server: ServerProcess) -> dict[str, str]:
    return {"Authorization": f"Bearer {server.job.key}"}


def post(server: ServerProcess, path: str, body: Any, **options) -> requests.Response:
    url = f"{server.job.url}/v1/{path}"
    return requests.post(url, json=body, headers=headers(server), timeout=300, **options)


def completed(server: ServerProcess, prompt: Any, tokens: int = 16, **more) -> dict[str, Any]:
    """The first choice of a greedy completion."""
    body = {"model": server.job.name, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    answer = post(server, "completions", body | more)
    assert answer.ok, answer.text
    choice: dict[str, Any] = answer.json()["choices"][0]
    return choice


def metric(server: ServerProcess, name: str) -> float:
    """The sum of a Prometheus metric over its labels."""
    text = requests.get(f"{server.job.url}/metrics", timeout=30).text
    values = re.findall(rf"^vllm:{name}(?:\{{.*\}})? (\S+)$", text, flags=re.MULTILINE)
    assert values, f"no metric {name}"
    return sum(map(float, values))


def pool_tokens(server: ServerProcess) -> int:
    """Tokens that the cache holds, as the engine reports it."""
    text = requests.get(f"{server.job.url}/metrics", timeout=30).text
    [found] = re.findall(r'kv_cache_size_tokens="(\d+)"', text)
    return int(found)


def gap_where_they_part(alone: dict[str, Any], tokens: list[str]) -> float | None:
    """How much likelier the first token that differs was than the next best, nats.

    alone: a choice with two `logprobs`. tokens: of another answer; None where it is the same.
    """
    found = alone["logprobs"]
    assert len(found["tokens"]) == len(tokens)
    for own, other, best in zip(found["tokens"], tokens, found["top_logprobs"], strict=True):
        if own != other:
            first, second = sorted(best.values(), reverse=True)[:2]
            return float(first - second)
    return None
