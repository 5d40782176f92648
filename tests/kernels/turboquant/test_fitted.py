"""The fitted codec: equal to the mse codec where nothing is known, as predicted where all is."""

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
    assert codec.encode(normal(2, 3, 7, 64)).nbytes == 2 * 3 * 7 * codec.bytes_per_vector
    matrices, books = 3 * (2 * 64 * 64 + 2 * 64), (32 + 31) + (8 + 7) + (4 + 3)
    assert codec.nbytes == 4 * (matrices + books)


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
    with pytest.raises(ValueError, match="norm"):
        FittedCodec(fit, "norm")  # type: ignore[arg-type]
    broken = normal(1, 2, 4, 64)
    broken[0, 1, 2, 3] = torch.inf
    with pytest.raises(NotFiniteError, match="1 of 8"):
        codec.encode(broken)


def test_no_tokens_and_zeros() -> None:
    basis, _ = falling_basis(2, 64, 0.1)
    codec = FittedCodec(fit_heads(torch.zeros(2, 64), basis, (ChannelGroup(64, 3),)), "unbiased")
    assert codec.decode(codec.encode(torch.zeros(1, 2, 0, 64))).shape == (1, 2, 0, 64)
    assert not codec.decode(codec.encode(torch.zeros(1, 2, 3, 64))).any()
