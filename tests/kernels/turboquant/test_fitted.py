"""The fitted codec: equal to the mse codec where nothing is known, as predicted where all is."""

from typing import Any

import pytest
import torch

from stillhouse.kernels.turboquant import (
    BalancedBasis,
    ChannelGroup,
    FittedCodec,
    FittedScalar,
    HeadFit,
    MseCodec,
    NotFiniteError,
    balance,
    choose_groups,
    expected_cost,
    fit_heads,
)

SCALARS: tuple[FittedScalar, ...] = ("unbiased", "least_squares")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def falling_basis(heads: int, dim: int, ratio: float) -> tuple[BalancedBasis, torch.Tensor]:
    """Channels already balanced: variance and weight both fall from 1 to `ratio`."""
    spread = torch.logspace(0, torch.tensor(ratio).log10(), dim, dtype=torch.float64)
    matrix = torch.diag(spread).expand(heads, dim, dim)
    return balance(matrix, matrix, ridge=0), spread


@pytest.mark.parametrize("scalar", SCALARS)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
def test_one_group_and_the_mse_codecs_rotation_give_its_bytes(
    bits: int, scalar: FittedScalar
) -> None:
    mse = MseCodec(64, bits, scalar)
    matrix = mse.rotation.matrix.expand(2, 64, 64).contiguous()
    fit = HeadFit(
        torch.zeros(2, 64),
        matrix,
        matrix.mT.contiguous(),
        torch.ones(2, 64),
        (ChannelGroup(64, bits),),
    )
    x = normal(2, 2, 5, 64)
    found, expected = FittedCodec(fit, scalar).encode(x), mse.encode(x)
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.scalars, expected.scalars, rtol=2**-10, atol=0)
    torch.testing.assert_close(FittedCodec(fit, scalar).decode(expected), mse.decode(expected))


@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("bits", [3, 4])
def test_the_cost_is_the_predicted_one_and_below_the_mse_codecs(dim: int, bits: int) -> None:
    basis, spread = falling_basis(2, dim, 1e-2)
    groups = choose_groups(basis.spread_HD, bits)
    x = normal(1, 2, 4000, dim) * spread.sqrt().float()
    fitted = FittedCodec(fit_heads(torch.zeros(2, dim), basis, groups), "least_squares")
    plain = MseCodec(dim, bits, "least_squares")
    assert fitted.bytes_per_vector <= plain.bytes_per_vector

    def cost(decoded: torch.Tensor) -> float:
        return float(((decoded - x).double().square() * spread).sum(-1).mean()) * 2

    found = cost(fitted.decode(fitted.encode(x)))
    assert found == pytest.approx(expected_cost(basis.spread_HD, groups), rel=0.1)
    assert found < 0.6 * cost(plain.decode(plain.encode(x)))


def test_inner_products_with_the_weights_queries_have_no_bias() -> None:
    basis, spread = falling_basis(1, 64, 0.05)
    groups = choose_groups(basis.spread_HD, 3)
    x = normal(1, 1, 500, 64) * spread.sqrt().float()
    weighted = x.double() * spread
    ratios = []
    for seed in range(40):
        codec = FittedCodec(fit_heads(torch.zeros(1, 64), basis, groups, seed * 10), "unbiased")
        decoded = codec.decode(codec.encode(x)).double()
        ratios.append(((decoded * weighted).sum() / (x * weighted).sum()).item())
    # The weight is constant inside a group of the codec, not in the data: hence 1 %, not 0.1 %.
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.01)


STEPS = ((24, 4.0), (24, 1.0), (16, 0.1))  # channels, and their variance and weight


def stepped(
    bits: tuple[int, ...], scalar: FittedScalar, seed: int = 0, heads: int = 2
) -> tuple[FittedCodec, torch.Tensor]:
    """A codec whose groups have one variance and one weight each, and the weights [64]."""
    weight = torch.cat([torch.full((channels,), step) for channels, step in STEPS]).double()
    matrix = torch.diag(weight).expand(heads, 64, 64)
    groups = tuple(ChannelGroup(n, b) for (n, _), b in zip(STEPS, bits, strict=True))
    fit = fit_heads(torch.zeros(heads, 64), balance(matrix, matrix, ridge=0), groups, seed)
    coded = torch.cat([torch.full((group.channels,), group.bits > 0) for group in groups])
    return FittedCodec(fit, scalar), weight * coded


@pytest.mark.parametrize("bits", [(5, 4, 3), (4, 2, 0), (3, 1, 0), (1, 0, 0)])
def test_unbiased_is_so_for_the_coded_channels_weighted_product(bits: tuple[int, ...]) -> None:
    _, weight = stepped(bits, "unbiased")
    spread = torch.cat([torch.full((n,), step**0.5) for n, step in STEPS])
    keys, across = normal(1, 2, 300, 64) * spread, normal(8, 2, 300, 64, seed=1) * spread
    square = (weight * keys.double().square()).sum(-1)
    inner = (weight * keys * across).sum(-1, keepdim=True)
    across = across - inner / square[..., None] * keys  # orthogonal in the weighted product
    off = []
    for seed in range(60):
        codec, _ = stepped(bits, "unbiased", 10 * seed)
        decoded = codec.decode(codec.encode(keys)).double()
        along = (weight * keys * decoded).sum(-1) / square - 1
        assert float(along.abs().max()) < 1.02 * 2**-11  # the rounding of the float16 scalar
        assert abs(float(along.mean())) < 1e-4
        off.append((weight * across * decoded).sum(-1) / square)
    pairs = torch.stack(off).mean(0)
    standard_error = float(pairs.std()) / pairs.numel() ** 0.5
    assert standard_error < 3.5e-4  # 3.0e-4 with 24 channels of 1 bit, 0.2e-4 with (5, 4, 3)
    assert abs(float(pairs.mean())) < 1e-3


