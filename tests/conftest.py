"""What holds for every test: the environment, set before torch and its kind are imported."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.mlflow_server import MlflowServer

# One thread a process: the same sums on every machine, and no crowding under `pytest -n`.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# No test reaches a hub or reports its use to anybody.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def pytest_addoption(pluginmanager: pytest.PytestPluginManager) -> None:
    # triton decides when it is imported; only a run of the tests for a GPU compiles its kernels. No
    # other hook comes before the folders' own conftest.py, which may import it.
    config = pluginmanager.get_plugin("pytestconfig")
    assert isinstance(config, pytest.Config)
    if config.known_args_namespace.markexpr != "gpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")


settings.register_profile("untimed", deadline=None)  # a loaded machine is no failure
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def cache_root() -> Path:
    """Converted and toy models, kept between test runs: converting Gemma takes a minute."""
    given = os.environ.get("STILLHOUSE_CACHE")
    root = Path(given) if given else Path(__file__).parent.parent / ".cache" / "stillhouse"
    root.mkdir(parents=True, exist_ok=True)
    return root


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def numpy_may_overflow() -> Iterator[None]:
    import numpy as np  # not before the environment is set

    # Triton's interpreter computes with NumPy, which warns where a GPU gives an infinity.
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(scope="module")
def rounding_bfloat16() -> Iterator[None]:
    """As a GPU does. Triton's interpreter cuts bfloat16 off, which is twice the error."""
    import numpy as np  # these not before the environment is set
    import torch
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle, interpreter_builder

    cast = interpreter_builder.cast_impl

    def rounding(source: Any, kind: Any) -> Any:
        if (source.dtype.scalar, kind.scalar) != (tl.float32, tl.bfloat16):
            return cast(source, kind)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
        return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter_builder, "cast_impl", rounding)
        yield


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where Triton's kernels run: interpreted, or compiled."""
    return str(request.param)
