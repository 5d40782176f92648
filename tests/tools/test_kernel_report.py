"""`make kernels`: which kernels it compiles, what it makes of their code, and what it refuses."""

import inspect
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import triton
import triton.language as tl

from stillhouse.kernels.paged_attention.gpu_configs import AttendShape, tiling
from stillhouse.kernels.paged_attention.pages import PAGE_TOKENS
from tools import attention_kernels, codec_kernels
from tools.attention_kernels import AttendConfig, ChunkConfig, QueryConfig
from tools.codec_kernels import CodecConfig
from tools.compiled_kernel import Usage
from tools.hot_loop import LoopCost, hot_loop, integer_limit, loop_faults, reads_wide
from tools.kernel_report import TABLE, KernelRecord, document, markdown, staleness
from tools.kernel_tables import row_names
from tools.sass import Instruction

ROOT = Path(__file__).parents[2]
SHAPE = AttendShape(128, 128, 128, 4, 3, 4, 128)
COST = LoopCost(6.5, 1.5, 3.0, 1.0, tensor=True, wide=True)
USAGE = Usage(registers=166, stack=0, shared=24576, warps=2)
CONFIGS = [*attention_kernels.shipped(), *codec_kernels.shipped()]


def shape(dim: int, key_bits: int, value_bits: int) -> AttendShape:
    return AttendShape(dim, dim, dim, key_bits, value_bits, 4, 128)


def test_the_committed_table_is_of_these_kernels():
    """Only `make kernels` compares its figures: it takes minutes."""
    named = [
        KernelRecord(config, USAGE, COST if isinstance(config, AttendConfig) else None)
        for config in CONFIGS
    ]
    assert row_names(TABLE.read_text()) == row_names(markdown(named))
    assert f"{len(CONFIGS)} kernels" in TABLE.read_text()


def test_a_table_is_stale_by_its_names_or_by_the_same_compilers_figures():
    records = [KernelRecord(QueryConfig(90, dim, 16, full=True), USAGE) for dim in (64, 96)]
    made = document(records)
    assert staleness(made, made) is None
    assert "figures" in (staleness(made.replace("| 166 |", "| 168 |"), made) or "")
    older = made.replace(f"triton {triton.__version__}", "triton 1.0")
    assert staleness(older.replace("| 166 |", "| 168 |"), made) is None
    assert "1 rows differ" in (staleness(document(records[:1]), made) or "")
    assert "1 rows differ" in (staleness(made, document(records[:1])) or "")


def test_no_kernel_is_compiled_twice():
    assert max(Counter(CONFIGS).values()) == 1


def test_every_head_size_and_format_is_compiled():
    attend = [c for c in CONFIGS if isinstance(c, AttendConfig)]
    assert {c.kernel for c in attend} == {"attend", "chunk"}
    sizes = {(c.kernel, c.arch, c.shape.head_dim) for c in attend}
    sizes |= {(c.kernel, c.arch, c.head_dim) for c in CONFIGS if not isinstance(c, AttendConfig)}
    kernels = {"attend", "query", "merge", "chunk", "finish", "store", "encode", "decode"}
    dims = {64, 80, 96, 128, 192, 256}
    assert sizes == {(name, arch, dim) for name in kernels for arch in (80, 90) for dim in dims}
    for kernel, dim in (("attend", 64), ("attend", 128), ("attend", 256)):
        found = [c for c in attend if (c.kernel, c.arch, c.shape.head_dim) == (kernel, 90, dim)]
        assert len({c.format for c in found if c.shape.raw}) == 16  # what a cache launches
    chunks = [c for c in attend if (c.kernel, c.arch, c.shape.head_dim) == ("chunk", 90, 128)]
    assert {c.format for c in chunks} >= {"k4v4", "k3v3", "k2v2", "k8v8", "k4v3", "k8v4"}
    assert {c.shape.capped for c in chunks} == {True, False}
    assert {c.shape.page for c in chunks} >= {64, 128}
    assert any(c.shape.key_channels < c.shape.head_dim for c in chunks)


