"""Compiled decode attention against the definition in float64, on the same packed bytes."""

import dataclasses
import math
from pathlib import Path

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
    cpu,
    cpu_compile,
)
from stillhouse.kernels.paged_attention.cpu import PackedHalf
from stillhouse.kernels.paged_attention.cpu_ir import emit
from stillhouse.kernels.paged_attention.cpu_plan import DecodePlan
from stillhouse.kernels.paged_attention.cpu_spec import SPLIT_TOKENS, DecodeSpec
from stillhouse.kernels.paged_attention.reference import (
    attend_packed_reference,
    coded_vectors,
    softmax_sums,
)
from stillhouse.kernels.paged_attention.units import LOG2E
from tests.kernels.paged_attention.packed_pages import (
    MIXED_KEY,
    MIXED_VALUE,
    Filled,
    filled,
    no_raw_tokens,
    vectors,
)

CLOSE = 1e-5


def pages_of(dim: int, key: int, value: int, tokens: int = 16) -> PageFormat:
    return PageFormat.of(VectorFormat.uniform(dim, key), VectorFormat.uniform(dim, value), tokens)


def attend(
    format: PageFormat,
    made: Filled,
    ranges: list[tuple[int, int]],
    threads: int | None = 1,
    softcap: float = 0.0,
) -> Tensor:
    found = cpu.decoder(format, made.query.shape[2], softcap)
    return attend_by(found, made, ranges, threads)


def attend_by(
    decoder: cpu.PackedDecoder,
    made: Filled,
    ranges: list[tuple[int, int]],
    threads: int | None = 1,
) -> Tensor:
    """Without tokens in 16 bits: the packed values' shares of the softmax."""
    batch, heads, group, _ = made.query.shape
    page = decoder.pages.tokens
    plan = DecodePlan(ranges, [(0, 0, 0, 0)] * len(ranges), heads, group, page, made.table)
    halves = PackedHalf(made.keys), PackedHalf(made.values)
    raw = no_raw_tokens(batch, heads, group)
    out, rest = decoder.attend(made.query * LOG2E, *halves, plan, raw, threads=threads)
    assert not rest.any()
    return out


def assert_close(
    format: PageFormat, made: Filled, ranges: list[tuple[int, int]], softcap: float = 0.0
) -> None:
    found = attend(format, made, ranges, softcap=softcap)
    _, total, sums = attend_packed_reference(
        made.query, made.keys, made.values, format, made.table, ranges, softcap=softcap
    )
    assert_shares(found, sums, total)


def assert_shares(found: Tensor, sums: Tensor, total: Tensor) -> None:
    expected = sums / total.clamp_min(1e-300)[..., None]
    assert bool(found.isfinite().all())
    assert not found[total[..., None].expand_as(sums) == 0].any()
    assert float((found - expected).norm()) <= CLOSE * float(expected.norm())


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, FP8])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 192, 256])
def test_every_width_and_head_size(dim: int, bits: int) -> None:
    format = pages_of(dim, bits, 9 - bits if bits in (4, 5) else bits)
    assert_close(format, filled(format, [37], heads=2, group=2), [(0, 37)])


@pytest.mark.parametrize("group", [1, 3, 8, 12])
def test_groups_of_queries(group: int) -> None:
    format = pages_of(64, 4, 3, 32)
    assert_close(format, filled(format, [50, 9], heads=2, group=group), [(0, 50), (0, 9)])


def test_channel_groups_of_different_bits() -> None:
    format = PageFormat.of(MIXED_KEY, MIXED_VALUE, 16)
    assert_close(format, filled(format, [100], heads=2, group=3), [(0, 100)])


@settings(max_examples=25)  # most compile
@given(
    st.sampled_from([16, 32, 64, 128]),
    st.sampled_from([1, 2, 3, 4, 5, FP8]),
    st.sampled_from([1, 2, 3, 4, 5, FP8]),
    st.integers(1, 3),
    st.sampled_from([1, 2, 3]),
    st.lists(st.tuples(st.integers(0, 150), st.integers(0, 150)), min_size=1, max_size=4),
    st.sampled_from([0.0, 2.0]),
    st.integers(0, 2**20),
)
def test_ragged_empty_and_cut_ranges(
    tokens: int,
    key_bits: int,
    value_bits: int,
    heads: int,
    group: int,
    ends: list[tuple[int, int]],
    softcap: float,
    seed: int,
) -> None:
    """A range may begin anywhere, as a sliding window's does."""
    format = pages_of(64, key_bits, value_bits, tokens)
    ranges = [(min(pair), max(pair)) for pair in ends]
    made = filled(format, [last for _, last in ranges], heads, group, seed)
    assert_close(format, made, ranges, softcap=softcap)


