"""`tools/sass_loops.py` finds the loops of machine code."""

import pytest

from tests.tools.machine_code import listing
from tools.sass import parse
from tools.sass_loops import Loop, loops


def extent(loop: Loop) -> tuple[int, int]:
    """Where a loop starts and how many instructions it has in line."""
    return loop.header, len(loop.inline)


def test_code_without_a_way_back_has_no_loop():
    # Where code ends, a jump to itself stands, here one that control could reach.
    assert loops(parse(listing("@P0 BRA 0x20", "EXIT", "BRA 0x20", "NOP"))) == []


def test_loops_are_nested():
    text = listing(
        "NOP",
        "MOV R1, R2",
        "FADD R1, R1, R2",
        "@P0 BRA 0x20",
        "FMUL R1, R1, R2",
        "@P1 BRA 0x10",
        "EXIT",
    )
    inner, outer = loops(parse(text))
    assert (extent(inner), inner.outer, inner.depth, inner.innermost) == ((0x20, 2), 0x10, 2, True)
    assert (extent(outer), outer.outer, outer.depth, outer.innermost) == ((0x10, 5), None, 1, False)


def test_loops_of_every_function_are_found():
    text = listing("NOP", "@P0 BRA 0x0", "EXIT", function="f") + listing(
        "@P0 BRA 0x0", function="g"
    )
    assert [(loop.function, *extent(loop)) for loop in loops(parse(text))] == [
        ("f", 0, 2),
        ("g", 0, 1),
    ]


def test_a_slow_path_and_a_subroutine_stand_out_of_line():
    text = listing(
        "NOP",
        "@P0 BRA 0x60",  # the loop
        "CALL.REL.NOINC 0x80",
        "@P1 EXIT",
        "BRA 0x10",
        "EXIT",
        "FADD R1, R1, R2",  # its slow path
        "BRA 0x20",
        "FMUL R1, R1, R2",  # the subroutine
        "RET.REL.NODEC R20 0x0",
    )
    (loop,) = loops(parse(text))
    assert [i.address for i in loop.inline] == [0x10, 0x20, 0x30, 0x40]
    assert [i.address for i in loop.out_of_line] == [0x60, 0x70, 0x80, 0x90]
    assert len(loop.body) == 8


def test_a_slow_path_right_behind_the_loop_is_out_of_line():
    (loop,) = loops(parse(listing("BRA.DIV ~URZ, 0x20", "BRA 0x0", "NOP", "BRA 0x10")))
    assert (extent(loop), len(loop.out_of_line)) == ((0, 2), 2)


def test_a_call_that_leaves_the_loop_is_no_part_of_it():
    text = listing(
        "NOP",
        "FADD R1, R1, R2",
        "@P0 CALL.REL.NOINC 0x40",  # as sm_80 leaves
        "BRA 0x10",
        "CALL.REL.NOINC 0x60",
        "EXIT",
        "RET.REL.NODEC R20 0x0",
    )
    (loop,) = loops(parse(text))
    assert (extent(loop), loop.out_of_line) == ((0x10, 3), ())


def test_a_subroutine_called_from_elsewhere_too_is_no_part_of_a_loop():
    text = listing(
        "CALL.REL.NOINC 0x40",
        "CALL.REL.NOINC 0x40",
        "@P0 BRA 0x10",
        "EXIT",
        "RET.REL.NODEC R20 0x0",
    )
    (loop,) = loops(parse(text))
    assert (extent(loop), loop.out_of_line) == ((0x10, 2), ())


def test_a_loop_may_be_entered_at_its_condition():
    text = listing("BRA 0x20", "FADD R1, R1, R2", "ISETP.GE.AND P0, PT, R1, R2, PT", "@P0 BRA 0x10")
    (loop,) = loops(parse(text))
    assert loop.header == 0x20
    assert [i.address for i in loop.inline] == [0x10, 0x20, 0x30]


def test_a_loop_around_one_that_waits_is_innermost():
    wait = "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R5], R2"
    text = listing("FADD R1, R1, R2", wait, "@!P0 BRA 0x10", "@P1 BRA 0x0", "EXIT")
    found = [(*extent(loop), loop.waits, loop.innermost) for loop in loops(parse(text))]
    assert found == [(0x10, 2, True, True), (0x0, 4, False, True)]


def test_a_branch_to_a_computed_address_is_refused():
    with pytest.raises(ValueError, match="expected branches with their target, found BRX at 0x10"):
        loops(parse(listing("NOP", "BRX R2 -0x20", "EXIT")))
