"""token_logprob: two words by hand, then the float64 reference, gradients, memory, refusals."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from stillhouse.kernels.token_logprob import token_logprob
from stillhouse.kernels.token_logprob.reference import token_logprob_reference


def make_bias(vocabulary, dtype=torch.float32):
    return torch.linspace(-3, 2, vocabulary).to(dtype)


def make_inputs(tokens, width, vocabulary, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype)
    weight = torch.randn(vocabulary, width, generator=generator).to(dtype)
    target = torch.randint(vocabulary, (tokens,), generator=generator)
    return hidden, weight, target


def gradients(function, hidden, weight, target, upstream, bias=None, **options):
    inputs = [hidden, weight] if bias is None else [hidden, weight, bias]
    hidden, weight, *rest = inputs = [x.detach().clone().requires_grad_() for x in inputs]
    value = function(hidden, weight, target, bias_V=rest[0] if rest else None, **options)
    value.backward(upstream.to(value.dtype))
    return value.detach(), *(x.grad for x in inputs)


def test_two_words_by_hand():
    # Logits (ln 3, 0): probabilities 3/4 and 1/4; d log p_0 / d h = (1 - 3/4) w_0 - 1/4 w_1.
    hidden = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[math.log(3), 8.0], [0.0, 4.0]], dtype=torch.float64)
    value = token_logprob(hidden, weight, torch.tensor([0, 1]))
    expected = torch.tensor([math.log(3 / 4), math.log(1 / 4)], dtype=torch.float64)
    torch.testing.assert_close(value, expected)
    value.backward(torch.tensor([1.0, -2.0], dtype=torch.float64))
    first = [math.log(3) / 4, 8 / 4 - 4 / 4]
    second = [-2 * (-3 / 4) * math.log(3), -2 * (-3 / 4 * 8 + 3 / 4 * 4)]
    torch.testing.assert_close(hidden.grad, torch.tensor([first, second], dtype=torch.float64))


def test_a_bias_by_hand():
    # The bias alone makes the logits (ln 3, 0), for two tokens: d log p_0 / d b = (1/4, -1/4).
    hidden, weight = torch.zeros(2, 3), torch.ones(2, 3)
    bias = torch.tensor([math.log(3), 0.0], requires_grad=True)
    value = token_logprob(hidden, weight, torch.tensor([0, 1]), bias_V=bias, chunk=1)
    torch.testing.assert_close(value, torch.tensor([math.log(3 / 4), math.log(1 / 4)]))
    value.backward(torch.tensor([1.0, -2.0]))
    torch.testing.assert_close(bias.grad, torch.tensor([1 / 4 + 6 / 4, -1 / 4 - 6 / 4]))


def test_softcap_by_hand():
    # tanh saturates: raw logits ±1000 become ±1, so p = 1 / (1 + e^-2).
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[1000.0], [-1000.0]])
    value = token_logprob(hidden, weight, torch.tensor([0]), softcap=1.0)
    assert value.item() == pytest.approx(-math.log1p(math.exp(-2)))
    # The bias is inside: 0 and 2000, capped 0 and 1.
    bias = torch.tensor([-1000.0, 3000.0])
    value = token_logprob(hidden, weight, torch.tensor([0]), bias_V=bias, softcap=1.0)
    assert value.item() == pytest.approx(-math.log1p(math.e))


@settings(max_examples=40)
@given(
    tokens=st.integers(0, 9),
    chunk=st.integers(1, 20),
    softcap=st.sampled_from([None, 3.0]),
    biased=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_chunk_equals_the_reference(tokens, chunk, softcap, biased, seed):
    hidden, weight, target = make_inputs(tokens, 5, 7, seed=seed)
    upstream = torch.randn(tokens, generator=torch.Generator().manual_seed(seed))
    inputs = (hidden, weight, target, upstream, make_bias(7) if biased else None)
    found = gradients(token_logprob, *inputs, softcap=softcap, chunk=chunk)
    expected = gradients(token_logprob_reference, *inputs, softcap=softcap)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(softcap):
    hidden, weight, target = make_inputs(5, 3, 6, torch.float64)
    hidden.requires_grad_()
    weight.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w: token_logprob(h, w, target, softcap=softcap, chunk=2), (hidden, weight)
    )
    bias = make_bias(6, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w, b: token_logprob(h, w, target, bias_V=b, softcap=softcap, chunk=2),
        (hidden, weight, bias),
    )
    # Each alone.
    for inputs in ((hidden.detach(), weight.detach(), bias), (hidden, weight.detach(), bias)):
        assert torch.autograd.gradcheck(
            lambda h, w, b: token_logprob(h, w, target, bias_V=b, softcap=softcap, chunk=2), inputs
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_summed_in_float32(dtype):
    # 8,192 rows are widened at a time: 9,000 words cross that border.
    hidden, weight, target = make_inputs(6, 64, 9000, dtype)
    upstream = torch.linspace(-2, 2, 6)
    inputs = (hidden, weight, target, upstream, make_bias(9000, dtype))
    found = gradients(token_logprob, *inputs, chunk=4)
    expected = gradients(token_logprob_reference, *inputs)
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[0], expected[0].float(), atol=1e-4, rtol=1e-5)
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert one.dtype == dtype
        step = torch.finfo(dtype).eps  # one rounding at the end
        torch.testing.assert_close(one.double(), other.double(), atol=1e-6, rtol=step)


def test_autocast_does_not_round_the_sums():
    hidden, weight, target = make_inputs(4, 64, 50)
    expected = token_logprob(hidden, weight, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(token_logprob(hidden, weight, target), expected)


def test_large_logits_do_not_overflow():
    hidden, weight, target = make_inputs(4, 8, 10)
    value = token_logprob(hidden * 1e4, weight, target)
    expected = token_logprob_reference(hidden * 1e4, weight, target)
    torch.testing.assert_close(value, expected.float(), rtol=1e-5, atol=0.1)


def test_inputs_are_left_alone_and_backward_may_run_twice():
    hidden, weight, target = make_inputs(5, 4, 6)
    copies = hidden.clone(), weight.clone(), target.clone()
    hidden.requires_grad_()
    value = token_logprob(hidden, weight, target, softcap=2.0, chunk=2)
    (first,) = torch.autograd.grad(value.sum(), hidden, retain_graph=True)
    (second,) = torch.autograd.grad(value.sum(), hidden)
    assert torch.equal(first, second)
    for one, other in zip((hidden, weight, target), copies, strict=True):
        assert torch.equal(one, other)


class AllocationRecord(TorchDispatchMode):
    """Elements of the largest floating storage that operations create inside the block."""

    def __init__(self, known):
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.largest, self.operations = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        for t in tree_flatten(out)[0]:
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.known:
                size = t.untyped_storage().nbytes() // t.element_size()
                self.largest = max(self.largest, size)
        return out


@pytest.mark.parametrize("mode", ["no_grad", "hidden"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_exceeds_one_chunk_of_logits(mode, dtype):
    tokens, vocabulary, chunk = 64, 300, 4
    hidden, weight, target = make_inputs(tokens, 8, vocabulary, dtype)
    hidden.requires_grad_(mode == "hidden")
    with AllocationRecord((hidden, weight, target)) as record:
        value = token_logprob(hidden, weight, target, chunk=chunk)
        if mode == "hidden":
            value.sum().backward()
    # A low-precision weight is widened whole here, as it is smaller than one block of rows.
    allowed = max(chunk * vocabulary, vocabulary * 8 if dtype != torch.float32 else 0)
    assert chunk * vocabulary <= record.largest <= allowed < tokens * vocabulary


def test_scoring_computes_nothing_for_gradients():
    hidden, weight, target = make_inputs(8, 4, 10)
    with AllocationRecord(()) as plain:
        expected = token_logprob(hidden, weight, target)
    weight.requires_grad_()
    with torch.no_grad(), AllocationRecord(()) as scoring:
        value = token_logprob(hidden, weight, target)
    assert torch.equal(value, expected)
    assert not value.requires_grad
    assert scoring.operations == plain.operations


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_TD": torch.zeros(2, 3, 4)}, r"expected hidden \[T, D\]"),
        ({"hidden_TD": torch.zeros(2, 5)}, r"found \[\[2, 5\], \[6, 4\], \[2\]\]"),
        ({"target_T": torch.zeros(3, dtype=torch.int64)}, r"expected hidden \[T, D\]"),
        ({"target_T": torch.zeros(2, dtype=torch.int32)}, r"int64 targets, found torch\.int32"),
        ({"target_T": torch.tensor([0, 6])}, "expected targets in 0…5, found 6"),
        ({"target_T": torch.tensor([0, -100])}, "found -100; drop tokens without a loss"),
        ({"hidden_TD": torch.zeros(2, 4, dtype=torch.int64)}, "expected floating"),
        ({"bias_V": torch.zeros(4)}, r"floating bias \[6\] or None, found torch.float32 \[4\]"),
        ({"bias_V": torch.zeros(6, dtype=torch.int64)}, "floating bias"),
        ({"chunk": 0}, "at least one token, found 0"),
        ({"softcap": 0.0}, "positive, finite softcap"),
        ({"softcap": math.inf}, "positive, finite softcap"),
        ({"softcap": math.nan}, "positive, finite softcap"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = {
        "hidden_TD": torch.zeros(2, 4),
        "weight_VD": torch.zeros(6, 4),
        "target_T": torch.tensor([0, 1]),
    }
    with pytest.raises(ValueError, match=message):
        token_logprob(**arguments | change)