RECORDS = {
    "k4v3": RecordFormat.of(VectorFormat.uniform(64, 4), VectorFormat.uniform(64, 3)),
    "fp8": RecordFormat.of(VectorFormat.uniform(80, FP8), VectorFormat.uniform(80, FP8)),
    "mixed": RecordFormat.of(MIXED_KEY, MIXED_VALUE),
}


@settings(max_examples=30)
@given(
    st.sampled_from(list(RECORDS)),
    st.integers(16, 70),
    st.lists(st.integers(0, 54), min_size=1, max_size=3),
    st.integers(1, 54),
    st.booleans(),
)
def test_records_of_any_length(
    name: str, tokens: int, firsts: list[int], length: int, capped: bool
) -> None:
    """Nothing past the last vector is read, and an offset is added before the cap."""
    format, draw = RECORDS[name], torch.Generator().manual_seed(tokens)
    batch, heads, group, softcap = len(firsts), 2, 3, 3.0 * capped
    halves = []
    for half in (format.key, format.value):
        packed, scalars = vectors(half.format, batch * heads, tokens, draw)
        shape = (batch, heads, tokens)
        scalars = None if scalars is None else scalars.view(shape)
        halves.append(PackedHalf(packed.view(*shape, -1), scalars))
    query = torch.randn((batch, heads, group, format.key.format.channels), generator=draw) / 3
    offset = torch.randn((batch, heads, group), generator=draw)
    ranges = [(first, max(min(first + length, tokens), 16)) for first in firsts]
    plan = DecodePlan(ranges, [(0, 0, 0, 0)] * batch, heads, group)
    raw = no_raw_tokens(batch, heads, group)
    found, _ = cpu.decoder(format, group, softcap).attend(
        query * LOG2E, halves[0], halves[1], plan, raw, offset * LOG2E, threads=1
    )
    for b, (first, last) in enumerate(ranges):
        whole = [
            coded_vectors(
                half.vectors[b], None if half.scalars is None else half.scalars[b], part.format
            )[:, first:last]
            for half, part in zip(halves, (format.key, format.value), strict=True)
        ]
        _, total, sums = softmax_sums(query[b], *whole, softcap=softcap, offset_HG=offset[b])
        assert_shares(found[b], sums, total)


def test_records_that_do_not_fit_are_refused() -> None:
    format = RECORDS["k4v3"]
    keys, values = (
        PackedHalf(torch.zeros((1, 2, 20, half.format.packed), dtype=torch.uint8),
                   torch.zeros((1, 2, 20)).half())
        for half in (format.key, format.value)
    )  # fmt: skip
    query = torch.zeros((1, 2, 1, 64))
    plan, raw = DecodePlan([(0, 20)], [(0, 0, 0, 0)], 2, 1), no_raw_tokens(1, 2, 1)
    attend = cpu.decoder(format, 1).attend
    with pytest.raises(ValueError, match="1 ranges within 20 tokens"):
        attend(query, keys, values, DecodePlan([(0, 21)], [(0, 0, 0, 0)], 2, 1), raw)
    with pytest.raises(ValueError, match="end at 16 or later"):
        DecodePlan([(0, 15)], [(0, 0, 0, 0)], 2, 1)
    for shape in ((1, 2), (1, 2, 2), (2, 1)):
        with pytest.raises(ValueError, match=r"expected offsets \[1, 2, 1\]"):
            attend(query, keys, values, plan, raw, torch.zeros(shape))
    with pytest.raises(ValueError, match="on the CPU, found one on meta"):
        attend(query.to("meta"), keys, values, plan, raw)
    with pytest.raises(ValueError, match="packed keys, uint8"):
        attend(query, PackedHalf(keys.vectors), values, plan, raw)
    with pytest.raises(ValueError, match="packed values, uint8"):
        attend(query, keys, PackedHalf(values.vectors[..., 1:], values.scalars), plan, raw)


