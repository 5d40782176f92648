"""The peers of `attention.py` from serving engines: fp8 kernels, and vLLM's TurboQuant.

None is part of the installation: what is not there is said in `missing`. Each is called as its
project calls it in a decode step. Content does not change a time, so caches hold random bits, and
scalars where a format has them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.attention_cases import (
    PAGE,
    DecodeCase,
    Steps,
    finite,
    random_bytes,
    random_fp8,
    random_query,
    random_table,
)
from benchmarks.attention_peers import PeerKernel, imported

TURBOQUANT = "vllm.model_executor.layers.quantization.turboquant"
FLASH = "vllm.vllm_flash_attn.flash_attn_interface"
PRESETS = ("4bit_nc", "3bit_nc", "k8v4")


@dataclass(frozen=True)
class Fp8Kernel(PeerKernel):
    """What both share."""

    def cache_bytes(self, case: DecodeCase) -> int:
        """A byte a number."""
        return 2 * case.vectors * case.dim

    @staticmethod
    def pages(case: DecodeCase, place: str) -> tuple[Tensor, Tensor]:
        """Keys and values [N, PAGE, H, D]."""
        shape = (case.batch * -(-case.context // PAGE), PAGE, case.heads, case.dim)
        key, value = (random_fp8(shape, place).view(torch.float8_e4m3fn) for _ in range(2))
        return key, value


@dataclass(frozen=True)
class VllmFlashKernel(Fp8Kernel):
    """FlashAttention-3 of vLLM over pages in fp8. Its query is in fp8 too, cast once beforehand."""

    name: str = "vllm flash-attention-3 fp8"

    def missing(self) -> str | None:
        """Where vLLM is not installed, or has no FlashAttention-3 for the device."""
        found, why = imported(
            FLASH,
            "flash_attn_varlen_func",
            "fa_version_unsupported_reason",
        )
        return why if found is None else found[1](3)

    def steps(self, case: DecodeCase, copies: int, place: str) -> Steps:
        """Scales of 1 for each sequence and head."""
        found, why = imported(FLASH, "flash_attn_varlen_func")
        if found is None:
            raise ImportError(why)
        query = random_query(case, place).view(case.batch, -1, case.dim).to(torch.float8_e4m3fn)
        table = random_table(case.batch, -(-case.context // PAGE), place)
        scale = torch.ones((case.batch, case.heads), device=place)
        options = {
            "max_seqlen_q": 1,
            "cu_seqlens_q": torch.arange(case.batch + 1, dtype=torch.int32, device=place),
            "max_seqlen_k": case.context,
            "seqused_k": _lengths(case, place),
            "block_table": table,
            "causal": True,
            "softmax_scale": case.dim**-0.5,
            "fa_version": 3,
            **dict.fromkeys(("q_descale", "k_descale", "v_descale"), scale),
        }

        def call() -> Callable[[], Tensor]:
            key, value = self.pages(case, place)
            return lambda: found[0](query, key, value, **options)

        calls = [call() for _ in range(copies)]
        return Steps(calls, lambda: finite(calls, case))


@dataclass(frozen=True)
class FlashInferKernel(Fp8Kernel):
    """FlashInfer's paged decode over fp8, queries in bfloat16, planned once beforehand."""

    name: str = "flashinfer fp8"

    def missing(self) -> str | None:
        """Where it is not installed."""
        return imported("flashinfer", "BatchDecodeWithPagedKVCacheWrapper")[1] or None

    def steps(self, case: DecodeCase, copies: int, place: str) -> Steps:
        """One plan: caches have the same page table."""
        found, why = imported("flashinfer", "BatchDecodeWithPagedKVCacheWrapper")
        if found is None:
            raise ImportError(why)
        room = torch.empty(256 << 20, dtype=torch.uint8, device=place)
        wrapper = found[0](room, "NHD", use_tensor_cores=True)
        width = -(-case.context // PAGE)
        last = case.context - (width - 1) * PAGE
        wrapper.plan(
            torch.arange(case.batch + 1, dtype=torch.int32, device=place) * width,
            random_table(case.batch, width, place).flatten(),
            torch.full((case.batch,), last, dtype=torch.int32, device=place),
            case.heads * case.group,
            case.heads,
            case.dim,
            PAGE,
            q_data_type=torch.bfloat16,
            kv_data_type=torch.float8_e4m3fn,
        )
        query = random_query(case, place).view(case.batch, -1, case.dim)

        def call() -> Callable[[], Tensor]:
            pages = self.pages(case, place)
            return lambda: wrapper.run(query, pages)

        calls = [call() for _ in range(copies)]
        return Steps(calls, lambda: finite(calls, case))


@dataclass(frozen=True)
class VllmTurboQuantKernel(PeerKernel):
    """vLLM's Triton decode kernel over its TurboQuant slots. preset: as in `turboquant_<preset>`.

    A slot holds a head's key (indices, float16 norm; or fp8) and its value (indices, float16 scale
    and zero). Splits are as many as it takes by default under a graph.
    """

    preset: str = "4bit_nc"

    def missing(self) -> str | None:
        """Where vLLM is not installed or has no such kernel."""
        return turboquant_parts()[1] or None

    def _config(self, dim: int) -> Any:
        parts, why = turboquant_parts()
        if parts is None:
            raise ImportError(why)
        return parts[1].from_cache_dtype(f"turboquant_{self.preset}", dim)

    def cache_bytes(self, case: DecodeCase) -> int:
        """Of whole slots."""
        return case.vectors * int(self._config(case.dim).slot_size_aligned)

    def steps(self, case: DecodeCase, copies: int, place: str) -> Steps:
        """As its backend calls it; the rotation is the identity, which takes as long as any."""
        parts, config = turboquant_parts()[0], self._config(case.dim)
        if parts is None:
            raise ImportError(turboquant_parts()[1])
        attend, _, centroids = parts
        width = -(-case.context // PAGE)
        eye = torch.eye(case.dim, device=place)
        options = {
            "query": random_query(case, place).view(case.batch, -1, case.dim),
            "block_table": random_table(case.batch, width, place),
            "seq_lens": _lengths(case, place),
            "Pi": eye,
            "PiT": eye,
            "centroids": centroids(case.dim, config.centroid_bits).to(place),
            "scale": case.dim**-0.5,
            "mse_bits": config.key_mse_bits,
            "key_packed_size": config.key_packed_size,
            "value_quant_bits": config.effective_value_quant_bits,
            "key_fp8": config.key_fp8,
            "norm_correction": config.norm_correction,
        }

        def call() -> Callable[[], Tensor]:
            slots = random_slots(case, config, width, place)
            return lambda: attend(kv_cache=slots, **options)

        calls = [call() for _ in range(copies)]
        return Steps(calls, lambda: finite(calls, case))


def turboquant_parts() -> tuple[tuple[Any, ...] | None, str]:
    """vLLM's kernel, its configuration and its centroids; None, and why, without them."""
    parts: list[Any] = []
    for module, name in (
        ("vllm.v1.attention.ops.triton_turboquant_decode", "triton_turboquant_decode_attention"),
        (f"{TURBOQUANT}.config", "TurboQuantConfig"),
        (f"{TURBOQUANT}.centroids", "get_centroids"),
    ):
        found, why = imported(module, name)
        if found is None:
            return None, why
        parts += found
    return tuple(parts), ""


def random_slots(case: DecodeCase, config: Any, width: int, place: str) -> Tensor:
    """uint8 [N, PAGE, H, slot], a head's tokens together as vLLM's backend lays them out."""
    shape = (case.batch * width, case.heads, PAGE, config.slot_size_aligned)
    slots = random_bytes(shape, place)
    key, value = config.key_packed_size, config.value_packed_size
    if config.key_fp8:
        slots[..., :key].bitwise_and_(0xBF)
    else:
        slots[..., key - 2 : key] = _half_bytes(case.dim**0.5, place)
    slots[..., key + value - 4 : key + value - 2] = _half_bytes(0.125, place)
    slots[..., key + value - 2 : key + value] = _half_bytes(-1.0, place)
    return slots.transpose(1, 2)


def _half_bytes(number: float, place: str) -> Tensor:
    return torch.tensor([number], dtype=torch.float16, device=place).view(torch.uint8)


def _lengths(case: DecodeCase, place: str) -> Tensor:
    return torch.full((case.batch,), case.context, dtype=torch.int32, device=place)
