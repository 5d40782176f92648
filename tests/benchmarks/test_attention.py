"""The GPU benchmark without a GPU: what it plans, counts, refuses, prints and writes.

Its own kernel runs in Triton's interpreter, torch's peer on the CPU; times are scripted.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import attention, attention_packed, gpu_timing
from benchmarks.attention_cases import SHAPES, DecodeCase, DecodeKernel, Steps, cases
from benchmarks.attention_packed import PackedKernel, difference, mixed_lengths, packed_kernels
from benchmarks.attention_peers import FlexKernel, PeerKernel, SdpaKernel
from benchmarks.attention_served import FlashInferKernel
from stillhouse.kernels.paged_attention.gpu import GpuDecoder, Sequences
from stillhouse.kernels.paged_attention.reference import coded_vectors

TOY = DecodeCase("toy", batch=2, context=40, heads=1, group=2, dim=64)
K4V4 = PackedKernel((4, 4), 16)
Calls = Sequence[Callable[[], Any]]


class ScriptedDevice:
    """Every call is made once; each next timing takes the next of the seconds."""

    place = "cpu"
    l2_bytes = 512

    def __init__(self, *seconds: float, free: int = 1 << 40) -> None:
        self.seconds, self.free, self.calls = list(seconds), free, list[int]()

    def free_bytes(self) -> int:
        return self.free

    def clear(self) -> None:
        pass

    def watch_memory(self) -> int:
        return 1000

    def peak_bytes(self) -> int:
        return 1100

    def step_seconds(self, calls: Calls) -> float:
        for call in calls:
            call()
        self.calls.append(len(calls))
        return self.seconds.pop(0)

    def facts(self) -> dict[str, Any]:
        return {"device": "NVIDIA Scripted 80GB"}


@dataclass(frozen=True)
class RaisingKernel(PeerKernel):
    """A peer that is there and fails."""

    name: str = "raising"

    def cache_bytes(self, case: DecodeCase) -> int:
        return 1

    def steps(self, case: DecodeCase, copies: int, place: str) -> Steps:
        raise RuntimeError("no kernel image\nis available")


@dataclass(frozen=True)
class AbsentKernel(RaisingKernel):
    """A peer whose own test for the device fails."""

    name: str = "absent"

    def missing(self) -> str | None:
        raise OSError("no library")


@dataclass(frozen=True)
class WrongKernel(PackedKernel):
    """One of this project's whose check says no."""

    def steps(self, case: DecodeCase, copies: int, place: str) -> Steps:
        return Steps([], lambda: "expected 1, found 2")


@pytest.mark.usefixtures("rounding_bfloat16")
def test_a_run_times_what_is_right_and_says_why_not_of_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    file, device = tmp_path / "out.json", ScriptedDevice(2e-6, 1e-6, 3e-6, 4e-3, 1e-3)
    kernels: list[DecodeKernel] = [SdpaKernel(), AbsentKernel(), RaisingKernel(), K4V4]
    kernels.append(WrongKernel((3, 3)))
    attention.run(device, [TOY], kernels, file, 60)
    found = json.loads(file.read_text())
    assert {"date", "machine", "versions"} <= set(found)
    assert {"python", "torch", "triton", "stillhouse"} <= set(found["versions"])
    assert found["machine"]["device"] == "NVIDIA Scripted 80GB"
    # A copy reads and writes 16 times the cache; the best of three counts.
    assert found["machine"]["copy_bytes_per_second"] == 2 * 16 * 512 / 1e-6
    assert found["missing"] == {"absent": "OSError: no library"}
    sdpa, mine = found["rows"]
    assert (sdpa["kernel"], sdpa["cache_bytes"], sdpa["page"]) == (
        "sdpa bf16",
        2 * 80 * 64 * 2,
        None,
    )
    assert (mine["kernel"], mine["cache_bytes"], mine["page"]) == ("k4v4 page 16", 6 * 1088, 16)
    assert mine["bytes_per_second"] == 6 * 1088 / 1e-3
    rate = found["machine"]["copy_bytes_per_second"]
    assert mine["share_of_copy"] == mine["bytes_per_second"] / rate
    assert (mine["peak_bytes"], mine["step_bytes"]) == (1100, 100)
    assert (sdpa["ratios"], mine["ratios"]) == ({}, {"sdpa bf16": 0.25})
    # 4,096 bytes that take turns: one cache is enough, of both.
    assert device.calls == [1, 1, 1, sdpa["copies"], mine["copies"]] == [1] * 5
    reasons = {one["kernel"]: (one["reason"], one["failed"]) for one in found["skipped"]}
    assert reasons == {
        "raising": ("RuntimeError: no kernel image", True),
        "k3v3": ("expected 1, found 2", True),
    }
    printed = capsys.readouterr().out
    for text in ("1000.0 us", "0.250 of sdpa bf16", "FAILED: expected 1, found 2"):
        assert text in printed


