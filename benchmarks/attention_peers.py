"""The peers of `attention.py` in torch, over bfloat16, and what all peers share."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from subprocess import SubprocessError
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from triton.errors import TritonError

from benchmarks.attention_cases import PAGE, DecodeCase, Steps, finite, random_query

# What a kernel, a compiler or an extension raises; an interrupted run is none of these.
KERNEL_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    SubprocessError,
    TritonError,
    TypeError,
    ValueError,
)
# flex_attention compiles each case anew, some ten seconds.
FLEX = {("llama-8b", 16, 32 << 10), ("llama-8b", 1, 128 << 10), ("llama-70b", 16, 32 << 10)}


def reason(error: BaseException) -> str:
    """One line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


@cache
def imported(module: str, *names: str) -> tuple[tuple[Any, ...] | None, str]:
    """The names of a module; None, and why, where it cannot be imported or has none such."""
    try:
        found = import_module(module)
        return tuple(getattr(found, name) for name in names), ""
    except KERNEL_ERRORS as error:
        return None, f"{module} was not found: {reason(error)}"


@dataclass(frozen=True)
class PeerKernel:
    """What most of them share."""

    name: str
    page: int | None = PAGE
    mine: bool = False

    def missing(self) -> str | None:
        """None: it is torch's."""
        return None

    def planned(self, case: DecodeCase) -> bool:
        """Everywhere."""
        return True


@dataclass(frozen=True)
class SdpaKernel(PeerKernel):
    """torch's FlashAttention over bfloat16 tensors, grouped heads; refused rather than replaced."""

    name: str = "sdpa bf16"
    page: int | None = None

    def cache_bytes(self, case: DecodeCase) -> int:
        """Two bytes a number."""
        return 2 * case.vectors * case.dim * 2

    def steps(self, case: DecodeCase, copies: int, place: str) -> Steps:
        """A call a cache."""
        attend = _flash_attention
        calls = _dense_calls(attend, case, copies, place)
        return Steps(calls, lambda: finite(calls, case))


@dataclass(frozen=True)
class FlexKernel(SdpaKernel):
    """torch's compiled flex_attention, its decode kernel."""

    name: str = "flex bf16"

    def planned(self, case: DecodeCase) -> bool:
        """Where compiling is worth the time."""
        return case.key in FLEX

    def steps(self, case: DecodeCase, copies: int, place: str) -> Steps:
        """Compiled for this case alone: beyond a limit of shapes torch would not compile at all."""
        from torch.nn.attention.flex_attention import flex_attention

        torch.compiler.reset()
        attend = torch.compile(flex_attention, dynamic=False, fullgraph=True)
        calls = _dense_calls(attend, case, copies, place)
        return Steps(calls, lambda: finite(calls, case))


def _flash_attention(query: Tensor, key: Tensor, value: Tensor, *, enable_gqa: bool) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return scaled_dot_product_attention(query, key, value, enable_gqa=enable_gqa)


def _dense_calls(
    attend: Callable[..., Tensor], case: DecodeCase, copies: int, place: str
) -> list[Callable[[], Tensor]]:
    """Over contiguous [B, H, T, D] in bfloat16."""
    query = random_query(case, place).flatten(1, 2)[:, :, None]
    shape = (case.batch, case.heads, case.context, case.dim)

    def call() -> Callable[[], Tensor]:
        key, value = (
            torch.empty(shape, dtype=torch.bfloat16, device=place).normal_() for _ in range(2)
        )
        return lambda: attend(query, key, value, enable_gqa=True)

    return [call() for _ in range(copies)]
