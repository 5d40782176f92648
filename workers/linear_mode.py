"""Products of linear layers in float32 by oneDNN, where torch's own choice is slow.

On x86 torch multiplies float32 matrices with MKL, which leaves AVX-512 unused on AMD's processors.
oneDNN, which torch carries as well, uses it: 2.2 times as fast on an EPYC (docs/decisions/0020).
"""

import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import Parameter
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

_PLAIN = (Tensor, Parameter)  # no quantised or wrapped weight


class OneDnnLinearMode(TorchFunctionMode):
    """Within it every linear layer whose weights are frozen is multiplied by oneDNN.

    So are its input's gradients. What oneDNN has no float32 product for goes to torch as always.
    Weights are read where they lie: nothing is copied or changed.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is linear:
            return _linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def fast_linears() -> AbstractContextManager[object]:
    """`OneDnnLinearMode` where it pays, else nothing."""
    return OneDnnLinearMode() if onednn_pays() else nullcontext()


@cache
def onednn_pays() -> bool:
    """Whether torch's float32 products are MKL's and this processor is one that MKL neglects."""
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and _vendor() == "AuthenticAMD"
    )


def _vendor() -> str | None:
    table = Path("/proc/cpuinfo")
    found = re.search(r"vendor_id\s*:\s*(\S+)", table.read_text()) if table.is_file() else None
    return found[1] if found else None


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    asks = torch.is_grad_enabled()
    learns = asks and any(x is not None and x.requires_grad for x in (weight, bias))
    if learns or not all(map(_is_plain, (input, weight, bias))):
        return linear(input, weight, bias)
    if asks and input.requires_grad:
        return _frozen(input, weight, bias)
    return _product(input, weight, bias)


def _product(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return product


class _FrozenLinear(torch.autograd.Function):
    """A product whose weight and bias get no gradient."""

    @staticmethod
    def forward(ctx: FunctionCtx, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _product(input, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _product(upstream, weight.T, None), None, None


# torch types `apply` as untyped; its arguments are those of `forward`.
_frozen = cast(Callable[[Tensor, Tensor, Tensor | None], Tensor], _FrozenLinear.apply)


def _is_plain(x: Tensor | None) -> bool:
    return x is None or (
        type(x) in _PLAIN
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.layout == torch.strided
        and x.numel() > 0
    )
