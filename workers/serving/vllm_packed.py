"""What our attention backends of vLLM share: a step's metadata, and a layer's way to its blocks."""

import sys
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadataBuilder,
    AttentionType,
)

from stillhouse.errors import ModelError
from stillhouse.kernels.turboquant import to_half
from stillhouse.workers.serving.layout import Blocks
from stillhouse.workers.serving.packed_layer import PackedLayer
from stillhouse.workers.serving.self_check import require_right
from stillhouse.workers.serving.server import SERVES_PACKED
from stillhouse.workers.serving.step import Step
from stillhouse.workers.serving.vllm_config import require_layers, served_cache


@dataclass(frozen=True)
class PackedMetadata:
    """A step, and where its tokens are stored."""

    step: Step
    slots_T: Tensor


class PackedBuilder(AttentionMetadataBuilder[PackedMetadata]):
    """Makes a `Step` of what vLLM has scheduled.

    It reads lengths on the host, which a captured graph would never do again.
    """

    _cudagraph_support = AttentionCGSupport.NEVER
    # Layers of several sizes have a builder each: one step serves them all.
    _last: ClassVar[tuple[Any, PackedMetadata] | None] = None

    def __init__(self, spec: Any, names: list[str], config: Any, device: torch.device) -> None:
        super().__init__(spec, names, config, device)
        require_layers(config, PlannedImpl)
        layers = config.compilation_config.static_forward_context
        for name in names:
            layers[name].impl.require_bytes(name, spec)
        # Waited for by who started the engine (`server.ServerProcess`).
        sys.stderr.write(f"{SERVES_PACKED} in {len(names)} layers\n")
        sys.stderr.flush()

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> PackedMetadata:
        """Of one cache group, whose layers' builders are given the same object."""
        common = common_attn_metadata
        if self._last is None or self._last[0] is not common:
            PackedBuilder._last = common, self._made(common)
        assert PackedBuilder._last is not None
        return PackedBuilder._last[1]

    def _made(self, common: Any) -> PackedMetadata:
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


class LayerBackend:
    """What a layer's backend says once its weights are loaded: its blocks' size is known then."""

    token_bytes: ClassVar[int]
    block: ClassVar[int]

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
        return PackedBuilder


class PlannedImpl:
    """Of a layer that is served as its plan says."""


class PackedImpl(PlannedImpl):
    """Of one layer, beside an implementation of vLLM's; `packed` is None where nothing of ours is
    served, and for layers in 16 bits."""

    kind: ClassVar[type[PackedLayer]]
    _checked: ClassVar[dict[Any, PackedLayer]] = {}
    packed: PackedLayer | None = None
    _views: tuple[Tensor, Blocks] | None = None

    # What vLLM's own implementations keep of a layer, under the same names.
    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    sliding_window: int | None
    logits_soft_cap: float | None
    alibi_slopes: Any
    sinks: Tensor | None
    attn_type: str
    kv_sharing_target_layer_name: str | None

    def remember_config(self) -> None:
        """vLLM's, while it is at hand."""
        self._config = get_current_vllm_config()

    def prepare(self, dtype: torch.dtype, device: torch.device) -> None:
        """Finds its layer, and what that one stores; vLLM asks for the blocks' size after self.

        ModelError for what cannot be served, and where the kernels fail their self-check.
        """
        served = served_cache(self._config)
        if served is None:
            return
        name, module = self._module()
        self._require_plain(name, module)
        block = self._config.cache_config.block_size
        index = int(extract_layer_index(name))
        found = served.layer(index, self.num_kv_heads, self.head_size, block, device)
        if found is None:
            return
        self.packed = self.kind(
            found.codecs,
            found.layout,
            self.num_heads // self.num_kv_heads,
            self.scale,
            float(self.logits_soft_cap or 0),
            max(self.sliding_window or 0, 0),
        )
        self._half = to_half(torch.empty(0, dtype=dtype)).dtype
        self._check(name, dtype, device)
        size = found.layout.token_bytes
        parts = {"token_bytes": size, "block": block, "__module__": __name__}
        bases = (LayerBackend, module.attn_backend)
        module.attn_backend = type(f"Packed{size}Backend", bases, parts)

    def _check(self, name: str, dtype: torch.dtype, device: torch.device) -> None:
        """In what is served, for which kernels are compiled here, too: a request would wait; and in
        what shows the smallest mistakes. Layers that are alike are checked once."""
        layer = self.packed
        assert layer is not None
        how = (*map(id, layer.codecs), layer.layout, layer.group, layer.scaling, layer.softcap)
        exact = (torch.float32,) if self.kind.takes_float32 else ()
        for checked in {dtype, *exact}:
            key = (*how, layer.window, self.num_kv_heads, checked)
            if key not in self._checked:
                require_right(layer, self.num_kv_heads, name, checked, device)
                self._checked[key] = layer  # which keeps the codecs, and so their ids

    def require_bytes(self, name: str, spec: Any) -> None:
        """ModelError unless the engine's blocks have the bytes that the layer's tokens take."""
        assert self.packed is not None
        layout = self.packed.layout
        wanted = self.num_kv_heads * layout.pages.tokens * layout.token_bytes
        if spec.unpadded_page_size_bytes != wanted:
            raise ModelError(
                f"self-check: expected blocks of {wanted} bytes in {name}, as its codecs take, "
                f"found {spec.unpadded_page_size_bytes}"
            )

    def store_step(self, layer: Any, states: tuple[Tensor, Tensor], kv_cache: Tensor) -> None:
        """Stores the step's keys and values [T, H, D]."""
        assert self.packed is not None
        metadata: PackedMetadata = get_forward_context().attn_metadata[layer.layer_name]
        count = metadata.slots_T.shape[0]
        key, value = (x[:count] for x in states)
        self.packed.store((key, value), self._blocks(kv_cache), metadata.slots_T, metadata.step)

    def attend_step(
        self, query: Tensor, kv_cache: Tensor, metadata: PackedMetadata, output: Tensor
    ) -> None:
        """Writes what the step's queries [T, Q, D] attend to into the output."""
        assert self.packed is not None
        count = metadata.slots_T.shape[0]
        self.packed.attend(query[:count], self._blocks(kv_cache), metadata.step, output[:count])

    def _blocks(self, kv_cache: Tensor) -> Blocks:
        if self._views is None or self._views[0] is not kv_cache:
            assert self.packed is not None
            self._views = kv_cache, self.packed.layout.views(kv_cache, self._half)
        return self._views[1]

    def _module(self) -> tuple[str, Any]:
        layers = self._config.compilation_config.static_forward_context
        [found] = [
            (name, layer) for name, layer in layers.items() if getattr(layer, "impl", None) is self
        ]
        return found

    def _require_plain(self, name: str, module: Any) -> None:
        kind = type(module)
        reasons = [
            reason
            for reason, there in (
                (f"layers of the kind {kind.__name__}", kind is not Attention),
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
