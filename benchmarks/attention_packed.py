"""This project's decode attention as `attention.py` measures it, and its check."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.attention_cases import (
    PAGE,
    DecodeCase,
    Steps,
    random_bytes,
    random_fp8,
    random_query,
    random_table,
)
from stillhouse.kernels.paged_attention import FP8, HalfPage, PageFormat, VectorFormat
from stillhouse.kernels.paged_attention.gpu import CodedBasis, GpuDecoder, Sequences
from stillhouse.kernels.paged_attention.pages import plane_rows, read_vectors
from stillhouse.kernels.paged_attention.reference import attend_reference, coded_vectors
from stillhouse.kernels.turboquant import Fp8Codec, MseCodec, ScalarKind

CHECKED = 8192  # tokens, at most, of a sequence whose result is checked
TOLERANCE = 0.01  # of the result's size, and of a sum's logarithm: bfloat16 rounds to 0.002
Bases = tuple[CodedBasis, CodedBasis]


@dataclass(frozen=True)
class PackedKernel:
    """`GpuDecoder` over pages. bits: of keys and values, 8 for fp8."""

    bits: tuple[int, int]
    page: int = PAGE
    everywhere: bool = True
    mine: bool = True

    @property
    def name(self) -> str:
        """k4v4 and so on, the page where it is not the usual one."""
        keys, values = self.bits
        name = "fp8" if self.bits == (FP8, FP8) else f"k{keys}v{values}"
        return name if self.page == PAGE else f"{name} page {self.page}"

    def missing(self) -> None:
        """It is here."""

    def planned(self, case: DecodeCase) -> bool:
        """Everywhere, or in the first of the cases."""
        return self.everywhere or case.key == ("llama-8b", 16, 32 << 10)

    def pages(self, dim: int) -> PageFormat:
        """Of all channels alike."""
        key, value = (VectorFormat.uniform(dim, bits) for bits in self.bits)
        return PageFormat.of(key, value, self.page)

    def cache_bytes(self, case: DecodeCase) -> int:
        """Whole pages."""
        count = case.batch * -(-case.context // self.page) * case.heads
        return count * self.pages(case.dim).nbytes

    def steps(self, case: DecodeCase, copies: int, place: str) -> Steps:
        """As a graph captures them: trusted, and for a fixed number of tokens."""
        pages, width = self.pages(case.dim), -(-case.context // self.page)
        bases = _bases(self.bits, case.dim, place)
        decoder = GpuDecoder(*bases, self.page, case.dim, scaling=case.dim**-0.5)
        query = random_query(case, place)
        first, last = (
            torch.full((case.batch,), end, dtype=torch.int32, device=place)
            for end in (0, case.context)
        )
        count = case.batch * width
        caches = [_random_pages(pages, count, case.heads, place) for _ in range(copies)]
        tables = [random_table(case.batch, width, place) for _ in range(copies)]

        def call(at: int, last: Tensor, trusted: bool = True) -> tuple[Tensor, Tensor]:
            sequences = Sequences(tables[at], first, last)
            keys, values = caches[at]
            return decoder.attend(
                query, keys, values, sequences, tokens=case.context, trusted=trusted
            )

        def check() -> str | None:
            lengths = checked_lengths(case)
            found = call(0, torch.tensor(lengths, dtype=torch.int32, device=place), False)
            on_cpu = _bases(self.bits, case.dim, "cpu")
            for b, head in {(0, 0), (case.batch - 1, case.heads - 1)}:
                coded = _coded(pages, caches[0], tables[0][b], lengths[b], head)
                mine = query[b : b + 1, head : head + 1].cpu()
                expected = attend_reference(mine, [coded], on_cpu, scaling=case.dim**-0.5)
                reason = difference([part[b, head].cpu() for part in found], expected)
                if reason is not None:
                    return f"sequence {b}, {lengths[b]} tokens, head {head}: {reason}"
            return None

        return Steps([_output(call, at, last) for at in range(copies)], check)


FORMATS = ((4, 4), (3, 3), (2, 2), (4, 3), (FP8, 4), (FP8, FP8))


def packed_kernels() -> list[PackedKernel]:
    """Every format, and one again with small pages."""
    return [*(PackedKernel(bits) for bits in FORMATS), PackedKernel((4, 4), 16, everywhere=False)]


def checked_lengths(case: DecodeCase) -> list[int]:
    """Of sequences of one batch: a long one first, then all kinds. The launch is the timed one,
    which knows its longest sequence only as a bound."""
    most = min(case.context, CHECKED)
    return [most, *(most - 61 * b % most for b in range(1, case.batch))]


def difference(found: list[Tensor], expected: tuple[Tensor, Tensor]) -> str | None:
    """Of a head's result [G, D] and logarithms [G] from float64 ones [1, 1, …], None if small."""
    out, lse = (part.double() for part in found)
    wanted, wanted_lse = (part[0, 0] for part in expected)
    error = float((out - wanted).norm() / wanted.norm())
    lse_error = float((lse - wanted_lse).abs().max())
    # So written that NaN is an error too.
    if error <= TOLERANCE and lse_error <= TOLERANCE:
        return None
    return (
        f"expected an error of at most {TOLERANCE} beside the float64 reference, found {error:.3g} "
        f"and {lse_error:.3g} of the logarithm of the sum"
    )


def random_half(count: int, heads: int, half: HalfPage, place: str) -> Tensor:
    """Pages [N, H, Y] of any indices, and of scalars that make coordinates of about 1."""
    shape = (count, heads, half.nbytes)
    if half.format.is_fp8:
        return random_fp8(shape, place)
    made = random_bytes(shape, place)
    scalars = torch.rand((count, heads, half.tokens, 1), device=place).add_(0.5)
    scalars = scalars.mul_(half.format.channels**0.5).half()
    plane_rows(made, half, half.scalars, 2)[...] = scalars.view(torch.uint8)
    return made


def _random_pages(pages: PageFormat, count: int, heads: int, place: str) -> tuple[Tensor, Tensor]:
    key, value = (random_half(count, heads, half, place) for half in (pages.key, pages.value))
    return key, value


def _bases(bits: tuple[int, int], dim: int, place: str) -> Bases:
    kinds: tuple[ScalarKind, ScalarKind] = ("unbiased", "least_squares")
    codecs = [
        Fp8Codec(dim) if width == FP8 else MseCodec(dim, width, kind)
        for width, kind in zip(bits, kinds, strict=True)
    ]
    key, value = (CodedBasis.of(codec, place) for codec in codecs)
    return key, value


def _coded(
    pages: PageFormat, cache: tuple[Tensor, Tensor], table_W: Tensor, tokens: int, head: int
) -> tuple[Tensor, Tensor]:
    """A sequence's keys and values of one head, float64 on the CPU."""
    used, slots = table_W[: -(-tokens // pages.tokens)].long(), torch.arange(tokens)
    key, value = (
        coded_vectors(*read_vectors(part[used, head : head + 1].cpu(), half, slots), half.format)
        for part, half in zip(cache, (pages.key, pages.value), strict=True)
    )
    return key, value


def _output(
    call: Callable[[int, Tensor], tuple[Tensor, Tensor]], at: int, last: Tensor
) -> Callable[[], Tensor]:
    return lambda: call(at, last)[0]
