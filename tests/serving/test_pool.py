"""How many tokens the same memory holds."""

from pathlib import Path

import pytest

from stillhouse.workers.serving.served_cache import ServedCache
from stillhouse.workers.serving.server import ServerProcess
from tests.serving.client import completed, pool_tokens
from tests.serving.conftest import Serve


@pytest.fixture(scope="module")
def plain(serve: Serve, smollm2: Path) -> ServerProcess:
    return serve(smollm2, ServedCache("bf16"))


def test_four_bits_hold_more_than_three_and_a_half_times_the_tokens(
    plain: ServerProcess, packed: ServerProcess
) -> None:
    """256 bytes a token, head and layer in bfloat16; 70 in 4 bits with a sink a block."""
    ratio = pool_tokens(packed) / pool_tokens(plain)
    assert ratio >= 3.6
    assert ratio == pytest.approx(256 / 70, rel=0.01)


def test_the_packed_server_says_much_the_same(plain: ServerProcess, packed: ServerProcess) -> None:
    prompt = "The capital of France is"
    assert completed(plain, prompt, 4)["text"] == completed(packed, prompt, 4)["text"]


def test_sliding_layers_are_packed_too(serve: Serve, gemma: Path) -> None:
    """5 of Gemma's 6 layers see 512 tokens; 1,024 bytes a token and head against 260."""
    sizes = []
    for cache in (ServedCache("bf16"), ServedCache("k4v4")):
        server = serve(gemma, cache)
        sizes.append(pool_tokens(server))
        assert completed(server, "Paris is the capital of", 2)["text"].strip()
        server.stop()
    assert sizes[1] / sizes[0] >= 3.6
