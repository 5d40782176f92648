"""oneDNN's products of linear layers beside torch's own, and who gets them."""

from pathlib import Path

import pytest
import torch
from torch.nn import Linear
from torch.nn.functional import linear

from stillhouse.workers import linear_mode
from stillhouse.workers.linear_mode import OneDnnLinearMode, fast_linears, onednn_pays


@pytest.fixture
def products(monkeypatch):
    """Counts the products that oneDNN makes."""
    made = []
    own = torch.ops.mkldnn._linear_pointwise

    class Counting:
        @staticmethod
        def _linear_pointwise(*given):
            made.append(given)
            return own(*given)

    monkeypatch.setattr(torch.ops, "mkldnn", Counting)
    return made


@pytest.mark.parametrize("shape", [(1, 7), (5, 7), (3, 4, 7)])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_torchs_product(products, shape, bias):
    layer, x = Linear(7, 11, bias=bias), torch.randn(shape)
    with torch.inference_mode(), OneDnnLinearMode():
        made = layer(x)
    assert len(products) == 1
    torch.testing.assert_close(made, layer(x).detach(), rtol=0, atol=1e-6)


def test_a_transposed_input_is_read_as_it_lies(products):
    layer, x = Linear(7, 11), torch.randn(7, 5).T
    with torch.inference_mode(), OneDnnLinearMode():
        torch.testing.assert_close(layer(x), layer(x.contiguous()), rtol=0, atol=1e-6)
    assert len(products) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_numbers_are_torchs(products, dtype):
    x, w = torch.randn(3, 4, dtype=dtype), torch.randn(5, 4, dtype=dtype)
    with torch.inference_mode(), OneDnnLinearMode():
        made = linear(input=x, weight=w)
    assert torch.equal(made, linear(x, w))
    assert not products


@pytest.mark.parametrize("bias", [True, False])
def test_a_frozen_layer_passes_gradients_on(products, bias):
    layer = Linear(4, 3, bias=bias).requires_grad_(False)
    x = torch.randn(2, 5, 4, requires_grad=True)
    upstream = torch.randn(2, 5, 3)
    with OneDnnLinearMode():
        made = layer(x)
    made.backward(upstream)
    assert len(products) == 2
    torch.testing.assert_close(x.grad, upstream @ layer.weight, rtol=0, atol=1e-6)


def test_a_layer_that_learns_is_torchs(products):
    layer = Linear(4, 3)
    with OneDnnLinearMode():
        layer(torch.randn(2, 4)).sum().backward()
    assert layer.weight.grad is not None
    assert not products


def test_an_empty_batch_is_torchs(products):
    with torch.inference_mode(), OneDnnLinearMode():
        assert Linear(4, 3)(torch.randn(0, 4)).shape == (0, 3)
    assert not products


@pytest.mark.parametrize(
    ("vendor", "capability", "pays"),
    [("AuthenticAMD", "AVX512", True), ("AuthenticAMD", "AVX2", False), ("Other", "AVX512", False)],
)
def test_only_processors_that_mkl_neglects_get_it(monkeypatch, vendor, capability, pays):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(linear_mode, "_vendor", lambda: vendor)
    onednn_pays.cache_clear()
    assert onednn_pays() is pays
    assert isinstance(fast_linears(), OneDnnLinearMode) is pays
    onednn_pays.cache_clear()


def test_a_machine_without_a_table_of_its_processor_has_no_vendor(monkeypatch):
    monkeypatch.setattr(Path, "is_file", lambda self: False)
    assert linear_mode._vendor() is None
