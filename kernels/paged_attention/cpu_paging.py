"""Where tokens lie: pages behind a table, or records one behind another."""

from typing import Any

from llvmlite import ir

from stillhouse.kernels.paged_attention.cpu_lanes import I64, LANES
from stillhouse.kernels.paged_attention.cpu_unpack import UnpackWriter
from stillhouse.kernels.paged_attention.pages import (
    HalfPage,
    PageFormat,
    Plane,
    RecordFormat,
    Records,
)

_LINE = 64  # bytes of a cache line


class PageWriter(UnpackWriter):
    """Reads one head's pages or records.

    key_parts, value_parts: the head's vectors and scalars of page 0, and bytes to the next page.
    table: int32 page of each `tokens` tokens; not read for records. last: where tokens end.
    """

    key_parts: tuple[Any, Any, Any]
    value_parts: tuple[Any, Any, Any]
    table: Any
    last: Any

    def __init__(
        self,
        function: ir.Function,
        permute: str,
        books: Any,
        pages: PageFormat | RecordFormat,
    ) -> None:
        super().__init__(function, permute, books)
        self.pages, self.key, self.value = pages, pages.key, pages.value

    def page_of(self, token: Any) -> tuple[Any, ...]:
        """The token's place in its page, and where that page's keys, values and scalars are."""
        b, tokens = self.b, self.pages.tokens
        if not tokens:
            return (token, *self.key_parts[:2], *self.value_parts[:2])
        page = b.sext(b.load(b.gep(self.table, [b.udiv(token, I64(tokens))])), I64)
        found = []
        for vectors, scalars, stride in (self.key_parts, self.value_parts):
            there = [b.mul(page, stride)]
            found += [b.gep(vectors, there), b.gep(scalars, there)]
        return (b.urem(token, I64(tokens)), *found)

    def value_rows(self, place: int, base: Any, slot: Any) -> list[tuple[Plane, Any]]:
        """The address of a token's row in each plane of a channel group."""
        b = self.b
        return [
            (plane, b.gep(base, [b.add(I64(plane.first), b.mul(slot, I64(plane.stride)))]))
            for plane in self.value.planes
            if plane.group == place
        ]

    def lines_of(self, at: Any, last: Any) -> list[tuple[Any, int]]:
        """The cache lines of 16 tokens, keys and values; instead of those from `last` on, of the
        ones before."""
        b = self.b
        final = b.and_(b.sub(last, I64(1)), ir.Constant(I64, -LANES))
        token = self.smallest(at, final)
        slot, keys, key_scalars, values, value_scalars = self.page_of(token)
        lines = []
        for half, base, scalars in (
            (self.key, keys, key_scalars),
            (self.value, values, value_scalars),
        ):
            for first, stride in rows_of(half):
                row = b.gep(base, [b.add(I64(first), b.mul(slot, I64(stride)))])
                lines += [(row, line) for line in range(0, LANES * stride, _LINE)]
            if not half.format.is_fp8:
                lines.append((b.gep(scalars, [b.shl(slot, I64(1))]), 0))
        return lines


def rows_of(half: HalfPage | Records) -> list[tuple[int, int]]:
    """First byte and stride of each array of rows: the planes of a page, or whole records."""
    if isinstance(half, Records):
        return [(0, half.format.packed)]
    return [(plane.first, plane.stride) for plane in half.planes]
