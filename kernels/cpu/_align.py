"""The inner loops of a tensor core's sums, as LLVM vectors whose lanes are outputs: the largest exponent of a group of products, and the
products brought to one unit, cut off and added.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ._tile import ROWS, VECTORS, lanes

TOGETHER = ROWS // 2  # rows of a block; every output takes two registers, its sum and its unit
LANES = lanes(4)
WIDTH = VECTORS * LANES  # outputs of a block's row
LOWEST = 64  # field of 2^-63: below every accumulator but 0, for all are multiples of E5M6's smallest product, 2^-40


class Emitter:
    """Vectors at places in flat arrays of several types."""

    def __init__(self, context: Any, builder: Any, sig: Any, args: Any):
        self.context, self.builder, self.sig, self.args = context, builder, sig, args

    def index(self, i: int) -> Any:
        return ir.Constant(ir.IntType(64), i)

    def element(self, k: int) -> Any:
        return self.context.get_value_type(self.sig.args[k].dtype)

    def place(self, k: int, at: Any) -> Any:
        """Element `at` of array argument k."""
        data = self.context.make_array(self.sig.args[k])(self.context, self.builder, self.args[k]).data
        return self.builder.gep(data, [at])

    def load(self, k: int, at: Any, count: int) -> Any:
        vector = ir.VectorType(self.element(k), count)
        return self.builder.load(self.builder.bitcast(self.place(k, at), vector.as_pointer()), align=self.sig.args[k].dtype.bitwidth // 8)

    def store(self, value: Any, k: int, at: Any) -> None:
        there = self.builder.bitcast(self.place(k, at), value.type.as_pointer())
        self.builder.store(value, there, align=self.sig.args[k].dtype.bitwidth // 8)

    def everywhere(self, k: int, at: Any, count: int) -> Any:
        """One element on every lane."""
        return self.spread(self.builder.load(self.place(k, at)), ir.VectorType(self.element(k), count))

    def spread(self, value: Any, vector: Any) -> Any:
        nothing, lane = ir.Constant(vector, ir.Undefined), ir.IntType(32)
        first = self.builder.insert_element(nothing, value, ir.Constant(lane, 0))
        return self.builder.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(lane, vector.count), [0] * vector.count))

    def larger(self, x: Any, y: Any) -> Any:
        """The larger of signed integers."""
        return self.builder.select(self.builder.icmp_signed(">", x, y), x, y)

    def loop(self, depth: Any, first: list[Any], body: Any) -> list[Any]:
        """values after values = body(k, values) for k from 0 to depth - 1, once at least."""
        builder = self.builder
        before, inside = builder.block, builder.append_basic_block("group")
        after = builder.append_basic_block("group.end")
        builder.branch(inside)
        builder.position_at_end(inside)
        k, carried = builder.phi(ir.IntType(64)), [builder.phi(v.type) for v in first]
        values = body(k, carried)
        following = builder.add(k, self.index(1))
        for phi, start, last in zip((k, *carried), (self.index(0), *first), (following, *values), strict=True):
            phi.add_incoming(start, before)
            phi.add_incoming(last, inside)
        builder.cbranch(builder.icmp_signed("<", following, depth), inside, after)
        builder.position_at_end(after)
        return values


def _flat(arrays: tuple[Any, ...], *elements: Any) -> bool:
    return all(isinstance(x, types.Array) and x.ndim == 1 and x.dtype == e for x, e in zip(arrays, elements, strict=True))


def _units(typingctx, a, a0, a_row, b, b0, depth, c, fraction, by, unit, total):
    """The unit that a group's products and the accumulator c are cut to, its inverse, and the accumulator in it: for i < TOGETHER,
    j < w = WIDTH and k < depth >= 1

        e[i,j] = max(max_k a[a0 + i a_row + k] + b[b0 + k w + j], exponent(c[i,j]))
        unit = 2^(e - fraction)    by = 1 / unit    total = trunc(c by)

    a and b are int8 exponents, whose sums must fit in one; [i,j] stands for i w + j.
    """
    single, wide = types.float32, total.dtype
    if not _flat((a, b, c, by, unit), types.int8, types.int8, *(single,) * 3) or wide not in (single, types.float64):
        return None
    i = types.int64

    def codegen(context, builder, sig, args):
        v, (_, a0, a_row, _, b0, depth, _, fraction, _, _, _) = Emitter(context, builder, sig, args), args
        starts = [builder.add(a0, builder.mul(a_row, v.index(r))) for r in range(TOGETHER)]
        small, word = ir.VectorType(ir.IntType(8), WIDTH), ir.VectorType(ir.IntType(32), LANES)
        real = ir.VectorType(ir.FloatType(), LANES)

        def body(k, tops):
            right = v.load(3, builder.add(b0, builder.mul(k, v.index(WIDTH))), WIDTH)
            left = [v.everywhere(0, builder.add(at, k), WIDTH) for at in starts]
            return [v.larger(t, builder.add(x, right)) for x, t in zip(left, tops, strict=True)]

        def whole(value):
            return ir.Constant(word, [value] * LANES)

        fraction = v.spread(fraction, word)
        tops = v.loop(depth, [ir.Constant(small, [-128] * WIDTH)] * TOGETHER, body)
        for r, top in enumerate(tops):
            for j in range(VECTORS):
                at, own = v.index(r * WIDTH + j * LANES), [ir.Constant(ir.IntType(32), j * LANES + n) for n in range(LANES)]
                part = builder.shuffle_vector(top, top, ir.Constant(word, own))
                old = v.load(6, at, LANES)
                field = builder.and_(builder.lshr(builder.bitcast(old, word), whole(23)), whole(255))
                e = v.larger(v.larger(builder.add(builder.sext(part, word), whole(127)), field), whole(LOWEST))
                inverse = builder.bitcast(builder.shl(builder.sub(builder.add(whole(254), fraction), e), whole(23)), real)
                v.store(inverse, 8, at)
                v.store(builder.bitcast(builder.shl(builder.sub(e, fraction), whole(23)), real), 9, at)
                start = builder.fptosi(builder.fmul(old, inverse), word)
                v.store(builder.sitofp(start, ir.VectorType(v.element(10), LANES)), 10, at)
        return context.get_dummy_value()

    return types.void(a, i, i, b, i, i, c, types.uint32, by, unit, total), codegen


def _aligned(typingctx, a, a0, a_row, b, b0, depth, by, total):
    """total[i,j] += sum_k trunc(a[a0 + i a_row + k] b[b0 + k w + j] by[i,j]) for i, j, k as in `units`

    in int32, which must hold the sum. Factors and products are float32 and exact.
    """
    single, wide = types.float32, total.dtype
    if not _flat((a, b, by), *(single,) * 3) or wide not in (single, types.float64):
        return None
    i = types.int64

    def codegen(context, builder, sig, args):
        v, (_, a0, a_row, _, b0, depth, _, _) = Emitter(context, builder, sig, args), args
        starts = [builder.add(a0, builder.mul(a_row, v.index(r))) for r in range(TOGETHER)]
        word, result = ir.VectorType(ir.IntType(32), LANES), ir.VectorType(v.element(7), LANES)
        places = [v.index(r * WIDTH + j * LANES) for r in range(TOGETHER) for j in range(VECTORS)]
        factors = [v.load(6, at, LANES) for at in places]

        def body(k, sums):
            row = builder.add(b0, builder.mul(k, v.index(WIDTH)))
            right = [v.load(3, builder.add(row, v.index(j * LANES)), LANES) for j in range(VECTORS)]
            after = []
            for r, at in enumerate(starts):
                left = v.everywhere(0, builder.add(at, k), LANES)
                for j in range(VECTORS):
                    q = r * VECTORS + j
                    product = builder.fmul(builder.fmul(left, right[j]), factors[q])
                    after.append(builder.add(sums[q], builder.fptosi(product, word)))
            return after

        for sums, at in zip(v.loop(depth, [ir.Constant(word, None)] * len(places), body), places, strict=True):
            v.store(builder.fadd(v.load(7, at, LANES), builder.sitofp(sums, result)), 7, at)
        return context.get_dummy_value()

    return types.void(a, i, i, b, i, i, by, total), codegen


def _keep(typingctx, total, mask, unit, c):
    """c[i,j] = the bits of total[i,j] that the mask keeps, times unit[i,j]"""
    if mask not in (types.uint32, types.uint64) or not _flat((unit, c), types.float32, types.float32):
        return None
    if not _flat((total,), types.float32 if mask == types.uint32 else types.float64):
        return None

    def codegen(context, builder, sig, args):
        v = Emitter(context, builder, sig, args)
        real, bits = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(args[1].type, LANES)
        mask = v.spread(args[1], bits)
        for q in range(TOGETHER * VECTORS):
            at = v.index(q * LANES)
            kept = v.load(0, at, LANES)
            kept = builder.bitcast(builder.and_(builder.bitcast(kept, bits), mask), kept.type)
            kept = kept if kept.type == real else builder.fptrunc(kept, real)
            v.store(builder.fmul(kept, v.load(2, at, LANES)), 3, at)
        return context.get_dummy_value()

    return types.void(total, mask, unit, c), codegen


# Not decorated: a type checker would see the typing context as a parameter.
# Editing this file: Numba's cache of _fp8_tiles.py's kernels does not notice; touch that as well.
units: Any = intrinsic(_units)
aligned: Any = intrinsic(_aligned)
keep: Any = intrinsic(_keep)
