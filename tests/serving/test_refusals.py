"""What no server starts with: each is said before anything is loaded, or by the engine at once."""

import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from stillhouse.errors import ConfigError, ModelError
from stillhouse.workers.cache import CachePlan
from stillhouse.workers.serving import serve_job
from stillhouse.workers.serving.plugin import register
from stillhouse.workers.serving.served_cache import ServedCache
from stillhouse.workers.serving.server import ServerProcess
from stillhouse.workers.serving.vllm_config import SETTINGS, served_cache
from tests.serving.conftest import job_of

Started = Callable[..., ServerProcess]


@pytest.fixture
def start(smollm2: Path, tmp_path: Path, environment: None) -> Started:
    def started(cache: ServedCache | None = None, **options) -> ServerProcess:
        job = job_of(smollm2, cache or ServedCache("k4v4"), **options)
        return ServerProcess(job, tmp_path / "log")

    return started


@pytest.mark.parametrize("name", ["k9v4", "int8", "", "k4v4 "])
def test_unknown_formats(name: str) -> None:
    with pytest.raises(ModelError, match="cache: expected plan, bf16, fp8 or kAvB"):
        ServedCache(name)


def test_a_public_address_without_a_key(start: Started) -> None:
    with pytest.raises(ConfigError, match=r"expected an API key for 0\.0\.0\.0"):
        start(host="0.0.0.0", key=None)


def test_a_context_beyond_the_models(start: Started) -> None:
    with pytest.raises(ConfigError, match="at most 8,192 tokens, as model was trained for, found"):
        start(context=10_000)


def test_a_port_in_use(start: Started) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="expected a free port, found"):
            start(port=taken.getsockname()[1])


def test_a_plan_of_another_model(start: Started, plan: Path, tmp_path: Path) -> None:
    found = CachePlan.load(plan)
    CachePlan(found.layers[:-1], found.sinks, 0).save(tmp_path / "short")
    with pytest.raises(ModelError, match="expected a plan for 30 layers, as model has, found one"):
        start(ServedCache("plan", tmp_path / "short"))


def test_a_damaged_plan_names_its_hash(start: Started, plan: Path, tmp_path: Path) -> None:
    CachePlan.load(plan).save(tmp_path / "damaged")
    path = tmp_path / "damaged" / "cache_plan.json"
    data = json.loads(path.read_text())
    data["tensors"]["sha256"] = "0" * 64
    path.write_text(json.dumps(data))
    with pytest.raises(ModelError, match="expected sha256 0000"):
        start(ServedCache("plan", path.parent))


def test_a_plan_with_recent_tokens(start: Started, plan: Path, tmp_path: Path) -> None:
    CachePlan(CachePlan.load(plan).layers, 0, 16).save(tmp_path / "recent")
    with pytest.raises(ModelError, match="without recent tokens in 16 bits, found 16"):
        start(ServedCache("plan", tmp_path / "recent"))


@pytest.mark.timeout(300)
def test_an_option_that_does_not_go_with_the_cache_is_named(start: Started) -> None:
    server = start(extra=("--kv-cache-dtype", "fp8"))
    with pytest.raises(ModelError, match="does not go with --kv-cache-dtype fp8"):
        server.wait_until_ready()


@pytest.mark.timeout(300)
def test_an_engine_that_has_not_loaded_the_plugin_is_ended(
    start: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would serve 16 bits and say nothing."""
    monkeypatch.setattr(serve_job, "PLUGIN", "")
    monkeypatch.setenv("VLLM_PLUGINS", "nobody")
    server = start()
    with pytest.raises(ModelError, match="expected the engine to load the plugin"):
        server.wait_until_ready()
    assert not server.is_healthy()


def test_the_plugin_may_be_loaded_twice() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    register()
    register()
    name = AttentionBackendEnum.CPU_ATTN.get_path()
    assert name == "stillhouse.workers.serving.vllm_cpu.PackedCpuBackend"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what vLLM imports
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"tensor_parallel_size": 3}, "--tensor-parallel-size above 1"),
        ({"enable_lora": True}, "--enable-lora"),
    ],
)
def test_options_of_the_engine(smollm2: Path, options: dict[str, object], reason: str) -> None:
    from vllm.engine.arg_utils import EngineArgs

    settings = {SETTINGS: ServedCache("k4v4").settings()}
    arguments = EngineArgs(str(smollm2), additional_config=settings, **options)
    with pytest.raises(ModelError, match=reason):
        served_cache(arguments.create_engine_config())
