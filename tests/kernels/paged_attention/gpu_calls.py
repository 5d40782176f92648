"""Decode attention on a GPU, called and compared with float64."""

from dataclasses import replace
from typing import Any

import torch

from stillhouse.kernels.paged_attention.gpu import CodedBasis, GpuDecoder
from stillhouse.kernels.paged_attention.reference import attend_reference
from tests.kernels.paged_attention.gpu_pages import Paged

# The norm of a head's error over the norm of its output in float64, the worst head of a batch.
# Found in the interpreter, which rounds as a GPU does (conftest.py): up to 1.0e-3 in float16, which
# is the kernel's own (1.7e-3 where an output of 1e-4 is subnormal), and 1.63e-3 to 1.95e-3 in
# bfloat16, of which rounding the output to 8 bits is 1.7e-3.
BOUND = 2e-3
RANGES = [(0, 70), (0, 1), (5, 5), (9, 64)]


def queries(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 3) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def decoder_of(case: Paged, dim: int, **more: Any) -> GpuDecoder:
    options: dict[str, Any] = {"scaling": dim**-0.5} | more
    return GpuDecoder(*case.bases, case.format.tokens, dim, **options)


def worst(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The relative error of the output of a head, the largest of all sequences and heads."""
    error = (found.double().cpu() - wanted).flatten(2).norm(dim=-1)
    return float((error / wanted.flatten(2).norm(dim=-1).clamp_min(1e-9)).max())


def compared(
    case: Paged, query: torch.Tensor, device: str, *, raw: Any = None, **more: Any
) -> float:
    """`worst` of a call, after its logarithms were compared."""
    dim, splits = query.shape[-1], more.pop("splits", 2)
    decoder = decoder_of(case, dim, **more)
    keys, values, sequences = case.to(device)
    out, lse = decoder.attend(
        query.to(device), keys, values, sequences, splits=splits, raw=raw and raw[0]
    )
    bases = tuple(_on_cpu(basis) for basis in case.bases)
    wanted, sums = attend_reference(
        query,
        case.coded,
        (bases[0], bases[1]),
        scaling=dim**-0.5,
        softcap=more.get("softcap", 0.0),
        raw=raw and raw[1],
    )
    torch.testing.assert_close(lse.double().cpu(), sums, rtol=3e-4, atol=4e-3)
    assert out.dtype == query.dtype
    return worst(out, wanted)


def _on_cpu(basis: CodedBasis) -> CodedBasis:
    names = ("into_HDC", "back_HCD", "mean_HD")
    maps = {name: part for name in names if (part := getattr(basis, name)) is not None}
    return replace(basis, **{name: part.cpu() for name, part in maps.items()})
