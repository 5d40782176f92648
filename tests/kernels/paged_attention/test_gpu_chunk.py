"""Continued prefill's Triton kernels against float64; devices as in test_gpu.py."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime.errors import InterpreterError

from stillhouse.kernels.paged_attention.gpu import CodedBasis, GpuDecoder, RawTokens
from stillhouse.kernels.paged_attention.gpu_chunk import ChunkTokens, attend_chunk
from stillhouse.kernels.paged_attention.reference import chunk_shares
from tests.kernels.paged_attention.gpu_pages import Paged, codec_of, fitted, paged

# As in test_gpu.py; found in the interpreter: up to 9e-4 in float16, 1.84e-3 in bfloat16.
BOUND = 2e-3
RANGES = [(0, 70), (5, 5), (9, 40)]


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half()


def chunk_of(case: Paged, tokens: int, before: int, dim: int, gap: int = 0) -> ChunkTokens:
    """`before` raw tokens between history and chunk; half of them hidden in the first sequence."""
    last = case.sequences.last_B
    batch, heads = len(last), case.keys.shape[1]
    key, value = (drawn(seed, batch, heads, before + tokens, dim) for seed in (7, 8))
    hidden = torch.zeros_like(last)
    hidden[0] = before // 2
    return ChunkTokens(key, value, last + before + gap, hidden)


def wanted(
    case: Paged, query: torch.Tensor, chunk: ChunkTokens, scaling: float, **more: Any
) -> torch.Tensor:
    """float64 [B, H, M, D]."""
    key, value = case.bases
    found = []
    for b, (coded_key, coded_value) in enumerate(case.coded):
        rows = query[b].double() * scaling
        coded = rows if key.into_HDC is None else rows @ key.into_HDC.double().cpu()
        offset = None
        if key.mean_HD is not None:
            offset = (rows @ key.mean_HD.double().cpu()[:, :, None])[..., 0]
        first = int(case.sequences.first_B[b])
        packed, raw, share = chunk_shares(
            coded,
            _behind(coded_key, first),
            _behind(coded_value, first),
            (rows, chunk.key_BHRD[b], chunk.value_BHRD[b]),
            position=int(chunk.position_B[b]),
            first=first,
            hidden=int(chunk.hidden_B[b]),
            offset_HM=offset,
            **more,
        )
        out = packed if value.back_HCD is None else packed @ value.back_HCD.double().cpu()
        if value.mean_HD is not None:
            out = out + share[..., None] * value.mean_HD.double().cpu()[:, None]
        found.append(out + raw)
    return torch.stack(found)


def _behind(coded_HTC: torch.Tensor, first: int) -> torch.Tensor:
    """With tokens that are not seen in front: the reference counts from a sequence's beginning."""
    return torch.nn.functional.pad(coded_HTC, (0, 0, first, 0))


def error_of(
    case: Paged, query: torch.Tensor, chunk: ChunkTokens, group: int, device: str, **more: Any
) -> float:
    dim = query.shape[-1]
    softcap = more.get("softcap", 0.0)
    decoder = GpuDecoder(*case.bases, case.format.tokens, dim, scaling=dim**-0.5, softcap=softcap)
    placed = ChunkTokens(*(part.to(device) for part in chunk))
    out, _ = attend_chunk(
        decoder, query.to(device), *case.to(device), placed, group=group,
        window=more.get("window", 0),
    )  # fmt: skip
    right = wanted(case, query, chunk, dim**-0.5, group=group, **more)
    error = (out.double().cpu() - right).flatten(2).norm(dim=-1)
    return float((error / right.flatten(2).norm(dim=-1)).max())


@pytest.mark.parametrize("bits", [(2, 3), (4, 4), (8, 2), (3, 8)])
def test_every_format_is_within_the_bound(bits: tuple[int, int], device: str) -> None:
    case = paged((codec_of(bits[0], 64), codec_of(bits[1], 64)), RANGES, 2, 32, device)
    chunk = chunk_of(case, 9, 0, 64)
    assert error_of(case, drawn(1, 3, 2, 27, 64), chunk, 3, device) < BOUND


@pytest.mark.parametrize("dim", [80, 128, 256])
def test_every_head_size_is_within_the_bound(dim: int, device: str) -> None:
    case = paged((codec_of(4, dim), codec_of(3, dim)), RANGES, 1, 16, device)
    chunk = chunk_of(case, 6, 0, dim)
    assert error_of(case, drawn(1, 3, 1, 12, dim), chunk, 2, device) < BOUND


def test_bfloat16(device: str) -> None:
    case = paged((codec_of(4, 64), codec_of(4, 64)), RANGES, 2, 32, device)
    chunk = chunk_of(case, 9, 4, 64)
    brain = chunk._replace(
        key_BHRD=chunk.key_BHRD.bfloat16(), value_BHRD=chunk.value_BHRD.bfloat16()
    )
    assert error_of(case, drawn(1, 3, 2, 27, 64).bfloat16(), brain, 3, device) < BOUND


def test_weights_of_raw_tokens_are_not_rounded_to_bfloat16(device: str) -> None:
    case = paged((codec_of(4, 64), codec_of(4, 64)), [(5, 5)], 2, 32, device)
    chunk = chunk_of(case, 9, 60, 64)
    brain = chunk._replace(
        key_BHRD=chunk.key_BHRD.bfloat16(), value_BHRD=chunk.value_BHRD.bfloat16()
    )
    error = error_of(case, drawn(1, 1, 2, 27, 64).bfloat16(), brain, 3, device)
    assert error < 1.8e-3  # no more than rounding the result costs: 1.66e-3; 2.13e-3 with one


