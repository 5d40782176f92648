"""What the Triton store refuses, on the host and in its debug mode; devices as in test_gpu.py."""

from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.errors import InterpreterError

from stillhouse.kernels.paged_attention.gpu_store import GpuStore
from stillhouse.kernels.turboquant import ChannelGroup, FittedCodec, Fp8Codec, HeadFit, MseCodec
from tests.kernels.paged_attention.gpu_pages import codec_of, fitted


def test_codecs_that_are_refused(device: str) -> None:
    good = codec_of(4, 64)
    with pytest.raises(ValueError, match=r"expected one group .* found \[\(64, 5\)\]"):
        GpuStore(MseCodec(64, 5, "norm"), good, 16, device=device)
    with pytest.raises(ValueError, match="expected a head size of 64, 80, … 256, found 32"):
        GpuStore(Fp8Codec(32), good, 16, device=device)
    with pytest.raises(ValueError, match="law 'gaussian' and 2, 3 or 4 bits, found 'sphere'"):
        GpuStore(good, MseCodec(64, 4, "norm", law="sphere"), 16, device=device)
    with pytest.raises(ValueError, match="one head size, found 64 and 80"):
        GpuStore(good, codec_of(4, 80), 16, device=device)
    with pytest.raises(ValueError, match="expected pages of"):
        GpuStore(good, good, 24, device=device)
    with pytest.raises(ValueError, match="expected a CUDA device, found meta"):
        GpuStore(Fp8Codec(64), Fp8Codec(64), 16, device="meta")
    uneven = HeadFit(
        torch.zeros(1, 64), None, None, torch.arange(1.0, 65)[None], (ChannelGroup(64, 4),)
    )
    with pytest.raises(ValueError, match="expected weights alike"):
        GpuStore(good, FittedCodec(uneven, "unbiased"), 16, device=device)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "heads": (
        {"key_THD": torch.zeros(2, 3, 64), "value_THD": torch.zeros(2, 3, 64)},
        "expected 2 heads, one for each map, found 3",
    ),
    "head size": ({"key_THD": torch.zeros(2, 2, 80)}, r"expected keys .*, \[2, 2, 64\], found"),
    "tokens": ({"value_THD": torch.zeros(3, 2, 64)}, r"expected values .* found .* \[3, 2, 64\]"),
    "axes": ({"key_THD": torch.zeros(2, 64)}, r"expected keys \[T, H, D\]"),
    "dtype": ({"value_THD": torch.zeros(2, 2, 64).double()}, r"found torch\.float64"),
    "stride": (
        {"key_THD": torch.zeros(2, 64, 2).transpose(1, 2)},
        r"expected contiguous keys, found vectors with strides \(128, 1, 2\)",
    ),
    "page bytes": (
        {"keys_NHY": torch.zeros(2, 2, 528, dtype=torch.uint8)},
        r"expected half pages of keys, uint8 \[N, 2, 544\]",
    ),
    "pages' dtype": (
        {"values_NHY": torch.zeros(2, 2, 1024, dtype=torch.int8)},
        r"expected half pages of values, uint8",
    ),
    "alignment": (
        {"keys_NHY": torch.zeros(2, 2, 552, dtype=torch.uint8)[..., :544]},
        "begin at multiples of 16 bytes",
    ),
    "slots' dtype": (
        {"slots_T": torch.zeros(2)},
        r"expected contiguous slots, int32 or int64 \[2\], found torch\.float32",
    ),
    "slots' number": ({"slots_T": torch.zeros(3, dtype=torch.int64)}, r"int64 \[2\], found"),
    "slots' stride": ({"slots_T": torch.zeros(4, dtype=torch.int64)[::2]}, "contiguous slots"),
    "device": (
        {"slots_T": torch.zeros(2, dtype=torch.int64, device="meta")},
        "expected tensors on .* found one on meta",
    ),
    "large slot": (
        {"slots_T": torch.tensor([0, 32])},
        "expected slots from -1 to 31, found 0 to 32",
    ),
    "small slot": ({"slots_T": torch.tensor([-2, 0])}, "expected slots from -1 to 31, found -2 to"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_arguments_are_refused_before_anything_is_written(case: str, device: str) -> None:
    changed, message = REFUSED[case]
    store = GpuStore(fitted(4, 64, 64, 2), Fp8Codec(64), 16, device=device)
    given = {
        "key_THD": torch.ones(2, 2, 64),
        "value_THD": torch.ones(2, 2, 64),
        "keys_NHY": store.pages.key.empty(2, 2),
        "values_NHY": store.pages.value.empty(3, 2),
        "slots_T": torch.arange(2),
    } | changed
    placed: Any = {
        name: part if part.is_meta else on_device(part, device) for name, part in given.items()
    }
    with pytest.raises(ValueError, match=message):
        store.store(**placed)
    assert not bool(placed["keys_NHY"].any())
    assert not bool(placed["values_NHY"].any())


def on_device(part: Tensor, device: str) -> Tensor:
    """With the same strides."""
    if device == "cpu":
        return part
    whole = torch.zeros(part.untyped_storage().nbytes(), dtype=torch.uint8, device=device)
    view = whole.view(part.dtype).as_strided(part.shape, part.stride())
    view.copy_(part)
    return view


@pytest.mark.usefixtures("debugging")
def test_a_trusted_slot_out_of_range_is_found_in_the_kernel() -> None:
    store = GpuStore(Fp8Codec(64), Fp8Codec(64), 16, device="cpu", check=True)
    x, pages = torch.zeros(2, 1, 64), store.pages.key.empty(2, 1)
    with pytest.raises(InterpreterError, match="a slot out of range"):
        store.store(x, x, pages, pages.clone(), torch.tensor([0, 32]), trusted=True)
