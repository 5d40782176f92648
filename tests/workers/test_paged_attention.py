"""Generated tokens that read pages as a GPU does: at every step what decoded pages would give.

`pytest -m gpu` compiles the kernels; any other run interprets them on CPU tensors. The models are
in float16: the interpreter cuts bfloat16 off where a GPU rounds it.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from stillhouse.workers.cache import CacheStorage, TurboQuantCache
from stillhouse.workers.cache.gpu_attention import attend_pages
from stillhouse.workers.cache.page_storage import PageStorage
from stillhouse.workers.cache.rows import Rows
from tests.workers import cache_models
from tests.workers.cache_models import tokens
from tests.workers.packed_steps import generated, left_padded, packed_model, scheme

pytestmark = pytest.mark.usefixtures("numpy_may_overflow")
PAGE, STEPS = 16, 4
MAKE: dict[str, Any] = {
    "llama": cache_models.llama,
    "gemma": cache_models.gemma,
    "gemma2": cache_models.gemma2,
}


@pytest.fixture(autouse=True)
def errors(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The relative error of each attention, the largest of a head: models themselves are chaotic,
    because a key beside a boundary is rounded to either side."""
    found: list[float] = []

    def compared(
        query_BHGD: Tensor, rows: tuple[Rows, ...], visible: Sequence[tuple[int, int]], **how: Any
    ) -> Tensor:
        out_BHGD = attend_pages(query_BHGD, rows, visible, **how)
        wanted_BHGD = decoded(query_BHGD, rows, visible, **how)
        error = (out_BHGD.double() - wanted_BHGD).flatten(2).norm(dim=-1)
        found.append(float((error / wanted_BHGD.flatten(2).norm(dim=-1)).max()))
        return out_BHGD

    monkeypatch.setattr("stillhouse.workers.cache.packed_attention.attend_pages", compared)
    return found


def decoded(
    query_BHGD: Tensor,
    rows: tuple[Rows, ...],
    visible: Sequence[tuple[int, int]],
    *,
    scaling: float,
    softcap: float,
) -> Tensor:
    """Attention over decoded keys and values in float64."""
    start, end = min(first for first, _ in visible), visible[0][1]
    keys, values = (part.decode(start, end, torch.float32, end).double() for part in rows)
    score = query_BHGD.double() @ keys.mT * scaling
    if softcap:
        score = softcap * torch.tanh(score / softcap)
    slot = torch.arange(start, end, device=score.device)
    for row, (first, _) in enumerate(visible):
        score[row] = score[row].masked_fill(slot < first, -torch.inf)
    return score.softmax(-1) @ values


def run(
    name: str,
    model: str,
    windows: tuple[int, int],
    device: str,
    batch: int = 1,
    pads: list[int] | None = None,
    dtype: torch.dtype = torch.float16,
) -> tuple[Tensor, Tensor]:
    """Logits of the decoded cache, and of one whose pages are attended to."""
    window: dict[str, int] = {} if model == "llama" else {"window": 24}
    head_dim = 80 if name == "fitted" else 64  # 64 of 80 channels are coded
    ready = MAKE[model](head_dim=head_dim, **window).to(device, dtype)
    if model == "gemma2":
        ready.set_attn_implementation("eager")  # transformers' other attention has no caps
    made = scheme(name, ready.config.num_hidden_layers, *windows, head_dim)
    ids = tokens(batch, 30).to(device)
    mask = None if pads is None else left_padded(ids.cpu(), pads).to(device)
    plain = generated(ready, ids, TurboQuantCache(ready.config, made, pads), mask, STEPS)
    # On CUDA pages are what the cache takes by itself.
    storage = CacheStorage("pages" if device == "cpu" else "auto", PAGE)
    cache = TurboQuantCache(ready.config, made, pads, attend_packed=True, storage=storage)
    return plain.float(), generated(packed_model(ready), ids, cache, mask, STEPS).float()


def assert_close(
    found: tuple[Tensor, Tensor], errors: list[float], layers: int, bound: float = 2e-3
) -> None:
    assert len(errors) == STEPS * layers  # every step of every layer read pages
    assert max(errors) < bound
    plain, paged = found
    torch.testing.assert_close(paged, plain, rtol=0, atol=0.3 * float(plain.std()))


