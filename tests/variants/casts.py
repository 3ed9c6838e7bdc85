"""cast and encode, seven ways; each is generic over the formats. Some find the code and look its value up, some find the value.

Four of them know every rounding. The others round to nearest even, as hardware does, and mend that afterwards.
"""

import functools
import math
from fractions import Fraction

import numpy as np

from . import e8m0
from .floats import LAYOUTS, Array, Layout


@functools.cache
def values(f: Layout) -> Array:
    """The value of every finite code and of the first beyond, in float64."""
    return np.array([f.value(code) for code in range(f.top + 2)])


def finished(f: Layout, x: Array, magnitude: Array, overflow: str, rounding: str = "half-even") -> Array:
    """The codes of |x| as if the exponent were unbounded, given the overflow rule, the sign and the NaN."""
    beyond = np.isinf(x) if rounding == "zero" else magnitude > f.top
    code = np.where(beyond, f.top if overflow == "saturate" else f.beyond, np.minimum(magnitude, f.top))
    code = code + ((np.signbit(x) & (f.negative_zero | (code > 0))).astype(np.int64) << (f.bits - 1))
    nan = np.isnan(x) | (beyond & (overflow == "nan") & (not f.infinite))
    return np.where(nan, f.nan, code).astype(f.dtype)


def valued(f: Layout, x: Array, magnitude: Array, overflow: str) -> Array:
    """The same for values, rounded to nearest."""
    limit = f.max if overflow == "saturate" else np.inf if f.infinite else np.nan
    y = np.where(magnitude > f.max, limit, magnitude)
    y = np.copysign(np.where(np.isnan(x), np.nan, y), x).astype(x.dtype)
    return y if f.negative_zero else y + x.dtype.type(0)  # -0 + 0 is 0


@functools.cache
def signed_table(f: Layout) -> Array:
    half = 1 << (f.bits - 1)
    table = np.append(values(f)[: f.top + 1], [np.nan] * (half - f.top - 1))
    if f.infinite:
        table[f.beyond] = np.inf
    table = np.concatenate([table, -table]).astype(np.float32)
    if not f.negative_zero:
        table[f.nan] = np.nan
    return table


def looked_up(f: Layout, codes: Array, dtype: np.dtype) -> Array:
    return signed_table(f)[codes].astype(dtype)


def assembled(f: Layout, y: Array) -> Array:
    """The code of |y|, which is a value of the format or infinite."""
    m, e = np.frexp(np.where(np.isfinite(y), np.abs(y), 0.0))
    normal = (e - 1 >= 1 - f.bias) & (m > 0)
    field = np.where(normal, e - 1 + f.bias, 0).astype(np.int64)
    mantissa = np.where(normal, np.ldexp(m, f.mantissa_bits + 1) - (1 << f.mantissa_bits), np.abs(y) / f.least)
    code = (field << f.mantissa_bits) + np.where(np.isfinite(y), mantissa, 0).astype(np.int64)
    return np.where(np.isnan(y), f.nan, np.where(np.isinf(y), f.beyond, code))


def mended(f: Layout, x: Array, nearest: Array, rounding: str, random: Array | None) -> Array:
    """Another rounding, from the nearest code: one down where that is above x, then up again by the fraction that is left."""
    if rounding == "half-even":
        return nearest
    table, magnitude = values(f), np.abs(np.where(np.isnan(x), 0, x)).astype(np.float64)
    low = np.minimum(nearest, f.top + 1)
    low = low - (table[low] > magnitude)
    inside = np.minimum(low, f.top)
    fraction = (magnitude - table[inside]) / (table[inside + 1] - table[inside])
    return np.where(low > f.top, low, low + goes_up(fraction, rounding, random))


def goes_up(fraction: Array, rounding: str, random: Array | None) -> Array:
    if rounding == "stochastic":
        assert random is not None
        return random < fraction
    return {"half-away": fraction >= 0.5, "half-zero": fraction > 0.5, "zero": np.zeros(np.shape(fraction), bool)}[rounding]


# by code


def integer(f: Layout, x: Array, rounding: str, random: Array | None) -> Array:
    """Integer arithmetic on the float32 pattern: add half a unit less one plus the last kept bit, shift. Subnormals shift further."""
    u = (x.astype(np.float32).view(np.uint32) & np.uint32(0x7FFFFFFF)).astype(np.int64)
    field = u >> 23
    wide = (u & 0x7FFFFF) | np.where(field > 0, 1 << 23, 0)  # the full significand
    drop = 23 - f.mantissa_bits
    further = np.maximum(1 - f.bias - (np.maximum(field, 1) - 127), 0)  # how far below the normal numbers
    shift = np.minimum(drop + further, 40)
    half = np.int64(1) << (shift - 1)
    if rounding == "stochastic":
        assert random is not None
        cut = wide & ((np.int64(1) << shift) - 1)
        kept = (wide >> shift) + (np.ldexp(random.astype(np.float64), drop + further) < cut)
    else:
        added = {"half-even": half - 1 + ((wide >> shift) & 1), "half-away": half, "half-zero": half - 1, "zero": 0}[rounding]
        kept = (wide + added) >> shift
    base = np.where(further == 0, (np.maximum(field, 1) - 127 + f.bias - 1) << f.mantissa_bits, 0)
    return np.where(u >= 0x7F800000, f.top + 1, base + kept)


