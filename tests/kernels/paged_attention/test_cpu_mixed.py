"""One softmax over packed tokens and tokens in 16 bits, and the threads that compute it."""

import dataclasses
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stillhouse.kernels.paged_attention import PageFormat, VectorFormat, cpu, cpu_threads
from stillhouse.kernels.paged_attention.cpu import PackedHalf, RawTokens
from stillhouse.kernels.paged_attention.cpu_plan import DecodePlan
from stillhouse.kernels.paged_attention.reference import attend_packed_reference
from stillhouse.kernels.paged_attention.units import LOG2E
from tests.kernels.paged_attention.packed_pages import Filled, filled, no_raw_tokens

HEADS, GROUP = 2, 3


def pages_of(dim: int) -> PageFormat:
    return PageFormat.of(VectorFormat.uniform(dim, 4), VectorFormat.uniform(dim, 3), 16)


def raw_tokens(
    batch: int,
    counts: tuple[int, int],
    dim: int,
    dtypes: tuple[torch.dtype, torch.dtype],
) -> RawTokens:
    draw = torch.Generator().manual_seed(sum(counts))
    parts = []
    for count in counts:  # as a cache holds them: heads behind tokens
        shape = (2, batch, count, HEADS, dim)
        both = torch.randn(shape, generator=draw).transpose(2, 3)
        parts.append((both[0].to(dtypes[0]), both[1].to(dtypes[1])))
    query = torch.randn((batch, HEADS, GROUP, dim), generator=draw) / dim**0.5
    mean = torch.randn((HEADS, dim), generator=draw)
    return RawTokens(query * LOG2E, (parts[0], parts[1]), mean)


Seen = list[tuple[int, int, int, int]]


def attend(
    format: PageFormat,
    made: Filled,
    spans: list[tuple[int, int]],
    raw: RawTokens,
    seen: Seen,
    softcap: float = 0.0,
    threads: int | None = None,
) -> tuple[Tensor, Tensor]:
    plan = DecodePlan(spans, seen, HEADS, GROUP, format.tokens, made.table)
    halves = PackedHalf(made.keys), PackedHalf(made.values)
    decoder = cpu.decoder(format, GROUP, softcap)
    return decoder.attend(made.query * LOG2E, *halves, plan, raw, threads=threads)


def expected_shares(
    format: PageFormat,
    made: Filled,
    spans: list[tuple[int, int]],
    raw: RawTokens,
    seen: Seen,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """In float64, by merging what the reference sums."""
    m, total, out = attend_packed_reference(
        made.query, made.keys, made.values, format, made.table, spans, softcap=softcap
    )
    coded, plain = torch.empty_like(out), torch.empty_like(raw.query_BHGD, dtype=torch.float64)
    for b, ends in enumerate(seen):
        keys, values = (
            torch.cat(
                [raw.parts[i][kind][b, :, ends[2 * i] : ends[2 * i + 1]].double() for i in (0, 1)],
                dim=1,
            )
            for kind in (0, 1)
        )
        score = raw.query_BHGD[b].double() / LOG2E @ keys.mT
        score = softcap * torch.tanh(score / softcap) if softcap else score
        both = torch.cat((m[b][..., None] + total[b][..., None].log(), score), -1).softmax(-1)
        packed, own = both[..., :1], both[..., 1:]
        assert raw.mean_HD is not None
        plain[b] = own @ values + packed * raw.mean_HD[:, None].double()
        coded[b] = out[b] / total[b].clamp_min(1e-300)[..., None] * packed
    return coded, plain


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 90), st.integers(0, 90)), min_size=1, max_size=3),
    st.tuples(st.integers(1, 5), st.integers(0, 40)),
    st.sampled_from([16, 24, 64]),
    st.sampled_from([torch.float16, torch.bfloat16]),
    st.sampled_from([torch.float16, torch.bfloat16]),
    st.sampled_from([0.0, 2.0]),
    st.sampled_from([1, 2]),
)
def test_one_softmax(
    ends: list[tuple[int, int]],
    counts: tuple[int, int],
    dim: int,
    key_dtype: torch.dtype,
    value_dtype: torch.dtype,
    softcap: float,
    threads: int,
) -> None:
    format, spans = pages_of(dim), [(min(pair), max(pair)) for pair in ends]
    made = filled(format, [last for _, last in spans], HEADS, GROUP, seed=dim)
    seen = [(b % counts[0], counts[0], min(b, counts[1]), counts[1]) for b in range(len(spans))]
    raw = raw_tokens(len(spans), counts, dim, (key_dtype, value_dtype))
    found = attend(format, made, spans, raw, seen, softcap, threads)
    expected = expected_shares(format, made, spans, raw, seen, softcap)
    one, two = (torch.cat([part.double() for part in parts], -1) for parts in (found, expected))
    assert bool(one.isfinite().all())
    assert float((one - two).norm() / two.norm()) < 1e-5


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_a_sequence_that_sees_no_token_gets_zeros(softcap: float) -> None:
    format, spans = pages_of(64), [(0, 0), (9, 9), (0, 20), (20, 20)]
    made = filled(format, [20, 20, 20, 20], HEADS, GROUP)
    kinds = (torch.float16, torch.float16)
    seen = [(0, 0, 0, 0), (2, 2, 3, 3), (0, 0, 0, 0), (0, 1, 0, 0)]
    found = attend(format, made, spans, raw_tokens(4, (2, 3), 64, kinds), seen, softcap)
    for part in found:
        assert not part[:2].any()
        assert bool(part.isfinite().all())
    assert bool(found[0][2].any())
    assert bool(found[1][3].any())


