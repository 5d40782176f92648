"""The backend of a GPU in a real engine: on Triton's interpreter, beside the CPU's."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stillhouse.workers.cache import CachePlan, LayerPlan
from stillhouse.workers.serving.served_cache import ServedCache
from tests.kernels.paged_attention.gpu_pages import fitted
from tests.serving.small_models import save_llama, save_olmo

ROOT = Path(__file__).resolve().parents[2]


def said(model: Path, cache: ServedCache, kind: str) -> tuple[list[str], list[dict[str, Any]]]:
    """Backends of the layers, and answers."""
    settings = json.dumps(cache.settings())
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
    found = json.loads(done.stdout.splitlines()[-1])
    return found["backends"], found["answers"]


def assert_alike(gpu: list[dict[str, Any]], cpu: list[dict[str, Any]], within: float = 0.1) -> None:
    for one, other in zip(gpu, cpu, strict=True):
        both = list(zip(one["tokens"], other["tokens"], strict=True))
        same = next((n for n, (x, y) in enumerate(both) if x != y), len(both))
        assert same  # later ones may part at a near-tie: each rounds its own way
        assert one["logp"][:same] == pytest.approx(other["logp"][:same], abs=within)


@pytest.mark.timeout(1200)
def test_a_gpus_kernels_say_what_a_cpus_say(tmp_path: Path) -> None:
    """Prompts in chunks of 32 tokens over blocks of 32, one of them from the prefix cache."""
    model, cache = save_llama(tmp_path / "llama"), ServedCache("k4v4", sinks=1)
    assert_alike(said(model, cache, "gpu")[1], said(model, cache, "cpu")[1])


@pytest.mark.timeout(1200)
def test_layers_in_16_bits_are_vllms_own(tmp_path: Path) -> None:
    """One that slides and one that does not, each beside one of 4 bits: blocks are padded.

    vLLM's Triton kernels run on the interpreter too.
    """
    model, half = save_olmo(tmp_path / "olmo"), LayerPlan(None, None)
    first, last = (LayerPlan(*(fitted(4, 64, 64, 2, n + k).fit for k in (1, 2))) for n in (0, 2))
    CachePlan((first, half, half, last), sinks=1, recent=0).save(tmp_path / "plan")
    cache = ServedCache("plan", tmp_path / "plan")
    backends, gpu = said(model, cache, "gpu")
    own = "TritonAttentionBackend"
    assert backends == ["Packed76Backend", own, own, "Packed76Backend"]
    assert_alike(gpu, said(model, cache, "cpu")[1], within=0.04)
