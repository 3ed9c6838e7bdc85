"""The inner loop of a matrix product: a block of results held in registers, as LLVM vectors and fused multiply-adds.

NumPy's matrix product divides every call among threads of its own, which wait for each other: beside other threads that is many times
slower, and a kernel cannot call it. LLVM keeps no array in registers, so the block is spelled out.
"""

import contextlib
import platform
from collections.abc import Iterator
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic

# What Numba compiles for: this machine, unless NUMBA_CPU_NAME names another (and NUMBA_CPU_FEATURES what that one has).
NAMED = {name.lstrip("+"): True for name in (config.CPU_FEATURES or "").split(",") if name.startswith("+")}
FEATURES = NAMED if config.CPU_NAME else dict(llvm.get_host_cpu_features())
ARM = platform.machine().lower() in ("aarch64", "arm64")
FUSED = ARM or bool(FEATURES.get("fma"))  # elsewhere a fused multiply-add is a call
BYTES = 64 if FEATURES.get("avx512f") else 32 if FEATURES.get("avx") else 16
VECTORS = 2  # side by side in a block
ROWS = 8 if FEATURES.get("avx512f") or ARM else 4  # of a block: 32 registers hold 8 x 2 and what they are made of, 16 hold 4 x 2


def lanes(itemsize: int) -> int:
    """Elements of one vector."""
    return BYTES // itemsize


