"""What `doctor` makes of the check of the attention kernels."""

import json
from subprocess import CompletedProcess

from stillhouse.pipelines.diagnosis import Check, kernel_checks

CPU: dict[str, object] = {"gpu": None, "name": "fp8 D=256", "error": 2e-7, "allowed": 1e-4}
GPU: dict[str, object] = {"gpu": "NVIDIA A100", "name": "k3v3 D=64", "error": 2e-2, "allowed": 4e-3}


def checks(*lines: dict[str, object], code: int = 0, said: str = "") -> list[Check]:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    return list(kernel_checks(CompletedProcess([], code, text, said)))


def test_a_cpu_alone() -> None:
    [found] = checks(CPU)
    assert (found.name, found.passed) == ("attention kernels", True)
    assert found.found == "within 2e-07 of float64 over packed pages (worst: fp8 D=256)"


def test_a_gpu_beside_it_that_is_wrong() -> None:
    cpu, gpu = checks(CPU, GPU)
    assert cpu.passed
    assert (gpu.name, gpu.passed) == ("attention kernels of NVIDIA A100", False)
    assert gpu.cure == "report this output"


def test_a_gpus_kernels_that_do_not_compile_leave_the_cpus() -> None:
    cpu, gpu = checks(CPU, code=1, said="Traceback\nRuntimeError: no ptxas\n")
    assert cpu.passed
    assert (gpu.passed, gpu.found) == (False, "RuntimeError: no ptxas")