def test_maps_and_means_of_a_fit(device: str) -> None:
    case = paged((fitted(4, 64, 80, 2), fitted(4, 64, 80, 2, seed=2)), RANGES, 2, 32, device)
    chunk = chunk_of(case, 9, 4, 80)
    assert error_of(case, drawn(1, 3, 2, 18, 80) / 4, chunk, 2, device) < BOUND


@settings(max_examples=6)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 90)), min_size=1, max_size=2),
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from([16, 32, 64, 128]),
    st.sampled_from([(1, 1), (5, 4), (23, 3), (40, 2)]),
    st.integers(0, 9),
    st.sampled_from([0, 1, 13, 64]),
    st.sampled_from([0.0, 3.0]),
    st.integers(0, 100),
)
def test_chunks_of_any_size_with_windows_and_caps(
    lengths: list[tuple[int, int]],
    bits: int,
    page: int,
    size: tuple[int, int],
    before: int,
    window: int,
    softcap: float,
    seed: int,
) -> None:
    ranges = [(first, first + count) for first, count in lengths]
    case = paged((codec_of(bits, 64), codec_of(4, 64)), ranges, 1, page, seed=seed)
    tokens, group = size
    chunk = chunk_of(case, tokens, before, 64)
    query = drawn(seed, len(ranges), 1, tokens * group, 64)
    more = {"window": window, "softcap": softcap}
    assert error_of(case, query, chunk, group, "cpu", **more) < BOUND


def test_one_token_is_a_step_of_decoding_with_its_own_key(device: str) -> None:
    case = paged((codec_of(4, 64), codec_of(4, 64)), RANGES, 2, 32, device)
    chunk = ChunkTokens(*(part.to(device) for part in chunk_of(case, 1, 0, 64)))
    decoder = GpuDecoder(*case.bases, 32, 64, scaling=1 / 8)
    query, places = drawn(1, 3, 2, 3, 64).to(device), case.to(device)
    out, lse = attend_chunk(decoder, query, *places, chunk, group=3)
    zero = torch.zeros_like(chunk.hidden_B)
    raw = RawTokens(chunk.key_BHRD, chunk.value_BHRD, zero, zero + 1)
    one, one_lse = decoder.attend(query, *places, raw=raw)
    torch.testing.assert_close(out, one, rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(lse, one_lse, rtol=0, atol=1e-3)


@pytest.mark.usefixtures("debugging")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"table_BW": 9}, "a page out of range"),
        ({"last_B": 30}, "packed tokens out of range"),
        ({"first_B": -1}, "packed tokens out of range"),
        ({"hidden_B": 4}, "raw tokens out of range"),
        ({"hidden_B": -1}, "raw tokens out of range"),
    ],
)
def test_the_debug_mode_finds_what_is_out_of_range(change: dict[str, int], words: str) -> None:
    case = paged((codec_of(4, 64), codec_of(4, 64)), [(0, 40)], 1, 32)
    decoder = GpuDecoder(*case.bases, 32, 64, scaling=1 / 8, check=True)
    query, chunk = drawn(1, 1, 1, 8, 64), chunk_of(case, 4, 3, 64)
    chunk = chunk._replace(hidden_B=torch.zeros_like(chunk.hidden_B))

    def attend(**by: int) -> None:
        where, moved = case.sequences, chunk
        for name, step in by.items():
            if name == "hidden_B":
                moved = moved._replace(hidden_B=moved.hidden_B + step)
            else:
                where = where._replace(**{name: getattr(where, name) + step})
        attend_chunk(decoder, query, case.keys, case.values, where, moved, group=2, trusted=True)

    attend()
    with pytest.raises(InterpreterError, match=words):
        attend(**change)


def test_what_does_not_fit_is_refused() -> None:
    case = paged((codec_of(4, 64), codec_of(4, 64)), RANGES, 2, 32)
    decoder = GpuDecoder(*case.bases, 32, 64, scaling=1 / 8)
    chunk, query = chunk_of(case, 4, 3, 64), drawn(1, 3, 2, 8, 64)

    def refused(match: str, query: torch.Tensor, chunk: ChunkTokens, group: int = 2) -> None:
        with pytest.raises(ValueError, match=match):
            attend_chunk(decoder, query, case.keys, case.values, case.sequences, chunk, group=group)

    refused("rows of 3 queries a token, found 8", query, chunk, 3)
    with pytest.raises(ValueError, match="a window of 0 or more, found -1"):
        attend_chunk(decoder, query, *case.to("cpu"), chunk, group=2, window=-1)
    one = CodedBasis.of(fitted(4, 64, 64, 1), "cpu")
    with pytest.raises(ValueError, match="expected 1 heads, one for each map, found 2"):
        attend_chunk(
            GpuDecoder(one, case.bases[1], 32, 64, scaling=1 / 8), query, *case.to("cpu"), chunk,
            group=2,
        )  # fmt: skip
    refused("raw tokens of 8 queries' tokens or more, found 7", query, chunk, 1)
    refused("in the queries' torch.bfloat16", query.bfloat16(), chunk)
    refused("past history's ends", query, chunk._replace(position_B=chunk.position_B - 30))
    refused("up to 3 hidden raw tokens, found", query, chunk._replace(hidden_B=chunk.hidden_B + 3))
    refused("raw keys", query, chunk._replace(key_BHRD=chunk.key_BHRD[..., :32]))
