"""A serving engine's steps on a CPU, against float64 attention over what each token is stored as.

The reference knows positions alone: that it agrees for random chunks shows that an answer does not
depend on them.
"""

import random
from dataclasses import dataclass, field, fields
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stillhouse.errors import ModelError
from stillhouse.kernels.paged_attention import PageFormat
from stillhouse.kernels.turboquant import (
    ChannelGroup,
    FittedCodec,
    Fp8Codec,
    MseCodec,
    NotFiniteError,
    to_half,
)
from stillhouse.workers.cache.cpu_attention import vector_format
from stillhouse.workers.serving.cpu_layer import CpuLayer
from stillhouse.workers.serving.layout import BlockLayout, Blocks
from stillhouse.workers.serving.self_check import require_right
from stillhouse.workers.serving.step import Piece, Step, pieces
from tests.kernels.paged_attention.fits import fitted_codec

HEADS, GROUP, BLOCK = 2, 3, 16


def fitted(dim: int, scalar: Any, seed: int) -> FittedCodec:
    """Of two channel groups and some channels that are left out."""
    groups = (ChannelGroup(16, 5), ChannelGroup(dim - 24, 4), ChannelGroup(8, 0))
    return fitted_codec(groups, HEADS, seed, scalar)


def codecs_of(kind: str, dim: int) -> tuple[Any, Any]:
    if kind == "fp8":
        return Fp8Codec(dim), Fp8Codec(dim)
    if kind == "fitted":
        return fitted(dim, "unbiased", 1), fitted(dim, "least_squares", 2)
    return MseCodec(dim, 4, "unbiased"), MseCodec(dim, 3, "least_squares")


