"""What decode attention on a GPU refuses, on the host and in its debug mode."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from triton.runtime.errors import InterpreterError

from stillhouse.kernels.paged_attention.gpu import CodedBasis, GpuDecoder, RawTokens, Sequences
from stillhouse.kernels.turboquant import ChannelGroup, HalfCodec, MseCodec
from tests.kernels.paged_attention.gpu_calls import BOUND, RANGES, compared, decoder_of, queries
from tests.kernels.paged_attention.gpu_pages import Paged, codec_of, fitted, paged


def refused(
    match: str,
    case: Paged,
    query: torch.Tensor,
    sequences: Sequences | None = None,
    raw: RawTokens | None = None,
    keys: torch.Tensor | None = None,
) -> None:
    with pytest.raises(ValueError, match=match):
        decoder_of(case, 64).attend(
            query,
            case.keys if keys is None else keys,
            case.values,
            sequences or case.sequences,
            raw=raw,
        )


def test_what_does_not_fit_is_refused_with_what_was_expected_and_found() -> None:
    case = paged((codec_of(4, 64), codec_of(4, 64)), RANGES, 2, 32)
    query, raw = queries(4, 2, 3, 64), queries(4, 2, 5, 64)
    table, first, last = case.sequences
    refused(r"queries \[B, H, G, 64\] .* found torch.float32", case, query.float())
    refused("found .*80", case, queries(4, 2, 3, 80))
    refused("those of a head contiguous", case, query.mT.contiguous().mT)
    refused(r"half pages of keys, uint8 \[N, 3, 1088\]", case, queries(4, 3, 3, 64))
    refused("multiples of 16 bytes", case, query, keys=_shifted(case.keys))
    refused("an int32 table of 4 rows", case, query, Sequences(table.long(), first, last))
    refused(r"int32 \[4\], found", case, query, Sequences(table, first[:1], last))
    refused(r"within 96 tokens", case, query, Sequences(table, first, last + 64))
    refused("within 96 tokens", case, query, Sequences(table, first - 1, last))
    count = len(case.keys)
    refused(f"pages from 0 to {count - 1}", case, query, Sequences(table + 1, first, last))
    refused("pages from 0 to", case, query, Sequences(table - 1, first, last))
    refused(r"raw values \[4, 2, 5, 64\]", case, query, raw=RawTokens(raw, raw[1:], first, last))
    refused("within 5 raw tokens", case, query, raw=RawTokens(raw, raw, first, last))
    for splits in (0, -1):
        with pytest.raises(ValueError, match=f"splits of 1 or more, found {splits}"):
            decoder_of(case, 64).attend(query, *case.to("cpu"), splits=splits)
    brain = raw.bfloat16()
    refused("in the queries' torch.float16", case, query, raw=RawTokens(brain, raw, first, last))


def test_fits_of_other_heads_and_other_head_sizes_are_refused() -> None:
    """Their maps would be read past their ends."""
    two, one, shared = fitted(4, 64, 64, 2), fitted(4, 64, 64, 1), codec_of(4, 64)
    for codecs, heads, found in (
        ((two, shared), 2, 4),
        ((shared, two), 2, 1),
        ((shared, one), 1, 2),
    ):
        fits = paged(codecs, RANGES, heads, 32)
        assert compared(fits, queries(4, heads, 3, 64) / 4, "cpu") < BOUND
        other = paged((shared, shared), RANGES, found, 32)
        case = replace(other, bases=fits.bases)
        refused(f"expected {heads} heads, one for each map, found {found}", case,
                queries(4, found, 3, 64))  # fmt: skip
    wide = CodedBasis.of(fitted(4, 64, 80, 1), "cpu")
    right = CodedBasis.of(shared, "cpu")
    with pytest.raises(ValueError, match="keys of a head size of 64, found a codec of 80"):
        GpuDecoder(wide, right, 32, 64, scaling=1.0)
    with pytest.raises(ValueError, match="values of a head size of 64, found a codec of 80"):
        GpuDecoder(right, wide, 32, 64, scaling=1.0)
    with pytest.raises(ValueError, match="keys of a head size of 80, found a codec of 64"):
        GpuDecoder(CodedBasis.of(codec_of(8, 64), "cpu"), wide, 32, 80, scaling=1.0)


def _shifted(pages: torch.Tensor) -> torch.Tensor:
    """The same pages, 4 bytes further than they should be."""
    return torch.cat((pages, pages[..., :4]), dim=-1)[..., : pages.shape[-1]]


def test_codecs_that_no_kernel_reads_are_refused() -> None:
    for codec in (MseCodec(64, 5, "unbiased"), MseCodec(32, 4, "unbiased")):
        with pytest.raises(ValueError, match="expected one group of 64, 80, … 256 channels"):
            CodedBasis.of(codec, "cpu")
    with pytest.raises(ValueError, match="law 'gaussian' and 2, 3 or 4 bits, found 'sphere'"):
        CodedBasis.of(MseCodec(64, 4, "unbiased", law="sphere"), "cpu")
    with pytest.raises(ValueError, match="2, 3 or 4 bits, found 'gaussian' and 8 bits"):
        CodedBasis.of(MseCodec(64, 8, "unbiased"), "cpu")  # no fp8: its vectors are rotated
    half: Any = HalfCodec(64)
    with pytest.raises(ValueError, match="expected an MseCodec, FittedCodec or Fp8Codec, found"):
        CodedBasis.of(half, "cpu")
    two = fitted(4, 64, 96, 1)
    two._groups = (ChannelGroup(64, 4), ChannelGroup(32, 2))
    with pytest.raises(ValueError, match=r"found \[\(64, 4\), \(32, 2\)\]"):
        CodedBasis.of(two, "cpu")


@pytest.mark.usefixtures("debugging")
def test_the_debug_mode_finds_a_page_that_does_not_exist() -> None:
    case = paged((codec_of(4, 64), codec_of(4, 64)), [(0, 40)], 1, 32)
    table, *ends = case.sequences
    decoder = decoder_of(case, 64, check=True)
    query = queries(1, 1, 2, 64)
    decoder.attend(query, case.keys, case.values, case.sequences, splits=1)
    with pytest.raises(InterpreterError, match="a page out of range"):
        decoder.attend(
            query, case.keys, case.values, Sequences(table + 9, *ends), splits=1, trusted=True
        )


@pytest.mark.usefixtures("debugging")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"last": 1}, "packed tokens out of range"),
        ({"first": -41}, "packed tokens out of range"),
        ({"raw_last": 1}, "raw tokens out of range"),
        ({"raw_first": -1}, "raw tokens out of range"),
    ],
)
def test_the_debug_mode_finds_ranges_past_a_table_and_past_raw_tokens(
    change: dict[str, int], words: str
) -> None:
    case = paged((codec_of(4, 64), codec_of(4, 64)), [(40, 64)], 1, 32)
    key, zero = queries(1, 1, 5, 64), torch.zeros(1, dtype=torch.int32)
    table, first, last = case.sequences
    decoder, query = decoder_of(case, 64, check=True), queries(1, 1, 2, 64)

    def attend(**by: int) -> None:
        at = Sequences(table, first + by.get("first", 0), last + by.get("last", 0))
        raw = RawTokens(key, key, zero + by.get("raw_first", 0), zero + 5 + by.get("raw_last", 0))
        decoder.attend(query, case.keys, case.values, at, raw=raw, splits=1, trusted=True)

    attend()
    with pytest.raises(InterpreterError, match=words):
        attend(**change)
