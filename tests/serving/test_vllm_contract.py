"""What our backends tell vLLM, and refuse of it; no engine is started."""

from pathlib import Path
from typing import Any

import pytest
import torch

from stillhouse.errors import ModelError
from stillhouse.workers.serving.plugin import register
from stillhouse.workers.serving.served_cache import ServedCache
from stillhouse.workers.serving.vllm_config import SETTINGS, served_cache
from tests.serving.small_models import save_llama

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what vLLM imports


@pytest.fixture
def config(tmp_path: Path) -> Any:
    """A `VllmConfig` with a packed cache."""
    from vllm.engine.arg_utils import EngineArgs

    register()
    settings = {SETTINGS: ServedCache("k4v4").settings()}
    model = str(save_llama(tmp_path))
    arguments = EngineArgs(model, dtype="float16", block_size=32, additional_config=settings)
    return arguments.create_engine_config()


@pytest.fixture
def compiled(config: Any) -> Any:
    """Its compilation as it is by default on a GPU."""
    from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode

    mode, graphs = CompilationMode.VLLM_COMPILE, CUDAGraphMode.FULL_AND_PIECEWISE
    config.compilation_config = CompilationConfig(mode=mode, cudagraph_mode=graphs)
    config.compilation_config.set_splitting_ops_for_v1("naive")
    return config.compilation_config


def test_attention_runs_between_cuda_graphs(config: Any, compiled: Any) -> None:
    from vllm.config import CUDAGraphMode
    from vllm.v1.attention.backend import AttentionCGSupport

    from stillhouse.workers.serving.vllm_packed import PackedBuilder

    support = PackedBuilder.get_cudagraph_support(config, None)
    assert support == AttentionCGSupport.NEVER
    found = compiled.resolve_cudagraph_mode_and_sizes(support, "PackedCudaBackend")
    assert found == CUDAGraphMode.PIECEWISE
    assert {"vllm::unified_attention_with_output", "vllm::unified_kv_cache_update"} <= set(
        compiled.splitting_ops
    )
    assert served_cache(config) is not None


def test_stores_in_cuda_graphs_are_refused(config: Any, compiled: Any) -> None:
    compiled.splitting_ops.remove("vllm::unified_kv_cache_update")
    with pytest.raises(ModelError, match="does not go with CUDA graphs with stores in them"):
        served_cache(config)


def test_attention_of_another_kind_is_refused(config: Any) -> None:
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.attention.chunked_local_attention import ChunkedLocalAttention

    with set_current_vllm_config(config):
        layer = ChunkedLocalAttention(
            2, 64, 0.125, 16, cache_config=config.cache_config, prefix="layers.0.attn"
        )
    with pytest.raises(ModelError, match=r"layers of the kind ChunkedLocalAttention, found in lay"):
        layer.process_weights_after_loading(torch.float16)


def test_a_gpus_backend_without_a_packed_cache_is_refused(config: Any) -> None:
    from vllm.config import set_current_vllm_config

    from stillhouse.workers.serving.vllm_cuda import PackedCudaImpl

    config.additional_config = {SETTINGS: ServedCache("bf16").settings()}
    with set_current_vllm_config(config):
        impl = PackedCudaImpl(2, 64, 0.125)
    with pytest.raises(ModelError, match="CUSTOM: expected a packed cache, found none asked for"):
        impl.process_weights_after_loading(torch.float16)
