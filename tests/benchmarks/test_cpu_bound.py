"""The bounds of the CPU benchmark: what is counted, and that it is what is measured."""

import re

import pytest

from benchmarks.cpu_bound import Mix, mix_text
from stillhouse.kernels.paged_attention import cpu_compile


def test_a_mix_counts_multiply_adds_table_reads_and_shifts():
    # 4 bits: a dword of a key has 8 indices, a byte of a value 2.
    found = Mix.of(4, 2, 33)
    assert found.products == 2 + 1
    assert found.reads == 1 + (5 * 4 / 32 + 4 / 8) / 2
    assert found.integers == ((1 - 1 / 8) + (1 - 1 / 2)) / 2
    # 3 bits: planes of 2 bits and of 1, merged.
    found = Mix.of(3, 2, 33)
    assert found.integers == ((3 / 4 + 1 - 1 / 4) + (1 - 2 / 8 + 2)) / 2


def test_no_instruction_of_a_mix_is_merged_or_dropped():
    text = cpu_compile.assembly_of(mix_text(Mix(3.0, 1.5, 0.5)))
    found = [len(re.findall(rf"\tv{name}", text)) for name in ("fmadd", "perm(ps|d)", "psrlv")]
    permute = cpu_compile.processor().permute
    # Registers of 8 lanes: two of each, and two halves of a table for both.
    shares = {"avx512": (1, 1, 1), "avx2": (2, 4, 2)}.get(permute)
    if shares is None:
        pytest.skip("this processor has no instruction that reads a table")
    assert found == [16 * n * share for n, share in zip((3, 1.5, 0.5), shares, strict=True)]
