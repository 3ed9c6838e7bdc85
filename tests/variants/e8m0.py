"""Powers of two without sign or zero: e8m0, three ways to encode and three to decode."""

import math

import numpy as np

from .floats import Array


def by_frexp(x: Array, rounding: str, random: Array | None) -> Array:
    """x = (1 + fraction) 2^k: k, and one more by the fraction. Below 2^-127 all is 2^-127."""
    m, e = np.frexp(np.where(np.isfinite(x) & (x > 0), x, 1).astype(np.float64))
    fraction = 2 * m - 1
    up = {"half-even": fraction >= 0.5, "half-away": fraction >= 0.5, "half-zero": fraction > 0.5, "zero": fraction < 0}.get(rounding)
    k = e - 1 + (fraction > random if up is None else up)
    return np.where(np.isinf(x), 128, np.where(e - 1 < -127, -127, k)) + 127


def by_bits(x: Array, rounding: str, random: Array | None) -> Array:
    """float32: the exponent's field, into which what is added to the mantissa carries. 2^-127 is a subnormal, with a field of 0."""
    u = (x.astype(np.float32).view(np.uint32) & np.uint32(0x7FFFFFFF)).astype(np.int64)
    tiny = u < 0x800000
    field, mantissa = np.where(tiny, 0, u >> 23), np.where(tiny, np.maximum(u - 0x400000, 0) * 2, u & 0x7FFFFF)
    if rounding == "stochastic":
        assert random is not None
        return field + (random.astype(np.float64) * 2**23 < mantissa)
    return field + ((mantissa + {"half-even": 0x400000, "half-away": 0x400000, "half-zero": 0x3FFFFF, "zero": 0}[rounding]) >> 23)


POWERS = np.ldexp(1.0, np.arange(-127, 129))


def by_search(x: Array, rounding: str, random: Array | None) -> Array:
    """A search in the table of powers, or of what lies halfway between them"""
    v = np.where(x > 0, x, 1).astype(np.float64)
    if rounding in ("zero", "stochastic"):
        low = np.maximum(np.searchsorted(POWERS, v, side="right") - 1, 0)
        return low if random is None else low + (random * POWERS[low] < v - POWERS[low])
    return np.searchsorted(1.5 * POWERS[:-1], v, side="left" if rounding == "half-zero" else "right")


WAYS = {"frexp": by_frexp, "integer": by_bits, "midpoints": by_search}


def encode_by(name: str, x: Array, overflow: str | None, rounding: str, random: Array | None) -> Array:
    with np.errstate(all="ignore"):
        code = WAYS[name](x, rounding, random)
    beyond = np.isinf(x) if rounding == "zero" else code > 254
    code = np.where(beyond, 255 if overflow == "nan" else 254, np.minimum(code, 254))
    return np.where(x > 0, code, 255).astype(np.uint8)


def value(codes: Array) -> Array:
    """A product of two powers that float32 has as normal numbers"""
    c = codes.astype(np.int32)
    x = np.ldexp(np.float32(1), c // 2 - 63) * np.ldexp(np.float32(1), c - c // 2 - 64)
    return np.where(codes == 255, np.float32(np.nan), x)


def by_table(codes: Array) -> Array:
    return np.array([math.ldexp(1.0, c - 127) for c in range(255)] + [math.nan], np.float32)[codes]


def by_pattern(codes: Array) -> Array:
    """Shifted into a float32's exponent; 2^-127 is the subnormal of half the least normal number."""
    u = codes.astype(np.uint32) << np.uint32(23)
    return np.where(codes == 0, np.uint32(0x400000), np.where(codes == 255, np.uint32(0x7FC00000), u)).view(np.float32)


DECODE = {"product": value, "table": by_table, "pattern": by_pattern}
