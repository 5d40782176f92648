"""Records of any codec: mapped, joined, counted; vectors in 16 bits."""

import math

import pytest
import torch

from stillhouse.kernels.turboquant import (
    SCALAR_KINDS,
    SKETCH_KINDS,
    ChannelGroup,
    FittedCodec,
    FittedScalar,
    Fp8Codec,
    HalfCodec,
    MseCodec,
    NotFiniteError,
    PackedVectors,
    PolarCodec,
    ProdCodec,
    SplitCodec,
    UniformCodec,
    VectorCodec,
    balance,
    fit_heads,
    join,
    map_tensors,
    nbytes_of,
    tensors_of,
    to_half,
)


def fitted(
    *groups: tuple[int, int], scalar: FittedScalar = "unbiased", heads: int = 2, last: float = 0.05
) -> FittedCodec:
    """Groups of (channels, bits), 64 in all; variance and weight fall from 1 to `last`."""
    spread = torch.logspace(0, math.log10(last), 64, dtype=torch.float64)
    matrix = torch.diag(spread).expand(heads, 64, 64)
    cut = [ChannelGroup(channels, bits) for channels, bits in groups]
    fit = fit_heads(torch.zeros(heads, 64), balance(matrix, matrix, ridge=0), cut)
    return FittedCodec(fit, scalar)


CODECS: list[VectorCodec] = [
    HalfCodec(64),
    Fp8Codec(64),
    *(MseCodec(64, bits, "unbiased") for bits in (1, 2, 3, 4, 5, 8)),
    ProdCodec(64, 3),
    PolarCodec(64),
    SplitCodec(64, 3, 2, "norm"),
    UniformCodec(64, 4),
    fitted((24, 4), (24, 2), (16, 0)),
    fitted((24, 5), (16, 3), (24, 0), scalar="least_squares"),
]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: type(codec).__name__)
def test_a_record_in_two_parts_joins_to_the_whole(codec: VectorCodec) -> None:
    x = normal(2, 2, 10, 64)
    whole = codec.encode(x)
    parts = join(codec.encode(x[:, :, :4]), codec.encode(x[:, :, 4:]), dim=2)
    assert torch.equal(codec.decode(parts), codec.decode(whole))
    assert nbytes_of(whole) == nbytes_of(parts) == 2 * 2 * 10 * codec.bytes_per_vector
    middle = map_tensors(whole, lambda tensor: tensor[:, :, 2:5])
    # A product of fewer rows may be summed in another order: which depends on the processor.
    torch.testing.assert_close(codec.decode(middle), codec.decode(whole)[:, :, 2:5])
    assert nbytes_of(middle) == nbytes_of(whole)  # a view frees nothing
    assert nbytes_of(map_tensors(middle, torch.clone)) == 2 * 2 * 3 * codec.bytes_per_vector


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: type(codec).__name__)
def test_dtypes_and_what_is_at_the_edges(codec: VectorCodec) -> None:
    x = normal(1, 2, 5, 64)
    x[0, 0, 1] = 0
    x[0, 0, 2] *= 1e-40  # denormal
    x[0, 0, 3] *= 1e-3
    x[0, 0, 3, 17] = 400  # one huge channel
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        decoded = codec.decode(codec.encode(x.to(dtype)), dtype)
        assert decoded.dtype == dtype
        assert decoded.shape == x.shape
        assert float(decoded[0, 0, 1:3].abs().max()) < 1e-30
        assert 200 < float(decoded[0, 0, 3].float().norm()) < 800
    none = codec.encode(x[:, :, :0])
    assert nbytes_of(none) == 0
    assert codec.decode(none).shape == (1, 2, 0, 64)
    with pytest.raises(ValueError, match="float64"):
        codec.encode(x.double())
    with pytest.raises(ValueError, match="32"):
        codec.encode(x[..., :32])
    for value in (float("nan"), float("inf"), -float("inf")):
        x[0, 1, 4, 9] = value
        with pytest.raises(NotFiniteError):
            codec.encode(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: type(codec).__name__)
