"""Key/value caches for transformers that hold packed vectors."""

from stillhouse.workers.cache.packed_attention import PACKED_ATTENTION
from stillhouse.workers.cache.plan import PLAN_FOLDER, CachePlan, FittedScheme, LayerPlan
from stillhouse.workers.cache.scheme import (
    CACHE_KINDS,
    CacheFormat,
    CacheKind,
    CacheScheme,
    ObliviousScheme,
    SameCodecScheme,
)
from stillhouse.workers.cache.storage import CacheStorage
from stillhouse.workers.cache.turboquant import CacheFactory, TurboQuantCache, layer_windows
from stillhouse.workers.cache.vllm_presets import VLLM_PRESETS, VllmScheme

__all__ = [
    "CACHE_KINDS",
    "PACKED_ATTENTION",
    "PLAN_FOLDER",
    "VLLM_PRESETS",
    "CacheFactory",
    "CacheFormat",
    "CacheKind",
    "CachePlan",
    "CacheScheme",
    "CacheStorage",
    "FittedScheme",
    "LayerPlan",
    "ObliviousScheme",
    "SameCodecScheme",
    "TurboQuantCache",
    "VllmScheme",
    "layer_windows",
]
