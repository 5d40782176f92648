"""Decode attention's Triton kernels against float64, under Triton's interpreter or on a GPU.

`pytest -m gpu` compiles them; any other run interprets them on CPU tensors (tests/conftest.py).
"""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.kernels.paged_attention.gpu import RawTokens, Sequences
from stillhouse.kernels.paged_attention.gpu_configs import AttendShape, split_count
from tests.kernels.paged_attention.gpu_calls import (
    BOUND,
    RANGES,
    compared,
    decoder_of,
    queries,
    worst,
)
from tests.kernels.paged_attention.gpu_pages import codec_of, fitted, paged


@pytest.mark.parametrize("bits", [(2, 2), (3, 3), (4, 4), (8, 8), (3, 2), (8, 4), (2, 8)])
def test_every_format_is_within_the_bound(bits: tuple[int, int], device: str) -> None:
    case = paged((codec_of(bits[0], 64), codec_of(bits[1], 64)), RANGES, 2, 32, device)
    error = compared(case, queries(4, 2, 3, 64), device)
    assert error < BOUND


@pytest.mark.parametrize("dim", [80, 96, 128, 192, 256])
def test_every_head_size_is_within_the_bound(dim: int, device: str) -> None:
    case = paged((codec_of(3, dim), codec_of(4, dim)), RANGES, 1, 32, device)
    assert compared(case, queries(4, 1, 4, dim), device) < BOUND


@pytest.mark.parametrize("group", [16, 17, 33])
def test_groups_of_more_queries_than_a_tile(group: int, device: str) -> None:
    case = paged((codec_of(4, 64), codec_of(3, 64)), [(0, 40), (3, 20)], 2, 32, device)
    key, value = (queries(2, 2, 5, 64, seed=seed) for seed in (5, 6))
    zero = torch.zeros(2, dtype=torch.int32)
    tokens = RawTokens(*(part.to(device) for part in (key, value, zero, zero + 5)))
    raw = (tokens, list(zip(key, value, strict=True)))
    assert compared(case, queries(2, 2, group, 64), device, raw=raw) < BOUND


@pytest.mark.parametrize("page", [16, 32, 64, 128])
def test_pages_of_every_size_and_bfloat16(page: int, device: str) -> None:
    case = paged((codec_of(4, 64), codec_of(8, 64)), [(3, 150), (0, 2)], 2, page, device)
    assert compared(case, queries(2, 2, 5, 64, dtype=torch.bfloat16), device) < BOUND


@settings(max_examples=6)
@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 60)), min_size=1, max_size=3),
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from([64, 80, 128]),
    st.sampled_from([16, 32, 64, 128]),
    st.sampled_from([1, 2, 7, 16, 17]),
    st.integers(1, 5),
    st.integers(0, 1000),
)
def test_ragged_sequences_of_any_format(
    lengths: list[tuple[int, int]],
    key_bits: int,
    value_bits: int,
    dim: int,
    page: int,
    group: int,
    splits: int,
    seed: int,
) -> None:
    ranges = [(first, first + count) for first, count in lengths]
    codecs = (codec_of(key_bits, dim), codec_of(value_bits, dim))
    case = paged(codecs, ranges, 1, page, seed=seed)
    query = queries(len(ranges), 1, group, dim, seed=seed)
    assert compared(case, query, "cpu", splits=splits) < BOUND


def test_fitted_maps_means_and_fewer_channels(device: str) -> None:
    codecs = (fitted(4, 80, 96, 2), fitted(3, 64, 96, 2, seed=2))
    case = paged((codecs[0], codecs[1]), RANGES, 2, 32, device)
    assert case.bases[0].mean_HD is not None
    assert case.bases[1].back_HCD is not None
    assert case.bases[1].back_HCD.shape == (2, 64, 96)
    assert compared(case, queries(4, 2, 3, 96) / 4, device) < BOUND


def test_soft_caps(device: str) -> None:
    case = paged((codec_of(4, 64), codec_of(4, 64)), RANGES, 2, 32, device)
    query = queries(4, 2, 3, 64) * 20
    assert compared(case, query, device, softcap=5.0) < BOUND


