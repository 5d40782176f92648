"""`tools/sass.py` reads instructions and knows what they do."""

import pytest

from tests.tools.machine_code import HEADING, listing, one
from tools.sass import (
    Instruction,
    Kind,
    access_width,
    classify,
    disassemble,
    parse,
    per_value,
    tally,
)

KINDS = """
integer: LOP3.LUT R4, R4, 0x7f0, RZ, 0xc0, !PT
integer: SHF.R.U32.HI R1, RZ, 0x3, R0
integer: PRMT R1, R2, 0x1, R3
integer: IADD3 R1, P0, R2, R3, RZ
integer: IMAD.SHL.U32 R4, R0, 0x10, RZ
integer: IMAD.U32 R4, R0, 0x10000, RZ
integer: IMAD.WIDE R20, R61, 0x2, R4
integer: IMAD.X R1, RZ, RZ, R17, P3
integer: LEA.HI.X.SX32 R5, R5, UR7, 0x1, P0
integer: ISETP.GE.AND P0, PT, R12, 0x1, PT
integer: SEL R1, R2, R3, P0
integer: VIADD R1, R2, 0x1
move: MOV R1, R2
move: IMAD.MOV.U32 R1, RZ, RZ, R2
move: IMAD.MOV R3, RZ, RZ, -R3
move: CS2R R24, SRZ
move: IMAD.U32 R1, RZ, RZ, UR4
move: HFMA2.MMA R5, -RZ, RZ, 1.875, 0
move: @P0 MOV R1, R2
convert: F2F.F32.F64 R1, R2
convert: I2FP.F32.S32 R1, R2
convert: F2I.FTZ.NTZ R1, R2
convert: I2F R1, R2
convert: F2FP.BF16.F32.PACK_AB R1, R2, R3
convert: HADD2.F32 R5, -RZ, R4.H0_H0
half: HFMA2 R1, R2, R3, R4
half: HFMA2.BF16_V2 R1, R2, R3, -RZ
half: HADD2 R1, R2, R3
half: HMNMX2 R1, R2, R3, PT
half: HMUL2 R1, R2, R3
half: HSETP2.GT.AND P0, PT, R1, R2, PT
half: HADD2.F32 R5, R3, R4.H0_H0
float: FFMA R1, R2, R3, R4
float: FADD.FTZ R1, -RZ, R2
float: FMNMX R1, R2, R3, PT
float: FSEL R1, R2, RZ, P0
special: MUFU.EX2 R1, R2
tensor: HMMA.16816.F32 R4, R8, R12, R4
tensor: HGMMA.64x64x16.F32 R24, gdesc[UR4], R24, gsb0
global load: LDG.E.128 R4, desc[UR4][R2.64]
global load: LDGSTS.E [R1], [R2.64]
global load: UTMALDG.2D [UR8], [UR4]
global store: STG.E.128 desc[UR14][R2.64], R40
global store: UTMASTG.2D [UR8], [UR4]
shared load: LDS.64 R4, [R2]
shared load: LDSM.16.MT88.4 R4, [R2+0x800]
shared store: STS.128 [R2], R4
shared store: STSM.16.M88.4 [R2], R4
shuffle: SHFL.BFLY PT, R1, R2, 0x10, 0x1f
barrier: BAR.SYNC.DEFER_BLOCKING 0x0
barrier: DEPBAR.LE SB0, 0x2
barrier: LDGDEPBAR
barrier: WARPSYNC.ALL
barrier: WARPGROUP.ARRIVE
barrier: SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R5+UR6], R2
barrier: UTMACMDFLUSH
control: @P0 EXIT
control: BRA 0x10
control: BSSY B0, 0x10
control: CALL.REL.NOINC 0x10
control: USETMAXREG.DEALLOC.CTAPOOL 0x18
uniform: UIADD3 UR4, UR4, 0x1, URZ
uniform: ULOP3.LUT UR4, UR4, 0x1
uniform: UMOV UR4, 0x1
uniform: R2UR UR4, R2
uniform: ULDC UR4
nop: NOP
nop: @!PT LDS RZ, [RZ]
nop: @!UPT UIADD3 URZ, URZ, URZ, URZ
other: STL [R1], R2
other: LDC R1, c[0x0][0x28]
other: ATOMG.E.ADD PT, R1, [R2], R3
other: DMUL R2, R4, R6
other: XYZZY R1
"""

# Compiled in a process of its own: this one interprets its kernels.


