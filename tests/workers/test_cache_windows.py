"""Sinks and recent window of the cache: which tokens are exact, in any pieces, padded or not."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.kernels.turboquant import MseCodec, NotFiniteError
from stillhouse.workers.cache import CacheFormat, ObliviousScheme, TurboQuantCache
from tests.workers.cache_models import HEAD_DIM, HEADS, WINDOW, gemma, llama, random_kv

FULL_LAYER, SLIDING_LAYER = 1, 0  # of the small gemma


def scheme(sinks: int, recent: int, bits: int = 2) -> ObliviousScheme:
    return ObliviousScheme(CacheFormat(bits, bits, sinks=sinks, recent=recent))


def expected(x: torch.Tensor, sinks: int, recent: int, padding: list[int]) -> torch.Tensor:
    """Slot by slot, sequence by sequence: float16 at both ends, two bits between them."""
    codec = MseCodec(HEAD_DIM, 2, "unbiased")
    exact = x.half().float()
    # A token that was in the recent window is coded from its 16 bits, so all of them are.
    out = codec.decode(codec.encode(exact if recent else x))
    for row, pads in enumerate(padding):
        out[row, :, pads : pads + sinks] = exact[row, :, pads : pads + sinks]
    if recent:
        out[:, :, -recent:] = exact[:, :, -recent:]
    return out


@given(
    sinks=st.integers(0, 5),
    recent=st.integers(0, 6),
    padding=st.lists(st.integers(0, 7), min_size=1, max_size=3),
    pieces=st.lists(st.integers(1, 9), min_size=1, max_size=6),
)
def test_both_ends_are_exact_in_any_pieces(
    sinks: int, recent: int, padding: list[int], pieces: list[int]
) -> None:
    total = sum(pieces)
    cache = TurboQuantCache(llama().config, scheme(sinks, recent), padding)
    keys, values = random_kv(len(padding), total)
    start = 0
    for piece in pieces:
        part = slice(start, start + piece)
        found, _ = cache.update(keys[:, :, part], values[:, :, part], 0)
        start += piece
        wanted = expected(keys[:, :, :start], sinks, recent, padding)
        for row, pads in enumerate(padding):  # what stands where a pad is, no attention reads
            torch.testing.assert_close(found[row, :, pads:], wanted[row, :, pads:])
        assert found.shape == wanted.shape
        assert bool(found.isfinite().all())


@pytest.mark.parametrize(("sinks", "recent"), [(0, 0), (4, 0), (0, 6), (4, 6), (30, 0), (4, 40)])
def test_bytes_are_those_of_each_part(sinks: int, recent: int) -> None:
    tokens, batch = 20, 3
    cache = TurboQuantCache(llama().config, scheme(sinks, recent))
    for _ in range(tokens):
        cache.update(*random_kv(batch, 1), 0)
    packed = max(tokens - sinks - recent, 0)
    exact = sinks + min(recent, max(tokens - sinks, 0))
    vectors = 2 * batch * HEADS
    assert cache.nbytes - cache.table_nbytes == vectors * (
        packed * (HEAD_DIM * 2 // 8 + 2) + exact * 2 * HEAD_DIM
    )


def test_a_sliding_layer_forgets_its_sinks_when_no_query_sees_them() -> None:
    keys, values = random_kv(2, 30).half().float()
    padding = [0, 3]
    cache = TurboQuantCache(gemma().config, scheme(4, 0), padding)
    for slot in range(30):
        part = slice(slot, slot + 1)
        found, _ = cache.update(keys[:, :, part], values[:, :, part], SLIDING_LAYER)
        first = max(slot + 1 - WINDOW, 0)
        wanted = expected(keys[:, :, : slot + 1], 4, 0, padding)[:, :, first:]
        for row, pads in enumerate(padding):
            shown = max(pads - first, 0)
            torch.testing.assert_close(
                found[row, :, shown:], wanted[row, :, shown:], atol=1e-3, rtol=0
            )
    assert cache.nbytes - cache.table_nbytes == 2 * 2 * HEADS * (WINDOW - 1) * (HEAD_DIM // 4 + 2)


@pytest.mark.parametrize("removed", [1, 3, 7, 12])
def test_crop_leaves_the_longest_prefix(removed: int) -> None:
    keys, values = random_kv(2, 16).half().float()
    again, after = random_kv(2, 5, seed=1).half().float()
    cropped = TurboQuantCache(llama().config, scheme(4, 5), [0, 2])
    cropped.update(keys[:, :, :10], values[:, :, :10], 0)
    cropped.update(keys[:, :, 10:], values[:, :, 10:], 0)
    cropped.crop(-removed)
    found, _ = cropped.update(again, after, 0)
    kept = 16 - removed
    wanted = expected(torch.cat((keys[:, :, :kept], again), dim=2), 4, 5, [0, 2])
    torch.testing.assert_close(found[0], wanted[0])
    torch.testing.assert_close(found[1, :, 2:], wanted[1, :, 2:])


@settings(max_examples=40)
@given(
    sinks=st.integers(0, 3),
    recent=st.integers(0, 12),
    layer=st.sampled_from([FULL_LAYER, SLIDING_LAYER]),
    padding=st.lists(st.integers(0, 5), min_size=1, max_size=2),
    steps=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=5),
)
def test_rejected_drafts_leave_no_trace(
    sinks: int, recent: int, layer: int, padding: list[int], steps: list[tuple[int, int]]
) -> None:
    """Steps of one token, accepted and rejected drafts, as assisted generation makes them."""
    batch, prompt = len(padding), 6
    keys, values = random_kv(batch, prompt + sum(1 + accepted for accepted, _ in steps) + 1)
    wrong = random_kv(batch, 4, seed=1)
    config, coding = gemma().config, scheme(sinks, recent)
    assisted, plain = (TurboQuantCache(config, coding, padding) for _ in range(2))
    assisted.activate_past_recording()
    start = 0
    for first, (accepted, rejected) in enumerate([(prompt - 1, 2), *steps, (0, 0)]):
        stop = start + 1 + accepted
        drafts = [
            torch.cat((x[:, :, start:stop], w[:, :, :rejected]), dim=2)
            for x, w in zip((keys, values), wrong, strict=True)
        ]
        read = assisted.update(drafts[0], drafts[1], layer)
        assisted.layers[layer].crop(-rejected)
        for slot in range(start, stop):
            one = slice(slot, slot + 1)
            alone = plain.update(keys[:, :, one], values[:, :, one], layer)
            if first and slot == start:  # the first token of a step reads what it reads alone
                shown = start + 1 - alone[0].shape[2]
                for found, wanted in zip(read, alone, strict=True):
                    for row, pads in enumerate(padding):
                        part = slice(max(pads - shown, 0), wanted.shape[2])
                        torch.testing.assert_close(found[row, :, part], wanted[row, :, part])
        assert assisted.nbytes == plain.nbytes
        start = stop


def test_what_is_held_for_a_crop_is_counted() -> None:
    cache = TurboQuantCache(llama().config, scheme(0, 3))
    cache.activate_past_recording()
    cache.update(*random_kv(1, 10), 0)
    held = cache.nbytes
    cache.layers[0].crop(0)
    assert held - cache.nbytes == 2 * HEADS * 7 * 2 * HEAD_DIM


def test_beams_carry_their_padding_with_them() -> None:
    keys, values = random_kv(4, 8).half().float()
    cache = TurboQuantCache(llama().config, scheme(2, 0), [0, 3])  # two sequences, two beams each
    cache.update(keys, values, 0)
    order: Any = torch.tensor([2, 2, 0, 1])
    cache.reorder_cache(order)
    again, after = random_kv(4, 1, seed=1).half().float()
    found, _ = cache.update(again, after, 0)
    wanted = expected(torch.cat((keys[order], again), dim=2), 2, 0, [3, 3, 0, 0])
    for row, pads in enumerate([3, 3, 0, 0]):
        torch.testing.assert_close(found[row, :, pads:], wanted[row, :, pads:])
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 8
    cache.batch_select_indices(torch.tensor([0, 7]))
    found, _ = cache.update(again[[0, 3]], after[[0, 3]], 0)
    torch.testing.assert_close(found[0, :, 3:-1], wanted[0, :, 3:])
    torch.testing.assert_close(found[1, :, :-1], wanted[3])


def test_padding_of_another_batch_is_refused() -> None:
    cache = TurboQuantCache(llama().config, scheme(2, 0), [0, 3])
    with pytest.raises(ValueError, match="padding for 3 sequences, found 2"):
        cache.update(*random_kv(3, 4), 0)


def test_what_16_bits_cannot_hold_is_refused_and_nothing_is_stored() -> None:
    cache = TurboQuantCache(llama().config, scheme(2, 3))
    cache.update(*random_kv(1, 4), 0)
    keys, values = random_kv(1, 2, seed=1)
    values[..., 1, 0] = 1e6
    with pytest.raises(NotFiniteError):
        cache.update(keys, values, 0)
    assert cache.get_seq_length() == 4
    assert cache.update(keys, keys, 0)[0].shape[2] == 6


def test_tables_are_shared_and_counted_once() -> None:
    one = scheme(0, 0)
    caches = [TurboQuantCache(llama().config, one) for _ in range(2)]
    for cache in caches:
        for layer in range(2):
            cache.update(*random_kv(1, 3), layer)
    codecs = {id(codec) for cache in caches for layer in cache.layers for codec in layer.codecs}
    assert len(codecs) == 2
    assert caches[0].table_nbytes == sum(
        one.codec(0, kind, random_kv(1, 1)[0]).nbytes for kind in ("key", "value")
    )