def test_a_plan_is_of_its_shape_and_pages() -> None:
    format = pages_of(64, 4, 4)
    made = filled(format, [20], heads=2, group=3)
    halves, raw = (PackedHalf(made.keys), PackedHalf(made.values)), no_raw_tokens(1, 2, 3)
    for heads, group, page in ((1, 3, 16), (2, 1, 16), (2, 3, 32)):
        plan = DecodePlan([(0, 20)], [(0, 0, 0, 0)], heads, group, page, made.table)
        with pytest.raises(ValueError, match=r"a plan for queries \[1, 2, 3\] and pages of 16"):
            cpu.decoder(format, 3).attend(made.query, *halves, plan, raw)


def test_layers_of_different_formats_share_a_plan() -> None:
    """Its room and its counters serve one layer after another."""
    formats = [pages_of(64, 4, 4), pages_of(64, 3, FP8), PageFormat.of(MIXED_KEY, MIXED_VALUE, 16)]
    length = 2 * SPLIT_TOKENS + 5
    layers = [filled(format, [length, 30], heads=2, group=2) for format in formats]
    ranges, none = [(0, length), (3, 30)], [(0, 0, 0, 0)] * 2
    plan = DecodePlan(ranges, none, 2, 2, 16, layers[0].table)
    for format, made in 2 * list(zip(formats, layers, strict=True)):
        assert torch.equal(made.table, layers[0].table)
        halves = PackedHalf(made.keys), PackedHalf(made.values)
        found, _ = cpu.decoder(format, 2).attend(
            made.query * LOG2E, *halves, plan, no_raw_tokens(2, 2, 2), threads=2
        )
        assert torch.equal(found, attend(format, made, ranges))


def test_splits_and_threads() -> None:
    format = pages_of(64, 4, 4, 128)
    length = 2 * SPLIT_TOKENS + 77
    made = filled(format, [length, 5], heads=2, group=2)
    ranges = [(3, length), (0, 5)]
    assert_close(format, made, ranges)
    calls = [attend(format, made, ranges, threads=threads) for threads in (1, 3)]
    assert torch.equal(*calls)


def test_the_order_of_pages_changes_nothing() -> None:
    format = pages_of(64, 3, 3)
    made = filled(format, [90], heads=1, group=2)
    order = torch.randperm(made.keys.shape[0])
    keys, values = torch.empty_like(made.keys), torch.empty_like(made.values)
    keys[order], values[order] = made.keys, made.values
    one = attend(format, made, [(0, 90)])
    table = order[made.table.long()].int()
    two = attend(format, Filled(keys, values, table, made.query), [(0, 90)])
    assert torch.equal(one, two)


def test_large_scores_do_not_overflow_and_the_greatest_comes_last() -> None:
    format = pages_of(64, 4, 4)
    made = filled(format, [64], heads=1, group=1)
    strong = Filled(made.keys, made.values, made.table, made.query * 200)
    assert_close(format, strong, [(0, 64)])


def test_a_scalar_that_is_no_number_shows() -> None:
    format = pages_of(64, 4, 4)
    made = filled(format, [20], heads=1, group=1)
    at = format.value.scalars + 2 * 3
    made.values[made.table[0, 0], 0, at : at + 2] = torch.tensor(
        [math.nan], dtype=torch.float16
    ).view(torch.uint8)
    assert bool(attend(format, made, [(0, 20)]).isnan().all())


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("permute", ["avx2", ""])
def test_tables_are_read_alike_on_other_processors(permute: str, bits: int) -> None:
    format = pages_of(64, bits, bits)
    text = emit(DecodeSpec(format, 2, 64, True, permute))
    assert ("llvm.x86.avx2.permps" in text) == (permute == "avx2")
    assert "avx512" not in text
    if permute and not cpu_compile.processor().permute:
        pytest.skip("needs a processor with AVX2")
    made = filled(format, [37], heads=1, group=2)
    one, two = (
        attend_by(cpu.PackedDecoder(format, 2, permute=how), made, [(0, 37)])
        for how in (None, permute)
    )
    torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


