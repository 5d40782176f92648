"""Records of any codec: mapped, joined, counted; vectors in 16 bits."""

import pytest
import torch

from stillhouse.kernels.turboquant import (
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
    join,
    map_tensors,
    nbytes_of,
    tensors_of,
    to_half,
)

CODECS: list[VectorCodec] = [
    HalfCodec(64),
    Fp8Codec(64),
    *(MseCodec(64, bits, "unbiased") for bits in (1, 2, 3, 4, 5, 8)),
    ProdCodec(64, 3),
    PolarCodec(64),
    SplitCodec(64, 3, 2, "norm"),
    UniformCodec(64, 4),
]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: type(codec).__name__)
def test_a_record_in_two_parts_joins_to_the_whole(codec: VectorCodec) -> None:
    x = normal(2, 3, 10, 64)
    whole = codec.encode(x)
    parts = join(codec.encode(x[:, :, :4]), codec.encode(x[:, :, 4:]), dim=2)
    assert torch.equal(codec.decode(parts), codec.decode(whole))
    assert nbytes_of(whole) == nbytes_of(parts) == 2 * 3 * 10 * codec.bytes_per_vector
    middle = map_tensors(whole, lambda tensor: tensor[:, :, 2:5])
    assert torch.equal(codec.decode(middle), codec.decode(whole)[:, :, 2:5])
    assert nbytes_of(middle) == nbytes_of(whole)  # a view frees nothing
    assert nbytes_of(map_tensors(middle, torch.clone)) == 2 * 3 * 3 * codec.bytes_per_vector


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