@pytest.mark.parametrize("model", ["llama", "gemma"])
@pytest.mark.parametrize("name", ["mse", "fitted", "fp8"])
def test_every_codec(name: str, model: str, device: str, errors: list[float]) -> None:
    assert_close(run(name, model, (2, 4), device), errors, 2 if model == "llama" else 3)


@pytest.mark.parametrize("windows", [(0, 0), (3, 0), (0, 5)])
def test_every_window(windows: tuple[int, int], device: str, errors: list[float]) -> None:
    assert_close(run("fp8", "gemma", windows, device), errors, 3)


@pytest.mark.parametrize(
    ("name", "model", "windows"),
    [("fp8", "gemma", (2, 4)), ("fitted", "llama", (3, 0)), ("fp8", "llama", (0, 0))],
)
def test_a_padded_batch(
    name: str, model: str, windows: tuple[int, int], device: str, errors: list[float]
) -> None:
    """The shortest has one token at first: fewer than sinks, and pads among its recent ones."""
    found = run(name, model, windows, device, 2, [7, 29])
    assert_close(found, errors, 2 if model == "llama" else 3)


def test_keys_of_two_planes(device: str, errors: list[float]) -> None:
    assert_close(run("planes", "llama", (2, 4), device), errors, 2)


def test_a_model_in_bfloat16(device: str, errors: list[float]) -> None:
    found = run("mse", "llama", (2, 4), device, dtype=torch.bfloat16)
    # Rounding to bfloat16 alone is 1.7e-3; the interpreter cuts off, and decodes to float32.
    assert_close(found, errors, 2, 2e-2 if device == "cpu" else 4e-3)


def test_capped_scores(device: str, errors: list[float]) -> None:
    assert_close(run("mse", "gemma2", (2, 4), device, 2, [0, 5]), errors, 2)


def test_a_ring_is_read_on_past_its_end(device: str) -> None:
    """A sliding layer's new tokens lie in pages before those of its old ones."""
    config, wrapped = cache_models.gemma(24, 64).config, 0
    made = scheme("fp8", 3, 0, 0)
    cache = TurboQuantCache(config, made, None, True, CacheStorage("pages", PAGE))
    draw = torch.Generator().manual_seed(0)
    for step in range(50):
        shape = (2, 2, cache_models.HEADS, 1 if step else 30, 64)
        key, value = torch.randn(shape, generator=draw).half().to(device)
        states: Any = cache.update(key, value, 0)[0]  # of a layer that slides
        packed = states.rows[0].packed if step else None
        if isinstance(packed, PageStorage):
            room = packed.pages_BWHY.shape[1] * PAGE
            if packed.first % room + packed.length > room and packed.first % 5 == 0:
                visible, how = [states.span, (states.span[0] + 3, states.span[1])], {"scaling": 0.1}
                found = attend_pages(key.repeat(1, 1, 3, 1), states.rows, visible, **how)
                wanted = decoded(key.repeat(1, 1, 3, 1), states.rows, visible, softcap=0.0, **how)
                assert float((found.double() - wanted).norm() / wanted.norm()) < 2e-3
                wrapped += 1
    assert wrapped >= 2


def test_beams_write_the_same(device: str, errors: list[float]) -> None:
    model = cache_models.gemma(24, 64).half().to(device)
    ids, texts = tokens(1, 25).to(device), []
    for one, packed in ((model, False), (packed_model(model), True)):
        storage = CacheStorage("pages", PAGE)
        cache = TurboQuantCache(model.config, scheme("fp8", 3, 2, 0), None, packed, storage)
        texts.append(
            one.generate(
                ids, attention_mask=torch.ones_like(ids), past_key_values=cache,
                max_new_tokens=4, do_sample=False, pad_token_id=0, num_beams=2,
            )
        )  # fmt: skip
    assert errors
    assert max(errors) < 2e-3
    assert torch.equal(*texts)


@pytest.mark.gpu
def test_what_the_kernels_do_not_take_is_kept_in_records() -> None:
    for dtype, name in ((torch.float32, "mse"), (torch.float16, "fitted")):
        model = cache_models.llama(16 if name == "fitted" else 64).to("cuda", dtype)
        cache = TurboQuantCache(model.config, scheme(name, 2, 2, 0), attend_packed=True)
        found = generated(packed_model(model), tokens(1, 30).cuda(), cache, None, 2)
        assert bool(found.isfinite().all())
        layer: Any = cache.layers[0]
        assert not any(isinstance(part, PageStorage) for part in layer.tables)
