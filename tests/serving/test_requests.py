"""What a running server answers: health, metrics, bad requests, after a kill."""

import os
import signal
from pathlib import Path

import pytest
import requests

from stillhouse.pipelines.chatting import ChatServer
from stillhouse.workers.serving.served_cache import ServedCache
from stillhouse.workers.serving.server import ServerProcess
from tests.serving.client import (
    NEAR_TIE,
    completed,
    gap_where_they_part,
    headers,
    metric,
    post,
)
from tests.serving.conftest import FINEST, Serve

PROMPT = {"model": "model", "prompt": "a", "max_tokens": 1}


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "v1/models"), ("POST", "v1/completions"), ("POST", "invocations"),
        ("POST", "tokenize"), ("POST", "detokenize"), ("POST", "inference/v1/generate"),
        ("GET", "openapi.json"), ("POST", "collective_rpc"),
    ],
)  # fmt: skip
def test_without_the_key_nothing_is_answered(packed: ServerProcess, method: str, path: str) -> None:
    for key in ({}, {"Authorization": "Bearer another"}):
        url = f"{packed.job.url}/{path}"
        answer = requests.request(method, url, headers=key, json=PROMPT, timeout=30)
        assert answer.status_code == 401
        assert "choices" not in answer.text


def test_health_and_metrics_ask_for_none(packed: ServerProcess) -> None:
    for path in ("health", "metrics"):
        assert requests.get(f"{packed.job.url}/{path}", timeout=30).status_code == 200


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"prompt": "a"}, 404),  # another model's name
        ({"model": "model", "prompt": "a", "max_tokens": -1}, 400),
        ({"model": "model", "prompt": "a", "temperature": "hot"}, 400),
        ({"model": "model"}, 400),
        ({"model": "model", "prompt": "word " * 3000, "max_tokens": 1}, 400),  # past its context
    ],
)
def test_malformed_requests_get_errors_of_the_protocol(
    packed: ServerProcess, body: dict[str, object], status: int
) -> None:
    answer = post(packed, "completions", {"model": "another"} | body)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def test_what_is_no_json_is_refused(packed: ServerProcess) -> None:
    url = f"{packed.job.url}/v1/completions"
    sent = headers(packed) | {"Content-Type": "application/json"}
    answer = requests.post(url, data=b"{not json", headers=sent, timeout=30)
    assert answer.status_code in (400, 422)


def test_a_body_of_ten_megabytes_harms_nobody(packed: ServerProcess) -> None:
    answer = post(packed, "completions", {"model": "model", "prompt": "a" * 10_000_000})
    assert answer.status_code == 400
    assert completed(packed, "One, two, three,", 2)["text"].strip()


def test_no_prompt_is_logged(packed: ServerProcess) -> None:
    completed(packed, "A sentence that stands in no log.", 2)
    assert "stands in no log" not in packed.log.read_text(errors="replace")


def test_metrics_count_tokens(packed: ServerProcess) -> None:
    before = metric(packed, "generation_tokens_total")
    completed(packed, "One, two, three,", 5)
    assert metric(packed, "generation_tokens_total") == before + 5


def test_chat_streams_pieces(packed: ServerProcess) -> None:
    server = ChatServer(packed.job.url, packed.job.key)
    assert server.model() == "model"
    pieces = list(server.chat("model", [{"role": "user", "content": "Say hello."}], 8))
    assert len(pieces) > 1
    assert (
        "".join(server.complete("model", "One, two, three,", 4))
        == completed(packed, "One, two, three,", 4)["text"]
    )


@pytest.mark.timeout(600)
def test_killed_and_started_again_it_serves(serve: Serve, smollm2: Path) -> None:
    server = serve(smollm2, ServedCache("k4v4"))
    said = completed(server, "One, two, three,", 4)["text"]
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()
    again = serve(smollm2, ServedCache("k4v4"), port=server.job.port)
    assert completed(again, "One, two, three,", 4)["text"] == said
    assert again.stop() == 0


@pytest.mark.timeout(600)
def test_preempted_requests_answer_the_same(serve: Serve, smollm2: Path, plan: Path) -> None:
    """A pool of 9 blocks, prompts in chunks of 64 tokens, five requests that outgrow the pool.

    Answers of 300 tokens part at a near-tie sooner or later; a wrong block would show at once.
    """
    block = 30 * 3 * 128 * 70  # bytes: layers, heads, tokens, bytes of a token
    small = serve(
        smollm2, ServedCache("plan", plan), dtype=FINEST, context=512, pool=10 * block,
        extra=("--max-num-batched-tokens", "64"),
    )  # fmt: skip
    prompt = [f"{number} is a number, and so is" for number in ("One", "Two", "Six", "Ten", "Nine")]
    body = {"model": "model", "prompt": prompt, "max_tokens": 300, "temperature": 0}
    body |= {"ignore_eos": True, "logprobs": 2}
    answers = post(small, "completions", body).json()["choices"]
    assert metric(small, "num_preemptions_total") > 0
    gaps = [
        gap_where_they_part(
            completed(small, text, 300, ignore_eos=True, logprobs=2), answer["logprobs"]["tokens"]
        )
        for text, answer in zip(prompt, answers, strict=True)
    ]
    assert all(gap is None or gap < NEAR_TIE for gap in gaps)
    assert metric(small, "kv_cache_usage_perc") == 0
    small.stop()