def _product(rows: int, vectors: int, scaled: bool) -> Any:
    """block(a, a0, a_row, a_step, b, b0, b_step, c, c0, c_row, depth, f, f0): for i < rows, j < vectors * lanes,

        c[c0 + i c_row + j] = sum_k a[a0 + i a_row + k a_step] b[b0 + k b_step + j]   (+ f[f0 + i] times the old c if `scaled`)

    on flat arrays, depth >= 1, indices not checked. Sums in order of k.
    """

    def typed(typingctx, a, a0, a_row, a_step, b, b0, b_step, c, c0, c_row, depth, f, f0):
        arrays, element = (a, b, c, f), c.dtype
        if any(not isinstance(x, types.Array) or x.ndim != 1 or x.dtype != element for x in arrays):
            return None
        i = types.int64
        signature = types.void(a, i, i, i, b, i, i, c, i, i, i, f, i)
        return signature, _emit(rows, vectors, scaled, element.bitwidth // 8)

    return intrinsic(typed)


def _emit(rows: int, vectors: int, scaled: bool, itemsize: int) -> Any:
    def codegen(context, builder, sig, args):
        _, a0, a_row, a_step, _, b0, b_step, _, c0, c_row, depth, _, f0 = args
        v = Vectors(context, builder, sig, args, itemsize)
        pa, pb, pc, pf = (v.data(k) for k in (0, 4, 7, 11))
        starts = [builder.add(a0, builder.mul(a_row, v.index(i))) for i in range(rows)]
        with v.loop(depth, rows * vectors) as (k, sums):
            row_b, offset = builder.add(b0, builder.mul(k, b_step)), builder.mul(k, a_step)
            right = [v.load(pb, row_b, j) for j in range(vectors)]
            for i in range(rows):
                left = v.everywhere(pa, builder.add(starts[i], offset))
                for j in range(vectors):
                    sums[i * vectors + j] = v.add_product(left, right[j], sums[i * vectors + j])
        for i in range(rows):
            row_c = builder.add(c0, builder.mul(c_row, v.index(i)))
            factor = v.everywhere(pf, builder.add(f0, v.index(i))) if scaled else None
            for j in range(vectors):
                total = sums[i * vectors + j]
                if factor is not None:
                    total = v.add_product(v.load(pc, row_c, j), factor, total)
                builder.store(total, v.place(pc, row_c, j), align=itemsize)
        return context.get_dummy_value()

    return codegen


def _dots(rows: int, columns: int, across: int) -> Any:
    """dots(w, w0, w_row, x, x0, x_row, depth, y, y0, y_step): for i < rows, j < columns,

        y[y0 + i + j y_step] = sum_k w[w0 + i w_row + k] x[x0 + j x_row + k]

    on flat arrays, for k < depth * across * lanes, depth >= 1, indices not checked. across * lanes running sums, which are then added up.
    """

    def typed(typingctx, w, w0, w_row, x, x0, x_row, depth, y, y0, y_step):
        if any(not isinstance(v, types.Array) or v.ndim != 1 or v.dtype != y.dtype for v in (w, x, y)):
            return None
        i = types.int64
        return types.void(w, i, i, x, i, i, i, y, i, i), codegen

    def codegen(context, builder, sig, args):
        _, w0, w_row, _, x0, x_row, depth, _, y0, y_step = args
        v = Vectors(context, builder, sig, args, sig.args[0].dtype.bitwidth // 8)
        pw, px, py = (v.data(k) for k in (0, 3, 7))
        starts = [builder.add(w0, builder.mul(w_row, v.index(i))) for i in range(rows)]
        columns_at = [builder.add(x0, builder.mul(x_row, v.index(j))) for j in range(columns)]
        with v.loop(depth, rows * columns * across) as (k, sums):
            offset = builder.mul(k, v.index(across * v.count))
            left = [[v.load(px, builder.add(at, offset), m) for m in range(across)] for at in columns_at]
            for i in range(rows):
                right = [v.load(pw, builder.add(starts[i], offset), m) for m in range(across)]
                for j in range(columns):
                    for m in range(across):
                        n = (i * columns + j) * across + m
                        sums[n] = v.add_product(left[j][m], right[m], sums[n])
        for n in range(rows * columns):
            own = sums[n * across : (n + 1) * across]
            while len(own) > 1:
                own = [builder.fadd(p, q) for p, q in zip(own[::2], own[1::2], strict=True)]
            lane = [builder.extract_element(own[0], ir.Constant(ir.IntType(32), i)) for i in range(v.count)]
            while len(lane) > 1:
                lane = [builder.fadd(p, q) for p, q in zip(lane[: len(lane) // 2], lane[len(lane) // 2 :], strict=True)]
            at = builder.add(y0, builder.add(v.index(n // columns), builder.mul(y_step, v.index(n % columns))))
            builder.store(lane[0], builder.gep(py, [at]), align=v.itemsize)
        return context.get_dummy_value()

    return intrinsic(typed)


class Vectors:
    """What both emit: vectors at places in flat arrays."""

    def __init__(self, context: Any, builder: Any, sig: Any, args: Any, itemsize: int):
        self.context, self.builder, self.sig, self.args, self.itemsize = context, builder, sig, args, itemsize
        self.count = lanes(itemsize)
        self.vector = ir.VectorType(context.get_value_type(sig.args[0].dtype), self.count)

    def index(self, i: int) -> Any:
        return ir.Constant(ir.IntType(64), i)

    def data(self, k: int) -> Any:
        """The memory of argument k."""
        return self.context.make_array(self.sig.args[k])(self.context, self.builder, self.args[k]).data

    def place(self, pointer: Any, at: Any, j: int) -> Any:
        """The j-th vector from there."""
        there = self.builder.gep(pointer, [self.builder.add(at, self.index(j * self.count))])
        return self.builder.bitcast(there, self.vector.as_pointer())

    def load(self, pointer: Any, at: Any, j: int) -> Any:
        return self.builder.load(self.place(pointer, at, j), align=self.itemsize)

    def everywhere(self, pointer: Any, at: Any) -> Any:
        """One element on every lane."""
        one = self.builder.load(self.builder.gep(pointer, [at]), align=self.itemsize)
        nothing, lane = ir.Constant(self.vector, ir.Undefined), ir.IntType(32)
        first = self.builder.insert_element(nothing, one, ir.Constant(lane, 0))
        return self.builder.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(lane, self.count), [0] * self.count))

    def add_product(self, x: Any, y: Any, z: Any) -> Any:
        """x y + z"""
        if not FUSED:
            return self.builder.fadd(self.builder.fmul(x, y), z)
        name = f"llvm.fma.v{self.count}f{8 * self.itemsize}"
        fma = cgutils.get_or_insert_function(self.builder.module, ir.FunctionType(self.vector, [self.vector] * 3), name)
        return self.builder.call(fma, (x, y, z))

    @contextlib.contextmanager
    def loop(self, depth: Any, count: int) -> Iterator[tuple[Any, list[Any]]]:
        """k from 0 to depth - 1 (once at least), and `count` vectors that start as zeros; the body replaces them in the list."""
        builder = self.builder
        before, body = builder.block, builder.append_basic_block("product")
        after = builder.append_basic_block("product.end")
        builder.branch(body)
        builder.position_at_end(body)
        k, carried = builder.phi(self.index(0).type), [builder.phi(self.vector) for _ in range(count)]
        sums = list(carried)
        yield k, sums
        following = builder.add(k, self.index(1))
        for phi, first, last in zip(
            (k, *carried), (self.index(0), *[ir.Constant(self.vector, None)] * count), (following, *sums), strict=True
        ):
            phi.add_incoming(first, before)
            phi.add_incoming(last, body)
        builder.cbranch(builder.icmp_signed("<", following, depth), body, after)
        builder.position_at_end(after)


# Editing this file: Numba's cache of _decode.py's and matvec.py's kernels does not notice; touch those as well.
block: Any = _product(ROWS, VECTORS, False)
block_row: Any = _product(1, VECTORS, False)
block_onto: Any = _product(ROWS, VECTORS, True)
block_onto_narrow: Any = _product(ROWS, 1, True)
ACROSS, TALL = 4, ROWS // 2  # vectors of a row that `dots` takes at a time, and rows where x is too long for the L1 cache
dots_one: Any = _dots(1, 1, ACROSS)
dots_two: Any = _dots(1, 2, ACROSS)
dots_four: Any = _dots(1, 4, ACROSS // 2)
tall_one: Any = _dots(TALL, 1, ACROSS // 2)
tall_two: Any = _dots(TALL, 2, ACROSS // 4)
tall_four: Any = _dots(TALL, 4, ACROSS // 4)
