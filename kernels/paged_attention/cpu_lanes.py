"""Vectors of 16 lanes in LLVM: the constants, loads, shuffles and sums that functions are made of.

16 lanes on every processor; LLVM splits them where registers are shorter.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

from stillhouse.kernels.paged_attention.units import LOG2E

LANES = 16

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
VF, VI, VH = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES), ir.VectorType(F16, LANES)
# 2^x on [-1/2, 1/2]: Taylor's terms ln(2)^n / n!, relative error 2e-9 at degree 7
_EXP2 = (1.0, 0.6931471805599453, 0.2402265069591007, 0.05550410866482158, 0.009618129107628477,
         0.0013333558146428443, 0.00015403530393381606, 1.5252733804059841e-05)  # fmt: skip


class LaneWriter:
    """Writes instructions into one function; `b` is llvmlite's builder of it."""

    def __init__(self, function: ir.Function) -> None:
        self.function = function
        self.b = ir.IRBuilder(function.append_basic_block("entry"))

    def exp2(self, x: Any) -> Any:
        """2^x for x up to 127; what is below -126 gives 2^-126."""
        b = self.b
        x = self.fmaximum(x, -126.0)
        whole = self.call("llvm.rint.v16f32", VF, [x])
        rest = b.fsub(x, whole)
        power = self.splat(_EXP2[-1])
        for term in reversed(_EXP2[:-1]):
            power = self.fma(power, rest, self.splat(term))
        bits = b.shl(b.add(b.fptosi(whole, VI), self.whole(127)), self.whole(23))
        return b.fmul(power, b.bitcast(bits, VF))

    def capped(self, score: Any, softcap: Any) -> Any:
        """cap · tanh(s / cap), both in exponents of 2; tanh x = 1 - 2 / (2^(2 x log2 e) + 1)."""
        b, cap = self.b, self.broadcast(softcap)
        ratio = b.fdiv(score, cap)
        power = self.exp2(self.fminimum(b.fmul(ratio, self.splat(2 * LOG2E)), 100.0))
        tanh = b.fsub(self.splat(1.0), b.fdiv(self.splat(2.0), b.fadd(power, self.splat(1.0))))
        return b.fmul(cap, tanh)

    def power_of_two(self, exponent: Any) -> Any:
        """2^x of one float."""
        return self.b.extract_element(self.exp2(self.broadcast(exponent)), I32(0))

    def largest(self, one: Any, two: Any) -> Any:
        return self.b.select(self.b.icmp_signed(">", one, two), one, two)

    def smallest(self, one: Any, two: Any) -> Any:
        return self.b.select(self.b.icmp_signed("<", one, two), one, two)

    def variable(self, kind: Any, count: int = 1) -> Any:
        """In the entry block, where LLVM finds what fits into registers."""
        with self.b.goto_entry_block():
            place = self.b.alloca(kind, count)
        place.align = 64
        return place

    def halves(self, base: Any, slot: Any) -> Any:
        """The scalars of 16 tokens, float32."""
        place = self.b.gep(base, [self.b.shl(slot, I64(1))])
        return self.b.fpext(self.load(place, 0, VH), VF)

    def load(self, base: Any, offset: int, kind: Any) -> Any:
        """From a byte's address, of any alignment."""
        place = self.b.bitcast(self.b.gep(base, [I64(offset)]), kind.as_pointer())
        return self.b.load(place, align=1)

    def load_floats(self, base: Any, offset: int) -> Any:
        place = self.b.bitcast(self.b.gep(base, [I64(offset)]), VF.as_pointer())
        return self.b.load(place, align=4)

    def store(self, value: Any, base: Any, offset: int) -> None:
        place = self.b.bitcast(self.b.gep(base, [I64(offset)]), VF.as_pointer())
        self.b.store(value, place, align=4)

    def broadcast(self, scalar: Any) -> Any:
        kind = VF if scalar.type == F32 else VI
        first = self.b.insert_element(ir.Constant(kind, ir.Undefined), scalar, I32(0))
        return self.shuffle(first, first, [0] * LANES)

    def shuffle(self, left: Any, right: Any, lanes: Sequence[int] | range) -> Any:
        mask = ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes))
        return self.b.shuffle_vector(left, right, mask)

    def splat(self, value: float) -> Any:
        return ir.Constant(VF, [value] * LANES)

    def prefetch(self, base: Any, offset: int) -> None:
        """Ask for the cache line of a byte."""
        place = self.b.gep(base, [I64(offset)])
        self.call("llvm.prefetch.p0", ir.VoidType(), [place, I32(0), I32(3), I32(1)])

    def unknown(self, pointer: Any) -> Any:
        """The same pointer, but LLVM does not know: what is read there is not moved before this."""
        kind = ir.FunctionType(pointer.type, [pointer.type])
        return self.b.asm(kind, "", "=r,0", [pointer], True)

    def taken(self, counter: Any) -> Any:
        """The counter's value before one more; threads get different ones."""
        return self.b.atomic_rmw("add", counter, I64(1), "acq_rel")

    def whole(self, value: int) -> Any:
        return ir.Constant(VI, [value & 0xFFFFFFFF] * LANES)

    def fma(self, x: Any, y: Any, z: Any) -> Any:
        return self.call("llvm.fma.v16f32", VF, [x, y, z])

    def fmaximum(self, x: Any, least: float) -> Any:
        b = self.b  # written so that a NaN stays one
        return b.select(b.fcmp_ordered("<", x, self.splat(least)), self.splat(least), x)

    def fminimum(self, x: Any, most: float) -> Any:
        b = self.b
        return b.select(b.fcmp_ordered(">", x, self.splat(most)), self.splat(most), x)

    def added(self, parts: Sequence[Any]) -> Any:
        total = parts[0]
        for part in parts[1:]:
            total = self.b.fadd(total, part)
        return total

    def reduce(self, how: str, value: Any) -> Any:
        """The maximum or the sum of all lanes, pairwise."""
        b = self.b
        width = LANES // 2
        while width:
            other = self.shuffle(value, value, [(i + width) % LANES for i in range(LANES)])
            if how == "fadd":
                value = b.fadd(value, other)
            else:
                value = b.select(b.fcmp_ordered("<", value, other), other, value)
            width //= 2
        return b.extract_element(value, I32(0))

    def call(self, name: str, result: Any, arguments: Sequence[Any]) -> Any:
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        module = self.function.module
        known = module.globals.get(name)
        return self.b.call(known or ir.Function(module, kind, name), arguments)

    @contextmanager
    def loop(self, start: Any, stop: Any, step: int) -> Iterator[Any]:
        """for (at = start; at < stop; at += step)"""
        b = self.b
        before = b.block
        head, inside, after = (self.function.append_basic_block() for _ in range(3))
        b.branch(head)
        b.position_at_end(head)
        at = b.phi(I64)
        at.add_incoming(start, before)
        b.cbranch(b.icmp_signed("<", at, stop), inside, after)
        b.position_at_end(inside)
        yield at
        at.add_incoming(b.add(at, I64(step)), b.block)
        b.branch(head)
        b.position_at_end(after)

    @contextmanager
    def each_item(self, job: Any) -> Iterator[Any]:
        """while ((item = next++) < items): threads that share a job get different ones."""
        b = self.b
        head, inside, after = (self.function.append_basic_block() for _ in range(3))
        b.branch(head)
        b.position_at_end(head)
        item = self.taken(job.place("next"))
        b.cbranch(b.icmp_signed("<", item, job.word("items")), inside, after)
        b.position_at_end(inside)
        yield item
        b.branch(head)
        b.position_at_end(after)
