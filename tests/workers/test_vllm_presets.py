"""vLLM's presets: bytes, boundary layers, and what they decode to."""

from typing import Any

import pytest
import torch

from stillhouse.kernels.turboquant import HalfCodec, MseCodec, gaussian_codebook
from stillhouse.workers.cache import CACHE_KINDS, VLLM_PRESETS, TurboQuantCache, VllmScheme
from tests.workers.cache_models import HEAD_DIM, HEADS, llama, random_kv


@pytest.mark.parametrize(
    ("dim", "stored"),
    [
        (128, {"k8v4": 196, "4bit_nc": 134, "k3v4_nc": 118, "3bit_nc": 102}),
        (64, {"k8v4": 100, "4bit_nc": 70, "k3v4_nc": 62, "3bit_nc": 54}),
    ],
)
def test_bytes_of_a_token_and_head_are_vllms(dim: int, stored: dict[str, int]) -> None:
    sample = torch.zeros(1, 1, 1, dim)
    for preset in VLLM_PRESETS:
        scheme = VllmScheme(preset, 30)
        both = (scheme.codec(5, kind, sample) for kind in CACHE_KINDS)
        assert sum(codec.bytes_per_vector for codec in both) == stored[preset]


@pytest.mark.parametrize(
    ("layers", "boundary", "exact"),
    [(30, 2, {0, 1, 28, 29}), (30, 0, set()), (3, 2, {0, 2}), (1, 2, set())],
)
def test_the_layers_at_both_ends_stay_exact(layers: int, boundary: int, exact: set[int]) -> None:
    scheme = VllmScheme("3bit_nc", layers, boundary)
    sample = torch.zeros(1, 1, 1, 64)
    for kind in CACHE_KINDS:
        found = {n for n in range(layers) if isinstance(scheme.codec(n, kind, sample), HalfCodec)}
        assert found == exact


def test_keys_by_the_formula_of_its_kernels() -> None:
    """‖x‖ H c / ‖c‖, with a Hadamard matrix of Sylvester's that has no signs."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < 64:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    matrix /= 8
    x = torch.randn(1, 1, 20, 64, generator=torch.Generator().manual_seed(0)) * 3
    norm = x.double().norm(dim=-1, keepdim=True)
    rotated = x.double() / norm @ matrix * 8
    book = torch.tensor(gaussian_codebook(3).centroids, dtype=torch.float64)
    centroid = book[(rotated[..., None] - book).abs().argmin(-1)]
    expected = norm * (centroid / centroid.norm(dim=-1, keepdim=True)) @ matrix
    codec = VllmScheme("3bit_nc", 30).codec(7, "key", x)
    torch.testing.assert_close(
        codec.decode(codec.encode(x)).double(), expected, rtol=2e-3, atol=2e-3
    )


def test_a_constant_offset_lands_in_one_coordinate_and_is_clipped() -> None:
    """What the signs are for: with them the same codec is more than ten times nearer."""
    x = 5 + 0.1 * torch.randn(1, 1, 200, 64, generator=torch.Generator().manual_seed(0))
    bare: Any = VllmScheme("4bit_nc", 30).codec(7, "key", x)
    errors = [
        float((codec.decode(codec.encode(x)) - x).square().sum() / x.square().sum())
        for codec in (bare, MseCodec(64, 4, "corrected"))
    ]
    assert errors[1] < 0.012
    assert errors[0] > 10 * errors[1]


def test_a_cache_of_a_preset_allocates_its_bytes() -> None:
    cache = TurboQuantCache(llama().config, VllmScheme("4bit_nc", 2, boundary=0))
    cache.update(*random_kv(2, 9), 0)
    stored = HEAD_DIM // 2 + 2 + HEAD_DIM // 2 + 4
    assert cache.nbytes - cache.table_nbytes == 2 * HEADS * 9 * stored


def test_what_vllm_does_not_serve_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a preset of"):
        VllmScheme("2bit", 30)
    with pytest.raises(ValueError, match="power of two, as vLLM's Hadamard, found 80"):
        VllmScheme("4bit_nc", 30).codec(5, "key", torch.zeros(1, 1, 1, 80))
