"""cast and encode, six ways; each is generic over the formats. Some find the code and look its value up, some find the value."""

import functools
import math

import numpy as np

from .floats import LAYOUTS, Array, Layout


@functools.cache
def values(f: Layout) -> Array:
    """The value of every finite code and of the first beyond, in float64."""
    return np.array([f.value(code) for code in range(f.top + 2)])


def finished(f: Layout, x: Array, magnitude: Array, overflow: str) -> Array:
    """The codes of |x| as if the exponent were unbounded, given the overflow rule, the sign and the NaN."""
    code = np.where(magnitude > f.top, f.top if overflow == "saturate" else f.beyond, magnitude)
    code = code + (np.signbit(x).astype(np.int64) << (f.bits - 1))
    nan = np.isnan(x) | ((f.name == "e4m3fn") & (overflow == "nan") & (magnitude > f.top))
    return np.where(nan, f.nan, code).astype(f.dtype)


def valued(f: Layout, x: Array, magnitude: Array, overflow: str) -> Array:
    """The same for values."""
    limit = f.max if overflow == "saturate" else np.nan if f.name == "e4m3fn" else np.inf
    y = np.where(magnitude > f.max, limit, magnitude)
    return np.copysign(np.where(np.isnan(x), np.nan, y), x).astype(x.dtype)


def looked_up(f: Layout, codes: Array, dtype: np.dtype) -> Array:
    table = np.append(values(f)[: f.top + 1], [np.nan] * ((1 << (f.bits - 1)) - f.top - 1))
    if f.name != "e4m3fn":
        table[f.beyond] = np.inf
    table = np.concatenate([table, -table]).astype(np.float32)
    return table[codes].astype(dtype)


def assembled(f: Layout, y: Array) -> Array:
    """The code of |y|, which is a value of the format or infinite."""
    m, e = np.frexp(np.where(np.isfinite(y), np.abs(y), 0.0))
    normal = (e - 1 >= 1 - f.bias) & (m > 0)
    field = np.where(normal, e - 1 + f.bias, 0).astype(np.int64)
    mantissa = np.where(normal, np.ldexp(m, f.mantissa_bits + 1) - (1 << f.mantissa_bits), np.abs(y) / f.least)
    code = (field << f.mantissa_bits) + np.where(np.isfinite(y), mantissa, 0).astype(np.int64)
    return np.where(np.isnan(y), f.nan, np.where(np.isinf(y), f.beyond, code))


# by code


def integer(f: Layout, x: Array) -> Array:
    """Integer arithmetic on the float32 pattern: add half a unit less one plus the last kept bit, shift. Subnormals shift further."""
    u = (x.astype(np.float32).view(np.uint32) & np.uint32(0x7FFFFFFF)).astype(np.int64)
    field = u >> 23
    wide = (u & 0x7FFFFF) | np.where(field > 0, 1 << 23, 0)  # the full significand
    drop = 23 - f.mantissa_bits
    further = np.clip(1 - f.bias - (np.maximum(field, 1) - 127), 0, 40)  # how far below the normal numbers
    shift = np.minimum(drop + further, 40)
    kept = (wide + (np.int64(1) << (shift - 1)) - 1 + ((wide >> shift) & 1)) >> shift
    base = np.where(further == 0, (np.maximum(field, 1) - 127 + f.bias - 1) << f.mantissa_bits, 0)
    return np.where(u >= 0x7F800000, f.top + 1, base + kept)


def midpoints(f: Layout, x: Array) -> Array:
    """A search among the midpoints of neighbours; on a midpoint the even code wins."""
    table = values(f)
    middles = (table[1:] + table[:-1]) / 2
    magnitude = np.abs(np.where(np.isnan(x), 0, x)).astype(np.float64)
    code = np.searchsorted(middles, magnitude, side="left")
    tie = magnitude == middles[np.minimum(code, len(middles) - 1)]
    return np.where(tie & (code % 2 == 1), code + 1, code)


def scalar(f: Layout, x: Array) -> Array:
    """One element at a time in Python's integers."""

    def one(v: float) -> int:
        if v == 0 or not math.isfinite(v):
            return 0 if v == 0 else f.top + 1
        m, e = math.frexp(abs(v))
        step = max(e - 1, 1 - f.bias) - f.mantissa_bits  # log2 of the unit
        whole, shift = int(math.ldexp(m, 53)), step - (e - 53)
        if shift > 60:
            return 0
        kept, rest = divmod(whole, 1 << shift)
        half = 1 << (shift - 1)
        kept += rest > half or (rest == half and kept % 2)
        return int(((step + f.mantissa_bits - (1 - f.bias)) << f.mantissa_bits) + kept)

    return np.array([one(v) for v in x.tolist()], dtype=np.int64)


