"""vLLM's attention on a CPU, with our cache in its blocks.

vLLM takes no backend from outside for a CPU, but lets its own be replaced: without settings of ours
(`vllm_config.SETTINGS`), and for layers in 16 bits, this one is vLLM's.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionMetadataBuilder, AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

from stillhouse.errors import ModelError
from stillhouse.kernels.turboquant import to_half
from stillhouse.workers.serving.cpu_layer import CpuLayer
from stillhouse.workers.serving.layout import Blocks
from stillhouse.workers.serving.self_check import require_right
from stillhouse.workers.serving.step import Step
from stillhouse.workers.serving.vllm_config import require_layers, served_cache


class PackedCpuBackend(CPUAttentionBackend):
    """What vLLM makes attention layers with."""

    @staticmethod
    def get_impl_cls() -> type["PackedCpuImpl"]:
        """Ours."""
        return PackedCpuImpl


@dataclass(frozen=True)
class PackedMetadata:
    """A step, and where its tokens are stored."""

    step: Step
    slots_T: Tensor


class PackedCpuBuilder(AttentionMetadataBuilder[PackedMetadata]):
    """Makes a `Step` of what vLLM has scheduled."""

    def __init__(self, spec: Any, names: list[str], config: Any, device: torch.device) -> None:
        super().__init__(spec, names, config, device)
        require_layers(config, PackedCpuImpl)
        layers = config.compilation_config.static_forward_context
        for name in names:
            layers[name].impl.require_bytes(name, spec)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> PackedMetadata:
        """Of one cache group."""
        common = common_attn_metadata
        if common.causal is not True:
            raise ModelError("the packed cache is of causal attention, found another")
        count = common.num_reqs
        step = Step(
            common.query_start_loc_cpu[: count + 1].tolist(),
            common.seq_lens[:count].tolist(),
            common.block_table_tensor[:count],
            self.kv_cache_spec.block_size,
        )
        return PackedMetadata(step, common.slot_mapping[: common.num_actual_tokens])


class _PackedLayerBackend(PackedCpuBackend):
    """Of one layer, after its weights are loaded: its blocks' size is known then."""

    token_bytes = 0
    block = 0

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """Packed bytes instead of keys and values."""
        return replace(spec, dtype=torch.uint8, state_content_bytes=cls.token_bytes)

    @classmethod
    def get_supported_kernel_block_sizes(cls, kv_cache_spec: Any = None) -> list[Any]:
        """The block that sinks were reckoned for."""
        return [cls.block]

    @staticmethod
    def get_builder_cls() -> Any:
        """Ours."""
        return PackedCpuBuilder


class PackedCpuImpl(CPUAttentionBackendImpl):
    """Attention of one layer."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._config = get_current_vllm_config()
        self._layer: CpuLayer | None = None
        self._blocks: tuple[Tensor, Blocks] | None = None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Finds its layer, and what that one stores; vLLM asks for the blocks' size after this."""
        super().process_weights_after_loading(act_dtype)
        served = served_cache(self._config)
        if served is None:
            return
        name, module = self._module()
        self._require_plain(name)
        block = self._config.cache_config.block_size
        found = served.layer(_index(name), self.num_kv_heads, self.head_size, block)
        if found is None:
            return
        window = self.sliding_window
        self._layer = CpuLayer(
            found.codecs,
            found.layout,
            self.num_queries_per_kv,
            self.scale,
            float(self.logits_soft_cap),
            max(window, 0),
        )
        self._half = to_half(torch.empty(0, dtype=act_dtype)).dtype
        # Its kernels are compiled here, too: a request would wait for them.
        require_right(self._layer, self.num_kv_heads, name)
        size = found.layout.token_bytes
        parts = {"token_bytes": size, "block": block, "__module__": __name__}
        module.attn_backend = type(f"Packed{size}Backend", (_PackedLayerBackend,), parts)

    def _module(self) -> tuple[str, Any]:
        layers = self._config.compilation_config.static_forward_context
        [found] = [
            (name, layer) for name, layer in layers.items() if getattr(layer, "impl", None) is self
        ]
        return found

    def _require_plain(self, name: str) -> None:
        reasons = [
            reason
            for reason, there in (
                ("ALiBi", self.alibi_slopes is not None),
                ("sink logits of the model's own", self.sinks is not None),
                ("keys and values of another layer", self.kv_sharing_target_layer_name is not None),
                (f"{self.attn_type} attention", self.attn_type != AttentionType.DECODER),
            )
            if there
        ]
        if reasons:
            raise ModelError(
                f"the packed cache does not go with {' and '.join(reasons)}, found in {name}; "
                "serve with --cache bf16"
            )

    def require_bytes(self, name: str, spec: Any) -> None:
        """ModelError unless the engine's blocks have the bytes that the layer's tokens take."""
        assert self._layer is not None
        layout = self._layer.layout
        wanted = self.num_kv_heads * layout.pages.tokens * layout.token_bytes
        if spec.unpadded_page_size_bytes != wanted:
            raise ModelError(
                f"self-check: expected blocks of {wanted} bytes in {name}, as its codecs take, "
                f"found {spec.unpadded_page_size_bytes}"
            )

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Stores the step's keys and values."""
        if self._layer is None:
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
            return
        metadata = _metadata(layer)
        count = metadata.slots_T.shape[0]
        states = key[:count], value[:count]
        self._layer.store(states, self._views(kv_cache), metadata.slots_T, metadata.step)

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
        if self._layer is None or attn_metadata is None:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale,
                output_block_scale,
            )  # fmt: skip
        count = attn_metadata.slots_T.shape[0]
        self._layer.attend(query[:count], self._views(kv_cache), attn_metadata.step, output[:count])
        return output

    def _views(self, kv_cache: Tensor) -> Blocks:
        if self._blocks is None or self._blocks[0] is not kv_cache:
            assert self._layer is not None
            self._blocks = kv_cache, self._layer.layout.views(kv_cache, self._half)
        return self._blocks[1]


def _metadata(layer: Any) -> PackedMetadata:
    from vllm.forward_context import get_forward_context

    found: PackedMetadata = get_forward_context().attn_metadata[layer.layer_name]
    return found


def _index(name: str) -> int:
    from vllm.model_executor.models.utils import extract_layer_index

    return int(extract_layer_index(name))