def test_tokens_in_16_bits_share_the_softmax(device: str) -> None:
    case = paged((fitted(4, 64, 64, 2), fitted(4, 64, 64, 2)), RANGES, 2, 32, device)
    key, value = (queries(4, 2, 21, 64, seed=seed) for seed in (5, 6))
    ends = [(0, 21), (3, 20), (7, 7), (0, 1)]
    first, last = (torch.tensor(part, dtype=torch.int32) for part in zip(*ends, strict=True))
    tokens = RawTokens(*(part.to(device) for part in (key, value, first, last)))
    seen = [(key[b, :, i:j], value[b, :, i:j]) for b, (i, j) in enumerate(ends)]
    error = compared(case, queries(4, 2, 3, 64) / 4, device, raw=(tokens, seen))
    assert error < BOUND


def test_weights_of_raw_tokens_are_not_rounded_to_bfloat16(device: str) -> None:
    case = paged((codec_of(4, 64), codec_of(4, 64)), [(5, 5)], 2, 32, device)
    key, value = (queries(1, 2, 60, 64, dtype=torch.bfloat16, seed=seed) for seed in (5, 6))
    zero = torch.zeros(1, dtype=torch.int32)
    tokens = RawTokens(*(part.to(device) for part in (key, value, zero, zero + 60)))
    query = queries(1, 2, 16, 64, dtype=torch.bfloat16)
    error = compared(case, query, device, raw=(tokens, [(key[0], value[0])]))
    assert error < 1.8e-3  # no more than rounding the result costs: 1.63e-3


def test_a_sequence_without_tokens_gets_zeros_and_minus_infinity(device: str) -> None:
    case = paged((codec_of(8, 64), codec_of(8, 64)), [(0, 0), (40, 40)], 2, 16, device)
    keys, values, sequences = case.to(device)
    out, lse = decoder_of(case, 64).attend(
        queries(2, 2, 3, 64).to(device), keys, values, sequences, splits=3
    )
    assert not out.any()
    assert bool((lse == -math.inf).all())


def test_scores_far_above_and_below_all_others(device: str) -> None:
    case = paged((codec_of(8, 64), codec_of(4, 64)), [(0, 70), (0, 33)], 2, 16, device)
    # Scores of hundreds, whose last bit in float16 is more than the bound: 2.8e-3.
    assert compared(case, queries(2, 2, 3, 64) * 60, device) < 4e-3


@pytest.mark.parametrize("bits", [(4, 4), (8, 3)])
@pytest.mark.parametrize("sizes", [[1e-4], [3e3], [3e3, 1e-2, 1.0, 1e-4, 50.0]])
def test_values_of_any_size(bits: tuple[int, int], sizes: list[float], device: str) -> None:
    codecs = (codec_of(bits[0], 64), codec_of(bits[1], 64))
    if bits[0] == 8:  # which ends at 448
        sizes = [min(size, 50.0) for size in sizes]
    case = paged(codecs, [(0, 70), (9, 64)], 2, 32, device, sizes=torch.tensor(sizes))
    query = queries(2, 2, 3, 64) / max(sizes)
    assert compared(case, query, device) < BOUND


@pytest.mark.parametrize("splits", [2, 3, 9])
def test_the_number_of_splits_hardly_matters(splits: int, device: str) -> None:
    case = paged((codec_of(4, 64), codec_of(4, 64)), [(7, 290), (0, 40)], 2, 16, device)
    keys, values, sequences = case.to(device)
    query, decoder = queries(2, 2, 3, 64).to(device), decoder_of(case, 64)
    one, one_lse = decoder.attend(query, keys, values, sequences, splits=1)
    out, lse = decoder.attend(query, keys, values, sequences, splits=splits)
    assert worst(out, one.double().cpu()) < 1e-3
    torch.testing.assert_close(lse, one_lse, rtol=0, atol=1e-5)


