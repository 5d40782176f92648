"""Which tiles the Triton kernels take, and the constants that they are compiled with.

`tools/kernel_report.py` compiles these; docs/kernels.md has the instruction counts behind them.
"""

from dataclasses import dataclass
from typing import Any

from stillhouse.kernels.paged_attention.triton_unpack import elements, tile_columns, tile_count

MOST_SPLITS = 128  # of a sequence; the merge reads as many sums a query
RESIDENT_WARPS = 8  # on an SM of sm_90, by what most shipped kernels take; others have up to 16
ROWS = 16  # queries of a tile, what a product has at least: sums of more would not fit registers


@dataclass(frozen=True, slots=True)
class AttendShape:
    """What decode attention is compiled for. C: coded channels of keys, V: of values."""

    head_dim: int
    key_channels: int
    value_channels: int
    key_bits: int
    value_bits: int
    group: int
    page: int
    raw: bool = False
    capped: bool = False


@dataclass(frozen=True, slots=True)
class Tiling:
    """block: tokens of a tile. warps and stages as Triton has them. registers: most of a thread;
    None leaves it to ptxas, which may spill a few bytes to have one more block on an SM."""

    block: int
    warps: int
    stages: int = 2
    registers: int | None = None


def tiling(shape: AttendShape) -> Tiling:
    """The fewest instructions a value, no spilled register, and 8 warps or more on an SM.

    A rule that agrees with what compiling each choice shows (docs/kernels.md).
    """
    wide = padded(max(shape.key_channels, shape.value_channels))
    columns = min(
        tile_columns(shape.key_channels, shape.key_bits),
        tile_columns(shape.value_channels, shape.value_bits),
    )
    # Each warp has the sums of 64 channels. With fewer columns of a tile, warps may decode each
    # other's again.
    warps = max(1, min(wide // 64, columns // (8 if wide > 128 else 16), 4))
    if shape.page < 32:  # a tile is of 32 tokens, each with an address of its own
        warps = max(1, warps // 2)
    block = min(64 * warps, 128) // (2 if _is_tight(shape, wide) else 1)
    extra = shape.raw or shape.capped
    registers = 255 if shape.page < 128 or wide > 128 or (extra and wide > 64) else None
    return Tiling(max(32, min(block, shape.page)), warps, registers=registers)


def _is_tight(shape: AttendShape, wide: int) -> bool:
    """Whether half the tokens are as much as fits the registers."""
    channels = max(shape.key_channels, shape.value_channels)
    bits = (shape.key_bits, shape.value_bits)
    extra = shape.raw + shape.capped + (shape.group > ROWS)
    if channels % 32:
        return True
    if wide == 64:
        return False
    if bits == (4, 4):  # two sums of scores
        return extra > 1 or shape.group > ROWS or 128 < channels < 256
    if wide == 128:
        return bool(extra) or 3 in bits or bits == (4, 2)
    return bool(extra) or shape.key_bits == 3


def attend_options(shape: AttendShape, splits: int, *, check: bool, asm: bool) -> dict[str, Any]:
    """Keyword arguments of a launch of `attend_kernel`."""
    found = tiling(shape)
    options: dict[str, Any] = {
        "D": shape.head_dim, "D_PAD": padded(shape.head_dim),
        "C": shape.key_channels, "V": shape.value_channels,
        "G": shape.group, "M": ROWS,
        "PAGE": shape.page, "BLOCK": found.block, "SPLITS": splits, "STAGES": found.stages,
        "HAS_RAW": shape.raw, "HAS_CAP": shape.capped, "CHECK": check, "ASM": asm,
        "num_warps": found.warps, "num_stages": found.stages, "maxnreg": found.registers,
        "enable_fp_fusion": True, "debug": check,
    }  # fmt: skip
    return options | tile_options(shape)


def tile_options(shape: AttendShape) -> dict[str, int]:
    """How rows of both halves are cut into tiles."""
    options = {}
    for name, channels, bits in (
        ("KEY", shape.key_channels, shape.key_bits),
        ("VALUE", shape.value_channels, shape.value_bits),
    ):
        options[f"{name}_BITS"] = bits
        options[f"{name}_TILES"] = tile_count(channels, bits)
        options[f"{name}_COLUMNS"] = tile_columns(channels, bits)
    return options


def query_options(
    head_dim: int, channels: int, rows: int, *, root: bool, mapped: bool, mean: bool
) -> dict[str, Any]:
    """Keyword arguments of a launch of `query_kernel`."""
    return {
        "D": head_dim, "C": channels, "C_PAD": padded(channels), "M": rows, "CHUNK": 16,
        "HAS_ROOT": root, "HAS_MAP": mapped, "HAS_MEAN": mean,
        "num_warps": 4, "num_stages": 2, "enable_fp_fusion": True,
    }  # fmt: skip


def merge_options(shape: AttendShape, splits: int, *, mapped: bool, mean: bool) -> dict[str, Any]:
    """Keyword arguments of a launch of `merge_kernel`."""
    return {
        "D": shape.head_dim, "V": shape.value_channels, "V_PAD": padded(shape.value_channels),
        "G": shape.group, "SPLITS": splits, "SPLITS_PAD": padded(splits + shape.raw),
        "TAKEN": min(16, padded(splits)), "CHUNK": 16,
        "HAS_RAW": shape.raw, "HAS_MAP": mapped, "HAS_MEAN": mean,
        "num_warps": 4, "num_stages": 2, "enable_fp_fusion": True,
    }  # fmt: skip


def chunk_options(shape: AttendShape, *, windowed: bool, check: bool, asm: bool) -> dict[str, Any]:
    """Keyword arguments of a launch of `chunk_kernel`."""
    # What fits the registers, by compiling.
    wide = padded(shape.head_dim) > 128
    block = 32 if 8 in (shape.key_bits, shape.value_bits) else 64
    block = 16 if wide else min(block, max(shape.page, 32))
    return {
        "D": shape.head_dim, "D_PAD": padded(shape.head_dim),
        "C": shape.key_channels, "V": shape.value_channels,
        "G": shape.group, "M": 64,
        "PAGE": shape.page, "BLOCK": block, "RAW_BLOCK": min(block, 32), "STAGES": 2,
        "HAS_WINDOW": windowed, "HAS_CAP": shape.capped, "CHECK": check, "ASM": asm,
        "num_warps": 8 if wide else 4, "num_stages": 2, "enable_fp_fusion": True, "debug": check,
    } | tile_options(shape)  # fmt: skip


def finish_options(
    head_dim: int, channels: int, rows: int, *, mapped: bool, mean: bool
) -> dict[str, Any]:
    """Keyword arguments of a launch of `finish_kernel`."""
    return {
        "D": head_dim, "D_PAD": padded(head_dim), "V": channels, "M": min(32, rows_of(rows)),
        "CHUNK": 16, "HAS_MAP": mapped, "HAS_MEAN": mean,
        "num_warps": 4, "num_stages": 2, "enable_fp_fusion": True,
    }  # fmt: skip


def split_count(shape: AttendShape, programs: int, tokens: int, processors: int) -> int:
    """Parts of each sequence's tokens, so that a GPU of so many processors (SMs) is full once.

    programs: sequences times key/value heads times tiles of queries. A part has two tiles or more.
    """
    found = tiling(shape)
    resident = processors * (RESIDENT_WARPS // found.warps)
    most = min(-(-tokens // (2 * found.block)), MOST_SPLITS)
    return max(1, min(resident // max(1, programs), most))


def padded(count: int) -> int:
    """The power of two at or above, 1 at least."""
    return 1 << (max(count, 1) - 1).bit_length()


def rows_of(group: int) -> int:
    """Rows of a tile of queries: a product has 16 or more."""
    return max(ROWS, padded(group))


def has_readable_rows(channels: int) -> bool:
    """Whether `triton_unpack` reads rows of so many channels: 64, 80, … 256."""
    return channels % 16 == 0 and elements(channels, 2) >= 8 and channels <= 256