@functools.cache
def odd_table(f: Layout) -> Array:
    """Codes of all float32 whose lower half is zero; the last bit of the upper half stands for anything that was cut off."""
    return integer(f, (np.arange(1 << 15, dtype=np.uint32) << np.uint32(16)).view(np.float32))


def halfway(f: Layout, x: Array) -> Array:
    """By way of 16 bits without double rounding: cut to 16 bits with a sticky last bit, then a table. 16-bit formats go the direct way."""
    u = x.astype(np.float32).view(np.uint32) & np.uint32(0x7FFFFFFF)
    if f.bits == 8:
        return odd_table(f)[(u >> np.uint32(16)) | ((u & np.uint32(0xFFFF)) != 0)]
    if f.name == "bf16":
        u = np.minimum(u, np.uint32(0x7F800000))
        return ((u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.int64)
    return (np.abs(x).astype(np.float16).view(np.uint16)).astype(np.int64)


# by value


def frexp(f: Layout, x: Array) -> Array:
    """Scale the unit to one, rint, scale back."""
    clipped = np.minimum(np.abs(np.where(np.isnan(x), 0, x)).astype(np.float64), 4 * f.max)
    _, e = np.frexp(clipped)
    unit = np.maximum(e - 1, 1 - f.bias) - f.mantissa_bits
    return np.ldexp(np.rint(np.ldexp(clipped, -unit)), unit)


def magic(f: Layout, x: Array) -> Array:
    """Add and take away a number so large that its unit in the last place is the format's."""
    clipped = np.minimum(np.abs(np.where(np.isnan(x), 0, x)).astype(np.float64), 4 * f.max)
    power = (np.maximum(clipped, f.least * 2.0**f.mantissa_bits).view(np.int64) & (0x7FF << 52)).view(np.float64)  # 2^floor(log2)
    big = power * (1.5 * 2.0 ** (52 - f.mantissa_bits))
    return (clipped + big) - big


def split(f: Layout, x: Array) -> Array:
    """Between a number's two neighbours: cut toward zero, and take the neighbour above if the rest is more than half, or half and odd."""
    clipped = np.minimum(np.abs(np.where(np.isnan(x), 0, x)).astype(np.float64), 4 * f.max)
    power = np.exp2(np.floor(np.log2(np.maximum(clipped, f.least * 2.0**f.mantissa_bits))))
    power = np.where(power > clipped, np.maximum(power / 2, f.least * 2.0**f.mantissa_bits), power)
    power = np.where(2 * power <= clipped, 2 * power, power)
    unit = power / 2.0**f.mantissa_bits
    below = np.trunc(clipped / unit)
    rest = clipped - below * unit
    return (below + ((rest > unit / 2) | ((rest == unit / 2) & (np.mod(below, 2) == 1)))) * unit


BY_CODE = {"integer": integer, "midpoints": midpoints, "scalar": scalar, "halfway": halfway}
BY_VALUE = {"frexp": frexp, "magic": magic, "split": split}
WIDE = {"midpoints", "scalar", "frexp", "magic", "split"}  # right from float64 too
SLOW = {"scalar"}


def encode_by(name: str, f: Layout, x: Array, overflow: str | None = None) -> Array:
    """The codes by the named way."""
    overflow = f.overflow(overflow)
    with np.errstate(all="ignore"):
        if name in BY_CODE:
            return finished(f, x, BY_CODE[name](f, x), overflow)
        y = valued(f, x, BY_VALUE[name](f, x), overflow)
        sign = np.where(np.isnan(y), 0, np.signbit(x).astype(np.int64) << (f.bits - 1))
        return (assembled(f, y) + sign).astype(f.dtype)


def cast_by(name: str, f: Layout, x: Array, overflow: str | None = None) -> Array:
    """The values by the named way."""
    overflow = f.overflow(overflow)
    with np.errstate(all="ignore"):
        if name in BY_VALUE:
            return valued(f, x, BY_VALUE[name](f, x), overflow)
        return looked_up(f, finished(f, x, BY_CODE[name](f, x), overflow), x.dtype)


NAMES = (*BY_CODE, *BY_VALUE)


def encoder(name: str, format: str):
    def encode(x: Array, *, overflow: str | None = None) -> Array:
        return encode_by(name, LAYOUTS[format], x, overflow)

    return encode


def caster(name: str, format: str):
    def cast(x: Array, *, overflow: str | None = None) -> Array:
        return cast_by(name, LAYOUTS[format], x, overflow)

    return cast
