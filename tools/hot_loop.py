"""What the hot loop of the attention kernel costs a decoded value, and how much it may cost."""

from dataclasses import dataclass

from stillhouse.kernels.paged_attention.gpu_configs import AttendShape, tiling
from tools import sass
from tools.sass_loops import Loop, loops

# Integer operations a decoded value. A pair of computed centroids takes one logical operation and
# some shifts, one that is looked up about 2 a value (docs/kernels.md); a pair of e4m3 numbers, made
# float16 by moving their bits, takes 4.5: 2.25 a value before anything else.
_LIMITS = {2: 2.0, 3: 2.0, 4: 2.0, 8: 3.0}
# Rows of 64 channels of 3 bits are read twice, side by side (`triton_unpack`), so that bringing
# both planes' bits together, and where each half has them, is shared by half as many values.
_LIMITS_64 = _LIMITS | {3: 3.25}
# Coded channels; with others columns of tiles, which are powers of two, are decoded for nothing.
LIMITED_CHANNELS = frozenset({64, 128, 256})
_GATHERED = 0.3  # more where a tile has several pages, and each row an address of its own
# More beside tokens in 16 bits, whose own loop ptxas pays for here: k4v3 at 128 takes 2.07 on sm_90
# instead of 1.98, in the same loop.
_BESIDE_RAW = 0.1


@dataclass(frozen=True, slots=True)
class LoopCost:
    """Instructions of one turn, divided by the values that it decodes: all, those on integers, on
    pairs of float16, on float32. tensor: whether the tensor cores multiply; wide: whether global
    memory is read by 16 bytes."""

    instructions: float
    integer: float
    half: float
    single: float
    tensor: bool
    wide: bool


def loop_cost(cubin: bytes, values_per_thread: float) -> LoopCost | None:
    """Of the hot loop of a cubin's only kernel; None where none has tensor instructions."""
    found = hot_loop(sass.disassemble(cubin))
    if found is None:
        return None
    counts = sass.tally(found.inline)
    each = sass.per_value(counts, values_per_thread)
    return LoopCost(
        counts.instructions / values_per_thread,
        each[sass.Kind.INTEGER],
        each[sass.Kind.HALF],
        each[sass.Kind.FLOAT],
        tensor=True,
        wide=counts.has_16_byte_loads,
    )


def hot_loop(instructions: list[sass.Instruction]) -> Loop | None:
    """The longest innermost loop that multiplies float16 on the tensor cores.

    Tokens in 16 bits have a loop of their own, in TF32 or bfloat16.
    """
    found = [
        loop
        for loop in loops(instructions)
        if loop.innermost and any(map(_multiplies_halves, loop.inline))
    ]
    return max(found, key=lambda loop: len(loop.inline), default=None)


def _multiplies_halves(instruction: sass.Instruction) -> bool:
    is_tensor = sass.classify(instruction) is sass.Kind.TENSOR
    return is_tensor and not {"TF32", "BF16"} & set(instruction.modifiers)


def integer_limit(shape: AttendShape) -> float | None:
    """The most integer operations a value, of keys and values on average; None: no limit."""
    keys, values = shape.key_channels, shape.value_channels
    if not {keys, values} <= LIMITED_CHANNELS:
        return None
    limits = keys * _limit(keys, shape.key_bits) + values * _limit(values, shape.value_bits)
    gathered = _GATHERED if shape.page < tiling(shape).block else 0.0
    return limits / (keys + values) + gathered + (_BESIDE_RAW if shape.raw else 0.0)


def _limit(channels: int, bits: int) -> float:
    return (_LIMITS_64 if channels == 64 else _LIMITS)[bits]


def reads_wide(shape: AttendShape) -> bool:
    """Whether 16-byte loads are due: a half's rows are multiples of 16 bytes, so that each thread's
    part of a row begins at one. Those of 80 channels of 4 bits, as an example, have 40 bytes."""
    halves = (
        (shape.key_channels, shape.key_bits),
        (shape.value_channels, shape.value_bits),
    )
    # Of 3 bits, the plane of 2: that of 1 is half as wide.
    return any(channels * (2 if bits == 3 else bits) % 128 == 0 for channels, bits in halves)


def loop_faults(
    shape: AttendShape, cost: LoopCost | None, *, many_queries: bool = False
) -> list[str]:
    """What is wrong with a loop; empty where nothing is.

    many_queries: each value meets 64 queries of a chunk, not 16, so that products and softmax cost
    more than decoding, and each warp decodes what others decode, too: nothing more is asked.
    """
    if cost is None or not cost.tensor:
        return ["has no loop that multiplies float16 on the tensor cores"]
    if many_queries:
        return []
    found = []
    if reads_wide(shape) and not cost.wide:
        found.append("reads rows of multiples of 16 bytes, but none by 16 bytes")
    limit = integer_limit(shape)
    if limit is not None and cost.integer > limit:
        found.append(f"takes {cost.integer:.2f} integer operations a value, more than {limit:.2f}")
    return found
