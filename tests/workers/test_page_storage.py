"""Pages hold what records hold, whatever is appended, dropped or taken back.

`pytest -m gpu` compiles the store; any other run interprets it on CPU tensors.
"""

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stillhouse.kernels.turboquant import Fp8Codec, HalfCodec, MseCodec, PackedVectors, unpack
from stillhouse.workers.cache import (
    CacheFormat,
    CacheStorage,
    ObliviousScheme,
    SameCodecScheme,
    TurboQuantCache,
)
from stillhouse.workers.cache.gpu_tables import GpuTables
from stillhouse.workers.cache.page_storage import PageStorage
from stillhouse.workers.cache.record_storage import PackedStorage, RecordStorage
from tests.workers import cache_models
from tests.workers.cache_models import HEADS
from tests.workers.packed_steps import scheme

pytestmark = pytest.mark.usefixtures("numpy_may_overflow")
DIM, PAGE = 64, 16
PAGES = CacheStorage("pages", PAGE)
FP8 = Fp8Codec(DIM)
PLANES = MseCodec(DIM, 3, "unbiased")  # two planes and scalars
Pair = tuple[PackedStorage, PackedStorage]


def vectors(batch: int, tokens: int, seed: int = 0, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Keys and values, float16."""
    draw = torch.Generator().manual_seed(seed)
    key, value = torch.randn((2, batch, HEADS, tokens, DIM), generator=draw).half().to(device)
    return key, value


def empty(kind: CacheStorage, codec: Any, batch: int, device: str = "cpu") -> Pair:
    return kind.empty((codec, codec), vectors(batch, 0, device=device), attend_packed=True)


def appended(pair: Pair, states: tuple[Tensor, Tensor]) -> Pair:
    return pair[0].append_both(pair[1], *states)


def reordered(pair: Pair, order: Tensor) -> Pair:
    """With these of its sequences."""
    return pair[0].mapped(lambda x: x[order]), pair[1].mapped(lambda x: x[order])


def assert_same(pages: Pair, records: Pair) -> None:
    for paged, record in zip(pages, records, strict=True):
        assert paged.length == record.length
        found, wanted = (part.decode(0, part.length, torch.float16) for part in (paged, record))
        assert torch.equal(found, wanted)


def assert_alike(pages: Pair, records: Pair) -> None:
    """Packed bytes and scalars, but for vectors whose sums' order decides at a boundary."""
    for paged, record in zip(pages, records, strict=True):
        assert isinstance(paged, PageStorage)
        assert isinstance(record, RecordStorage)
        assert paged.length == record.length
        if paged.length:
            found, wanted = paged.record(0, paged.length), record.record
            assert isinstance(found, PackedVectors)
            assert float((found.indices != wanted.indices).float().mean()) < 2e-3
            torch.testing.assert_close(found.scalars, wanted.scalars, rtol=2e-2, atol=0)


STEP = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 40)),
    st.tuples(st.just("drop"), st.integers(0, 30)),
    st.tuples(st.just("crop"), st.integers(0, 30)),
    st.tuples(st.just("beams"), st.integers(1, 3)),
)