def test_what_does_not_fit_and_what_comes_too_late_is_left_out(tmp_path: Path) -> None:
    clock = iter([0.0, 1.0, 99.0]).__next__
    kernels: list[DecodeKernel] = [SdpaKernel(), RaisingKernel()]
    device = ScriptedDevice(*[1.0] * 3, free=1 << 20)
    table = attention.run(device, [TOY], kernels, tmp_path / "out.json", 60, now=clock)
    assert [one.reason for one in table.skipped] == [
        "expected 1.0 GiB free, found 0.0",
        "the run had taken its 60 seconds",
    ]
    assert not any(one.failed for one in table.skipped)


def test_the_whole_command_ends_with_1_when_its_own_kernel_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(attention, "cases", lambda quick: [replace(TOY, group=1)])
    monkeypatch.setattr(attention, "packed_kernels", lambda: [WrongKernel((4, 4))])
    monkeypatch.setattr(attention, "CudaDevice", lambda: ScriptedDevice(*[1.0] * 4))
    file = tmp_path / "out.json"
    with pytest.raises(SystemExit) as ended:
        attention.main(["--quick", "--json", str(file), "--kernels", "sdpa bf16", "k4v4"])
    assert ended.value.code == 1
    assert [row["kernel"] for row in json.loads(file.read_text())["rows"]] == ["sdpa bf16"]
    monkeypatch.setattr(attention, "CudaDevice", lambda: ScriptedDevice(*[1.0] * 4))
    attention.main(["--json", str(file), "--kernels", "sdpa bf16", "--contexts", "40"])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="expected compiled kernels"):
        attention.main(["--json", str(file)])


def test_without_a_gpu_it_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="expected a CUDA device, found none"):
        attention.main([])


def test_options(tmp_path: Path) -> None:
    asked = attention.parsed(["--quick", "--contexts", "4096", "--kernels", "k4v4", "vllm k8v4"])
    assert [case.key for case in attention.chosen(asked)] == [("llama-8b", 8, 4096)]
    assert [one.name for one in attention.kernels(asked.kernels)] == ["vllm k8v4", "k4v4"]
    with pytest.raises(SystemExit):
        attention.parsed(["--kernels", "k9v9"])
    file = attention.default_file("NVIDIA H100 80GB HBM3", quick=False)
    assert file.parent.is_dir()
    assert file.name == "attention-nvidia-h100-80gb-hbm3.json"
    assert attention.default_file("A", quick=True).name == "attention-a-quick.json"


def test_the_grid() -> None:
    every, quick = cases(), cases(quick=True)
    assert every[: len(quick)] == quick
    assert len(every) == len(set(every)) == 6 * 4 + 4
    assert {case.shape for case in every} == set(SHAPES)
    assert (every[0].heads, every[0].group, every[0].dim) == (8, 4, 128)
    assert sum(FlexKernel().planned(case) for case in every) == 3
    names = [kernel.name for kernel in packed_kernels() if kernel.planned(every[1])]
    assert names == ["k4v4", "k3v3", "k2v2", "k4v3", "k8v4", "fp8"]
    assert sum(kernel.page == 16 and kernel.planned(every[0]) for kernel in packed_kernels()) == 1


