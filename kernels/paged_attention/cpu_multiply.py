"""LLVM functions that multiply small matrices in float32: sums of 6 rows lie in registers.

C [6, 16 n] = A [6, depth] · B [depth, 16 n], or added to what C holds. 24 sums hide a fused
multiply-add's latency, and each number that is loaded meets 4 or 6 others.
"""

from typing import Any

from llvmlite import ir

from stillhouse.kernels.paged_attention.cpu_lanes import F32, I64, LANES, VF, LaneWriter

ROWS, VECTORS = 6, 4  # of C that are summed at once


class Multiplier:
    """One function a width in vectors of 16, made when it is first asked for."""

    def __init__(self, module: ir.Module) -> None:
        self._module = module
        self._made: dict[tuple[int, bool], ir.Function] = {}

    def write_call(self, writer: LaneWriter, left: Any, right: Any, out: Any, shape: Any) -> None:
        """The products of ROWS rows, in as many calls as `columns` takes.

        left, right, out: pairs of an address and of numbers from row to row. shape: depth, columns
        (a multiple of 16), and whether to add to what is there.
        """
        depth, columns, adds = shape
        b = writer.b
        for at in range(0, columns, VECTORS * LANES):
            vectors = min(VECTORS, (columns - at) // LANES)
            b.call(
                self._function(vectors, adds),
                [left[0], left[1], b.gep(right[0], [I64(at)]), right[1],
                 b.gep(out[0], [I64(at)]), out[1], depth],
            )  # fmt: skip

    def _function(self, vectors: int, adds: bool) -> ir.Function:
        found = self._made.get((vectors, adds))
        if found is None:
            floats = F32.as_pointer()
            kind = ir.FunctionType(ir.VoidType(), [floats, I64, floats, I64, floats, I64, I64])
            name = f"multiply_{vectors}{'_add' if adds else ''}"
            found = ir.Function(self._module, kind, name)
            found.linkage = "internal"
            _multiply(found, vectors, adds)
            self._made[vectors, adds] = found
        return found


def _multiply(function: ir.Function, vectors: int, adds: bool) -> None:
    """The body: for each step of the depth, `vectors` loads, 6 broadcasts, their products."""
    writer = LaneWriter(function)
    b = writer.b
    left, left_row, right, right_row, out, out_row, depth = function.args
    sums = [[writer.variable(VF) for _ in range(vectors)] for _ in range(ROWS)]
    places = [b.gep(out, [b.mul(out_row, I64(r))]) for r in range(ROWS)]
    rows = [b.gep(left, [b.mul(left_row, I64(r))]) for r in range(ROWS)]
    for parts, place in zip(sums, places, strict=True):
        for v, part in enumerate(parts):
            b.store(writer.load_floats(place, v * LANES) if adds else writer.splat(0.0), part)
    with writer.loop(I64(0), depth, 1) as k:
        line = b.gep(right, [b.mul(right_row, k)])
        numbers = [writer.load_floats(line, v * LANES) for v in range(vectors)]
        for parts, row in zip(sums, rows, strict=True):
            one = writer.broadcast(b.load(b.gep(row, [k])))
            for part, number in zip(parts, numbers, strict=True):
                b.store(writer.fma(one, number, b.load(part)), part)
    for parts, place in zip(sums, places, strict=True):
        for v, part in enumerate(parts):
            writer.store(b.load(part), place, v * LANES)
    b.ret_void()
