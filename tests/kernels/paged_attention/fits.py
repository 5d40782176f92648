"""Codecs fitted to vectors that nobody has: with a mean and a map of each head's own."""

from collections.abc import Sequence

import torch

from stillhouse.kernels.turboquant import ChannelGroup, FittedCodec, balance, fit_heads
from stillhouse.kernels.turboquant.fitted import FittedScalar


def fitted_codec(
    groups: Sequence[ChannelGroup],
    heads: int,
    seed: int = 1,
    scalar: FittedScalar = "unbiased",
    with_map: bool = True,
) -> FittedCodec:
    """Of as many channels as the groups have together."""
    dim = sum(group.channels for group in groups)
    draw = torch.Generator().manual_seed(seed)
    factor = torch.randn((heads, dim, dim), generator=draw, dtype=torch.float64)
    moment = factor @ factor.mT / dim + torch.eye(dim, dtype=torch.float64)
    mean = torch.randn((heads, dim), generator=draw, dtype=torch.float64)
    fit = fit_heads(mean, balance(moment, moment), groups)
    return FittedCodec(fit if with_map else fit.without_map(), scalar)
