"""Stochastic rounding, the noise of sums, and the uniform numbers behind both: the hot loops of Monte-Carlo arithmetic.

The numbers are functions of the value and a key, not a stream: equal values round alike, as in a real kernel. Used by
golden/montecarlo.py, where the noise is derived.
"""

import math
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Array = NDArray[Any]


@njit(inline="always")
def _uniform(bits: Any, key: Any) -> float:
    z = (bits ^ key) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return np.float64(z >> np.uint64(11)) * 2.0**-53


@njit(cache=True, nogil=True)
def _uniforms(bits: Array, key: Any, out: Array) -> None:
    for i in range(bits.size):
        out[i] = _uniform(bits[i], key)


@njit(cache=True, nogil=True)
def _round(x: Array, extra: Array, key: Any, extra_key: Any, emin: int, mantissa_bits: int, out: Array) -> None:
    bits = x.view(np.uint64)
    for i in range(x.size):
        if x[i] == 0.0 or not math.isfinite(x[i]):
            out[i] = x[i]
            continue
        exponent = max(int((bits[i] >> np.uint64(52)) & np.uint64(0x7FF)) - 1023, emin) - mantissa_bits
        units = math.ldexp(x[i], -exponent)
        if extra.size:
            units += extra[i if extra.size > 1 else 0] * (2 * _uniform(bits[i], extra_key) - 1)
        floor = np.floor(units)
        out[i] = math.ldexp(floor + (_uniform(bits[i], key) < units - floor), exponent)


@njit(cache=True, nogil=True)
def _scatter(total: Array, squares: Array, n: int, half: float, first: Any, second: Any, out: Array) -> None:
    bits = total.view(np.uint64)
    for i in range(total.size):
        if not math.isfinite(total[i]):  # an overflow has no noise
            out[i] = total[i]
            continue
        deviation = half * math.sqrt((n + 1) * (squares[i] / 6 + total[i] * total[i] / 3) / 3)
        radius = math.sqrt(-2 * math.log1p(-_uniform(bits[i], first)))
        out[i] = total[i] + deviation * radius * math.cos(2 * math.pi * _uniform(bits[i], second))


NONE = np.empty(0)


def uniform(x: Array, key: int) -> Array:
    """u[i] in [0,1): the upper 53 bits of SplitMix64 of (the float64 x[i]'s bits xor key), as a fraction"""
    x = np.asarray(x, dtype=np.float64, order="C")
    out = np.empty_like(x)
    _uniforms(x.reshape(-1).view(np.uint64), np.uint64(key), out.reshape(-1))
    return out


def rounded(x: Array, key: int, emin: int, mantissa_bits: int, extra: Array | float = 0.0, extra_key: int = 0) -> Array:
    """y[i] = (⌊z⌋ + [uniform(x, key) < z - ⌊z⌋]) u,   z = x/u + extra (2 uniform(x, extra_key) - 1)

    u is a unit in the last place of x in a format of `mantissa_bits` whose least exponent is `emin`; extra, in such units, is a number or
    of x's shape. Zeros, infinities and NaNs stay as they are.
    """
    x = np.asarray(x, dtype=np.float64, order="C")
    if isinstance(extra, np.ndarray) and extra.ndim:
        more = np.ascontiguousarray(np.broadcast_to(extra, x.shape), dtype=np.float64).reshape(-1)
    else:
        more = np.full(1, extra, dtype=np.float64) if extra else NONE
    out = np.empty_like(x)
    _round(x.reshape(-1), more, np.uint64(key), np.uint64(extra_key), emin, mantissa_bits, out.reshape(-1))
    return out


def scattered(total: Array, squares: Array, n: int, half: float, first: int, second: int) -> Array:
    """y[i] = t + half √((n+1)(q/6 + t²/3)/3) g,   g = √(-2 ln(1 - uniform(t, first))) cos(2π uniform(t, second)), a normal number

    t = total[i] is a sum of n terms, q = squares[i] that of their squares, and half is half a unit of the accumulator, relative.
    Infinities and NaNs stay as they are.
    """
    total, squares = (np.asarray(x, dtype=np.float64, order="C") for x in (total, squares))
    out = np.empty_like(total)
    _scatter(total.reshape(-1), squares.reshape(-1), n, half, np.uint64(first), np.uint64(second), out.reshape(-1))
    return out
