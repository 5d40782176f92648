"""The Triton store against `codec.encode` and `write_vectors`, byte for byte, under the interpreter
or on a GPU.

`pytest -m gpu` compiles it; any other run interprets it on CPU tensors (tests/conftest.py).
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from stillhouse.kernels.paged_attention import HalfPage, gpu_store, read_vectors, write_vectors
from stillhouse.kernels.paged_attention.gpu import GpuCodec
from stillhouse.kernels.paged_attention.gpu_store import GpuStore, StoreShape, store_options
from stillhouse.kernels.turboquant import (
    SCALAR_KINDS,
    ChannelGroup,
    FittedCodec,
    Fp8Codec,
    HeadFit,
    MseCodec,
    gaussian_codebook,
    unpack,
)
from tests.kernels.paged_attention.gpu_pages import codec_of, fitted

BITS = [2, 3, 4, 8]
HEAD_DIMS = [64, 80, 96, 128, 192, 256]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EDGE = 1e-5  # where float32 sums in another order may round to either side of a boundary
HALF_ULP = 2.0**-10  # a float16 next to another


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shuffled(count: int, room: int, seed: int = 1) -> Tensor:
    """Slots, none twice."""
    return torch.randperm(room, generator=torch.Generator().manual_seed(seed))[:count]


def cpu_record(codec: GpuCodec, x_THD: Tensor) -> tuple[Tensor, Tensor | None]:
    """What `write_vectors` takes."""
    record: Any = codec.encode(x_THD.cpu().transpose(0, 1).contiguous())
    return (record.codes, None) if isinstance(codec, Fp8Codec) else (record.indices, record.scalars)


def unit_coordinates(codec: MseCodec | FittedCodec, x_THD: Tensor) -> Tensor:
    """What is rounded, float64 [H, T, C]."""
    z = x_THD.cpu().double().transpose(0, 1)
    if isinstance(codec, FittedCodec):
        z = z - codec.fit.mean_HD.double()[:, None]
        matrix = codec.fit.map_HDD
    else:
        matrix = codec.rotation.matrix[None]
    if matrix is not None:
        z = z @ matrix.double().mT
    z = z[..., : codec.coded_groups[0].channels]
    return z / z.norm(dim=-1, keepdim=True) * math.sqrt(z.shape[-1])


def assert_stored(
    codec: GpuCodec, x_THD: Tensor, before: Tensor, after: Tensor, half: HalfPage, slots: Tensor
) -> None:
    """Those of `codec.encode` lie at their slots, and everything else is as before."""
    slots, before, after = slots.cpu().long(), before.cpu(), after.cpu()
    x_THD, slots = x_THD.cpu()[slots >= 0], slots[slots >= 0]
    found, scalars = read_vectors(after, half, slots)
    wanted, wanted_scalars = cpu_record(codec, x_THD)
    expected = before.clone()
    plain = None if scalars is None else scalars.clone(memory_format=torch.contiguous_format)
    write_vectors(expected, half, slots, found, plain)
    assert torch.equal(after, expected)
    if isinstance(codec, Fp8Codec) or not len(slots):
        assert torch.equal(found, wanted)
        return
    group = half.format.groups[0]
    edges = torch.tensor(gaussian_codebook(group.bits).boundaries, dtype=torch.float64)
    near = (unit_coordinates(codec, x_THD)[..., None] - edges).abs().amin(dim=-1) < EDGE
    assert float(near.double().mean()) < 2e-3
    differs = unpack(found, group.bits, group.channels) != unpack(
        wanted, group.bits, group.channels
    )
    assert not bool((differs & ~near).any())
    assert scalars is not None
    assert wanted_scalars is not None
    torch.testing.assert_close(
        scalars.float(), wanted_scalars.float(), rtol=HALF_ULP, atol=2.0**-24
    )


def store_and_compare(
    codecs: tuple[GpuCodec, GpuCodec],
    vectors: tuple[Tensor, Tensor],
    page: int,
    slots: Tensor,
    device: str,
    **more: Any,
) -> tuple[Tensor, Tensor]:
    """The pages, which were full of other bytes."""
    store = GpuStore(*codecs, page, device=device, check=True)
    pages = []
    for half in (store.pages.key, store.pages.value):
        shape = half.empty(int(slots.max()) // page + 2, vectors[0].shape[1]).shape
        draw = torch.Generator().manual_seed(5)
        pages.append(torch.randint(256, shape, generator=draw, dtype=torch.uint8).to(device))
    before = [half.clone() for half in pages]
    key, value = (x.to(device) for x in vectors)
    store.store(key, value, pages[0], pages[1], slots.to(device), **more)
    halves = (store.pages.key, store.pages.value)
    for codec, x, old, new, half in zip(codecs, vectors, before, pages, halves, strict=True):
        assert_stored(codec, x, old, new, half, slots)
    return pages[0], pages[1]


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("bits", BITS)
def test_every_format_and_head_size(bits: int, dim: int, device: str) -> None:
    other = {2: 8, 3: 2, 4: 3, 8: 4}[bits]  # keys and values of one launch are not alike
    vectors = (gaussian(19, 1, dim, seed=dim), gaussian(19, 1, dim, seed=bits))
    codecs = (codec_of(bits, dim), codec_of(other, dim))
    store_and_compare(codecs, vectors, 16, shuffled(19, 48), device)


@pytest.mark.usefixtures("debugging")
@pytest.mark.parametrize("page", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_pages_of_every_size(page: int, dtype: torch.dtype, device: str) -> None:
    vectors = (gaussian(9, 2, 64), gaussian(9, 2, 64, seed=1))
    slots = shuffled(9, 4 * page).to(dtype)
    store_and_compare((codec_of(3, 64), codec_of(4, 64)), vectors, page, slots, device)


@pytest.mark.parametrize(("bits", "dim"), [((3, 3), 80), ((4, 2), 192), ((8, 8), 96)])
def test_prefill_takes_large_tiles(
    bits: tuple[int, int], dim: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_store, "_FEW", 0)
    vectors = (gaussian(70, 1, dim, seed=2), gaussian(70, 1, dim, seed=3))
    slots = torch.arange(7, 77)  # from the middle of a page on
    slots[[0, 5, 69]] = -1
    codecs = (codec_of(bits[0], dim), codec_of(bits[1], dim))
    store_and_compare(codecs, vectors, 32, slots, device)


@pytest.mark.parametrize("slots", [[37, -1, 0, -1, 63], [-1, -1, -1, -1, 20], [-1] * 5])
def test_decoding_stores_one_token_a_sequence_and_skips_some(slots: list[int], device: str) -> None:
    vectors = (gaussian(5, 2, 128), gaussian(5, 2, 128, seed=1))
    at = torch.tensor(slots, dtype=torch.int32)
    store_and_compare((codec_of(4, 128), codec_of(8, 128)), vectors, 16, at, device)


@pytest.mark.parametrize(("coded", "dim"), [(112, 128), (64, 96), (80, 80)])
@pytest.mark.parametrize("bits", [(3, 2), (4, 3)])
def test_fitted_codecs_have_means_and_maps_of_each_head(
    bits: tuple[int, int], coded: int, dim: int, device: str
) -> None:
    key = fitted(bits[0], coded, dim, 2)
    value = FittedCodec(fitted(bits[1], dim, dim, 2, seed=7).fit, "least_squares")
    vectors = (gaussian(6, 2, dim) * 3 + 1, gaussian(6, 2, dim, seed=4))
    store_and_compare((key, value), vectors, 16, shuffled(6, 32), device)


def test_a_model_may_have_mapped_the_vectors_itself(device: str) -> None:
    keys = FittedCodec(fitted(3, 80, 96, 2).fit.without_map(), "unbiased")
    plain = HeadFit(
        torch.zeros(2, 96),
        None,
        None,
        torch.ones(2, 96),
        (ChannelGroup(64, 4), ChannelGroup(32, 0)),
    )
    values = FittedCodec(plain, "least_squares")
    store = GpuStore(keys, values, 16, device=device)
    assert store.key.matrix_HDN is None
    assert store.value.mean_HD is None
    vectors = (gaussian(6, 2, 96), gaussian(6, 2, 96, seed=4))
    store_and_compare((keys, values), vectors, 16, shuffled(6, 32), device)


def test_a_fitted_codec_may_share_pages_with_another(device: str) -> None:
    vectors = (gaussian(3, 2, 128), gaussian(3, 2, 128, seed=4))
    codecs = (fitted(4, 112, 128, 2), codec_of(8, 128))
    store_and_compare(codecs, vectors, 16, shuffled(3, 32), device)


@pytest.mark.parametrize("key", SCALAR_KINDS)
def test_every_scalar(key: Any, device: str) -> None:
    value = SCALAR_KINDS[SCALAR_KINDS.index(key) - 1]
    codecs = (MseCodec(80, 3, key), MseCodec(80, 4, value))
    size = torch.linspace(0.01, 100, 9)[:, None, None]
    vectors = (gaussian(9, 1, 80) * size, gaussian(9, 1, 80, seed=1) * size)
    store_and_compare(codecs, vectors, 16, shuffled(9, 32), device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_dtypes_and_strides(bits: int, dtype: torch.dtype, device: str) -> None:
    codecs = (codec_of(bits, 64), codec_of(3, 64))
    store = GpuStore(*codecs, 16, device=device)
    # Keys as a joint projection leaves them, values of other strides, both halves in one page.
    key = gaussian(5, 6, 64).to(dtype).to(device)[:, 2:4]
    value = gaussian(2, 5, 64, seed=1).to(dtype).to(device).transpose(0, 1)
    pages = torch.full((3, 2, store.pages.nbytes), 7, dtype=torch.uint8, device=device)
    keys, values = pages.split([store.pages.key.nbytes, store.pages.value.nbytes], dim=-1)
    slots = shuffled(5, 48)
    store.store(key, value, keys, values, slots.to(device))
    for codec, x, half_pages, half in (
        (codecs[0], key, keys, store.pages.key),
        (codecs[1], value, values, store.pages.value),
    ):
        assert_stored(codec, x, torch.full_like(half_pages, 7), half_pages, half, slots)


@pytest.mark.parametrize("kind", SCALAR_KINDS)
def test_what_is_not_finite_shows_in_the_scalar(kind: Any, device: str) -> None:
    x = gaussian(6, 1, 64)
    x[0, 0, 3], x[1, 0, 5], x[2, 0, 63] = math.nan, math.inf, -math.inf
    x[3] *= 1e5  # longer than float16 holds
    x[4] = 0
    store = GpuStore(MseCodec(64, 3, kind), fitted(4, 64, 64, 1), 16, device=device)
    keys, values = (half.empty(1, 1, device) for half in (store.pages.key, store.pages.value))
    slots = torch.arange(6)
    store.store(x.to(device), x.to(device), keys, values, slots.to(device))
    for pages, half in ((keys, store.pages.key), (values, store.pages.value)):
        _, scalars = read_vectors(pages.cpu(), half, slots)
        assert scalars is not None
        assert torch.isfinite(scalars[0]).tolist() == [False] * 4 + [True] * 2
        if pages is keys:  # the values' codec subtracts a mean
            assert float(scalars[0, 4]) == 0


def test_nothing_to_store(device: str) -> None:
    store = GpuStore(codec_of(4, 64), codec_of(8, 64), 16, device=device)
    none = torch.zeros(0, 2, 64, device=device)
    keys, values = (half.empty(2, 2, device) for half in (store.pages.key, store.pages.value))
    store.store(none, none, keys, values, torch.zeros(0, dtype=torch.int64, device=device))
    assert not bool(keys.any())


def test_bytes_of_the_tables_are_those_allocated(device: str) -> None:
    store = GpuStore(fitted(3, 80, 96, 2), Fp8Codec(96), 16, device=device)
    assert store.nbytes == 4 * (2 * 96 * 128 + 2 * 96 + 7 + 8)


def test_options_hold_what_the_kernel_is_compiled_for() -> None:
    key, value = StoreShape(112, 3, "unbiased", True, True), StoreShape(128, 8)
    large, small = (store_options(128, 32, key, value, few=few) for few in (False, True))
    assert (large["BLOCK"], small["BLOCK"]) == (64, 16)
    assert (large["KEY_S"], large["KEY_C"], large["VALUE_BITS"], large["PAGE"]) == (16, 112, 8, 32)
    wide = StoreShape(256, 4, "unbiased", True)
    assert store_options(256, 32, wide, wide, few=False)["BLOCK"] == 32


@pytest.mark.gpu
def test_a_graph_stores_what_lies_in_its_inputs_when_it_is_replayed() -> None:
    codecs = (codec_of(4, 128), codec_of(8, 128))
    store = GpuStore(*codecs, 16, device="cuda")
    key, value = (torch.zeros(4, 2, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    keys, values = (half.empty(3, 2, "cuda") for half in (store.pages.key, store.pages.value))
    slots = torch.full((4,), -1, device="cuda")
    store.store(key, value, keys, values, slots, trusted=True)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        store.store(key, value, keys, values, slots, trusted=True)
    key.copy_(gaussian(4, 2, 128))
    value.copy_(gaussian(4, 2, 128, seed=1))
    slots.copy_(torch.tensor([5, -1, 40, 17]))
    graph.replay()
    parts = ((key, keys, store.pages.key), (value, values, store.pages.value))
    for codec, (x, pages, half) in zip(codecs, parts, strict=True):
        assert_stored(codec, x, torch.zeros_like(pages), pages, half, slots)
