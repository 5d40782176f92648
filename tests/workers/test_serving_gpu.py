"""A serving engine's steps through Triton's kernels, in 16 bits; as `test_serving_cpu`."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from stillhouse.errors import ModelError
from stillhouse.kernels.paged_attention import PageFormat
from stillhouse.kernels.turboquant import Fp8Codec, MseCodec
from stillhouse.workers.cache.cpu_attention import vector_format
from stillhouse.workers.serving.gpu_layer import GpuLayer
from stillhouse.workers.serving.layout import BlockLayout
from stillhouse.workers.serving.machine import kernel_errors
from stillhouse.workers.serving.self_check import worst_error
from tests.kernels.paged_attention.gpu_pages import fitted
from tests.workers.test_serving_cpu import BLOCK, GROUP, HEADS, Engine, assert_agrees
from tests.workers.test_serving_cpu import fitted as several_groups

pytestmark = pytest.mark.usefixtures("numpy_may_overflow")


def made(kind: str, sinks: int, window: int = 0, softcap: float = 0.0, block: int = BLOCK) -> Any:
    codecs: tuple[Any, Any] = (MseCodec(64, 4, "unbiased"), MseCodec(64, 3, "least_squares"))
    if kind == "fp8":
        codecs = Fp8Codec(64), Fp8Codec(64)
    if kind == "fitted":
        codecs = fitted(4, 64, 64, HEADS), fitted(4, 64, 64, HEADS, seed=2)
    pages = PageFormat.of(vector_format(codecs[0]), vector_format(codecs[1]), block)
    layout = BlockLayout(pages, 64, sinks)
    return GpuLayer(codecs, layout, GROUP, 64**-0.5, softcap, window)


@pytest.mark.parametrize(
    ("kind", "sinks", "window", "softcap"),
    [("mse", 0, 0, 0.0), ("fitted", 2, 0, 0.0), ("fp8", 1, 0, 5.0), ("mse", 3, 20, 0.0)],
)
def test_random_chunks(kind: str, sinks: int, window: int, softcap: float) -> None:
    layer = made(kind, sinks, window, softcap)
    engine = Engine(layer, [35, 1, 17], random.Random(sinks), torch.float16)
    engine.run(longest=16)
    assert_agrees(engine, within=3e-3)


def test_the_self_check_of_a_gpu() -> None:
    assert worst_error(made("mse", 1, block=32), HEADS, dtype=torch.float16) < 3e-3


def test_the_check_of_a_machine() -> None:
    """The first of its formats and head sizes, in blocks of 128 tokens."""
    name, error = next(kernel_errors(GpuLayer, torch.float16, "cpu"))
    assert name == "k4v4 D=64"
    assert error < 3e-3


def test_a_plan_of_several_channel_groups_names_its_cure() -> None:
    layer = made("mse", 0)
    several = several_groups(64, "unbiased", 1), several_groups(64, "least_squares", 2)
    with pytest.raises(ModelError, match=r"do not read it: expected one group .*channel_groups: 1"):
        worst_error(replace(layer, codecs=several), HEADS, dtype=torch.float16)