@settings(max_examples=40)
@given(st.lists(STEP, min_size=1, max_size=12), st.booleans())
def test_any_changes_leave_the_same_vectors(steps: list[tuple[str, int]], fp8: bool) -> None:
    codec: Any = FP8 if fp8 else PLANES
    pages, records = empty(PAGES, codec, 2), empty(CacheStorage("records"), codec, 2)
    batch = 2
    for seed, (what, count) in enumerate(steps):
        if what == "append":
            states = vectors(batch, count, seed)
            pages, records = appended(pages, states), appended(records, states)
        elif what == "beams":
            order = torch.arange(count) % batch
            pages, records = reordered(pages, order), reordered(records, order)
            batch = count
        else:
            left = max(pages[0].length - count, 0)
            part = slice(min(count, pages[0].length), None) if what == "drop" else slice(left)
            pages, records = ((pair[0].cut(part), pair[1].cut(part)) for pair in (pages, records))
        (assert_same if fp8 else assert_alike)(pages, records)
        used = -(-(pages[0].length + PAGE - 1) // PAGE)
        assert pages[0].nbytes <= batch * 2 * (used + used // 4 + 2) * (PAGE * DIM * HEADS + 8)


def test_pieces_and_one_append_are_the_same(device: str) -> None:
    states = vectors(3, 50, device=device)
    made = scheme("mse", 0, 0, 0, DIM)
    codecs = tuple(made.codec(0, kind, states[0]) for kind in ("key", "value"))
    whole = PAGES.empty((codecs[0], codecs[1]), states, True)
    pieces = PAGES.empty((codecs[0], codecs[1]), states, True)
    whole = appended(whole, states)
    start = 0
    for piece in (5, 1, 1, 30, 13):
        end = start + piece
        pieces = appended(pieces, (states[0][:, :, start:end], states[1][:, :, start:end]))
        start = end
    assert_same(pieces, whole)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_bytes_are_those_of_the_codec(bits: int, device: str) -> None:
    codec = MseCodec(DIM, bits, "unbiased", device=torch.device(device))
    states = vectors(2, 40, device=device)
    [keys, _] = appended(empty(PAGES, codec, 2, device), states)
    assert isinstance(keys, PageStorage)
    found, wanted = keys.record(0, 40), codec.encode(states[0])
    differs = unpack(found.indices, bits, DIM) != unpack(wanted.indices, bits, DIM)
    assert float(differs.float().mean()) < 1e-4  # beside a boundary a sum's order decides
    torch.testing.assert_close(found.scalars, wanted.scalars, rtol=2.0**-10, atol=2.0**-24)


def test_a_step_of_a_sliding_layer_moves_nothing() -> None:
    pages = appended(empty(PAGES, FP8, 2), vectors(2, 40))
    places = set()
    for step in range(60):
        pages = appended(pages, vectors(2, 1, step))
        pages = (pages[0].cut(slice(1, None)), pages[1].cut(slice(1, None)))
        assert isinstance(pages[0], PageStorage)
        places.add(pages[0].pages_BWHY.data_ptr())
    assert len(places) <= 2  # the first append may find its ring full
    assert pages[0].length == 40


@pytest.mark.parametrize("more", [1, 40])
def test_a_ring_that_has_turned_is_moved_whole(more: int) -> None:
    pages, records = empty(PAGES, FP8, 2), empty(CacheStorage("records"), FP8, 2)
    for seed, tokens in enumerate((3 * PAGE, 20, 20, more, 60)):
        states = vectors(2, tokens, seed)
        pages, records = appended(pages, states), appended(records, states)
        assert_same(pages, records)
        if tokens == 20:  # the first pages are free, and written again
            part = slice(PAGE + 2, None)
            pages = (pages[0].cut(part), pages[1].cut(part))
            records = (records[0].cut(part), records[1].cut(part))
    assert_same(pages, records)


def test_growth_is_by_a_quarter() -> None:
    pages, sizes = appended(empty(PAGES, FP8, 1), vectors(1, 20 * PAGE)), []
    for _ in range(12):
        pages = appended(pages, vectors(1, PAGE))
        sizes.append(pages[0].nbytes // (PAGE * DIM * HEADS))
    assert sizes == [25] * 5 + [31] * 6 + [38]


def filled(pads: list[int] | None = None, storage: CacheStorage = PAGES) -> TurboQuantCache:
    config = cache_models.gemma(24, DIM).config
    return TurboQuantCache(config, scheme("fp8", 3, 2, 4), pads, storage=storage)


@pytest.mark.parametrize("recording", [False, True])
def test_a_cache_gives_what_one_of_records_gives(recording: bool) -> None:
    caches = filled([0, 3]), filled([0, 3], CacheStorage("records"))
    for cache in caches:
        if recording:
            cache.activate_past_recording()
    for seed, tokens in enumerate((30, 1, 1, 4)):
        for layer in range(2):
            states = vectors(2, tokens, seed)
            found = [torch.stack(cache.update(*states, layer)) for cache in caches]
            assert torch.equal(*found)
        if recording and seed:
            for cache in caches:
                cache.crop(-1)


def test_a_copy_is_independent() -> None:
    cache = filled()
    cache.update(*vectors(1, 30), 1)
    other = copy.deepcopy(cache)
    states = vectors(1, 1, 1)
    [found, _], [again, _] = cache.update(*states, 1), other.update(*states, 1)
    assert torch.equal(found, again)
    other.update(*vectors(1, 1, 2), 1)
    other.update(*vectors(1, 9, 3), 1)
    packed = 31 - 4  # what was recent is packed by now
    assert torch.equal(cache.update(*states, 1)[0][:, :, :packed], found[:, :, :packed])


def test_bytes_are_all_that_is_allocated() -> None:
    config = cache_models.llama(DIM).config
    cache = TurboQuantCache(config, ObliviousScheme(CacheFormat(4, 3, recent=5)), storage=PAGES)
    for layer in range(2):
        cache.update(*vectors(3, 40), layer)
    pages = 3 * math.ceil(35 / PAGE)
    vector = DIM * (4 + 3) // 8 + 2 * 2
    stored = pages * PAGE * HEADS * vector + 2 * 4 * 2 * pages  # and both tables' int32
    exact = 2 * 3 * HEADS * 5 * DIM * 2
    assert cache.nbytes - cache.table_nbytes == 2 * (stored + exact)
    codecs = {id(codec): codec for layer in cache.layers for codec in layer.codecs}
    assert cache.table_nbytes > sum(codec.nbytes for codec in codecs.values())


def test_tables_are_shared_by_caches_and_made_anew_for_other_codecs(device: str) -> None:
    first, second = (MseCodec(DIM, bits, "unbiased", device=device) for bits in (3, 4))
    where = torch.empty(0, device=device).device
    found = GpuTables.of(first, first, 16, where)
    assert GpuTables.of(first, first, 16, where) is found
    assert GpuTables.of(first, first, 32, where).store.pages.tokens == 32
    assert GpuTables.of(first, second, 32, where).store.value.format.groups[0].bits == 4


def test_what_no_kernel_takes_is_refused() -> None:
    config = cache_models.llama(DIM).config
    key, value = (part.float() for part in vectors(1, 3))
    with pytest.raises(ValueError, match="a model in float16 or bfloat16, found"):
        TurboQuantCache(config, storage=PAGES).update(key, value, 0)
    refused = {
        "expected one group of 64, 80": ObliviousScheme(CacheFormat(5, 5)),
        "2, 3 or 4 bits, found 'gaussian' and 8 bits": ObliviousScheme(CacheFormat(8, 4)),
        "found HalfCodec": SameCodecScheme(lambda dim, _kind, _device: HalfCodec(dim)),
    }
    for what, made in refused.items():
        with pytest.raises(ValueError, match=what):
            TurboQuantCache(config, made, storage=PAGES).update(*vectors(1, 3), 0)
    with pytest.raises(ValueError, match="expected pages of"):
        CacheStorage("pages", 20)