def test_an_instruction_has_a_predicate_an_opcode_and_operands():
    text = listing("NOP", "@!P0 LDGSTS.E.BYPASS.128 [R39+0x800], desc[UR14][R6.64], P1")
    found = parse(text)[1]
    operands = ("[R39+0x800]", "desc[UR14][R6.64]", "P1")
    assert found == Instruction("kernel", 16, "!P0", "LDGSTS.E.BYPASS.128", operands, None)
    assert (found.base, found.modifiers) == ("LDGSTS", ("E", "BYPASS", "128"))


@pytest.mark.parametrize(
    ("line", "target"),
    [
        ("@!P0 BRA 0x1f0", 0x1F0),
        ("BRA.U !UP0, 0x1f0", 0x1F0),
        ("BRA.DIV ~URZ, 0x1f0", 0x1F0),
        ("CALL.REL.NOINC 0x1f0", 0x1F0),
        ("WARPSYNC.COLLECTIVE R15, 0x1f0", 0x1F0),
        ("WARPSYNC 0xffffffff", None),  # a mask
        ("BSSY B0, 0x1f0", None),
        ("RET.REL.NODEC R20 0x0", None),
        ("UMOV UR4, 0x400", None),
        ("EXIT", None),
    ],
)
def test_branches_have_a_target(line, target):
    assert one(line).target == target


@pytest.mark.parametrize("text", ["", HEADING.format("kernel"), "        /*0000*/  ??? ;\n"])
def test_what_is_no_machine_code_is_refused(text):
    with pytest.raises(ValueError, match=r"expected .* from cuobjdump, found"):
        parse(text)


def test_what_is_no_cubin_is_refused():
    with pytest.raises(ValueError, match="expected a cubin, found 5 bytes"):
        disassemble(b"bytes")


@pytest.mark.parametrize("row", KINDS.strip().splitlines())
def test_an_instruction_has_a_kind(row):
    kind, line = row.split(": ")
    assert classify(one(line)) is Kind(kind)


@pytest.mark.parametrize(
    ("line", "width"),
    [
        ("LDG.E.LTC128B R1, [R2.64]", 4),
        ("LDG.E.U8.CONSTANT R1, [R2.64]", 1),
        ("LDG.E.U16 R1, [R2.64]", 2),
        ("LDG.E.64.CONSTANT R2, [R4.64]", 8),
        ("LDGSTS.E.BYPASS.LTC128B.128 [R1], [R2.64]", 16),
        ("STS.64 [R1], R2", 8),
        ("LDSM.16.M88 R1, [R2]", 4),
        ("LDSM.16.M88.2 R2, [R4]", 8),
        ("STSM.16.MT88.4 [R2], R4", 16),
        ("UTMALDG.2D [UR8], [UR4]", None),
        ("MOV R1, R2", None),
    ],
)
def test_accesses_to_memory_have_a_width(line, width):
    assert access_width(one(line)) == width


def test_a_tally_drops_nothing():
    text = listing(
        "LDG.E.128 R4, [R2.64]",
        "@P0 LDG.E.128 R4, [R2.64]",
        "LDG.E.U8 R4, [R2.64]",
        "UTMALDG.2D [UR8], [UR4]",
        "@!PT LDS RZ, [RZ]",
        "LDS R1, [R2]",
        "XYZZY.A R1",
        "FADD R1, R1, R2",
    )
    counts = tally(parse(text))
    assert counts.kinds == {
        Kind.GLOBAL_LOAD: 4,
        Kind.NOP: 1,
        Kind.SHARED_LOAD: 1,
        Kind.OTHER: 1,
        Kind.FLOAT: 1,
    }
    assert counts.instructions == sum(counts.opcodes.values()) == 8
    assert counts.opcodes["@!PT LDS"] == counts.opcodes["LDS"] == 1
    assert counts.other == {"XYZZY.A": 1}
    assert counts.widths[Kind.GLOBAL_LOAD] == {16: 2, 1: 1, None: 1}
    assert counts.global_bytes == {16: 32, 1: 1}
    assert counts.has_16_byte_loads
    assert not tally(parse(listing("LDG.E.64 R4, [R2.64]", "LDS.128 R4, [R2]"))).has_16_byte_loads


def test_a_value_takes_its_part_of_the_instructions():
    counts = tally(parse(listing("FADD R1, R1, R2", "FMUL R1, R1, R2", "PRMT R1, R2, 0x1, R3")))
    part = per_value(counts, 4)
    assert (part[Kind.FLOAT], part[Kind.INTEGER], part[Kind.TENSOR]) == (0.5, 0.25, 0.0)
    with pytest.raises(ValueError, match="expected values_per_thread above 0, found 0"):
        per_value(counts, 0)
