"""vLLM's attention on a GPU, with our cache in its blocks: `--attention-backend CUSTOM`.

Steps are not captured in CUDA graphs: vLLM runs attention between the graphs of the other layers.
A layer that a plan leaves in 16 bits gets vLLM's `TRITON_ATTN` once weights are loaded.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend, TritonAttentionImpl
from vllm.v1.kv_cache_interface import KVCacheLayout

from stillhouse.errors import ModelError
from stillhouse.kernels.paged_attention import PAGE_TOKENS
from stillhouse.workers.serving.gpu_layer import GpuLayer
from stillhouse.workers.serving.vllm_config import served_cache
from stillhouse.workers.serving.vllm_packed import PackedBuilder, PackedImpl, PlannedImpl


class HalfCudaImpl(PlannedImpl, TritonAttentionImpl):
    """Of a layer that its plan leaves in 16 bits: vLLM's own, which runs on every card."""


class PackedCudaImpl(PackedImpl, AttentionImpl[Any]):
    """Attention of one layer."""

    kind = GpuLayer

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.alibi_slopes, self.sinks = alibi_slopes, sinks
        self.sliding_window, self.logits_soft_cap = sliding_window, logits_soft_cap
        self.kv_cache_dtype, self.attn_type = kv_cache_dtype, attn_type
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.remember_config()

    @staticmethod
    def device() -> torch.device:
        """That the layer's states lie on."""
        return torch.device("cuda", torch.cuda.current_device())

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """The model's layers are known, and their weights; one in 16 bits is vLLM's from now on.

        ModelError where no packed cache is asked for: vLLM would choose better for itself.
        """
        if served_cache(self._config) is None:
            raise ModelError(
                "--attention-backend CUSTOM: expected a packed cache, found none asked for; leave "
                "the backend to vLLM, or name the cache with --cache"
            )
        self.prepare(act_dtype, self.device())
        if self.packed is None:
            _, module = self._module()
            # It stores apart from attention, too: the graphs that vLLM compiles and keeps are then
            # the same whichever layers a plan has packed.
            module.attn_backend, module.impl = TritonAttentionBackend, self._unpacked()
            module.impl.process_weights_after_loading(act_dtype)

    def _unpacked(self) -> HalfCudaImpl:
        return HalfCudaImpl(
            self.num_heads,
            self.head_size,
            self.scale,
            self.num_kv_heads,
            self.alibi_slopes,
            self.sliding_window,
            self.kv_cache_dtype,
            self.logits_soft_cap,
        )

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Stores the step's keys and values."""
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
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """As vLLM's; query and output [T, Q, D]."""
        if attn_metadata is not None:
            self.attend_step(query, kv_cache, attn_metadata, output)
        return output


class PackedCudaBackend(AttentionBackend):
    """What vLLM makes attention layers with."""

    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto"]

    @staticmethod
    def get_name() -> str:
        """The member of vLLM's enumeration that it is registered as."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[PackedCudaImpl]:
        """Ours."""
        return PackedCudaImpl

    @staticmethod
    def get_builder_cls() -> Any:
        """Ours."""
        return PackedBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        """Pages that the kernels read."""
        return list(PAGE_TOKENS)

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """Head sizes that the kernels read."""
        return list(range(64, 257, 16))

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[Any, ...]:
        """Blocks of a layer one behind another, a head's tokens contiguous."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """They are masked."""
        return True