def test_autocast_changes_nothing(codec: VectorCodec, dtype: torch.dtype) -> None:
    x = normal(1, 2, 40, 64).to(dtype)
    packed = codec.encode(x)
    decoded = codec.decode(packed)
    with torch.autocast("cpu", torch.bfloat16):
        again = codec.encode(x)
        found = codec.decode(packed)
    for one, other in zip(tensors_of(packed), tensors_of(again), strict=True):
        assert torch.equal(one, other)
    assert found.dtype == torch.float32
    assert torch.equal(found, decoded)


@pytest.mark.parametrize(
    "codec",
    [
        HalfCodec(64),
        Fp8Codec(64),
        PolarCodec(64),
        UniformCodec(64, 3),
        *(SplitCodec(64, 3, 2, scalar) for scalar in SCALAR_KINDS if scalar != "norm"),
    ],
    ids=lambda codec: type(codec).__name__,
)
def test_a_second_round_changes_nothing(codec: VectorCodec) -> None:
    x = normal(1, 2, 2000, 64) * torch.logspace(-2, 1.5, 2000)[:, None]
    first = codec.encode(x)
    decoded = codec.decode(first)
    second = codec.encode(decoded)
    for one, other in zip(tensors_of(first), tensors_of(second), strict=True):
        if one.dtype == torch.uint8:
            assert torch.equal(one, other)
        else:  # a float16 scalar may move to its neighbour
            torch.testing.assert_close(one, other, rtol=2**-10, atol=0)
    torch.testing.assert_close(codec.decode(second), decoded, rtol=2**-9, atol=1e-4)


def changed(codec: VectorCodec, x: torch.Tensor) -> float:
    """Share of vectors of which a second round changes an index."""
    first = codec.encode(x)
    second = codec.encode(codec.decode(first))
    pairs = zip(tensors_of(first), tensors_of(second), strict=True)
    rows = [(one != other).any(-1) for one, other in pairs if one.dtype == torch.uint8]
    return float(torch.stack(rows).any(0).double().mean())


def test_a_second_round_that_promises_nothing() -> None:
    """What is decoded is no fixed point there; the cache encodes no decoded vector (0014)."""
    x = normal(1, 2, 5000, 64)
    for scalar in SCALAR_KINDS:
        # The low set's scale is its own, so only the few of the mse codec of 32 channels.
        assert changed(SplitCodec(64, 4, 3, scalar), x) < 2e-3
    alike, apart = fitted((48, 4), (16, 0)), fitted((32, 4), (16, 2), (16, 0))
    x_fitted = x * torch.logspace(0, math.log10(0.05), 64).sqrt()
    assert changed(alike, x_fitted) < 1e-3
    # One scale for both groups, whose centroids fall short of the vector by different shares.
    assert 5e-3 < changed(apart, x_fitted) < 0.1
    for kind in SKETCH_KINDS:  # the residual of what is decoded is another
        assert changed(ProdCodec(64, 3, kind), x) > 0.99


def test_tuples_are_records_and_other_objects_are_not() -> None:
    record = (PackedVectors(torch.zeros(2, dtype=torch.uint8), torch.ones(1)), torch.ones(3))
    assert [tensor.numel() for tensor in tensors_of(record)] == [2, 1, 3]
    doubled = map_tensors(record, lambda tensor: tensor * 2)
    assert isinstance(doubled[0], PackedVectors)
    assert doubled[0].scalars.item() == 2
    with pytest.raises(TypeError, match="found int"):
        map_tensors((3,), torch.clone)


def test_half_vectors_own_their_storage_and_keep_bfloat16() -> None:
    x = normal(1, 1, 2, 64).half()
    packed = HalfCodec(64).encode(x)
    x.zero_()
    assert bool(packed.values.any())
    assert to_half(normal(4)).dtype == torch.float16
    assert to_half(normal(4).bfloat16()).dtype == torch.bfloat16
    assert to_half(torch.tensor([1e30]).bfloat16()).isfinite().all()
    with pytest.raises(NotFiniteError, match="65,504"):
        to_half(torch.tensor([1e5]))
