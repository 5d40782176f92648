"""The backend of a GPU in a real engine: on Triton's interpreter, beside the CPU's."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stillhouse.workers.serving.served_cache import ServedCache

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def small_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers with heads of 64 channels, of random weights."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=64, max_position_embeddings=128,
        initializer_range=0.12, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return folder


def answers(model: Path, kind: str) -> list[dict[str, Any]]:
    settings = json.dumps(ServedCache("k4v4", sinks=1).settings())
    done = subprocess.run(
        [sys.executable, "-m", "tests.serving.interpreted_gpu", str(model), settings, kind],
        cwd=ROOT,
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
        },
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.timeout(1200)
def test_a_gpus_kernels_say_what_a_cpus_say(small_llama: Path) -> None:
    """Prompts in chunks of 32 tokens over blocks of 32, one of them from the prefix cache."""
    for one, other in zip(answers(small_llama, "gpu"), answers(small_llama, "cpu"), strict=True):
        both = list(zip(one["tokens"], other["tokens"], strict=True))
        same = next((n for n, (x, y) in enumerate(both) if x != y), len(both))
        assert same  # later ones may part at a near-tie: each rounds its own way
        assert one["logp"][:same] == pytest.approx(other["logp"][:same], abs=0.1)
