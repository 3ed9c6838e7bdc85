"""Stochastic rounding, and the uniform numbers behind it: the hottest loop of Monte-Carlo arithmetic (golden/montecarlo.py).

The numbers are functions of the value and a key, not a stream: equal values round alike, as in a real kernel.
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
def _round(x: Array, bits: Array, extra: Array, keys: Array, emin: int, mantissa_bits: int, out: Array) -> None:
    for i in range(x.size):
        if x[i] == 0.0 or not math.isfinite(x[i]):
            out[i] = x[i]
            continue
        exponent = max(int((bits[i] >> np.uint64(52)) & np.uint64(0x7FF)) - 1023, emin) - mantissa_bits
        units = math.ldexp(x[i], -exponent)
        if extra.size:
            units += extra[i if extra.size > 1 else 0] * (2 * _uniform(bits[i], keys[1]) - 1)
        floor = np.floor(units)
        out[i] = math.ldexp(floor + (_uniform(bits[i], keys[0]) < units - floor), exponent)


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
    more = np.asarray(extra, dtype=np.float64)
    more = np.ascontiguousarray(np.broadcast_to(more, x.shape)).reshape(-1) if more.ndim else more.reshape(-1)[: int(more != 0)]
    out, flat = np.empty_like(x), x.reshape(-1)
    keys = np.array([key, extra_key], dtype=np.uint64)
    _round(flat, flat.view(np.uint64), more, keys, emin, mantissa_bits, out.reshape(-1))
    return out
