"""The attention kernels as they ship: what `tools/kernel_report.py` compiles of them.

Another kernel is another `Config` with a `launch`, one of `OtherConfig`, and a line of `shipped`.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from stillhouse.kernels.paged_attention.gpu_configs import (
    MOST_SPLITS,
    AttendShape,
    attend_options,
    chunk_options,
    finish_options,
    merge_options,
    query_options,
)
from stillhouse.kernels.paged_attention.gpu_store import StoreShape, store_options
from stillhouse.kernels.paged_attention.triton_attend import attend_kernel
from stillhouse.kernels.paged_attention.triton_chunk import chunk_kernel, finish_kernel
from stillhouse.kernels.paged_attention.triton_merge import merge_kernel
from stillhouse.kernels.paged_attention.triton_query import query_kernel
from stillhouse.kernels.paged_attention.triton_store import store_kernel
from tools.compiled_kernel import SHARED_BYTES, Launch

HEAD_DIMS = (64, 80, 96, 128, 192, 256)
SAME = ((4, 4), (3, 3), (2, 2), (8, 8))  # bits of keys and of values
MIXED = ((4, 3), (4, 2), (3, 2), (8, 4))
EVERY = tuple((key, value) for key in (2, 3, 4, 8) for value in (2, 3, 4, 8))
USUAL_GROUP, USUAL_PAGE = 4, 128
# Head sizes and coded channels of fits that leave some out, in keys and in values.
UNCODED = ((80, (64, 64)), (96, (80, 64)), (128, (112, 96)), (256, (192, 240)))

# Of all parameters that are no int32. Coded queries are float16, all sums float32.
_TYPES = {
    **dict.fromkeys(
        ("query_ptr", "raw_keys_ptr", "raw_values_ptr", "out_ptr", "key_ptr", "value_ptr"), "*bf16"
    ),
    "coded_ptr": "*fp16",
    **dict.fromkeys(
        ("factor_ptr", "offset_ptr", "sums_ptr", "raw_sums_ptr", "ml_ptr", "lse_ptr", "map_ptr",
         "mean_ptr", "key_matrix_ptr", "key_mean_ptr", "key_boundary_ptr", "key_centroid_ptr",
         "value_matrix_ptr", "value_mean_ptr", "value_boundary_ptr", "value_centroid_ptr"),
        "*fp32",
    ),
    **dict.fromkeys(("keys_ptr", "values_ptr", "key_pages_ptr", "value_pages_ptr"), "*u8"),
    **dict.fromkeys(
        ("table_ptr", "first_ptr", "last_ptr", "raw_first_ptr", "raw_last_ptr", "position_ptr",
         "hidden_ptr"),
        "*i32",
    ),
    "slot_ptr": "*i64",
    "columns_ptr": "*u16",
    **dict.fromkeys(("scale", "cap"), "fp32"),
}  # fmt: skip
_RAW = ("raw_keys_ptr", "raw_values_ptr", "raw_first_ptr", "raw_last_ptr")
_MAPS = ("map_ptr", "mean_ptr")
# What has any value: counts, and the length of a page table's rows.
_PLAIN = frozenset({"pages", "room", "stride_table", "ROWS", "rows", "raw_tokens", "window", "T"})


@dataclass(frozen=True, slots=True)
class AttendConfig:
    """`attend_kernel`."""

    arch: int
    shape: AttendShape
    check: bool = False
    kernel: str = "attend"

    def launch(self) -> Launch:
        given = attend_options(self.shape, 16, check=self.check, asm=True)
        if not self.shape.raw:
            given |= dict.fromkeys(_RAW)
        return Launch(attend_kernel, given, _TYPES, _PLAIN)

    @property
    def block(self) -> int:
        """Tokens of a tile."""
        return int(self.launch().given["BLOCK"])

    @property
    def values_per_thread(self) -> float:
        """That one turn of the loop decodes."""
        channels = self.shape.key_channels + self.shape.value_channels
        return float(self.block * channels / (32 * self.launch().given["num_warps"]))

    @property
    def format(self) -> str:
        """As "k4v3"."""
        return f"k{self.shape.key_bits}v{self.shape.value_bits}"


@dataclass(frozen=True, slots=True)
class ChunkConfig(AttendConfig):
    """`chunk_kernel`, with a window."""

    kernel: str = "chunk"

    def launch(self) -> Launch:
        given = chunk_options(self.shape, windowed=True, check=self.check, asm=True)
        return Launch(chunk_kernel, given, _TYPES, _PLAIN)


@dataclass(frozen=True, slots=True)
class QueryConfig:
    """`query_kernel`; full: with a map and a mean."""

    arch: int
    head_dim: int
    rows: int
    full: bool
    kernel: str = "query"

    def launch(self) -> Launch:
        dim, full = self.head_dim, self.full
        given = query_options(dim, dim, self.rows, root=full, mapped=full, mean=full)
        return Launch(query_kernel, given | _absent(full), _TYPES, _PLAIN)


@dataclass(frozen=True, slots=True)
class MergeConfig:
    """`merge_kernel`; full: with a map, a mean and tokens in 16 bits."""

    arch: int
    head_dim: int
    splits: int
    full: bool
    kernel: str = "merge"

    def launch(self) -> Launch:
        shape = _shape(self.head_dim, (4, 4), raw=self.full)
        given = merge_options(shape, self.splits, mapped=self.full, mean=self.full)
        return Launch(merge_kernel, given | _absent(self.full), _TYPES, _PLAIN)


@dataclass(frozen=True, slots=True)
class FinishConfig:
    """`finish_kernel`, with a map and a mean."""

    arch: int
    head_dim: int
    kernel: str = "finish"

    def launch(self) -> Launch:
        given = finish_options(self.head_dim, self.head_dim, 1024, mapped=True, mean=True)
        return Launch(finish_kernel, given, _TYPES, _PLAIN)


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """`store_kernel`, with maps and means where bits are not 8; few: of small tiles."""

    arch: int
    head_dim: int
    bits: tuple[int, int]
    few: bool
    kernel: str = "store"

    def launch(self) -> Launch:
        halves, absent = [], dict[str, None]()
        for name, bits in zip(("key", "value"), self.bits, strict=True):
            coded = bits != 8
            kind = "least_squares" if coded else ""
            halves.append(StoreShape(self.head_dim, bits, kind, mapped=coded, mean=coded))
            if not coded:
                parts = ("matrix", "mean", "boundary", "centroid")
                absent |= dict.fromkeys(f"{name}_{part}_ptr" for part in parts)
        given = store_options(self.head_dim, USUAL_PAGE, *halves, few=self.few)
        return Launch(store_kernel, given | absent, _TYPES, _PLAIN)


OtherConfig = QueryConfig | MergeConfig | FinishConfig | StoreConfig
AttentionConfig = AttendConfig | OtherConfig


def shipped() -> Iterator[AttentionConfig]:
    """Every head size, format and flag, not every combination of them."""
    for arch in SHARED_BYTES:
        yield from (AttendConfig(arch, shape) for shape in _shapes(arch))
        yield AttendConfig(arch, _shape(128, (4, 4), raw=True, capped=True), check=True)
        yield ChunkConfig(arch, _shape(128, (4, 4), capped=True), check=True)
        yield from (ChunkConfig(arch, _shape(dim, (4, 4), coded=c)) for dim, c in UNCODED)
        for dim in HEAD_DIMS:
            yield from (ChunkConfig(arch, shape) for shape in _chunk_shapes(arch, dim))
            yield from _others(arch, dim)


def _shapes(arch: int) -> Iterator[AttendShape]:
    for dim in HEAD_DIMS:
        yield from (_shape(dim, bits) for bits in _formats(arch, dim))
        # What a cache launches: its sinks and recent tokens are in 16 bits.
        yield from (_shape(dim, bits, raw=True) for bits in (EVERY if arch == 90 else SAME))
    for dim, coded in UNCODED:
        yield _shape(dim, (4, 4), coded=coded, raw=True)
    # A page of 16 tokens is less than a tile, one of 64 less than the largest.
    for bits, (dim, page) in itertools.product(SAME, ((128, 16), (128, 64), (256, 16))):
        yield _shape(dim, bits, page=page)
    # Two tiles of queries.
    for bits in SAME:
        yield _shape(128, bits, group=32)
    for dim, bits in itertools.product((64, 128, 256), ((4, 4), (2, 2), (8, 4))):
        yield _shape(dim, bits, raw=True, capped=True)


def _formats(arch: int, dim: int) -> Sequence[tuple[int, int]]:
    if dim == 128:
        return EVERY if arch == 90 else SAME + MIXED
    return SAME if arch == 90 else ()


def _chunk_shapes(arch: int, dim: int) -> Iterator[AttendShape]:
    if dim == 128:
        yield from (_shape(dim, bits) for bits in SAME + MIXED)
    else:
        yield from (_shape(dim, bits) for bits in (SAME if arch == 90 else SAME[:1]))
    if dim in (64, 128, 256):
        yield _shape(dim, (4, 4), capped=True)
        yield _shape(dim, (4, 4), page=64)


def _others(arch: int, dim: int) -> Iterator[OtherConfig]:
    yield QueryConfig(arch, dim, 16, full=True)
    yield QueryConfig(arch, dim, 32, full=True)
    yield QueryConfig(arch, dim, 16, full=False)
    yield MergeConfig(arch, dim, MOST_SPLITS, full=True)
    yield MergeConfig(arch, dim, 1, full=False)
    yield FinishConfig(arch, dim)
    for few in (True, False):
        yield StoreConfig(arch, dim, (4, 3), few)  # 3 bits have two planes
    yield StoreConfig(arch, dim, (8, 2), few=False)


def _shape(
    dim: int,
    bits: tuple[int, int],
    *,
    group: int = USUAL_GROUP,
    page: int = USUAL_PAGE,
    coded: tuple[int, int] | None = None,
    raw: bool = False,
    capped: bool = False,
) -> AttendShape:
    return AttendShape(dim, *(coded or (dim, dim)), *bits, group, page, raw, capped)


def _absent(full: bool) -> dict[str, None]:
    return {} if full else dict.fromkeys(_MAPS)
