"""Decode attention over packed pages on a GPU: three Triton kernels, nothing decoded in memory.

A query goes into the keys' coded basis once (`triton_query`), splits of each sequence are attended
to side by side (`triton_attend`), and merged and mapped back once (`triton_merge`). Tokens in 16
bits, as attention sinks and recent ones, meet the packed ones in one softmax.

The host waits for nothing but the check of the page table, which `trusted` leaves out; with it and
a fixed `tokens` a call can be captured in a CUDA graph, when one like it has compiled the kernels
and made `columns`. Importing this module needs no
GPU; calling it needs CUDA tensors, or the interpreter (TRITON_INTERPRET=1) for CPU tensors.

Shape suffixes: B sequences, H key/value heads, G queries of each, N pages, Y bytes of a half page,
W pages of a sequence, R tokens in 16 bits, D head size, C coded channels.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from stillhouse.kernels.paged_attention.gpu_configs import (
    ROWS,
    AttendShape,
    attend_options,
    merge_options,
    query_options,
    rows_of,
    split_count,
)
from stillhouse.kernels.paged_attention.gpu_refusals import (
    require_bases,
    require_codec,
    require_decode,
    require_table,
)
from stillhouse.kernels.paged_attention.pages import PageFormat, VectorFormat
from stillhouse.kernels.paged_attention.refusals import require_least
from stillhouse.kernels.paged_attention.triton_attend import attend_kernel
from stillhouse.kernels.paged_attention.triton_merge import merge_kernel
from stillhouse.kernels.paged_attention.triton_query import query_kernel
from stillhouse.kernels.paged_attention.triton_unpack import column_tables
from stillhouse.kernels.paged_attention.units import LOG2E
from stillhouse.kernels.turboquant import FittedCodec, Fp8Codec, MseCodec

GpuCodec = MseCodec | FittedCodec | Fp8Codec
ASM = isinstance(attend_kernel, triton.runtime.JITFunction)  # the interpreter has no PTX
_PROCESSORS = 132  # SMs of an H100: what the interpreter's grids are made for


@dataclass(frozen=True, eq=False, slots=True)
class CodedBasis:
    """How a codec's vectors relate to its coded channels, float32 and contiguous.

    into_HDC: takes a query where its product with coded vectors is its product with the decoded.
    back_HCD: takes sums of coded vectors to those of decoded ones without their mean. Both [1, …]
    where heads share them, None for the identity. mean_HD: what decoding adds, None for nothing.
    heads: H where each has a fit of its own, None where any number is taken.
    """

    format: VectorFormat
    head_dim: int
    heads: int | None = None
    into_HDC: Tensor | None = None
    back_HCD: Tensor | None = None
    mean_HD: Tensor | None = None

    @classmethod
    def of(cls, codec: GpuCodec, device: torch.device | str) -> "CodedBasis":
        """ValueError for a codec whose vectors no Triton kernel reads."""
        format = require_codec(codec)
        if isinstance(codec, Fp8Codec):
            return cls(format, codec.head_dim)
        fitted = codec.heads if isinstance(codec, FittedCodec) else None
        heads, dim, channels = fitted or 1, codec.head_dim, format.channels
        own = codec.fit.mean_HD if isinstance(codec, FittedCodec) else codec.rotation.matrix
        # The maps are linear: their matrices are what they make of the unit vectors.
        unit_DD, unit_CC = (
            torch.eye(n, dtype=torch.float32, device=own.device) for n in (dim, channels)
        )
        into_HDC = codec.query_in_coded(unit_DD.expand(1, heads, dim, dim))[0]
        back_HCD = codec.from_coded(unit_CC.expand(1, heads, channels, channels))[0]
        mean_HD = codec.fit.mean_HD if isinstance(codec, FittedCodec) else None
        if mean_HD is not None and not bool(mean_HD.any()):
            mean_HD = None
        parts = (
            None if part is None else part.float().contiguous().to(device)
            for part in (into_HDC, back_HCD, mean_HD)
        )
        return cls(format, dim, fitted, *parts)

    @property
    def nbytes(self) -> int:
        """Of its tensors."""
        parts = (self.into_HDC, self.back_HCD, self.mean_HD)
        return sum(part.untyped_storage().nbytes() for part in parts if part is not None)


class RawTokens(NamedTuple):
    """Tokens in 16 bits that share the softmax: of sequence b those from first_B[b] to last_B[b].

    key_BHRD, value_BHRD: in the queries' dtype, each head's tokens contiguous. Ends are int32.
    """

    key_BHRD: Tensor
    value_BHRD: Tensor
    first_B: Tensor
    last_B: Tensor


class Sequences(NamedTuple):
    """Where packed tokens lie. table_BW: int32, the page of each `page` tokens; of sequence b those
    from first_B[b] to last_B[b], int32, are attended to."""

    table_BW: Tensor
    first_B: Tensor
    last_B: Tensor


class GpuDecoder:
    """Attends over pages of keys and values of two codecs' vectors.

    page: tokens of a page. scaling: of scores. softcap: of scores, 0 for none. check: bounds are
    checked in the kernel as well, slowly. ValueError for vectors of another head size.
    """

    def __init__(
        self,
        key: CodedBasis,
        value: CodedBasis,
        page: int,
        head_dim: int,
        *,
        scaling: float,
        softcap: float = 0.0,
        check: bool = False,
    ) -> None:
        require_bases((key, value), head_dim)
        self.pages = PageFormat.of(key.format, value.format, page)
        self.key, self.value, self.head_dim, self.check = key, value, head_dim, check
        self.scale, self.cap = scaling * LOG2E, softcap * LOG2E  # in units of log2, as all scores

    def attend(
        self,
        query_BHGD: Tensor,
        keys_NHY: Tensor,
        values_NHY: Tensor,
        sequences: Sequences,
        *,
        raw: RawTokens | None = None,
        tokens: int | None = None,
        splits: int | None = None,
        trusted: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """softmax(cap(q · keys · scaling)) · values, and the logarithm of each sum of exponentials.

        query_BHGD: float16 or bfloat16, each head's queries contiguous. keys_NHY, values_NHY: uint8
        pages (`HalfPage`), each contiguous. tokens: of the longest sequence as far as the host
        knows, by default all that the table has room for; splits: parts of a sequence, chosen from
        `tokens` and the device by default. trusted: pages and ranges are not looked at.

        Returns [B, H, G, D] in the queries' dtype and float32 [B, H, G]: zeros and -inf where no
        token is seen. ValueError, before anything is launched, for what does not fit.
        """
        require_decode(self, query_BHGD, (keys_NHY, values_NHY), sequences, raw)
        require_least("splits", splits, 1)
        if not trusted:
            require_table(self.pages.tokens, (keys_NHY, values_NHY), sequences, raw)
        shape = self.shape(query_BHGD, raw=raw is not None)
        if splits is None:
            room = sequences.table_BW.shape[1] * self.pages.tokens
            batch, heads, group, _ = query_BHGD.shape
            programs = batch * heads * triton.cdiv(group, ROWS)
            processors = _processors(query_BHGD.device)
            splits = split_count(shape, programs, room if tokens is None else tokens, processors)
        pages = (keys_NHY, values_NHY)
        with torch.cuda.device_of(query_BHGD):
            sums = self._attend(shape, splits, query_BHGD, pages, sequences, raw)
            return self._merge(shape, splits, query_BHGD, sums)

    def shape(self, query_BHGD: Tensor, *, raw: bool) -> AttendShape:
        """What its kernels are compiled for."""
        key, value = self.key.format, self.value.format
        return AttendShape(
            self.head_dim, key.channels, value.channels, key.groups[0].bits, value.groups[0].bits,
            query_BHGD.shape[2], self.pages.tokens, raw, bool(self.cap),
        )  # fmt: skip

    def coded(self, query_BHRD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries in the keys' coded basis, float16 [B, H, R, C], and float32 factors and offsets
        [B, H, R]; see `query_kernel`."""
        batch, heads, count, dim = query_BHRD.shape
        basis, device = self.key, query_BHRD.device
        channels = basis.format.channels
        coded = torch.empty((batch, heads, count, channels), dtype=torch.float16, device=device)
        factor, offset = (
            torch.empty((batch, heads, count), dtype=torch.float32, device=device) for _ in range(2)
        )
        rows = rows_of(min(count, 32))
        options = query_options(
            dim,
            channels,
            rows,
            root=not basis.format.is_fp8,
            mapped=basis.into_HDC is not None,
            mean=basis.mean_HD is not None,
        )
        query_kernel[(triton.cdiv(count, rows), heads, batch)](
            query_BHRD, basis.into_HDC, basis.mean_HD, coded, factor, offset, self.scale,
            *query_BHRD.stride()[:2], head_stride(basis.into_HDC), head_stride(basis.mean_HD),
            count, **options,
        )  # fmt: skip
        return coded, factor, offset

    def columns(self, device: torch.device) -> Tensor:
        """`column_tables` of keys and of values, uint16 [4, 32], kept."""
        groups = (self.key.format.groups[0], self.value.format.groups[0])
        return _columns(tuple((group.channels, group.bits) for group in groups), device)

    def _attend(
        self,
        shape: AttendShape,
        splits: int,
        query: Tensor,
        pages: tuple[Tensor, Tensor],
        sequences: Sequences,
        raw: RawTokens | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, heads, group, dim = query.shape
        coded = self.coded(query)
        every = splits + shape.raw
        sums = floats(query, batch, heads, splits, group, shape.value_channels)
        raw_sums = floats(query, batch, heads, group, dim) if raw else sums
        ml = floats(query, batch, heads, every, 2, group)
        raw_parts = (None,) * 4 if raw is None else raw
        raw_strides = [0] * 4
        if raw is not None:
            raw_strides = [n for half in raw[:2] for n in half.stride()[:2]]
        table = sequences.table_BW
        page_strides = [stride for half in pages for stride in half.stride()[:2]]
        attend_kernel[(every * triton.cdiv(group, ROWS), heads, batch)](
            query, *coded, *pages, self.columns(query.device), *sequences, *raw_parts,
            sums, raw_sums, ml,
            self.scale, self.cap, *query.stride()[:2], *page_strides, table.stride(0),
            *raw_strides, min(half.shape[0] for half in pages), table.shape[1] * self.pages.tokens,
            0 if raw is None else raw.key_BHRD.shape[2],
            **attend_options(shape, splits, check=self.check, asm=ASM),
        )  # fmt: skip
        return sums, raw_sums, ml

    def _merge(
        self,
        shape: AttendShape,
        splits: int,
        query: Tensor,
        sums: tuple[Tensor, Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        batch, heads, group, _ = query.shape
        basis = self.value
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        lse = floats(query, batch, heads, group)
        mapped, mean = basis.back_HCD is not None, basis.mean_HD is not None
        merge_kernel[(group, heads, batch)](
            *sums, basis.back_HCD, basis.mean_HD, out, lse,
            head_stride(basis.back_HCD), head_stride(basis.mean_HD),
            **merge_options(shape, splits, mapped=mapped, mean=mean),
        )  # fmt: skip
        return out, lse


def floats(like: Tensor, *shape: int) -> Tensor:
    """Room for float32 on the device of `like`."""
    # An explicit dtype: a serving engine runs models under a bfloat16 default dtype.
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def head_stride(part: Tensor | None) -> int:
    """Elements from one head to the next; 0 where all share it."""
    return 0 if part is None or part.shape[0] == 1 else part.stride(0)


@cache
def _columns(halves: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    rows = [row for channels, bits in halves for row in column_tables(channels, bits)]
    return torch.tensor(rows, dtype=torch.uint16, device=device)


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _PROCESSORS
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.multi_processor_count)