@pytest.mark.parametrize("amplitude", [1e1, 1e2, 1e3])
def test_an_outlier_spoils_its_own_group_alone(amplitude: float) -> None:
    spread = torch.cat([torch.full((n,), step**0.5) for n, step in STEPS])
    usual = normal(1, 2, 1000, 64) * spread
    cheap, left_out = usual.clone(), usual.clone()
    cheap[..., 30] = amplitude * usual[..., 30].sign()  # 2 bits, weight 1 of 4
    left_out[..., 55] = amplitude * usual[..., 55].sign()  # 0 bits
    error = {}
    for scalar in SCALARS:
        codec, weight = stepped((4, 2, 0), scalar)
        packed, same = codec.encode(usual), codec.encode(left_out)
        assert torch.equal(same.indices, packed.indices)
        assert torch.equal(same.scalars, packed.scalars)
        lost = (codec.decode(codec.encode(cheap)) - cheap).double().square() * weight
        error[scalar] = float((lost.sum(-1) / (weight * cheap.double().square()).sum(-1)).mean())
    assert error["least_squares"] < error["unbiased"] < 1.5 * error["least_squares"]
    assert error["unbiased"] < 0.45  # 0.015 without an outlier


def test_the_mean_is_free() -> None:
    basis, _ = falling_basis(2, 64, 0.1)
    mean = 100 * normal(2, 64, seed=1)
    codec = FittedCodec(fit_heads(mean, basis, (ChannelGroup(64, 3),)), "unbiased")
    at_mean = mean[None, :, None].expand(1, 2, 3, 64)
    assert torch.equal(codec.decode(codec.encode(at_mean)), at_mean)
    x = normal(1, 2, 3, 64)
    zero = FittedCodec(fit_heads(0 * mean, basis, (ChannelGroup(64, 3),)), "unbiased")
    error = codec.decode(codec.encode(x + at_mean)) - at_mean
    torch.testing.assert_close(error, zero.decode(zero.encode(x)), atol=0.02, rtol=0)


def test_bytes_are_those_allocated() -> None:
    basis, _ = falling_basis(3, 64, 0.1)
    groups = (ChannelGroup(16, 5), ChannelGroup(32, 3), ChannelGroup(8, 2), ChannelGroup(8, 0))
    codec = FittedCodec(fit_heads(torch.zeros(3, 64), basis, groups), "least_squares")
    assert codec.bytes_per_vector == 10 + 12 + 2 + 0 + 2
    matrices, books = 3 * (2 * 64 * 64 + 2 * 64), (32 + 31) + (8 + 7) + (4 + 3)
    assert codec.nbytes == 4 * (matrices + books)
    assert codec.encode(normal(2, 3, 7, 64)).nbytes == 2 * 3 * 7 * codec.bytes_per_vector
    # What the loops of a CPU read beside: the books in a row, and four numbers a coded group.
    assert codec.nbytes == 4 * (matrices + 2 * books) + (3 * 4 + 8) * 8


def test_what_does_not_fit_is_refused() -> None:
    basis, _ = falling_basis(2, 64, 0.1)
    fit = fit_heads(torch.zeros(2, 64), basis, (ChannelGroup(64, 3),))
    codec = FittedCodec(fit, "unbiased")
    with pytest.raises(ValueError, match="64 channels in all"):
        fit_heads(torch.zeros(2, 64), basis, (ChannelGroup(56, 3),))
    with pytest.raises(ValueError, match=r"\[..., 2, T, 64\]"):
        codec.encode(normal(1, 3, 4, 64))
    with pytest.raises(ValueError, match="float64"):
        codec.encode(normal(1, 2, 4, 64).double())
    no_scalar: Any = "norm"
    with pytest.raises(ValueError, match="norm"):
        FittedCodec(fit, no_scalar)
    broken = normal(1, 2, 4, 64)
    broken[0, 1, 2, 3] = torch.inf
    with pytest.raises(NotFiniteError, match="1 of 8"):
        codec.encode(broken)


def test_no_tokens_and_zeros() -> None:
    basis, _ = falling_basis(2, 64, 0.1)
    codec = FittedCodec(fit_heads(torch.zeros(2, 64), basis, (ChannelGroup(64, 3),)), "unbiased")
    assert codec.decode(codec.encode(torch.zeros(1, 2, 0, 64))).shape == (1, 2, 0, 64)
    assert not codec.decode(codec.encode(torch.zeros(1, 2, 3, 64))).any()
