"""Machine code as cuobjdump prints it."""

from tools.sass import Instruction, parse

HEADING = '\t\tFunction : {}\n\t.headerflags\t@"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"\n'


def listing(*lines: str, function: str = "kernel") -> str:
    """The lines as cuobjdump prints them: an address, and the encoding at the side and below."""
    rows = (
        f"        /*{16 * at:04x}*/  {line} ;  /* 0x{at:016x} */\n{'':60}/* 0x000fe20000000800 */\n"
        for at, line in enumerate(lines)
    )
    return HEADING.format(function) + "".join(rows)


def one(line: str) -> Instruction:
    (instruction,) = parse(listing(line))
    return instruction