@dataclass
class Engine:
    """Hands out blocks in random order and runs random steps."""

    layer: CpuLayer
    lengths: list[int]
    draw: random.Random
    dtype: torch.dtype = torch.float32
    states: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(self.draw.randrange(1 << 30))
        dim, layout = self.layer.layout.head_dim, self.layer.layout
        count = [-(-n // BLOCK) for n in self.lengths]
        order = list(range(1, sum(count) + 4))
        self.draw.shuffle(order)
        self.table = torch.zeros((len(count), max(count) + 2), dtype=torch.int32)
        for row, blocks in enumerate(count):
            self.table[row, :blocks] = torch.tensor([order.pop() for _ in range(blocks)])
        garbage = torch.randint(0, 256, (sum(count) + 4, HEADS, BLOCK, layout.token_bytes))
        self.memory = garbage.to(torch.uint8)
        self.blocks = layout.views(self.memory, to_half(torch.empty(0, dtype=self.dtype)).dtype)
        for n in self.lengths:
            query = torch.randn(n, HEADS * GROUP, dim)
            key, value = torch.randn(2, n, HEADS, dim) * 2
            query, key, value = (x.to(self.dtype) for x in (query, key + 1, value))
            self.states.append((query, key, value))
            self.outputs.append(torch.full((n, HEADS * GROUP, dim), torch.nan, dtype=self.dtype))

    def run(self, longest: int) -> None:
        done = [0] * len(self.lengths)
        while pending := [r for r, n in enumerate(self.lengths) if done[r] < n]:
            chosen = self.draw.sample(pending, self.draw.randint(1, len(pending)))
            sizes = [
                min(self.draw.choice((1, self.draw.randint(1, longest))), self.lengths[r] - done[r])
                for r in chosen
            ]
            self._step(chosen, done, sizes)
            for r, size in zip(chosen, sizes, strict=True):
                done[r] += size

    def _step(self, chosen: list[int], done: list[int], sizes: list[int]) -> None:
        spans = [(r, done[r], done[r] + size) for r, size in zip(chosen, sizes, strict=True)]
        starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        step = Step(starts, [end for *_, end in spans], self.table[chosen], BLOCK)
        query, key, value = (
            torch.cat([self.states[r][part][first:end] for r, first, end in spans])
            for part in range(3)
        )
        slots = torch.cat([self._slots(*span) for span in spans])
        self.layer.store((key, value), self.blocks, slots, step)
        out = torch.full_like(query, torch.nan)
        self.layer.attend(query, self.blocks, step, out)
        for (r, first, end), rows in zip(spans, out.split(sizes), strict=True):
            self.outputs[r][first:end] = rows

    def _slots(self, r: int, first: int, end: int) -> Tensor:
        place = torch.arange(first, end)
        return self.table[r].long()[place // BLOCK] * BLOCK + place % BLOCK


def as_stored(codec: Any, x_THD: Tensor, sinks: int) -> Tensor:
    """float64 [H, T, D]."""
    x_HTD = x_THD.transpose(0, 1)[None]
    stored = codec.decode(codec.encode(x_HTD))[0].double()
    stored[:, :sinks] = to_half(x_HTD[0, :, :sinks]).double()
    return stored


def expected(layer: CpuLayer, states: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    query, key, value = states
    tokens = query.shape[0]
    keys, values = (
        as_stored(codec, x, layer.layout.sinks).repeat_interleave(GROUP, dim=0)
        for codec, x in zip(layer.codecs, (key, value), strict=True)
    )
    score = query.double().transpose(0, 1) @ keys.mT * layer.scaling
    if layer.softcap:
        score = layer.softcap * torch.tanh(score / layer.softcap)
    seen = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    if layer.window:
        seen &= ~torch.ones(tokens, tokens, dtype=torch.bool).tril(-layer.window)
    out = score.masked_fill(~seen, -torch.inf).softmax(-1) @ values
    return out.transpose(0, 1)


def made(kind: str, dim: int, sinks: int, window: int = 0, softcap: float = 0.0) -> CpuLayer:
    codecs = codecs_of(kind, dim)
    pages = PageFormat.of(vector_format(codecs[0]), vector_format(codecs[1]), BLOCK)
    layout = BlockLayout(pages, dim, sinks)
    return CpuLayer(codecs, layout, GROUP, dim**-0.5, softcap, window)


def assert_agrees(engine: Engine, within: float = 1e-5) -> None:
    for states, found in zip(engine.states, engine.outputs, strict=True):
        wanted = expected(engine.layer, states)
        error = (found.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        assert float(error.max()) < within


@pytest.mark.parametrize("kind", ["mse", "fitted", "fp8"])
@pytest.mark.parametrize(("sinks", "window"), [(0, 0), (1, 0), (4, 0), (0, 20), (3, 20), (4, 9)])
def test_random_chunks(kind: str, sinks: int, window: int) -> None:
    engine = Engine(made(kind, 64, sinks, window), [70, 1, 33, 16, 50], random.Random(sinks))
    engine.run(longest=30)
    assert_agrees(engine)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    sinks=st.integers(0, 5),
    window=st.sampled_from([0, 1, 4, 17, 40]),
    seed=st.integers(0, 1 << 20),
)
def test_any_lengths_windows_and_sinks(
    lengths: list[int], sinks: int, window: int, seed: int
) -> None:
    engine = Engine(made("mse", 64, sinks, window), lengths, random.Random(seed))
    engine.run(longest=25)
    assert_agrees(engine)


@pytest.mark.parametrize("dim", [80, 256])
def test_head_sizes_and_capped_scores(dim: int) -> None:
    engine = Engine(made("mse", dim, 2, softcap=5.0), [40, 21], random.Random(dim))
    engine.run(longest=20)
    assert_agrees(engine)


def test_bfloat16_states() -> None:
    engine = Engine(made("mse", 64, 4), [40, 21], random.Random(2), torch.bfloat16)
    engine.run(longest=20)
    assert_agrees(engine, within=5e-3)


def test_sinks_may_be_longer_than_a_packed_vector() -> None:
    """As first tokens of some models are: 2.4e5, where a float16 scalar ends at 65,504."""
    engine = Engine(made("mse", 64, 1), [20], random.Random(4))
    _, key, _ = engine.states[0]
    key[0] = 3e4
    engine.run(longest=20)
    assert bool(engine.outputs[0].isfinite().all())
    rest = MseCodec(64, 4, "unbiased")
    with pytest.raises(NotFiniteError):
        rest.encode(key[:1].transpose(0, 1)[None])


@pytest.mark.parametrize("kind", ["mse", "fitted", "fp8"])
@pytest.mark.parametrize("place", [0, 7])  # a sink, and a packed token
def test_what_cannot_be_stored_spoils_its_own_request_alone(kind: str, place: int) -> None:
    layer = made(kind, 64, 1)
    size = layer.layout.token_bytes
    table = torch.tensor([[2, 0], [1, 3]], dtype=torch.int32)
    step = Step([0, 20, 40], [20, 20], table, BLOCK)
    slots = torch.cat([table[r].long()[torch.arange(20) // BLOCK] * BLOCK + torch.arange(20) % BLOCK
                       for r in (0, 1)])  # fmt: skip
    query = torch.randn(40, HEADS * GROUP, 64)
    key, value = torch.randn(2, 40, HEADS, 64)
    outputs = []
    for largest in (1.0, 1e6):
        key[place, 0] *= largest
        blocks = layer.layout.views(
            torch.zeros((4, HEADS, BLOCK, size), dtype=torch.uint8), torch.float16
        )
        layer.store((key, value), blocks, slots, step)
        outputs.append(torch.zeros_like(query))
        layer.attend(query, blocks, step, outputs[-1])
    fine, spoilt = outputs
    assert bool(spoilt[place:20, :GROUP].isnan().all())
    assert torch.equal(spoilt[20:], fine[20:])
    assert torch.equal(spoilt[:20, GROUP:], fine[:20, GROUP:])


def test_slots_of_minus_one_store_nothing() -> None:
    engine = Engine(made("mse", 64, 0), [20], random.Random(1))
    before = engine.memory.clone()
    step = Step([0, 5], [5], engine.table, BLOCK)
    _, key, value = (x[:5] for x in engine.states[0])
    engine.layer.store((key, value), engine.blocks, torch.full((5,), -1), step)
    assert torch.equal(engine.memory, before)


def test_pieces_cover_a_chunk_and_see_the_same_sinks() -> None:
    for window in range(12):
        for sinks in range(5):
            for first in range(15):
                found = list(pieces(first, first + 13, sinks, window))
                places = [q for piece in found for q in range(piece.first, piece.end)]
                assert places == list(range(first, first + 13))
                for piece in found:
                    for q in range(piece.first, piece.end):
                        lost = max(q - window + 1, 0) if window else 0
                        assert min(lost, sinks) == piece.hidden
                        assert piece.packed <= max(lost, sinks)


def test_without_a_window_a_chunk_is_one_piece() -> None:
    assert list(pieces(7, 50, 4, 0)) == [Piece(7, 50, 4, 0)]


@pytest.mark.parametrize(("sinks", "wanted"), [(0, 68), (1, 70), (4, 76)])
def test_bytes_of_a_token(sinks: int, wanted: int) -> None:
    """4 bits and a float16 scalar of 64 channels, twice; each sink 4·64 bytes a 128-token block."""
    codec = MseCodec(64, 4, "unbiased")
    form = vector_format(codec)
    assert BlockLayout(PageFormat.of(form, form, 128), 64, sinks).token_bytes == wanted


def test_other_blocks_are_refused() -> None:
    layout = made("mse", 64, 0).layout
    with pytest.raises(ValueError, match=r"expected blocks of uint8 \[N, H, 16, 60\]"):
        layout.views(torch.zeros((3, 2, 16, 61), dtype=torch.uint8), torch.float16)


@pytest.mark.parametrize("kind", ["mse", "fitted", "fp8"])
@pytest.mark.parametrize(("sinks", "window", "softcap"), [(0, 0, 0.0), (4, 0, 5.0), (1, 9, 0.0)])
def test_the_self_check_passes(kind: str, sinks: int, window: int, softcap: float) -> None:
    assert require_right(made(kind, 64, sinks, window, softcap), HEADS, "layer 0") < 1e-5


class _OtherScale(CpuLayer):
    def attend(self, query_TQD: Tensor, *rest: Any) -> None:
        super().attend(query_TQD * 1.01, *rest)


class _OtherPages(CpuLayer):
    def _singles(self, query_BHGD: Tensor, blocks: Blocks, step: Step) -> Tensor:
        order = torch.arange(len(blocks.keys_NHY)).flip(0)
        other = blocks._replace(
            keys_NHY=blocks.keys_NHY[order], values_NHY=blocks.values_NHY[order]
        )
        return super()._singles(query_BHGD, other, step)


class _NoWindow(CpuLayer):
    def attend(self, *arguments: Any) -> None:
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        CpuLayer(**plain | {"window": 0}).attend(*arguments)


class _OtherStates(CpuLayer):
    def _write(self, states: tuple[Tensor, Tensor], blocks: Blocks, slots_T: Tensor) -> None:
        super()._write((states[0].flip(-1), states[1]), blocks, slots_T)


class _OtherSinks(CpuLayer):
    def store(
        self, states: tuple[Tensor, Tensor], blocks: Blocks, slots_T: Tensor, step: Step
    ) -> None:
        super().store(states, blocks, slots_T, step)
        blocks.sinks_NH2SD.mul_(1.01)


@pytest.mark.parametrize(
    ("kind", "complaint"),
    [
        (_OtherScale, "attention of layer 3 over packed"),
        (_OtherPages, "attention of layer 3 over packed"),
        (_NoWindow, "attention of layer 3 over packed"),
        (_OtherStates, "keys and values of layer 3 stored"),
        (_OtherSinks, "keys and values of layer 3 stored"),
    ],
)
@pytest.mark.parametrize("sinks", [1, 4])
def test_the_self_check_notices(kind: type[CpuLayer], complaint: str, sinks: int) -> None:
    layer = made("mse", 64, sinks, window=4096)
    plain = {field.name: getattr(layer, field.name) for field in fields(layer)}
    require_right(layer, HEADS, "layer 3")
    with pytest.raises(ModelError, match=f"self-check: expected {complaint}"):
        require_right(kind(**plain), HEADS, "layer 3")
