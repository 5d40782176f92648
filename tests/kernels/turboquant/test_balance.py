"""The balanced basis against closed forms and its definition; the cut against a full search."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.kernels.turboquant import (
    ChannelGroup,
    balance,
    choose_groups,
    expected_cost,
    group_curve,
)

FLAT_64 = torch.ones(1, 64, dtype=torch.float64)


def spd(dim: int, seed: int, heads: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(heads, dim, dim, dtype=torch.float64, generator=generator)
    return root @ root.mT + 0.1 * torch.eye(dim, dtype=torch.float64)


def test_a_diagonal_pair_by_hand() -> None:
    basis = balance(torch.diag(torch.tensor([1.0, 4.0]))[None], torch.eye(2)[None], ridge=0)
    # s_i² = 4 and 1; A = diag of (s / Σ)^(1/2), the wider channel first.
    assert basis.spread_HD.tolist() == [pytest.approx([2.0, 1.0])]
    found = basis.map_HDD[0].abs()
    torch.testing.assert_close(found, torch.tensor([[0, 0.5**0.5], [1, 0]], dtype=torch.float64))


@given(st.integers(0, 10_000), st.sampled_from([2, 8, 16]))
def test_variance_and_weight_of_each_channel_are_its_spread(seed: int, dim: int) -> None:
    covariance, weight = spd(dim, seed), spd(dim, seed + 1)
    basis = balance(covariance, weight, ridge=0)
    inverse = torch.linalg.inv(basis.map_HDD)
    expected = torch.diag_embed(basis.spread_HD)
    tolerance = 1e-6 * float(expected.max())
    for found in (basis.map_HDD @ covariance @ basis.map_HDD.mT, inverse.mT @ weight @ inverse):
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
    assert bool((basis.spread_HD.diff(dim=-1) <= 0).all())


def test_the_product_of_traces_is_the_least_of_all_maps_tried() -> None:
    covariance, weight = spd(8, 3), spd(8, 4)
    best = balance(covariance, weight, ridge=0).spread_HD.sum(-1) ** 2
    for seed in range(20):
        tried = spd(8, 100 + seed)
        inverse = torch.linalg.inv(tried)
        cost = (inverse.mT @ weight @ inverse).diagonal(dim1=1, dim2=2).sum(-1) * (
            tried @ covariance @ tried.mT
        ).diagonal(dim1=1, dim2=2).sum(-1)
        assert bool((cost > best).all())


def test_zeros_and_one_direction_give_finite_maps() -> None:
    nothing = torch.zeros(1, 8, 8, dtype=torch.float64)
    one = nothing.clone()
    one[0, 0, 0] = 1e-12
    for covariance in (nothing, one):
        for weight in (nothing, one):
            basis = balance(covariance, weight)
            assert bool(torch.isfinite(torch.linalg.inv(basis.map_HDD)).all())


def test_channels_that_are_alike_get_equal_bits() -> None:
    assert choose_groups(FLAT_64, 3) == (ChannelGroup(64, 3),)


def test_the_cost_of_a_cut_by_hand() -> None:
    spread = torch.tensor([[3.0] * 8 + [1.0] * 8])
    # D(1) = 1 - 2/π; eight channels of 3 have (Σ s)² / 8 = 72; what is left out costs 8.
    found = expected_cost(spread, (ChannelGroup(8, 1), ChannelGroup(8, 0)))
    assert found == pytest.approx((1 - 2 / torch.pi) * 72 + 8, rel=1e-6)


def test_bits_go_where_errors_cost_most() -> None:
    spread = torch.tensor([[100.0] * 16 + [1.0] * 48])
    groups = choose_groups(spread, 2)
    assert groups[0].bits == 5
    assert 16 <= groups[0].channels <= 24
    assert expected_cost(spread, groups) < 0.1 * expected_cost(spread, (ChannelGroup(64, 2),))


@given(st.integers(0, 1000), st.sampled_from([64, 80, 128, 256]), st.floats(0, 5.0))
def test_a_cut_keeps_the_budget_and_beats_equal_bits(seed: int, dim: int, bits: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(2, dim, generator=generator).exp().pow(3).sort(descending=True).values
    groups = choose_groups(spread, bits)
    assert sum(group.channels for group in groups) == dim
    assert sum(group.channels * group.bits for group in groups) <= bits * dim
    assert all(group.channels % 8 == 0 for group in groups)
    equal = (ChannelGroup(dim, int(bits)),)
    assert expected_cost(spread, groups) <= expected_cost(spread, equal) * (1 + 1e-9)


@given(st.integers(0, 1000), st.sampled_from([64, 80, 128, 256]))
def test_one_group_is_the_cheapest_of_its_bits(seed: int, dim: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(2, dim, generator=generator).exp().pow(3).sort(descending=True).values
    curve = group_curve(spread, 1)
    every = [
        (ChannelGroup(channels, bits), ChannelGroup(dim - channels, 0))
        for channels in range(64, dim + 1, 16)
        for bits in (2, 3, 4)
    ]
    assert curve[0].bits == 128
    assert curve[-1].bits == 4 * dim
    for choice in curve:
        assert (*choice.groups, ChannelGroup(0, 0))[:2] in every
        fitting = [g for g in every if g[0].channels * g[0].bits <= choice.bits]
        best = min(expected_cost(spread, g if g[1].channels else g[:1]) for g in fitting)
        assert choice.cost == pytest.approx(best)


def test_refusals() -> None:
    for dim in (48, 72, 272):
        with pytest.raises(ValueError, match=f"for one channel group, found {dim}"):
            group_curve(torch.ones(1, dim), 1)
    with pytest.raises(ValueError, match="at least 0 bits"):
        choose_groups(FLAT_64, -1)
    with pytest.raises(ValueError, match="multiple of 8"):
        choose_groups(torch.ones(1, 20), 3)
