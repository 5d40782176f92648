"""The Triton store casts to fp8 as `Fp8Codec` does, on any processor; devices as in test_gpu.py."""

import math

import pytest
import torch
from torch import Tensor

from stillhouse.kernels.paged_attention import read_vectors
from stillhouse.kernels.paged_attention.gpu_store import GpuStore
from stillhouse.kernels.turboquant import Fp8Codec


@pytest.mark.usefixtures("debugging")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fp8_of_every_number_of_16_bits(dtype: torch.dtype, device: str) -> None:
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(64, 4, 256)
    assert_same_fp8(fp8_bytes(x, device), cast_bytes(x), x)


@pytest.mark.usefixtures("debugging")
def test_fp8_beside_every_tie(device: str) -> None:
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    tie = torch.cat([(codes[1:] + codes[:-1]) / 2, torch.tensor([464.0])])
    far = torch.tensor([math.inf, math.nan, 480.0, 3e38, 1e-45, 2.0**-126, 0.0])
    up, down = (tie.nextafter(torch.full_like(tie, end)) for end in (math.inf, -math.inf))
    values = torch.cat([tie, up, down, codes, far])
    values = torch.cat([values, -values])
    x = torch.zeros(5 * 256)
    x[: len(values)] = values
    x = x.view(5, 1, 256)
    found = fp8_bytes(x, device)
    assert_same_fp8(found, cast_bytes(x), x)
    assert found.view(-1)[126] == 0x7E  # 464 goes to 448
    assert found.view(-1)[253] == 0x7F  # and the next number is lost


def fp8_bytes(x_THD: Tensor, device: str) -> Tensor:
    """uint8 [T, H, D], as keys and values alike have them."""
    tokens, heads, dim = x_THD.shape
    store = GpuStore(Fp8Codec(dim), Fp8Codec(dim), 16, device=device)
    pages = [store.pages.key.empty(-(-tokens // 16), heads, device) for _ in range(2)]
    slots = torch.arange(tokens)
    x = x_THD.to(device)
    store.store(x, x, pages[0], pages[1], slots.to(device))
    assert torch.equal(*pages)
    return read_vectors(pages[0].cpu(), store.pages.key, slots)[0].transpose(0, 1)


def assert_same_fp8(found: Tensor, wanted: Tensor, x_THD: Tensor) -> None:
    """But for the sign of a NaN, which a GPU may drop where it widens the number."""
    kept = torch.where(x_THD.isnan(), 0x7F, 0xFF).to(torch.uint8)
    assert torch.equal(found & kept, wanted & kept)


def cast_bytes(x_THD: Tensor) -> Tensor:
    """What `Fp8Codec` makes of numbers, those that it refuses included."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stillhouse.kernels.turboquant.fp8.Fp8Vectors.require_finite", lambda _: None)
        return Fp8Codec(x_THD.shape[-1]).encode(x_THD).codes
