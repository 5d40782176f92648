"""How the GPU benchmark calls what is not installed here; modules of the same faces stand in."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.attention_cases import PAGE, DecodeCase
from benchmarks.attention_peers import imported
from benchmarks.attention_served import (
    FLASH,
    TURBOQUANT,
    FlashInferKernel,
    VllmFlashKernel,
    VllmTurboQuantKernel,
)

TOY = DecodeCase("toy", batch=2, context=40, heads=1, group=2, dim=64)
Absent = Callable[[str], None]


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Absent]:
    """Makes a module fail to import, installed or not."""
    imported.cache_clear()
    yield lambda name: monkeypatch.setitem(sys.modules, name, None)
    imported.cache_clear()


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Puts modules of peers in place, with these names."""

    def install(name: str, **names: Any) -> None:
        parts = name.split(".")
        for stop in range(1, len(parts)):
            monkeypatch.setitem(
                sys.modules, ".".join(parts[:stop]), ModuleType(".".join(parts[:stop]))
            )
        module = ModuleType(name)
        module.__dict__.update(names)
        monkeypatch.setitem(sys.modules, name, module)

    imported.cache_clear()
    yield install
    imported.cache_clear()


def test_a_peer_that_is_not_installed_says_which_module(
    absent: Absent, modules: Callable[..., None]
) -> None:
    for name in (FLASH, "vllm.v1.attention.ops.triton_turboquant_decode"):
        absent(name)
    assert f"{FLASH} was not found" in (VllmFlashKernel().missing() or "")
    assert "triton_turboquant_decode was not found" in (VllmTurboQuantKernel("x").missing() or "")
    modules("flashinfer")
    assert "BatchDecodeWithPagedKVCacheWrapper" in (FlashInferKernel().missing() or "")


@dataclass(frozen=True)
class SlotConfig:
    """vLLM 0.32's TurboQuantConfig, as far as it is asked."""

    head_dim: int
    key_fp8: bool = False
    norm_correction: bool = True
    centroid_bits: int = 4
    key_mse_bits: int = 4
    effective_value_quant_bits: int = 4

    @staticmethod
    def from_cache_dtype(name: str, head_dim: int) -> "SlotConfig":
        assert name == "turboquant_4bit_nc"
        return SlotConfig(head_dim)

    @property
    def key_packed_size(self) -> int:
        return self.head_dim // 2 + 2

    @property
    def value_packed_size(self) -> int:
        return self.head_dim // 2 + 4

    @property
    def slot_size_aligned(self) -> int:
        return self.key_packed_size + self.value_packed_size


def test_vllms_turboquant_is_called_as_vllm_calls_it(modules: Callable[..., None]) -> None:
    def decode(
        query: Any, kv_cache: Any, block_table: Any, seq_lens: Any, Pi: Any, centroids: Any,
        scale: float, mse_bits: int, key_packed_size: int, value_quant_bits: int,
        key_fp8: bool, norm_correction: bool, PiT: Any,
    ) -> Any:  # fmt: skip
        assert query.shape == (2, 2, 64)
        assert query.dtype == torch.bfloat16
        assert kv_cache.shape == (2, PAGE, 1, 70)
        assert block_table.shape == (2, 1)
        assert (block_table.dtype, seq_lens.dtype) == (torch.int32, torch.int32)
        assert seq_lens.tolist() == [40, 40]
        assert (scale, mse_bits, key_packed_size, value_quant_bits) == (0.125, 4, 34, 4)
        assert (key_fp8, norm_correction) == (False, True)
        norm, scales = (kv_cache[..., at : at + 2].contiguous() for at in (32, 66))
        assert norm.view(torch.float16).unique().tolist() == [8.0]
        assert scales.view(torch.float16).unique().tolist() == [0.125]
        return query

    name = "vllm.v1.attention.ops.triton_turboquant_decode"
    modules(name, triton_turboquant_decode_attention=decode)
    modules(f"{TURBOQUANT}.config", TurboQuantConfig=SlotConfig)
    modules(f"{TURBOQUANT}.centroids", get_centroids=lambda dim, bits: torch.zeros(1 << bits))
    kernel = VllmTurboQuantKernel("vllm 4bit_nc")
    assert kernel.missing() is None
    assert kernel.cache_bytes(TOY) == 2 * 40 * 70
    steps = kernel.steps(TOY, 2, "cpu")
    assert len(steps.calls) == 2
    assert steps.check() is None


def test_fp8_peers_are_called_as_their_projects_say(modules: Callable[..., None]) -> None:
    def flash(query: Any, key: Any, value: Any, **options: Any) -> Any:
        assert query.dtype == key.dtype == value.dtype == torch.float8_e4m3fn
        assert key.shape == (2, PAGE, 1, 64)
        assert options["cu_seqlens_q"].tolist() == [0, 1, 2]
        assert options["k_descale"].shape == (2, 1)
        return query.float()

    class Wrapper(SimpleNamespace):
        def __init__(self, room: Any, layout: str, use_tensor_cores: bool) -> None:
            assert (layout, use_tensor_cores) == ("NHD", True)
            super().__init__()

        def plan(self, ends: Any, pages: Any, last: Any, *sizes: int, **_: Any) -> None:
            assert (ends.tolist(), sorted(pages.tolist()), last.tolist()) == (
                [0, 1, 2],
                [0, 1],
                [40, 40],
            )
            assert sizes == (2, 1, 64, PAGE)

        def run(self, query: Any, pages: Any) -> Any:
            assert pages[0].dtype == torch.float8_e4m3fn
            return query

    modules(FLASH, flash_attn_varlen_func=flash, fa_version_unsupported_reason=lambda _: None)
    modules("flashinfer", BatchDecodeWithPagedKVCacheWrapper=Wrapper)
    for kernel in (VllmFlashKernel(), FlashInferKernel()):
        assert kernel.missing() is None
        assert kernel.steps(TOY, 1, "cpu").check() is None
