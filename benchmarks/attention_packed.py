"""This project's decode attention as `attention.py` measures it, and its check.

Shape suffixes: B sequences, H key/value heads, G queries of each, W pages of a sequence, D head
size.
"""

from collections.abc import Callable, Iterator
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

MIXED = 8192  # tokens of the longest sequence of a batch of several lengths
CHUNK = 8192  # tokens that are decoded in float64 at a time
# The norm of a sequence's error over that of its result. The tests hold 2e-3, of which bfloat16's
# rounding takes 1.7; indices of random bytes, as here, are all as likely: 1.95e-3 with 2 bits.
TOLERANCE = 2.5e-3
LOG_TOLERANCE = 0.01  # of the logarithm of a sum of exponentials
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
            mixed = mixed_lengths(case)
            lengths = torch.tensor(mixed, dtype=torch.int32, device=place)
            whole, parts = call(0, last), call(0, lengths, False)
            ends = sorted({0, case.batch - 1})
            checked = [(whole, ends[-1], case.context), *((parts, b, mixed[b]) for b in ends)]
            for found, b, tokens in checked:
                coded = _coded(pages, caches[0], tables[0][b], tokens)
                expected = exact(query[b], coded, bases)
                reason = difference([part[b] for part in found], expected)
                if reason is not None:
                    return f"sequence {b}, {tokens} tokens: {reason}"
            return None

        return Steps([_output(call, at, last) for at in range(copies)], check)


FORMATS = ((4, 4), (3, 3), (2, 2), (4, 3), (FP8, 4), (FP8, FP8))


def packed_kernels() -> list[PackedKernel]:
    """Every format, and one again with small pages."""
    return [*(PackedKernel(bits) for bits in FORMATS), PackedKernel((4, 4), 16, everywhere=False)]


def mixed_lengths(case: DecodeCase) -> list[int]:
    """Of sequences of one batch: a long one first, then all kinds. The launch is the timed one,
    which knows its longest sequence only as a bound."""
    most = min(case.context, MIXED)
    return [most, *(most - 61 * b % most for b in range(1, case.batch))]


def difference(found: list[Tensor], expected: tuple[Tensor, Tensor]) -> str | None:
    """Of a sequence's result [H, G, D] and logarithms [H, G] from float64 ones; None if small."""
    out, lse = (part.double() for part in found)
    wanted, wanted_lse = expected
    error = float((out - wanted).norm() / wanted.norm())
    lse_error = float((lse - wanted_lse).abs().max())
    # So written that NaN is an error too.
    if error <= TOLERANCE and lse_error <= LOG_TOLERANCE:
        return None
    return (
        f"expected an error of at most {TOLERANCE} beside float64, and of {LOG_TOLERANCE} of the "
        f"logarithm of the sum, found {error:.3g} and {lse_error:.3g}"
    )


def exact(
    query_HGD: Tensor, coded: Iterator[tuple[Tensor, Tensor]], bases: Bases
) -> tuple[Tensor, Tensor]:
    """float64 [H, G, D] and logarithms [H, G] of one sequence, whose tokens come part by part."""
    scaling = query_HGD.shape[-1] ** -0.5
    parts = [attend_reference(query_HGD[None], [one], bases, scaling=scaling) for one in coded]
    out_PHGD, lse_PHG = (torch.cat(kind) for kind in zip(*parts, strict=True))
    share_PHG1 = lse_PHG.softmax(0)[..., None]
    return (out_PHGD * share_PHG1).sum(0), lse_PHG.logsumexp(0)


def random_half(count: int, heads: int, half: HalfPage, place: str) -> Tensor:
    """Pages [N, H, Y] of any indices, and of scalars that make coordinates of about 1."""
    shape = (count, heads, half.nbytes)
    if half.format.is_fp8:
        return random_fp8(shape, place)
    made = random_bytes(shape, place)
    # Within a tenth, as those of vectors of normally distributed coordinates are.
    scalars = torch.rand((count, heads, half.tokens, 1), device=place).mul_(0.2).add_(0.9)
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
    pages: PageFormat, cache: tuple[Tensor, Tensor], table_W: Tensor, tokens: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """A sequence's keys and values, float64, `CHUNK` tokens at a time."""
    for start in range(0, tokens, CHUNK):
        at_T = torch.arange(start, min(start + CHUNK, tokens), device=table_W.device)
        slots_T = table_W[at_T // pages.tokens].long() * pages.tokens + at_T % pages.tokens
        key, value = (
            coded_vectors(*read_vectors(part, half, slots_T), half.format)
            for part, half in zip(cache, (pages.key, pages.value), strict=True)
        )
        yield key, value


def _output(
    call: Callable[[int, Tensor], tuple[Tensor, Tensor]], at: int, last: Tensor
) -> Callable[[], Tensor]:
    return lambda: call(at, last)[0]
