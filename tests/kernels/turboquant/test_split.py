"""Two sets of channels with different bits."""

from typing import Any

import pytest
import torch

from stillhouse.kernels.turboquant import MseCodec, SplitCodec, distortion
from stillhouse.kernels.turboquant.split import spread_channels


def gaussian(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_the_papers_example() -> None:
    codec = SplitCodec(128, 3, 2, "norm", high_channels=32)
    assert codec.bits == 2.25
    assert codec.bytes_per_vector * 8 / 128 == 2.5  # both scalars in
    assert codec.encode(gaussian(7, 128)).nbytes == 7 * 40


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("bits", [(3, 2), (4, 3)])
def test_the_error_is_that_of_the_two_codebooks(dim: int, bits: tuple[int, int]) -> None:
    codec = SplitCodec(dim, *bits, "least_squares")
    x = gaussian(3000, dim)
    error = (codec.decode(codec.encode(x)) - x).square().sum() / x.square().sum()
    # The scalar of a set of 32 channels tells more of each than that of 128 does.
    assert 0.85 < float(error) / (sum(map(distortion, bits)) / 2) < 1.01


def test_each_set_is_coded_by_itself() -> None:
    index = torch.tensor([1, 3, 5, 7, 8, 9, 14, 15])
    codec = SplitCodec(16, 4, 1, "norm", seed=3, high_channels_index=index)
    x = gaussian(9, 16)
    found = codec.decode(codec.encode(x))
    high = MseCodec(8, 4, "norm", 6)
    low = MseCodec(8, 1, "norm", 7)
    rest = torch.tensor([0, 2, 4, 6, 10, 11, 12, 13])
    assert torch.equal(found[:, index], high.decode(high.encode(x[:, index])))
    assert torch.equal(found[:, rest], low.decode(low.encode(x[:, rest])))


@pytest.mark.parametrize(("dim", "count"), [(64, 32), (128, 32), (80, 40), (96, 48)])
def test_the_blind_choice_keeps_rotary_pairs_together(dim: int, count: int) -> None:
    chosen = spread_channels(dim, count)
    assert len(set(chosen)) == count
    assert {(c + dim // 2) % dim for c in chosen} == set(chosen)


@pytest.mark.parametrize(
    ("bits", "options", "match"),
    [
        ((2, 3), {}, "high_bits above low_bits, found 2 and 3"),
        ((3, 2), {"high_channels": 12}, "multiples of 8, found 12 and 52"),
        ((3, 2), {"high_channels": 64}, "found 64 and 0"),
        ((3, 2), {"high_channels_index": torch.tensor([1, 1])}, "distinct channels"),
        ((3, 2), {"high_channels": 8, "high_channels_index": torch.arange(8)}, "give one"),
    ],
)
def test_other_splits_are_refused(
    bits: tuple[int, int], options: dict[str, Any], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        SplitCodec(64, *bits, "norm", **options)
