"""The loops of kernels that are compiled here, and the command that prints them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.sass import Kind, classify, disassemble, tally
from tools.sass_loops import loops
from tools.sass_report import report

ROOT = Path(__file__).parents[2]

KERNELS = """
import sys
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

@triton.jit
def product(a_ptr, b_ptr, out_ptr, K, N: tl.constexpr):
    n = tl.arange(0, N)
    sums = tl.zeros((N, N), tl.float32)
    for k in range(0, K, N):
        a = tl.load(a_ptr + n[:, None] * K + k + n[None, :])
        b = tl.load(b_ptr + (k + n[:, None]) * N + n[None, :])
        sums = tl.dot(a, b, sums)
    tl.store(out_ptr + n[:, None] * N + n[None, :], sums)

@triton.jit
def exponential(x_ptr, out_ptr, N: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(out_ptr + n, tl.exp(tl.load(x_ptr + n).to(tl.float32)))

SIGNATURES = {
    product: {"a_ptr": "*fp16", "b_ptr": "*fp16", "out_ptr": "*fp32", "K": "i32"},
    exponential: {"x_ptr": "*fp16", "out_ptr": "*fp32"},
}
for kernel, signature in SIGNATURES.items():
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(signature))}
    source = ASTSource(kernel, {**signature, "N": "constexpr"}, {"N": 64}, aligned)
    for arch in (80, 90):
        target = GPUTarget("cuda", arch, 32)
        compiled = triton.compile(source, target=target, options={"num_stages": 3})
        path = Path(sys.argv[1]) / f"{kernel.__name__}{arch}.cubin"
        path.write_bytes(compiled.asm["cubin"])
"""


@pytest.fixture(scope="module")
def cubins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with both kernels for both architectures."""
    folder = tmp_path_factory.mktemp("cubins")
    script = folder / "kernels.py"
    script.write_text(KERNELS)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    subprocess.run([sys.executable, str(script), str(folder)], check=True, env=environment)
    return folder


@pytest.mark.parametrize("arch", [80, 90])
def test_a_pipelined_product_is_one_loop_of_tensor_instructions(cubins, arch):
    instructions = disassemble((cubins / f"product{arch}.cubin").read_bytes())
    assert [i.address for i in instructions] == [16 * at for at in range(len(instructions))]
    (loop,) = loops(instructions)
    counts = tally(loop.inline)
    assert (loop.function, loop.innermost, loop.out_of_line) == ("product", True, ())
    # 64 x 64 x 64: 16 x 8 x 16 for each HMMA of the 4 warps, 64 x 64 x 16 for each HGMMA of all.
    assert counts.kinds[Kind.TENSOR] == {80: 32, 90: 4}[arch]
    # Two tiles of 64 x 64 halves, by 128 threads.
    assert counts.widths[Kind.GLOBAL_LOAD] == {16: 8}
    assert any(opcode.startswith("LDGSTS.") for opcode in counts.opcodes)
    assert counts.other == {}
    assert counts.kinds[Kind.FLOAT] == counts.kinds[Kind.GLOBAL_STORE] == 0


@pytest.mark.parametrize("arch", [80, 90])
def test_a_kernel_without_a_loop_has_none(cubins, arch):
    instructions = disassemble((cubins / f"exponential{arch}.cubin").read_bytes())
    assert loops(instructions) == []
    kinds = {classify(i) for i in instructions}
    assert {Kind.SPECIAL, Kind.CONVERT, Kind.GLOBAL_LOAD, Kind.GLOBAL_STORE} <= kinds
    assert Kind.TENSOR not in kinds


def test_the_command_prints_a_table(cubins):
    command = [sys.executable, "-m", "tools.sass_report", str(cubins / "product90.cubin")]
    command += ["--values", "32"]
    text = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True).stdout
    assert text == report(disassemble((cubins / "product90.cubin").read_bytes()), 32.0)
    assert "| tensor | 4 (0.12) |\n" in text
    assert "  global loads: 8 of 16 bytes\n" in text
