"""SwiGLU, forward and backward: the ways to write silu that kernels have."""

import math
from collections.abc import Callable

import numpy as np

from .floats import Array, to_bf16
from .router import exp2_polynomial, exp_split


def logistic(g: Array) -> Array:
    """Without overflow: exp(-|g|)"""
    e = np.exp(-np.abs(g))
    return np.where(g >= 0, g.dtype.type(1), e) / (1 + e)


def quotient(g: Array) -> Array:
    """g/(1 + exp(-g)), which may divide by infinity"""
    return g / (1 + np.exp(-g))


def times_sigmoid(g: Array) -> Array:
    return g * logistic(g)


def by_tanh(g: Array) -> Array:
    """g/2 (1 + tanh(g/2)), which cancels where g is negative; there g exp(g)/(1 + exp(g))"""
    half = g.dtype.type(0.5) * g
    e = np.exp(np.minimum(g, 0))
    return np.where(g > -1, half + half * np.tanh(half), g * e / (1 + e))


def by_exp2(g: Array) -> Array:
    """One reciprocal, and 2^(-g log2 e)"""
    return g * (1 / (1 + exp2_polynomial(g * g.dtype.type(-math.log2(math.e)))))


def by_split_exp(g: Array) -> Array:
    return g / (exp_split(-g) + 1)


def in_double(g: Array) -> Array:
    return quotient(g.astype(np.float64))


def clamped(gate: Array, up: Array, limit: float | None) -> tuple[Array, Array]:
    return (
        (gate, up) if limit is None else (np.where(gate > limit, gate.dtype.type(limit), gate), np.maximum(np.minimum(up, limit), -limit))
    )


def _swiglu(silu: Callable) -> Callable:
    def forward(gate: Array, up: Array, *, limit: float | None = None) -> Array:
        g, u = clamped(gate, up, limit)
        return (silu(g) * u).astype(gate.dtype)

    return forward


def swiglu_up_first(gate: Array, up: Array, *, limit: float | None = None) -> Array:
    """(up σ(gate)) gate"""
    g, u = clamped(gate, up, limit)
    return (u * logistic(g)) * g


def swiglu_eager(gate: Array, up: Array, *, limit: float | None = None) -> Array:
    r = to_bf16
    g, u = clamped(gate, up, limit)
    return r(r(g / r(1 + r(np.exp(-g)))) * u)


SILUS = {"quotient": quotient, "sigmoid": times_sigmoid, "tanh": by_tanh, "exp2": by_exp2, "split-exp": by_split_exp, "double": in_double}
SWIGLU = {**{name: _swiglu(silu) for name, silu in SILUS.items()}, "up-first": swiglu_up_first}
SINGLE = ("exp2", "split-exp")


def swiglu_stored(gate: Array, up: Array, *, to: Callable, limit: float | None = None, silu: str = "stored") -> Array:
    """silu(gate) is stored before it is multiplied."""
    g, u = clamped(gate, up, limit)
    return to(quotient(g)) * u


def slope_product(g: Array) -> Array:
    """σ (1 + g (1 - σ))"""
    s = logistic(g)
    return s * (1 + g * (1 - s))


def slope_sum(g: Array) -> Array:
    """σ + g σ(g) σ(-g)"""
    s = logistic(g)
    return s + g * s * logistic(-g)


def slope_silu(g: Array) -> Array:
    """silu + σ (1 - silu)"""
    s = 1 / (1 + np.exp(-g))
    a = g * s
    return a + s * (1 - a)


def slope_double(g: Array) -> Array:
    return slope_product(g.astype(np.float64))


def slope_exp2(g: Array) -> Array:
    """One reciprocal, and 2^(-g log2 e)"""
    s = 1 / (1 + exp2_polynomial(g * g.dtype.type(-math.log2(math.e))))
    return s * (g * (1 - s) + 1)


def cut(gate: Array, up: Array, dgate: Array, dup: Array, limit: float | None) -> tuple[Array, Array]:
    """0 where a limit has cut, and not at the limit itself"""
    if limit is None:
        return dgate, dup
    return dgate * (gate <= limit), dup * (np.abs(up) <= limit)


def _swiglu_back(silu: Callable, slope: Callable, late: bool) -> Callable:
    def backward(gate: Array, up: Array, dy: Array, *, limit: float | None = None) -> tuple[Array, Array]:
        g, u = clamped(gate, up, limit)
        dgate = dy * (u * slope(g)) if late else dy * u * slope(g)
        return cut(gate, up, dgate.astype(gate.dtype), (silu(g) * dy).astype(gate.dtype), limit)

    return backward


def swiglu_back_eager(gate: Array, up: Array, dy: Array, *, limit: float | None = None) -> tuple[Array, Array]:
    r = to_bf16
    g, u = clamped(gate, up, limit)
    s = r(1 / r(1 + r(np.exp(-g))))
    dgate = r(r(dy * u) * r(s * r(1 + r(g * r(1 - s)))))
    return cut(gate, up, dgate, r(dy * r(g * s)), limit)


BACK = {
    "product": _swiglu_back(quotient, slope_product, late=False),
    "sum": _swiglu_back(by_tanh, slope_sum, late=True),
    "silu": _swiglu_back(times_sigmoid, slope_silu, late=False),
    "double": _swiglu_back(in_double, slope_double, late=True),
    "exp2": _swiglu_back(by_exp2, slope_exp2, late=False),
}
BACK_SINGLE = ("exp2",)
