"""vLLM's attention on a CPU, with our cache in its blocks.

vLLM takes no backend from outside for a CPU, but lets its own be replaced: without settings of ours
(`vllm_config.SETTINGS`), and for layers in 16 bits, this one is vLLM's.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

from stillhouse.workers.serving.cpu_layer import CpuLayer
from stillhouse.workers.serving.vllm_packed import PackedImpl


class PackedCpuImpl(PackedImpl, CPUAttentionBackendImpl):
    """Attention of one layer."""

    kind = CpuLayer

    def __init__(self, *args: Any, **options: Any) -> None:
        CPUAttentionBackendImpl.__init__(self, *args, **options)
        self.remember_config()

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """The model's layers are known, and their weights."""
        self.prepare(act_dtype, torch.device("cpu"))

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Stores the step's keys and values."""
        if self.packed is None:
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        else:
            self.store_step(layer, (key, value), kv_cache)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *scales: Any,
        **options: Any,
    ) -> Tensor:
        """As vLLM's; query and output [T, Q, D]."""
        if self.packed is None or attn_metadata is None:
            states = (query, key, value, kv_cache, attn_metadata, output)
            return super().forward(layer, *states, *scales, **options)
        self.attend_step(query, kv_cache, attn_metadata, output)
        return output


class PackedCpuBackend(CPUAttentionBackend):
    """What vLLM makes attention layers with."""

    @staticmethod
    def get_impl_cls() -> type[PackedCpuImpl]:
        """Ours."""
        return PackedCpuImpl