def midpoints(f: Layout, x: Array, rounding: str, random: Array | None) -> Array:
    """A search among the midpoints of neighbours; on a midpoint the even code wins, or the side that the rounding says."""
    table = values(f)
    magnitude = np.abs(np.where(np.isnan(x), 0, x)).astype(np.float64)
    if rounding in ("zero", "stochastic"):
        low = np.searchsorted(table, magnitude, side="right") - 1
        width = np.diff(table, append=np.inf)[low]
        return low if random is None else low + (random * width < magnitude - table[low])
    middles = (table[1:] + table[:-1]) / 2
    code = np.searchsorted(middles, magnitude, side="right" if rounding == "half-away" else "left")
    tie = (magnitude == middles[np.minimum(code, len(middles) - 1)]) & (rounding == "half-even")
    return np.where(tie & (code % 2 == 1), code + 1, code)


def scalar(f: Layout, x: Array, rounding: str, random: Array | None) -> Array:
    """One element at a time in Python's integers and fractions."""

    def one(v: float, r: float) -> int:
        if v == 0 or not math.isfinite(v):
            return 0 if v == 0 else f.top + 1
        _, e = math.frexp(abs(v))
        step = max(e - 1, 1 - f.bias) - f.mantissa_bits  # log2 of the unit
        units = Fraction(abs(v)) / Fraction(2) ** step
        kept = units.numerator // units.denominator
        rest = units - kept
        if rounding == "stochastic":
            kept += Fraction(r) < rest
        elif rest == Fraction(1, 2):
            kept += {"half-even": kept % 2, "half-away": 1}.get(rounding, 0)
        elif rounding != "zero":
            kept += rest > Fraction(1, 2)
        return ((step + f.mantissa_bits - (1 - f.bias)) << f.mantissa_bits) + kept

    numbers = [0.0] * len(x) if random is None else random.tolist()
    return np.array([one(v, r) for v, r in zip(x.tolist(), numbers, strict=True)], dtype=np.int64)


@functools.cache
def odd_table(f: Layout) -> Array:
    """Codes of all float32 whose lower half is zero; the last bit of the upper half stands for anything that was cut off."""
    return integer(f, (np.arange(1 << 15, dtype=np.uint32) << np.uint32(16)).view(np.float32), "half-even", None)


def halfway(f: Layout, x: Array, rounding: str, random: Array | None) -> Array:
    """By way of 16 bits without double rounding: cut to 16 bits with a sticky last bit, then a table. 16-bit formats go the direct way."""
    u = x.astype(np.float32).view(np.uint32) & np.uint32(0x7FFFFFFF)
    if f.bits <= 8:
        code = odd_table(f)[(u >> np.uint32(16)) | ((u & np.uint32(0xFFFF)) != 0)]
    elif f.name == "bf16":
        u = np.minimum(u, np.uint32(0x7F800000))
        code = ((u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.int64)
    else:
        code = (np.abs(x).astype(np.float16).view(np.uint16)).astype(np.int64)
    return mended(f, x, code, rounding, random)


# by value: nearest even


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
LACKS = {("halfway", "e5m6"), ("halfway", "tf32")}  # 16 bits do not hold them and the bit that is rounded by


def encode_by(
    name: str, f: Layout, x: Array, overflow: str | None = None, rounding: str = "half-even", random: Array | None = None
) -> Array:
    """The codes by the named way."""
    overflow = f.overflow(overflow)
    with np.errstate(all="ignore"):
        if name in BY_CODE:
            return finished(f, x, BY_CODE[name](f, x, rounding, random), overflow, rounding)
        y = BY_VALUE[name](f, x)
        if rounding != "half-even":
            code = np.where(y > f.max, f.top + 1, assembled(f, np.minimum(y, f.max)))
            return finished(f, x, mended(f, x, code, rounding, random), overflow, rounding)
        y = valued(f, x, y, overflow)
        sign = np.signbit(x) & ~np.isnan(y) & (f.negative_zero | (y != 0))
        return (assembled(f, y) + (sign.astype(np.int64) << (f.bits - 1))).astype(f.dtype)


def cast_by(name: str, f: Layout, x: Array, overflow: str | None = None, rounding: str = "half-even", random: Array | None = None) -> Array:
    """The values by the named way."""
    if name in BY_VALUE and rounding == "half-even":
        with np.errstate(all="ignore"):
            return valued(f, x, BY_VALUE[name](f, x), f.overflow(overflow))
    return looked_up(f, encode_by(name, f, x, overflow, rounding, random), x.dtype)


def names(format: str) -> tuple[str, ...]:
    """The ways that a format has."""
    return tuple(e8m0.WAYS) if format == "e8m0" else tuple(n for n in (*BY_CODE, *BY_VALUE) if (n, format) not in LACKS)


def encoder(name: str, format: str):
    def encode(x: Array, random: Array | None = None, *, overflow: str | None = None, rounding: str = "half-even") -> Array:
        if format == "e8m0":
            return e8m0.encode_by(name, x, overflow, rounding, random)
        return encode_by(name, LAYOUTS[format], x, overflow, rounding, random)

    return encode


def caster(name: str, format: str):
    def cast(x: Array, random: Array | None = None, *, overflow: str | None = None, rounding: str = "half-even") -> Array:
        if format == "e8m0":
            return e8m0.value(e8m0.encode_by(name, x, overflow, rounding, random)).astype(x.dtype)
        return cast_by(name, LAYOUTS[format], x, overflow, rounding, random)

    return cast
