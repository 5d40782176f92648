"""Plain 8-bit floats."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.kernels.turboquant import Fp8Codec, NotFiniteError


def test_values_by_hand() -> None:
    x = torch.tensor([[0.0, -0.0, 1.0, 1.0625, 1.125, 448.0, 464.0, 2.0**-9, 2.0**-11, -3.3]])
    codec = Fp8Codec(10)
    found = codec.decode(codec.encode(x))
    # 3 mantissa bits: steps of 1/8 in [1, 2), ties to even; the smallest number is 2^-9.
    wanted = [0.0, -0.0, 1.0, 1.0, 1.125, 448.0, 448.0, 2.0**-9, 0.0, -3.25]
    assert found[0].tolist() == wanted


@pytest.mark.parametrize("value", [464.1, -1e30, math.inf, -math.inf, math.nan])
def test_what_it_cannot_hold_is_refused(value: float) -> None:
    x = torch.ones(3, 16)
    x[1, 5] = value
    with pytest.raises(NotFiniteError, match="found 1 of 3"):
        Fp8Codec(16).encode(x)


@given(st.floats(-464, 464, width=32))
def test_the_error_is_bounded(value: float) -> None:
    codec = Fp8Codec(8)
    x = torch.full((1, 8), value)
    error = float((codec.decode(codec.encode(x)) - x).abs().max())
    assert error <= max(abs(value) * 2**-4, 2**-10)


def test_coding_again_changes_nothing() -> None:
    codec = Fp8Codec(64)
    once = codec.encode(torch.randn(50, 64))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert torch.equal(codec.encode(codec.decode(once, dtype)).codes, once.codes)
