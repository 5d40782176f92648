"""What `attention.py` measures: shapes of a decode step, and what a kernel under test offers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Protocol

import torch
from torch import Tensor

SHAPES = {"llama-8b": (8, 4, 128), "llama-70b": (8, 8, 128)}  # heads, queries of each, head size
CONTEXTS = tuple(count << 10 for count in (4, 16, 32, 64, 128, 256))
BATCHES = (1, 8, 16, 64)
PAGE = 128  # tokens of a page
# Long caches that fill the device, a single one, and one that launches dominate.
QUICK = (("llama-8b", 16, 32 << 10), ("llama-8b", 1, 128 << 10), ("llama-8b", 8, 4 << 10))
# The other shape differs in its queries alone.
FEWER = tuple(product(("llama-70b",), (1, 16), (32 << 10, 128 << 10)))


@dataclass(frozen=True, slots=True)
class DecodeCase:
    """One query token of each of `batch` sequences that have `context` tokens."""

    shape: str
    batch: int
    context: int
    heads: int
    group: int
    dim: int

    @classmethod
    def of(cls, shape: str, batch: int, context: int) -> "DecodeCase":
        """Of `SHAPES`."""
        return cls(shape, batch, context, *SHAPES[shape])

    @property
    def key(self) -> tuple[str, int, int]:
        """What names it."""
        return self.shape, self.batch, self.context

    @property
    def vectors(self) -> int:
        """Keys, and as many values."""
        return self.batch * self.context * self.heads


@dataclass(frozen=True)
class Steps:
    """Calls over caches of their own, which take turns; check: None, or what is wrong with them."""

    calls: Sequence[Callable[[], Tensor]]
    check: Callable[[], str | None]


class DecodeKernel(Protocol):
    """Attention of one decode step over a cache in its own format.

    mine: whether it is this project's, and so must be right. page: tokens of one, None for a cache
    without pages.
    """

    @property
    def name(self) -> str: ...
    @property
    def mine(self) -> bool: ...
    @property
    def page(self) -> int | None: ...

    def missing(self) -> str | None:
        """Why it cannot run at all here."""

    def planned(self, case: DecodeCase) -> bool:
        """Whether it is measured there; compiling takes some too long for every case."""

    def cache_bytes(self, case: DecodeCase) -> int:
        """That a step reads."""

    def steps(self, case: DecodeCase, copies: int, place: str) -> Steps:
        """Over so many caches of any content."""


def cases(*, quick: bool = False) -> list[DecodeCase]:
    """The most telling first, in case that time runs out."""
    every = [*QUICK, *FEWER, *product(("llama-8b",), BATCHES, CONTEXTS)]
    return [DecodeCase.of(*key) for key in (QUICK if quick else dict.fromkeys(every))]


def random_query(case: DecodeCase, place: str) -> Tensor:
    """bfloat16 [B, H, G, D]."""
    shape = (case.batch, case.heads, case.group, case.dim)
    return torch.randn(shape, device=place).bfloat16()


def random_table(batch: int, pages: int, place: str) -> Tensor:
    """int32 [B, W]: every page once, in no order."""
    return torch.randperm(batch * pages, device=place).view(batch, pages).int()


def random_bytes(shape: Sequence[int], place: str) -> Tensor:
    """uint8 of all values, filled in place: a cache may take most of the memory."""
    return torch.empty(tuple(shape), dtype=torch.uint8, device=place).random_(0, 256)


def random_fp8(shape: Sequence[int], place: str) -> Tensor:
    """uint8 whose bits are e4m3 numbers below 2."""
    return random_bytes(shape, place).bitwise_and_(0xBF)


def finite(calls: Sequence[Callable[[], Tensor]], case: DecodeCase) -> str | None:
    """What is wrong with a peer's result as far as anybody can see without its reference."""
    found = calls[0]()
    count = case.batch * case.heads * case.group * case.dim
    if found.numel() != count or not bool(found.isfinite().all()):
        return f"expected {count} finite numbers, found {list(found.shape)}, not all of them finite"
    return None
