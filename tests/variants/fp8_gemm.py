"""FP8 products and the linear layer, otherwise than the reference writes them.

A part by BLAS, by einsum, in another order; the scales before or after each other, or within the addition; tensor cores in integers.
"""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

from . import fp8
from .decodes import shifted, table, viewed
from .floats import LAYOUTS, Array, Layout, to_bf16
from .linear import product, product_sequential, product_split, product_steps, product_warp
from .quantize import columns, looped, padded, patterns, repeated, strided

# products: a part's sum


def fields(f: Layout, codes: Array) -> tuple[Array, Array]:
    """Signed significand and the exponent of its last place"""
    c = codes.astype(np.int64)
    rest = c & ((1 << (f.bits - 1)) - 1)
    field, mantissa = rest >> f.mantissa_bits, rest & ((1 << f.mantissa_bits) - 1)
    whole = mantissa + np.where(field > 0, 1 << f.mantissa_bits, 0)
    return np.where(c >> (f.bits - 1), -whole, whole), np.maximum(field, 1) - f.bias - f.mantissa_bits


def toward_zero(value: Array, right: Array) -> Array:
    """value·2^-right, cut"""
    size = np.abs(value)
    moved = np.where(right >= 0, size >> np.clip(right, 0, 62), size << np.clip(-right, 0, 62))
    return np.where(value < 0, -moved, moved)


def core_in_integers(f: Layout, a: Array, b: Array, bits: int) -> Array:
    """A tensor core: significands, exponents and the accumulator are integers (four to a group at a time, whatever the order)."""
    (ma, ea), (mb, eb) = fields(f, a), fields(f, b)
    c, ec = np.zeros((len(a), len(b)), np.int64), np.full((len(a), len(b)), -(1 << 20))  # c·2^ec
    kept, last = min(bits, 23), 2 * f.mantissa_bits
    for k in range(0, a.shape[1], 32):
        part = slice(k, k + 32)
        m = ma[:, None, part] * mb[None, :, part]
        e = np.where(m != 0, ea[:, None, part] + eb[None, :, part], -(1 << 20))
        lead = np.where(c != 0, np.maximum(ec + bit_length(c) - 1, -126), -(1 << 20))
        top = np.maximum(e.max(axis=2) + last, lead)
        top = np.where(top < -1000, 0, top)
        total = toward_zero(c, top - bits - ec)
        for start in range(0, m.shape[2], 4):
            total = total + toward_zero(m[..., start : start + 4], (top - bits)[..., None] - e[..., start : start + 4]).sum(axis=2)
        over = np.maximum(np.maximum(bit_length(total) - 1 + top - bits, -126) - kept - (top - bits), 0)
        c, ec = toward_zero(total, over), top - bits + over
    y = np.ldexp(c.astype(np.float64), np.clip(ec, -1000, 1000))
    return np.where(unreadable(f, a)[:, None] | unreadable(f, b)[None, :], np.nan, y)


def bit_length(value: Array) -> Array:
    """Of |value| below 2^53"""
    return np.frexp(np.abs(value).astype(np.float64))[1]


def unreadable(f: Layout, codes: Array) -> Array:
    return np.asarray(np.isnan(table(f, codes)).any(axis=1))


def core_in_fractions(f: Layout, a: Array, b: Array, bits: int) -> Array:
    """The same one output at a time, in Python's fractions."""
    va, vb = table(f, a).astype(np.float64), table(f, b).astype(np.float64)
    (_, ea), (_, eb) = fields(f, a), fields(f, b)

    def one(i: int, j: int) -> float:
        c = Fraction(0)
        for k in range(0, a.shape[1], 32):
            part = [d for d in range(k, min(k + 32, a.shape[1])) if va[i, d] and vb[j, d]]
            tops = [int(ea[i, d] + eb[j, d]) + 2 * f.mantissa_bits for d in part]  # a subnormal's is the least normal number's
            tops += [max(exponent(c), -126)] if c else []
            if not tops:
                continue
            unit = Fraction(2) ** (max(tops) - bits)
            total = sum((cut(Fraction(va[i, d]) * Fraction(vb[j, d]), unit) for d in part), cut(c, unit))
            c = cut(total, Fraction(2) ** (max(exponent(total), -126) - min(bits, 23))) if total else total
        return float(c)

    wrong = unreadable(f, a)[:, None] | unreadable(f, b)[None, :]
    return np.array([[np.nan if wrong[i, j] else one(i, j) for j in range(len(b))] for i in range(len(a))])