def test_raw_tokens_that_do_not_fit_are_refused() -> None:
    format = pages_of(16)
    made = filled(format, [20], HEADS, GROUP)
    kinds = (torch.float16, torch.float16)
    good, seen, spans = raw_tokens(1, (2, 3), 16, kinds), [(0, 2, 0, 3)], [(0, 20)]
    attend(format, made, spans, good, seen)
    (keys, values), recent = good.parts
    for raw, words in (
        (raw_tokens(1, (2, 3), 8, kinds), "queries .* of 16 channels or more"),
        (good._replace(query_BHGD=good.query_BHGD.double()), "expected float32 queries"),
        (good._replace(mean_HD=good.query_BHGD[0, 0]), r"expected float32 means \[2, 16\]"),
        (good._replace(parts=((keys.float(), values), recent)), "keys and values in 16 bits"),
        (good._replace(parts=((keys, values[:, :, 1:]), recent)), "keys and values in 16 bits"),
        (good._replace(parts=((keys, values), (keys, values.to("meta")))), "on meta"),
    ):
        with pytest.raises(ValueError, match=words):
            attend(format, made, spans, raw, seen)
    for wrong, words in (
        ([(0, 3, 0, 3)], r"raw ranges within \[2, 3\] tokens"),
        ([(-1, 2, 0, 3)], "raw ranges from 0 on"),
        ([], "raw ranges of 1 sequences, found 0"),
    ):
        with pytest.raises(ValueError, match=words):
            attend(format, made, spans, good, wrong)
    with pytest.raises(ValueError, match="threads of 1 or more, found -1"):
        attend(format, made, spans, good, seen, threads=-1)


def test_a_batch_of_no_sequences_has_empty_results() -> None:
    format = pages_of(16)
    made = filled(format, [20], HEADS, GROUP)
    raw = raw_tokens(0, (2, 3), 16, (torch.float16, torch.float16))
    none = dataclasses.replace(made, query=made.query[:0], table=made.table[:0])
    out, plain = attend(format, none, [], raw, [])
    assert (list(out.shape), list(plain.shape)) == ([0, HEADS, GROUP, 16], [0, HEADS, GROUP, 16])


def attended(format: PageFormat, made: Filled, threads: int) -> Tensor:
    none = no_raw_tokens(1, HEADS, GROUP)
    return attend(format, made, [(0, 1200)], none, [(0, 0, 0, 0)], threads=threads)[0]


def test_a_pool_does_what_a_team_does(monkeypatch: pytest.MonkeyPatch) -> None:
    format = pages_of(64)
    made = filled(format, [1200], HEADS, GROUP)
    expected = attended(format, made, 1)
    assert torch.equal(attended(format, made, 2), expected)
    monkeypatch.setattr(cpu_threads, "_team", lambda: None)
    assert torch.equal(attended(format, made, 2), expected)


def test_a_forked_child_attends_with_threads_of_its_own() -> None:
    """libgomp's threads do not live on in a child; waiting for them would never end."""
    format = pages_of(64)
    made = filled(format, [1200], HEADS, GROUP)
    expected = attended(format, made, 2)
    child = os.fork()
    if not child:
        os._exit(0 if torch.equal(attended(format, made, 2), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