def test_buffers_ignore_the_default_dtype() -> None:
    format = pages_of(64, 4, 4)
    made = filled(format, [40], heads=2, group=2)
    expected = attend(format, made, [(0, 40)])
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        cpu.decoder.cache_clear()
        found = attend(format, made, [(0, 40)])
    finally:
        torch.set_default_dtype(before)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_what_does_not_fit_is_refused() -> None:
    format = pages_of(64, 4, 4)
    made = filled(format, [20], heads=2, group=3)
    span = [(0, 20)]

    def changed(**parts: torch.Tensor) -> Filled:
        return dataclasses.replace(made, **parts)

    for threads in (0, -1):
        with pytest.raises(ValueError, match=f"threads of 1 or more, found {threads}"):
            attend(format, made, span, threads=threads)
    for wrong, ranges, words in (
        (changed(query=made.query.double()), span, r"float32 queries \[1, 2, 3, 64\], found"),
        (changed(query=made.query[..., 1:]), span, "float32 queries"),
        (changed(keys=made.keys[..., 1:]), span, "half pages of keys, uint8"),
        (changed(values=made.values[:, :1]), span, "half pages of values, uint8"),
        (changed(table=made.table.long()), span, "expected an int32 table of 1 rows"),
        (made, [(0, 33)], "1 ranges within 32 tokens"),
        (made, [(0, 5), (0, 5)], "int32 table of 2 rows"),
        (changed(table=made.table + 2), span, "expected pages from 0 to 2, found"),
        (changed(table=made.table - 3), span, "expected pages from 0 to 2, found"),
    ):
        with pytest.raises(ValueError, match=words):
            attend(format, wrong, ranges)


@settings(max_examples=20)
@given(
    st.sampled_from([16, 64]),
    st.lists(st.tuples(st.integers(0, 150), st.integers(0, 150)), min_size=1, max_size=4),
)
def test_entries_of_a_table_that_no_range_uses_may_be_anything(
    tokens: int, ends: list[tuple[int, int]]
) -> None:
    """Nor does what is asked for early lie past a range, where its table has no pages."""
    format = pages_of(64, 4, 4, tokens)
    made = filled(format, [max(pair) for pair in ends], heads=2, group=1)
    filling = torch.full((len(ends), 3), 7)
    table = torch.cat((filling, made.table, filling), dim=1).int()
    ranges = [(first + 3 * tokens, last + 3 * tokens) for first, last in ends]
    place = torch.arange(table.shape[1])
    for row, (first, last) in enumerate(ranges):
        unused = (place < first // tokens) | (place >= -(-last // tokens)) | (first >= last)
        table[row, unused] = torch.tensor([-1, 10_000, -(2**31)])[place[unused] % 3].int()
    found = attend(format, dataclasses.replace(made, table=table), ranges, threads=2)
    torch.testing.assert_close(found, attend(format, made, ends, threads=2), rtol=1e-5, atol=1e-5)
    for row, (first, last) in enumerate(ranges):
        if first < last:
            wrong = table.clone()
            wrong[row, (last - 1) // tokens] = -1
            with pytest.raises(ValueError, match=r"expected pages from 0 to .*, found -1 to"):
                attend(format, dataclasses.replace(made, table=wrong), ranges)


def test_a_batch_of_no_sequences_has_empty_results() -> None:
    format = pages_of(64, 4, 4)
    made = filled(format, [20], heads=2, group=3)
    none = dataclasses.replace(made, query=made.query[:0], table=made.table[:0])
    found = attend(format, none, [], threads=2)
    assert list(found.shape) == [0, 2, 3, 64]


def test_code_is_kept_and_a_damaged_file_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path))
    format = pages_of(16, 2, 2)
    made = filled(format, [20], heads=1, group=1)
    spec = DecodeSpec(format, 1, 16, False, cpu_compile.processor().permute)
    outputs, written = [], []
    for damage in (False, True, False):
        cpu_compile.compiled.cache_clear()
        cpu.decoder.cache_clear()
        outputs.append(attend(format, made, [(0, 20)]))
        [file] = (tmp_path / "compiled").iterdir()
        written.append(file.read_bytes())
        if damage:
            file.write_bytes(written[-1][:-1])
    assert written[0] == written[1] == written[2]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert "run:" in cpu_compile.assembly(spec)


def test_a_cache_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "file"))
    format = pages_of(16, 1, 1)
    assert_close(format, filled(format, [20], heads=1, group=1), [(0, 20)])