@pytest.mark.parametrize("kernel", sorted({config.kernel for config in CONFIGS}))
def test_a_launch_gives_every_constant(kernel):
    for config in (config for config in CONFIGS if config.kernel == kernel):
        function, given, types, plain = config.launch()
        parameters = inspect.signature(function.fn).parameters
        constants = {n for n, p in parameters.items() if p.annotation is tl.constexpr}
        assert constants <= given.keys()
        pointers = {n for n in parameters if n.endswith("_ptr")}
        assert pointers <= types.keys() | {n for n, value in given.items() if value is None}
        assert not plain & constants


def test_tiles_fit_pages_and_warps_have_columns():
    for config in CONFIGS:
        if isinstance(config, AttendConfig) and config.kernel == "attend":
            found = tiling(config.shape)
            assert 32 <= found.block <= max(32, config.shape.page)
            assert found.warps in (1, 2, 4)
            smaller = [tiling(replace(config.shape, page=page)).block for page in PAGE_TOKENS]
            assert smaller == sorted(smaller)


def test_warps_on_an_sm_are_limited_by_registers_and_by_shared_memory():
    assert USAGE.resident_warps(90) == 2 * 6  # 64 · 1024 / (64 · 168)
    assert replace(USAGE, shared=56 * 1024).resident_warps(90) == 2 * 4  # of 228 KiB, 57 a block
    assert replace(USAGE, shared=56 * 1024).resident_warps(80) == 2 * 2  # of 164 KiB
    assert Usage(registers=16, stack=0, shared=0, warps=1).resident_warps(90) == 32


def test_a_kernel_that_spills_or_takes_too_much_does_not_fit():
    assert USAGE.faults(80) == []
    assert replace(USAGE, stack=8).faults(90) == ["spills 8 bytes"]
    large = replace(USAGE, shared=164 * 1024)
    assert large.faults(90) == []
    assert large.faults(80) == ["takes 167936 bytes of shared memory of 166912"]


@pytest.mark.parametrize(
    ("dim", "bits", "limit"),
    [
        (128, (4, 3), 2.0),
        (256, (2, 2), 2.0),
        (128, (8, 8), 3.0),
        (128, (8, 4), 2.5),
        (64, (4, 4), 2.0),
        (64, (3, 3), 3.25),
        (64, (8, 2), 2.5),
    ],
)
def test_integer_operations_are_limited(dim, bits, limit):
    assert integer_limit(shape(dim, *bits)) == limit
    assert loop_faults(shape(dim, *bits), replace(COST, integer=limit)) == []
    assert loop_faults(shape(dim, *bits), replace(COST, integer=limit + 0.01)) == [
        f"takes {limit + 0.01:.2f} integer operations a value, more than {limit:.2f}"
    ]


def test_rows_of_several_pages_may_cost_more_integer_operations():
    assert integer_limit(replace(shape(128, 4, 4), page=16)) == 2.3
    assert integer_limit(replace(shape(128, 4, 4), page=32)) == 2.0


def test_loops_beside_tokens_in_16_bits_may_cost_a_little_more():
    assert integer_limit(replace(shape(128, 4, 4), raw=True)) == 2.1


def test_integer_operations_are_not_limited_where_columns_are_wasted():
    assert integer_limit(shape(96, 4, 4)) is None
    assert integer_limit(replace(shape(128, 4, 4), value_channels=96)) is None
    assert loop_faults(shape(96, 4, 4), replace(COST, integer=9.0)) == []


@pytest.mark.parametrize(
    ("dim", "bits", "wide"),
    [
        (64, (4, 4), True),  # rows of 32 bytes
        (64, (3, 3), True),  # of 16, beside 8
        (64, (2, 2), True),
        (80, (4, 4), False),  # of 40
        (80, (2, 2), False),  # of 20
        (80, (8, 8), True),
        (96, (4, 4), True),  # of 48
        (96, (3, 2), False),  # of 24
        (192, (2, 2), True),  # of 48
    ],
)
def test_loads_of_16_bytes_are_due_for_rows_that_they_divide(dim, bits, wide):
    assert reads_wide(shape(dim, *bits)) is wide
    assert bool(loop_faults(shape(dim, *bits), replace(COST, integer=0, wide=False))) is wide


def test_a_loop_without_tensor_instructions_is_refused():
    wanted = ["has no loop that multiplies float16 on the tensor cores"]
    assert loop_faults(SHAPE, None) == wanted
    assert loop_faults(SHAPE, replace(COST, tensor=False)) == wanted