def exponent(x: Fraction) -> int:
    e = abs(x.numerator).bit_length() - x.denominator.bit_length()
    return e if abs(x) >= Fraction(2) ** e else e - 1


def cut(x: Fraction, unit: Fraction) -> Fraction:
    units = abs(x) / unit
    whole = units.numerator // units.denominator * unit
    return -whole if x < 0 else whole


def exact_in_integers(f: Layout, a: Array, b: Array) -> Array:
    """Everything in units of the smallest product"""
    units = [np.ldexp(table(f, c).astype(np.float64), f.bias + f.mantissa_bits - 1).astype(np.int64) for c in (a, b)]
    return np.ldexp((units[0] @ units[1].T).astype(np.float64), -2 * (f.bias + f.mantissa_bits - 1))


MODELS = {"wgmma13": 13, "mma25": 25}


def dot(f: Layout, a: Array, b: Array, accumulator: str, dtype: Any, sum_of: Callable, core: Callable) -> Array:
    if accumulator == "fp32":
        return sum_of(viewed(f, a).astype(dtype), shifted(f, b).astype(dtype))
    if accumulator == "exact":
        return exact_in_integers(f, a, b).astype(dtype)
    bits = MODELS[accumulator] if accumulator in MODELS else int(accumulator[5:])
    return core(f, a, b, bits).astype(dtype)


# products: parts, scales, promotion


def one_by_one(dot: Array, sa: Array, sb: Array, order: str) -> Array:
    return dot * sa * sb if order == "one by one" else dot * (sa * sb)


def other_side(dot: Array, sa: Array, sb: Array, order: str) -> Array:
    """b's scale first, or the product of the scales from the other side"""
    return dot * sb * sa if order == "one by one" else (sb * sa) * dot


def added(parts: list[tuple[Array, Array, Array]], order: str, scaled: Callable) -> Array:
    total = None
    for dot, sa, sb in parts:
        term = scaled(dot, sa, sb, order)
        total = term if total is None else total + term
    assert total is not None
    return total


def backwards(parts: list, order: str, scaled: Callable) -> Array:
    return added(parts[::-1], order, scaled)


def pairwise(parts: list, order: str, scaled: Callable) -> Array:
    terms = [scaled(*part, order) for part in parts]
    while len(terms) > 1:
        terms = [terms[i] + terms[i + 1] if i + 1 < len(terms) else terms[i] for i in range(0, len(terms), 2)]
    return terms[0]


def halves(parts: list, order: str, scaled: Callable) -> Array:
    """Split-K: two workers, the second's sum is added to the first's."""
    if len(parts) == 1:
        return added(parts, order, scaled)
    middle = len(parts) // 2
    return added(parts[:middle], order, scaled) + added(parts[middle:], order, scaled)


def fused(parts: list, order: str, scaled: Callable) -> Array:
    """acc = fma(part·sa, sb, acc), or fma(part, sa·sb, acc): the product is not rounded before it is added."""
    dtype = parts[0][0].dtype
    total = np.zeros_like(parts[0][0])
    for dot, sa, sb in parts:
        left, right = (dot * sa, sb) if order == "one by one" else (dot, sa * sb)
        total = (left.astype(np.float64) * right + total).astype(dtype)
    return total