@pytest.mark.parametrize(
    ("kernel", "vector_pair"),
    [
        (PackedKernel((4, 4)), 64 + 64 + 4),
        (PackedKernel((4, 4), 16), 64 + 64 + 4),
        (PackedKernel((3, 3)), 48 + 48 + 4),
        (PackedKernel((2, 2)), 32 + 32 + 4),
        (PackedKernel((4, 3)), 64 + 48 + 4),
        (PackedKernel((8, 4)), 128 + 64 + 2),
        (PackedKernel((8, 8)), 256),
        (SdpaKernel(), 512),
        (FlashInferKernel(), 256),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_bytes_of_a_cache(kernel: Any, vector_pair: int) -> None:
    case = DecodeCase.of("llama-8b", 16, 32768)
    assert kernel.cache_bytes(case) == 16 * 32768 * 8 * vector_pair


@pytest.mark.usefixtures("rounding_bfloat16")
@pytest.mark.parametrize("bits", [(2, 2), (8, 4)])
def test_the_check_accepts_the_kernel_and_sees_an_error(
    bits: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(attention_packed, "MIXED", 30)
    monkeypatch.setattr(attention_packed, "CHUNK", 16)
    case = replace(TOY, heads=4, group=4)
    steps = PackedKernel(bits, 32).steps(case, 1, "cpu")
    assert steps.check() is None
    assert steps.calls[0]().shape == (2, 4, 4, 64)
    right = coded_vectors

    def wrong(*parts: Any) -> torch.Tensor:
        return 1.005 * right(*parts)

    monkeypatch.setattr(attention_packed, "coded_vectors", wrong)
    assert "sequence 1, 40 tokens: expected an error of at most 0.0025" in (steps.check() or "")


@pytest.mark.usefixtures("rounding_bfloat16")
def test_the_check_sees_what_is_wrong_past_the_tokens_of_mixed_lengths(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The launch is right up to 30 tokens, and leaves out the last ones of 40."""
    torch.manual_seed(0)
    monkeypatch.setattr(attention_packed, "MIXED", 30)
    attend = GpuDecoder.attend

    def short(
        self: GpuDecoder,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        sequences: Sequences,
        **more: Any,
    ) -> Any:
        last = sequences.last_B.clamp_max(30)
        return attend(self, query, keys, values, sequences._replace(last_B=last), **more)

    monkeypatch.setattr(GpuDecoder, "attend", short)
    steps = PackedKernel((4, 4), 32).steps(replace(TOY, heads=4, group=4), 1, "cpu")
    assert "sequence 1, 40 tokens: expected an error" in (steps.check() or "")


def test_a_result_that_is_no_number_is_wrong() -> None:
    out, lse = torch.ones(2, 4), torch.zeros(2)
    expected = (out.double(), lse.double())
    assert difference([out, lse], expected) is None
    assert difference([out * torch.nan, lse], expected) is not None
    assert difference([out, lse + 0.1], expected) is not None
    lengths = mixed_lengths(DecodeCase.of("llama-8b", 64, 262144))
    assert lengths[0] == max(lengths) == 8192
    assert min(lengths) > 0
    assert len(set(lengths)) == 64


def test_buffers_exceed_the_cache_several_times_and_replays_are_bounded() -> None:
    l2 = 50 << 20
    assert gpu_timing.copies(4 << 20, l2) == 100
    assert gpu_timing.copies(1 << 30, l2) == 1
    assert gpu_timing.copies(1, l2) == gpu_timing.MOST_COPIES
    assert [gpu_timing.replays(s) for s in (0.0, 1e-6, 5e-3, 1.0)] == [50, 50, 20, 7]


def added(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.add_(1) + 1


@pytest.mark.gpu
def test_a_cuda_device_times_captured_calls_and_watches_memory() -> None:
    device = gpu_timing.CudaDevice()
    assert device.l2_bytes > 0
    assert device.free_bytes() > 1 << 20
    numbers = [torch.zeros(1 << 20, device="cuda") for _ in range(3)]
    before = device.watch_memory()
    # Beside a call itself, nothing: what it returns is dropped before the next one.
    assert 0 < device.step_seconds([partial(added, x) for x in numbers]) < 0.01
    assert before + (4 << 20) <= device.peak_bytes() < before + (8 << 20)
    assert torch.equal(numbers[0], numbers[2])
    assert float(numbers[0][0]) > gpu_timing.LEAST
    assert PackedKernel((4, 4)).steps(TOY, 1, device.place).check() is None


def test_driver_version(tmp_path: Path) -> None:
    file = tmp_path / "version"
    assert gpu_timing.driver_version(file) == "unknown"
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 2024\n")
    assert gpu_timing.driver_version(file) == "550.54.15"
