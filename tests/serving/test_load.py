"""Many requests at once: the same answers, nothing lost, nothing leaked."""

import asyncio
import logging
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import requests

from stillhouse.workers.serving.server import ServerProcess
from tests.serving.client import NEAR_TIE, completed, gap_where_they_part, metric
from tests.serving.stories import story

REQUESTS, CANCELLED = 200, 30
DIFFERING = 0.05  # at most this share of answers


@dataclass
class Asked:
    prompt: str
    tokens: int
    cancelled: bool = False
    answer: list[str] = field(default_factory=list)  # tokens


def requests_of_mixed_lengths(seed: int) -> list[Asked]:
    """A third share a prefix of some 300 tokens, of which two blocks are whole."""
    draw = random.Random(seed)

    shared = story(draw, 25)
    made = []
    for number in range(REQUESTS):
        own = story(draw, draw.choice((1, 2, 5, 12)))
        made.append(Asked(f"{shared} {own}" if number % 3 == 0 else own, draw.randint(2, 20)))
    for number in draw.sample(range(REQUESTS), CANCELLED):
        made[number].cancelled, made[number].tokens = True, 200
    return made


async def ask_all(server: ServerProcess, asked: list[Asked]) -> int:
    """Streams all at once; how many health checks were answered meanwhile."""
    from openai import AsyncOpenAI

    client = AsyncOpenAI(base_url=f"{server.job.url}/v1", api_key=server.job.key, timeout=600)
    done = asyncio.Event()
    healthy = 0

    async def watch() -> None:
        nonlocal healthy
        while not done.is_set():
            health = await asyncio.to_thread(requests.get, f"{server.job.url}/health", timeout=30)
            assert health.status_code == 200
            healthy += 1
            await asyncio.sleep(0.5)

    async def ask(one: Asked) -> None:
        stream: Any = await client.completions.create(
            model=server.job.name, prompt=one.prompt, max_tokens=one.tokens, temperature=0,
            stream=True, logprobs=1,
        )  # fmt: skip
        async for event in stream:
            one.answer += event.choices[0].logprobs.tokens
            if one.cancelled and len(one.answer) >= 3:
                await stream.close()
                return

    watcher = asyncio.create_task(watch())
    await asyncio.gather(*(ask(one) for one in asked))
    done.set()
    await watcher
    await client.close()
    return healthy


@pytest.mark.timeout(900)
def test_two_hundred_streams_at_once(packed: ServerProcess) -> None:
    asked = requests_of_mixed_lengths(seed=1)
    healthy = asyncio.run(ask_all(packed, asked))
    assert healthy >= 3
    whole = [one for one in asked if not one.cancelled]
    assert len(whole) == REQUESTS - CANCELLED
    alone = [completed(packed, one.prompt, one.tokens, logprobs=2) for one in whole]
    gaps = [gap_where_they_part(one, other.answer) for one, other in zip(alone, whole, strict=True)]
    differing = [gap for gap in gaps if gap is not None]
    note = f"{len(differing)} of {len(whole)} answers differ, at gaps of {sorted(differing)} nats"
    logging.getLogger(__name__).warning(note)
    assert all(gap < NEAR_TIE for gap in differing)
    assert len(differing) <= DIFFERING * len(whole)
    assert metric(packed, "num_requests_running") == 0
    assert metric(packed, "kv_cache_usage_perc") == 0  # every page is free again
