"""Options of the engine that the packed cache does not go with: each is named with its reason."""

from types import SimpleNamespace
from typing import Any

import pytest

from stillhouse.errors import ModelError
from stillhouse.workers.serving.served_cache import ServedCache
from stillhouse.workers.serving.vllm_config import SETTINGS, require_supported, served_cache


def config(**changed: Any) -> Any:
    """What vLLM's configuration says by default, as far as it is asked; changed: dotted names."""
    found = SimpleNamespace(
        additional_config={SETTINGS: {"format": "k4v4"}},
        cache_config=SimpleNamespace(cache_dtype="auto"),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=1,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
        ),
        compilation_config=SimpleNamespace(
            cudagraph_mode=SimpleNamespace(has_piecewise_cudagraphs=lambda: True),
            splitting_ops_contain_kv_cache_update=lambda: True,
        ),
        speculative_config=None,
        kv_transfer_config=None,
        lora_config=None,
        model_config=SimpleNamespace(use_mla=False, is_encoder_decoder=False),
    )
    for name, value in changed.items():
        *path, last = name.split("__")
        place = found
        for part in path:
            place = getattr(place, part)
        setattr(place, last, value)
    return found


def test_the_default_is_served() -> None:
    require_supported(config())
    assert served_cache(config()) == ServedCache("k4v4")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"cache_config__cache_dtype": "fp8"}, "--kv-cache-dtype fp8"),
        ({"parallel_config__tensor_parallel_size": 2}, "--tensor-parallel-size above 1"),
        ({"parallel_config__decode_context_parallel_size": 2}, "context parallelism"),
        ({"parallel_config__prefill_context_parallel_size": 2}, "context parallelism"),
        ({"speculative_config": object()}, "--speculative-config"),
        ({"kv_transfer_config": object()}, "--kv-transfer-config"),
        ({"lora_config": object()}, "--enable-lora"),
        (
            {"compilation_config__splitting_ops_contain_kv_cache_update": lambda: False},
            "CUDA graphs with stores in them",
        ),
        ({"model_config__use_mla": True}, "multi-head latent attention"),
        ({"model_config__is_encoder_decoder": True}, "encoder-decoder models"),
    ],
)
def test_what_does_not_go_with_it_is_named(changed: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match=f"does not go with {reason}"):
        served_cache(config(**changed))


def test_several_are_named_at_once() -> None:
    with pytest.raises(ModelError, match=r"--enable-lora.*; nor with .*latent"):
        require_supported(config(lora_config=object(), model_config__use_mla=True))


def test_without_a_cache_of_ours_nothing_is_refused() -> None:
    for settings in ({}, {SETTINGS: {"format": "bf16"}}):
        assert served_cache(config(additional_config=settings, lora_config=object())) is None


@pytest.mark.parametrize("settings", [{}, {"format": "k4v4", "sink": 4}, {"sinks": 1}])
def test_other_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="expected settings of"):
        served_cache(config(additional_config={SETTINGS: settings}))
