"""SwiGLU, forward and backward, with V4's clamp."""

import math
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from ._common import need, run
from ._declared import declared
from ._gate import sigmoid

Array = NDArray[Any]
COST = 2  # elements of a copy that one element's work is worth, for `run`


@njit(nogil=True, error_model="numpy")
def clipped(x, low, high):
    """NaN stays"""
    x = high if x > high else x
    return low if x < low else x


@njit(nogil=True, error_model="numpy", cache=True)
def _forward(lo, hi, gate, up, limit, y):
    low, gate, up, y = -limit, gate[lo:hi], up[lo:hi], y[lo:hi]  # an index that starts at a variable would not be vectorised
    for i in range(y.size):
        g = limit if gate[i] > limit else gate[i]
        y[i] = g * sigmoid(g) * clipped(up[i], low, limit)


def _slopes(gate, up, dy, limit):
    """silu(gate) up, dgate, dup"""
    F = type(gate)
    one, zero = F(1), F(0)
    g, u = limit if gate > limit else gate, clipped(up, -limit, limit)
    s = sigmoid(g)
    a = g * s
    dgate = dy * u * (s * (one + g * (one - s)))
    return a * u, zero if gate > limit else dgate, zero if abs(up) > limit else dy * a


slopes: Any = njit(nogil=True, error_model="numpy")(_slopes)


@njit(nogil=True, error_model="numpy", cache=True)
def _backward(lo, hi, gate, up, dy, limit, dgate, dup):
    gate, up, dy, dgate, dup = gate[lo:hi], up[lo:hi], dy[lo:hi], dgate[lo:hi], dup[lo:hi]
    for i in range(dy.size):
        _, dgate[i], dup[i] = slopes(gate[i], up[i], dy[i], limit)


def limit_of(op: str, limit: Any, dtype: np.dtype[Any]) -> Any:
    """The limit on the carrier; infinity for none"""
    ok = limit is None or (isinstance(limit, (int, float, np.integer, np.floating)) and not isinstance(limit, bool) and limit > 0)
    need(ok, op, "limit", repr(limit), "limit > 0, or None for no clamp")
    return dtype.type(math.inf if limit is None else limit)


def swiglu(gate: Array, up: Array, *, limit: float | None = None, silu: str = "float32") -> Array:
    """y[n,f] = silu(gate[n,f]) up[n,f],   silu(g) = g / (1 + exp(-g)).

    With a limit gate becomes min(gate, limit) and up is clipped to ±limit first. gate, up and y are float32 or float64 alike. silu says
    where 16-bit implementations round; it changes nothing here. ValueError: dtypes or shapes do not fit, limit <= 0.
    """
    arrays, a, _ = declared("swiglu", "forward", {"gate": gate, "up": up}, {"limit": limit, "silu": silu})
    gate, up = arrays["gate"], arrays["up"]
    y, bound = np.empty_like(gate), limit_of("swiglu", a["limit"], gate.dtype)
    run(_forward, gate.size, COST, gate.reshape(-1), up.reshape(-1), bound, y.reshape(-1))
    return y


def swiglu_bwd(gate: Array, up: Array, dy: Array, *, limit: float | None = None, silu: str = "float32") -> tuple[Array, Array]:
    """dgate = dy up σ (1 + gate (1 - σ)),   dup = dy silu(gate);   0 strictly beyond a limit. Errors as swiglu."""
    arrays, a, _ = declared("swiglu", "backward", {"gate": gate, "up": up, "dy": dy}, {"limit": limit, "silu": silu})
    gate, up, dy = (arrays[name] for name in ("gate", "up", "dy"))
    dgate, dup, bound = np.empty_like(gate), np.empty_like(up), limit_of("swiglu_bwd", a["limit"], gate.dtype)
    flat = (x.reshape(-1) for x in (gate, up, dy))
    run(_backward, gate.size, COST, *flat, bound, dgate.reshape(-1), dup.reshape(-1))
    return dgate, dup
