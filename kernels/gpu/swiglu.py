"""SwiGLU with V4's clamp, forward and backward. A thread takes an element."""

import math
from typing import Any

from ...ref.swiglu import Silu, check_limit
from ._call import empty, kernel_of
from ._device import cuda, device_function, each, kernel

Array = Any


@device_function
def sigmoid(z):
    """1 / (1 + e^-z), which never overflows"""
    F = type(z)
    small = F(math.exp(-abs(z)))
    return (F(1) if z >= F(0) else small) / (F(1) + small)


@device_function
def clipped(v, low, high):
    """NaN stays"""
    v = high if v > high else v
    return low if v < low else v


@kernel
def _forward(gate, up, limit, y):
    for i in range(cuda.grid(1), y.size, cuda.gridsize(1)):
        g = limit if gate[i] > limit else gate[i]
        y[i] = g * sigmoid(g) * clipped(up[i], -limit, limit)


@kernel
def _backward(gate, up, dy, limit, dgate, dup):
    F = gate.dtype.type
    for i in range(cuda.grid(1), dy.size, cuda.gridsize(1)):
        g, u = limit if gate[i] > limit else gate[i], clipped(up[i], -limit, limit)
        s = sigmoid(g)
        dgate[i] = F(0) if gate[i] > limit else dy[i] * u * (s * (F(1) + g * (F(1) - s)))
        dup[i] = F(0) if abs(up[i]) > limit else dy[i] * (g * s)


def _bound(op: str, limit: float | None, like: Array) -> Any:
    """The limit on the carrier; infinity for none"""
    check_limit(op, limit)
    return like.dtype.type(math.inf if limit is None else limit)


@kernel_of("swiglu")
def swiglu(gate: Array, up: Array, *, limit: float | None = None, silu: Silu = "float32") -> Array:
    """y[n,f] = silu(gate[n,f]) up[n,f],   silu(g) = g / (1 + exp(-g)).

    With a limit gate becomes min(gate, limit) and up is clipped to ±limit first. gate, up and y are float32 or float64 alike. silu says
    where 16-bit implementations round; it changes nothing here. ValueError: dtypes or shapes do not fit, limit <= 0.
    """
    y, bound = empty(gate.shape, gate.dtype), _bound("swiglu", limit, gate)
    each(_forward, y.size, gate.reshape(-1), up.reshape(-1), bound, y.reshape(-1))
    return y


@kernel_of("swiglu", "backward")
def swiglu_bwd(gate: Array, up: Array, dy: Array, *, limit: float | None = None, silu: Silu = "float32") -> tuple[Array, Array]:
    """dgate = dy up σ (1 + gate (1 - σ)),   dup = dy silu(gate);   0 strictly beyond a limit. Errors as swiglu."""
    dgate, dup, bound = empty(gate.shape, gate.dtype), empty(gate.shape, gate.dtype), _bound("swiglu_bwd", limit, gate)
    each(_backward, dy.size, *(a.reshape(-1) for a in (gate, up, dy)), bound, dgate.reshape(-1), dup.reshape(-1))
    return dgate, dup