def gemm(
    sum_of: Callable = product,
    core: Callable = core_in_integers,
    promoted: Callable = added,
    scaled: Callable = one_by_one,
) -> Callable:
    def fn(
        a_codes: Array,
        a_scale: Array,
        b_codes: Array,
        b_scale: Array,
        *,
        accumulator: str = "fp32",
        promote: int = 128,
        tile: int = 128,
        scale_order: str = "one by one",
        format: str = "e4m3fn",
        out: str = "fp32",
    ) -> Array:
        f, rows = LAYOUTS[format], np.arange(len(b_codes))
        each = b_scale[rows if len(b_scale) == len(b_codes) else rows // 128]
        parts = []
        step = promote or tile
        with np.errstate(all="ignore"):
            for k in range(0, a_codes.shape[1], step):
                here, j = slice(k, k + step), k // tile
                part = dot(f, a_codes[:, here], b_codes[:, here], accumulator, a_scale.dtype, sum_of, core)
                parts.append((part, a_scale[:, j : j + 1], each[None, :, j]))
            y = promoted(parts, scale_order, scaled)
        return to_bf16(y).astype(y.dtype) if out == "bf16" else y

    return fn


def by_einsum(a: Array, b: Array) -> Array:
    return np.einsum("nd,od->no", a, b)


def by_rows_of_b(a: Array, b: Array) -> Array:
    """A matrix-vector product for each row of b"""
    return np.stack([a @ row for row in b], axis=1)


GEMM = {
    "blas": gemm(),
    "einsum": gemm(by_einsum, promoted=backwards),
    "sequential": gemm(product_sequential, promoted=halves, scaled=other_side),
    "steps": gemm(product_steps, promoted=pairwise),
    "split-k": gemm(product_split, promoted=halves),
    "warp": gemm(product_warp, promoted=backwards, scaled=other_side),
    "vectors": gemm(by_rows_of_b, promoted=pairwise, scaled=other_side),
    "fused": gemm(promoted=fused),
    "fractions": gemm(core=core_in_fractions, promoted=backwards),
}
GEMM_SINGLE = ("fused",)
GEMM_SLOW = ("fractions",)

# the linear layer


def linear(quantise: Callable, block: Callable, multiply: Callable, turn: Callable) -> tuple[Callable, Callable]:
    """Forward and backward from these parts; turn says how tiles of 128×1 are made: as columns, or as rows of the transposed."""

    def operands(x: Array, weight: Array, o: dict) -> tuple[Array, Array, Array, Array]:
        xs, ws = quantise(x.astype(np.float32), recipe=o["recipe"]), block(weight.astype(np.float32), recipe=o["weight_recipe"])
        return (*xs, *ws)

    def times(a: Any, b: Any, o: dict, dtype: Any) -> Array:
        scales = a[1].astype(dtype), b[1].astype(dtype)
        codes = np.ascontiguousarray(a[0]), np.ascontiguousarray(b[0])
        return multiply(codes[0], scales[0], codes[1], scales[1], accumulator=o["accumulator"], promote=o["promote"])

    def forward(x: Array, weight: Array, **o: Any) -> Array:
        xc, xs, wc, ws = operands(x, weight, o)
        return times((xc, xs), (wc, ws), o, x.dtype)

    def backward(x: Array, weight: Array, dy: Array, **o: Any) -> tuple[Array, Array]:
        xc, xs, wc, ws = operands(x, weight, o)
        g = dy.astype(np.float32)
        dx = times(quantise(g, recipe=o["recipe"]), (wc.T, ws.T), o, dy.dtype)
        again = o["recipe"]
        if o["cache"] == "e5m6":
            again = "tilekernels-ue8m0"
            xc, xs = quantise(x.astype(np.float32), recipe=again, format="e5m6")
        kept = repeated(xc, xs, format=o["cache"])
        return dx, times(turn(quantise, g, o["recipe"]), turn(quantise, kept, again), o, dy.dtype)

    return forward, backward


def columns_turned(quantise: Callable, x: Array, recipe: str) -> tuple[Array, Array]:
    codes, scale = quantise(x, recipe=recipe, axis=0)
    return codes.T, scale.T


def rows_of_turned(quantise: Callable, x: Array, recipe: str) -> tuple[Array, Array]:
    return quantise(np.ascontiguousarray(x.T), recipe=recipe)


LINEARS = {
    "blas": linear(padded, fp8.by_padding, GEMM["blas"], rows_of_turned),
    "loops": linear(looped, fp8.by_loops, GEMM["steps"], columns_turned),
    "fused": linear(patterns, fp8.by_patterns, GEMM["fused"], rows_of_turned),
    "split-k": linear(columns, fp8.by_reduction, GEMM["split-k"], columns_turned),
    "vectors": linear(strided, fp8.by_padding, GEMM["vectors"], columns_turned),
}
LINEAR = {name: pair[0] for name, pair in LINEARS.items()}
LINEAR_BACK = {name: pair[1] for name, pair in LINEARS.items()}
LINEAR_SINGLE = ("fused",)