def code(*loops: tuple[str, ...]) -> list[Instruction]:
    """Loops one behind the other, each of these opcodes."""
    found: list[Instruction] = []
    for opcodes in loops:
        start = 16 * len(found)
        for opcode in opcodes:
            found.append(Instruction("kernel", 16 * len(found), None, opcode, (), None))
        found.append(Instruction("kernel", 16 * len(found), "P0", "BRA", (hex(start),), start))
    return found


def test_the_hot_loop_multiplies_halves():
    short = ("HMMA.16816.F32",)
    longer = ("HMMA.16816.F32", "FADD")
    other = ("HMMA.1688.F32.TF32", "HMMA.16816.F32.BF16", "FADD")
    idle = ("FADD",) * 5
    found = hot_loop(code(idle, short, longer, other))
    assert [i.base for i in found.inline] == ["HMMA", "FADD", "BRA"]
    assert hot_loop(code(idle, other)) is None


def test_a_chunks_loop_is_not_limited():
    dear = replace(COST, integer=9.0, wide=False)
    assert KernelRecord(ChunkConfig(90, SHAPE), USAGE, dear).faults == []
    assert len(KernelRecord(AttendConfig(90, SHAPE), USAGE, dear).faults) == 2
    assert KernelRecord(ChunkConfig(90, SHAPE), USAGE).faults == loop_faults(SHAPE, None)


def test_a_record_has_the_faults_of_its_loop():
    config = AttendConfig(90, SHAPE)
    assert KernelRecord(config, USAGE, COST).faults == []
    bad = KernelRecord(config, replace(USAGE, stack=4), replace(COST, wide=False))
    assert [fault.split()[0] for fault in bad.faults] == ["spills", "reads"]
    assert KernelRecord(QueryConfig(90, 64, 16, full=True), USAGE).faults == []


def test_the_tables_name_every_figure():
    codec = [
        KernelRecord(CodecConfig("encode", 90, 4, 64, dtype, "norm", True), usage)
        for dtype, usage in (("fp32", USAGE), ("bf16", replace(USAGE, registers=200)))
    ]
    query = KernelRecord(QueryConfig(80, 96, 16, full=True), USAGE)
    attend = AttendConfig(90, replace(SHAPE, raw=True, capped=True))
    text = markdown([*codec, query, KernelRecord(attend, USAGE, COST)])
    assert "| encode | 90 | 64 | 4 | 2 | 200 | 0 | 24576 |\n" in text
    assert "| query | 80 | 96 | 2 | 166 | 0 | 24576 |\n" in text
    row = "| attend | sm_90 | 128 | k4v3 | 4 | 128 | raw cap | 32 | 2 | 166 | 0 | 24576 | 12 "
    assert row + "| 6.50 | 1.50 | 3.00 | 1.00 | yes |\n" in text
    lines = markdown([KernelRecord(AttendConfig(90, SHAPE), USAGE)]).splitlines()
    assert any(line.endswith("| 12 | none | none | none | none | none |") for line in lines)
    fewer = ChunkConfig(80, replace(SHAPE, key_channels=96, capped=True), check=True)
    row = "| chunk | sm_80 | 128 (96, 128) | k4v3 | 4 | 128 | cap check | 64 | 2 |"
    assert row in markdown([KernelRecord(fewer, USAGE, COST)])


def test_a_kernel_is_compiled_and_its_loop_is_counted():
    # In a process of its own: this one interprets its kernels.
    script = (
        "import json; from tools.kernel_report import *; "
        "from stillhouse.kernels.paged_attention.gpu_configs import AttendShape; "
        "record = measure(AttendConfig(90, AttendShape(64, 64, 64, 8, 8, 4, 32))); "
        "print(json.dumps([record.row(), record.faults]))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, check=True, cwd=ROOT, env=environment, capture_output=True, text=True
    )
    row, faults = json.loads(done.stdout)
    assert faults == []
    assert (row["config"]["kernel"], row["warps"], row["stack"]) == ("attend", 1, 0)
    loop = row["loop"]
    assert loop["tensor"]
    assert loop["wide"]
    # A pair of e4m3 numbers takes three operations on pairs of float16, and 4.5 on integers.
    assert loop["half"] == 1.5
    assert 2.25 < loop["integer"] < loop["instructions"]
