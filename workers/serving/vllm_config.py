"""What vLLM was asked for: our settings in it, and refusals of what our cache does not go with.

Everything refused here would otherwise be accepted and served differently.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

from stillhouse.errors import ModelError
from stillhouse.workers.serving.served_cache import HALF, ServedCache

SETTINGS = "stillhouse"  # our key in vLLM's `additional_config`


def served_cache(config: Any) -> ServedCache | None:
    """Of a `VllmConfig`; None where nothing of ours is served. Raises as `require_supported`."""
    settings = config.additional_config.get(SETTINGS)
    if settings is None:
        return None
    served = _shared(ServedCache.of(settings))
    if served.format == HALF:
        return None
    require_supported(config)
    return served


@cache
def _shared(served: ServedCache) -> ServedCache:
    """One for all layers: its plan is read once, and codecs that are alike are one."""
    return served


def require_supported(config: Any) -> None:
    """ModelError that names every option that the packed cache does not go with, and why."""
    found = list(_unsupported(config))
    if found:
        raise ModelError("the packed cache does not go with " + "; nor with ".join(found))


def _unsupported(config: Any) -> Iterator[str]:
    parallel, cache = config.parallel_config, config.cache_config
    compiled = config.compilation_config
    if cache.cache_dtype != "auto":
        yield f"--kv-cache-dtype {cache.cache_dtype}: the format is ours; leave it at auto"
    if parallel.tensor_parallel_size > 1:
        yield "--tensor-parallel-size above 1: a plan is fitted to all heads of a layer"
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        yield "context parallelism: a sequence's sinks lie in its first block"
    if config.speculative_config is not None:
        yield "--speculative-config: drafts that are taken back are not tested with it"
    if config.kv_transfer_config is not None:
        yield "--kv-transfer-config: connectors copy blocks as if they held plain keys and values"
    if config.lora_config is not None:
        yield "--enable-lora: the plan is fitted to the weights as they are; merge the adapter"
    if (
        compiled.cudagraph_mode.has_piecewise_cudagraphs()
        and not compiled.splitting_ops_contain_kv_cache_update()
    ):
        yield (
            "CUDA graphs with stores in them, as inductor's partition and breakable graphs have: "
            "which tokens are sinks is read on the host"
        )
    if config.model_config.use_mla:
        yield "multi-head latent attention: its cache holds no keys and values"
    if config.model_config.is_encoder_decoder:
        yield "encoder-decoder models: cross-attention has a cache of its own kind"


def require_layers(config: Any, ours: type) -> None:
    """ModelError unless every layer with a cache goes through an implementation of ours."""
    layers = config.compilation_config.static_forward_context
    others = [
        name
        for name, layer in layers.items()
        if hasattr(layer, "get_kv_cache_spec")
        and not isinstance(getattr(layer, "impl", None), ours)
    ]
    if others:
        raise ModelError(
            f"the packed cache is of attention layers alone, found {others[:4]} of another kind; "
            "serve with --cache bf16"
        )