def test_the_order_of_pages_does_not_matter_at_all(device: str) -> None:
    case = paged((codec_of(3, 64), codec_of(4, 64)), [(7, 190), (0, 40)], 2, 16, device)
    keys, values, (table, *ends) = case.to(device)
    order = torch.randperm(len(keys), generator=torch.Generator().manual_seed(9))
    moved = torch.empty_like(order)
    moved[order] = torch.arange(len(order))
    query, decoder = queries(2, 2, 3, 64).to(device), decoder_of(case, 64)
    one = decoder.attend(query, keys, values, Sequences(table, *ends), splits=2)
    there = Sequences(moved.int().to(device)[table.long()], *ends)
    order = order.to(device)
    two = decoder.attend(query, keys[order], values[order], there, splits=2)
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])


def test_strides_of_a_cache_that_keeps_both_halves_together(device: str) -> None:
    case = paged((codec_of(4, 64), codec_of(3, 64)), RANGES, 2, 32, device)
    keys, values, sequences = case.to(device)
    both = torch.cat((keys, values), dim=-1)
    query = queries(4, 4, 3, 64).to(device)[:, 1:3]
    decoder, size = decoder_of(case, 64), keys.shape[-1]
    one = decoder.attend(query.contiguous(), keys, values, sequences, splits=2)
    two = decoder.attend(query, both[..., :size], both[..., size:], sequences, splits=2)
    assert torch.equal(one[0], two[0])


def test_a_stored_scalar_that_is_not_finite_shows_as_nan(device: str) -> None:
    case = paged((codec_of(4, 64), codec_of(4, 64)), [(0, 20), (0, 20)], 1, 32, device)
    page = int(case.sequences.table_BW[0, 0])
    for half in (case.keys, case.values):
        kept = half.clone()
        scalars = half[page, 0, case.format.key.scalars :].view(torch.float16)
        scalars[4] = math.inf
        keys, values, sequences = case.to(device)
        out, _ = decoder_of(case, 64).attend(
            queries(2, 1, 16, 64).to(device), keys, values, sequences, splits=1
        )
        assert bool(out[0].isnan().all())
        assert bool(out[1].isfinite().all())
        half.copy_(kept)


def test_entries_of_a_table_that_no_range_reaches_may_be_anything() -> None:
    case = paged((codec_of(4, 64), codec_of(4, 64)), [(40, 64), (0, 5)], 1, 32)
    table, first, last = case.sequences
    filled = table.clone()
    filled[0, 0], filled[1, 1] = -7, 10_000
    query, decoder = queries(2, 1, 2, 64), decoder_of(case, 64)
    one = decoder.attend(query, case.keys, case.values, case.sequences, splits=1)
    two = decoder.attend(query, case.keys, case.values, Sequences(filled, first, last), splits=1)
    assert torch.equal(one[0], two[0])


def test_splits_fill_a_gpu_once_and_have_two_tiles_or_more() -> None:
    shape = AttendShape(128, 128, 128, 4, 4, 4, 128)
    assert split_count(shape, 8, 100, 132) == 1
    # 2 warps each: 4 programs on an SM.
    assert split_count(shape, 8, 131_072, 132) == 132 * 4 // 8
    assert split_count(shape, 128, 32_768, 132) == 132 * 4 // 128
    assert split_count(shape, 10_000, 131_072, 132) == 1
    counts = [split_count(shape, 8, tokens, 132) for tokens in range(1, 20_000, 97)]
    assert counts == sorted(counts)


@pytest.mark.gpu
def test_a_captured_graph_follows_the_sequences() -> None:
    case = paged((codec_of(4, 128), codec_of(3, 128)), [(0, 900), (5, 700)], 4, 128, "cuda")
    keys, values, sequences = case.to("cuda")
    decoder = decoder_of(case, 128)
    query = queries(2, 4, 4, 128, dtype=torch.bfloat16).cuda()
    decoder.attend(query, keys, values, sequences, tokens=1024, trusted=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = decoder.attend(query, keys, values, sequences, tokens=1024, trusted=True)
    for last in ([900, 700], [64, 6], [513, 700]):
        sequences.last_B.copy_(torch.tensor(last, dtype=torch.int32))
        graph.replay()
        again, _ = decoder.attend(query, keys, values, sequences, tokens=1024)
        assert torch.equal(out, again)


def test_importing_needs_no_gpu_and_no_interpreter() -> None:
    code = "import stillhouse.kernels.paged_attention.gpu"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
