"""Continued prefill over packed history against the definition in float64."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stillhouse.kernels.paged_attention import (
    FP8,
    PageFormat,
    RecordFormat,
    VectorFormat,
    read_vectors,
)
from stillhouse.kernels.paged_attention.chunk_rows import chunk_of_rows, rows_of_chunk
from stillhouse.kernels.paged_attention.cpu import PackedHalf
from stillhouse.kernels.paged_attention.cpu_chunk import ChunkSpan, ChunkTokens, chunk_decoder
from stillhouse.kernels.paged_attention.reference import chunk_shares, coded_vectors
from tests.kernels.paged_attention.packed_pages import (
    MIXED_KEY,
    MIXED_VALUE,
    Filled,
    filled,
    vectors,
)

CLOSE = 1e-5


def uniform(dim: int, key: int, value: int, tokens: int = 16) -> PageFormat:
    return PageFormat.of(VectorFormat.uniform(dim, key), VectorFormat.uniform(dim, value), tokens)


def chunk_of(made: Filled, group: int, tokens: int, dim: int, before: int = 0) -> ChunkTokens:
    batch, heads = made.query.shape[:2]
    draw = torch.Generator().manual_seed(tokens + 100 * before)
    query = torch.randn((batch, heads, tokens * group, dim), generator=draw) / math.sqrt(dim)
    raw = torch.randn((2, batch, heads, before + tokens, dim), generator=draw)
    return ChunkTokens(query, raw[0], raw[1])


def coded_query(made: Filled, rows: int, channels: int) -> Tensor:
    batch, heads = made.query.shape[:2]
    draw = torch.Generator().manual_seed(rows)
    return torch.randn((batch, heads, rows, channels), generator=draw) * 3 / math.sqrt(channels)


def history(format: PageFormat, made: Filled, b: int, last: int) -> tuple[Tensor, Tensor]:
    at = torch.arange(last)
    slots = made.table[b, at // format.tokens].long() * format.tokens + at % format.tokens
    halves = ((made.keys, format.key), (made.values, format.value))
    key, value = (coded_vectors(*read_vectors(p, h, slots), h.format) for p, h in halves)
    return key, value


def assert_shares(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], b: int) -> None:
    whole = torch.cat([part.double() for part in expected[:2]], -1)
    one = torch.cat([part[b].double() for part in found[:2]], -1)
    assert bool(one.isfinite().all())
    assert float((one - whole).norm() / whole.norm()) < CLOSE
    torch.testing.assert_close(found[2][b].double(), expected[2], rtol=1e-5, atol=1e-6)


def assert_close(
    format: PageFormat,
    spans: list[ChunkSpan],
    *,
    group: int,
    tokens: int,
    heads: int = 2,
    window: int = 0,
    softcap: float = 0.0,
    threads: int = 1,
) -> None:
    channels = format.key.format.channels
    made = filled(format, [span.last for span in spans], heads, group, seed=tokens)
    before = max(span.position - span.last for span in spans)
    chunk = chunk_of(made, group, tokens, channels, before)
    query = coded_query(made, tokens * group, channels)
    offset = query[..., 0] / 2
    found = chunk_decoder(format, group, softcap).attend(
        query, PackedHalf(made.keys), PackedHalf(made.values), spans, chunk,
        table_BW=made.table, offset_BHM=offset, window=window, threads=threads,
    )  # fmt: skip
    for b, span in enumerate(spans):
        raw = (chunk.query_BHMD[b], chunk.key_BHRD[b], chunk.value_BHRD[b])
        expected = chunk_shares(
            query[b], *history(format, made, b, span.last), raw, group=group,
            position=span.position, first=span.first, hidden=span.hidden, window=window,
            softcap=softcap, offset_HM=offset[b],
        )  # fmt: skip
        assert_shares(found, expected, b)


@pytest.mark.parametrize("bits", [2, 3, 4, FP8])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_every_width_and_head_size(dim: int, bits: int) -> None:
    span = ChunkSpan(0, 75, 75)
    assert_close(uniform(dim, bits, bits), [span], group=2, tokens=9)


@pytest.mark.parametrize(("heads", "group"), [(1, 1), (3, 3), (2, 8)])
def test_heads_and_groups_over_several_blocks(heads: int, group: int) -> None:
    spans = [ChunkSpan(0, 70, 70), ChunkSpan(5, 33, 33)]
    assert_close(uniform(64, 4, 4, 32), spans, group=group, tokens=70, heads=heads, threads=2)


def test_channel_groups_of_different_bits() -> None:
    format = PageFormat.of(MIXED_KEY, MIXED_VALUE, 16)
    span = ChunkSpan(3, 100, 100)
    channels = MIXED_KEY.channels
    assert channels % 16  # raw tokens are padded
    assert_close(format, [span], group=3, tokens=5)


@settings(max_examples=40)
@given(
    st.sampled_from([16, 32, 64, 128]),
    st.sampled_from([(4, 4), (3, 2), (FP8, 4)]),
    st.lists(st.tuples(st.integers(0, 150), st.integers(0, 150)), min_size=1, max_size=3),
    st.integers(1, 40),
    st.sampled_from([0, 1, 7, 64]),
    st.integers(0, 20),
    st.sampled_from([0.0, 2.0]),
)
def test_ragged_history_windows_and_raw_tokens_between(
    page: int,
    bits: tuple[int, int],
    ends: list[tuple[int, int]],
    tokens: int,
    window: int,
    between: int,
    softcap: float,
) -> None:
    """Histories may be empty, chunks a single token, and each query has a window of its own."""
    spans = [
        ChunkSpan(min(pair), max(pair), max(pair) + between, hidden=between // 2) for pair in ends
    ]
    format = uniform(64, *bits, page)
    assert_close(format, spans, group=2, tokens=tokens, window=window, softcap=softcap)


@settings(max_examples=15)
@given(st.integers(16, 90), st.integers(0, 60), st.integers(1, 20))
def test_records(length: int, first: int, tokens: int) -> None:
    """Nothing past the last vector is read."""
    format = RecordFormat.of(VectorFormat.uniform(64, 4), VectorFormat.uniform(64, 3))
    draw, heads, group = torch.Generator().manual_seed(length), 2, 3
    halves = []
    for half in (format.key, format.value):
        packed, scalars = vectors(half.format, heads, length, draw)
        assert scalars is not None
        halves.append(PackedHalf(packed[None], scalars[None]))
    query = torch.randn((1, heads, tokens * group, 64), generator=draw) / 3
    raw = torch.randn((2, 1, heads, tokens, 64), generator=draw)
    chunk = ChunkTokens(query, raw[0], raw[1])
    spans = [ChunkSpan(min(first, length), length, length)]
    found = chunk_decoder(format, group).attend(query, halves[0], halves[1], spans, chunk)
    key, value = (
        coded_vectors(half.vectors[0], half.scalars[0], part.format)
        for half, part in zip(halves, (format.key, format.value), strict=True)
    )
    expected = chunk_shares(
        query[0], key, value, (query[0], raw[0, 0], raw[1, 0]), group=group,
        position=length, first=spans[0].first,
    )  # fmt: skip
    assert_shares(found, expected, 0)


def test_threads_change_no_bit() -> None:
    format = uniform(64, 4, 4, 64)
    made = filled(format, [200], heads=2, group=3)
    chunk, query = chunk_of(made, 3, 50, 64), coded_query(made, 150, 64)
    halves = PackedHalf(made.keys), PackedHalf(made.values)
    calls = [
        chunk_decoder(format, 3).attend(
            query, *halves, [ChunkSpan(0, 200, 200)], chunk, table_BW=made.table, threads=threads
        )
        for threads in (1, 3)
    ]
    for one, two in zip(*calls, strict=True):
        assert torch.equal(one, two)


def test_unused_places_may_hold_no_numbers() -> None:
    format = uniform(64, 4, 4, 16)
    made = filled(format, [20], heads=1, group=1)
    nan = torch.tensor([math.nan], dtype=torch.float16).view(torch.uint8)
    for pages, half in ((made.keys, format.key), (made.values, format.value)):
        page = pages[made.table[0, 1], 0]
        page[half.scalars + 2 * 4 : half.scalars + 2 * 16] = nan.repeat(12)
    chunk, query = chunk_of(made, 1, 3, 64), coded_query(made, 3, 64)
    found = chunk_decoder(format, 1).attend(
        query, PackedHalf(made.keys), PackedHalf(made.values), [ChunkSpan(0, 20, 20)], chunk,
        table_BW=made.table,
    )  # fmt: skip
    assert all(bool(part.isfinite().all()) for part in found)


def test_rows_are_tokens_of_queries() -> None:
    query = torch.arange(2 * 5 * 6 * 4).view(2, 5, 6, 4)
    rows = rows_of_chunk(query, 3)
    assert rows.shape == (2, 3, 10, 4)
    assert torch.equal(rows[1, 2, 4 * 2 + 1], query[1, 4, 2 * 2 + 1])
    assert torch.equal(chunk_of_rows(rows, 2), query)


def test_what_does_not_fit_is_refused() -> None:
    format = uniform(64, 4, 4)
    made = filled(format, [20], heads=1, group=2)
    chunk, query = chunk_of(made, 2, 3, 64), coded_query(made, 6, 64)

    def attend(
        query: Tensor, chunk: ChunkTokens, span: ChunkSpan, group: int = 2, **more: Any
    ) -> None:
        halves = PackedHalf(made.keys), PackedHalf(made.values)
        decoder, table = chunk_decoder(format, group), made.table
        decoder.attend(query, *halves, [span], chunk, table_BW=table, **more)

    good = ChunkSpan(0, 20, 20)
    with pytest.raises(ValueError, match="rows of 4 queries a token, found 6"):
        attend(query, chunk, good, group=4)
    with pytest.raises(ValueError, match=r"expected float32 queries \[1, 1, 6, 64\]"):
        attend(query[..., 1:], chunk, good)
    with pytest.raises(ValueError, match="expected float32 raw keys"):
        attend(query, chunk._replace(key_BHRD=chunk.key_BHRD.half()), good)
    short = ChunkTokens(chunk.query_BHMD, chunk.key_BHRD[:, :, 1:], chunk.value_BHRD[:, :, 1:])
    with pytest.raises(ValueError, match="raw tokens of 3 queries' tokens or more, found 2"):
        attend(query, short, good)
    for span in (ChunkSpan(0, 20, 19), ChunkSpan(0, 20, 20, hidden=1)):
        with pytest.raises(ValueError, match="expected a place of the chunk past its history"):
            attend(query, chunk, span)
    with pytest.raises(ValueError, match="ranges within 32 tokens"):
        attend(query, chunk, ChunkSpan(0, 40, 40))
    with pytest.raises(ValueError, match="threads of 1 or more, found -1"):
        attend(query, chunk, good, threads=-1)
    with pytest.raises(ValueError, match="a window of 0 or more, found -1"):
        attend(query, chunk, good, window=-1)


def test_a_batch_of_no_sequences_has_empty_results() -> None:
    format = uniform(64, 4, 4)
    made = filled(format, [20], heads=1, group=2)
    chunk = ChunkTokens(*(part[:0] for part in chunk_of(made, 2, 3, 64)))
    found = chunk_decoder(format, 2).attend(
        coded_query(made, 6, 64)[:0], PackedHalf(made.keys), PackedHalf(made.values), [], chunk,
        table_BW=made.table[:0],
    )  # fmt: skip
    assert [list(part.shape) for part in found] == [[0, 1, 6, 64], [0, 1, 6, 64], [0, 1, 6]]
