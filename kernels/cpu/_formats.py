"""Narrow floating-point formats as data, and the functions that round and decode one number. cast.py and fp8.py loop over them.

`encode_one` and `cast_one` round to nearest, ties to even, in a few operations of the carrier's own width. `round_any` takes every format
and rounding, in float64, where each step is exact.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from ._common import flip, shr

ROUNDINGS = ("half-even", "half-away", "half-zero", "zero", "stochastic")


class Format(NamedTuple):
    """A floating-point format: what the kernels' parameters follow from."""

    name: str
    mantissa: int  # explicit mantissa bits
    bias: int
    bits: int
    max_code: int  # bit pattern of the largest finite number; infinity is the next one, where there is one
    nan_code: int | None
    overflow: str  # what its casts do by default
    signed: bool = True  # without a sign there is no zero: code 0 is the smallest power of two
    negative_zero: bool = True

    @property
    def code(self) -> type:
        return np.uint8 if self.bits <= 8 else np.uint16 if self.bits <= 16 else np.uint32

    @property
    def min_exponent(self) -> int:
        return self.signed - self.bias

    @property
    def max_exponent(self) -> int:
        return (self.max_code >> self.mantissa) - self.bias

    @property
    def max(self) -> float:
        fraction = self.max_code & ((1 << self.mantissa) - 1)
        return (1 + fraction / (1 << self.mantissa)) * 2.0**self.max_exponent

    @property
    def has_inf(self) -> bool:
        return self.nan_code not in (None, self.max_code + 1)

    @property
    def plain(self) -> bool:
        """Whether encode_one and cast_one do it."""
        return self.signed and self.negative_zero


FORMATS = {
    f.name: f
    for f in (
        Format("e4m3fn", 3, 7, 8, 0x7E, 0x7F, "saturate"),
        Format("e5m2", 2, 15, 8, 0x7B, 0x7E, "saturate"),
        Format("e4m3fnuz", 3, 8, 8, 0x7F, 0x80, "saturate", negative_zero=False),
        Format("e5m2fnuz", 2, 16, 8, 0x7F, 0x80, "saturate", negative_zero=False),
        Format("e2m1", 1, 1, 4, 0x7, None, "saturate"),
        Format("e8m0", 0, 127, 8, 0xFE, 0xFF, "saturate", signed=False),
        Format("e5m6", 6, 15, 12, 0x7BF, 0x7E0, "nan"),
        Format("bf16", 7, 127, 16, 0x7F7F, 0x7FC0, "nan"),
        Format("fp16", 10, 15, 16, 0x7BFF, 0x7E00, "nan"),
        Format("tf32", 10, 127, 19, 0x3FBFF, 0x3FE00, "nan"),
    )
}


class Rounding(NamedTuple):
    """Carrier to format. Every field is an unsigned integer as wide as the carrier; *bits* are a carrier's bit pattern."""

    magnitude: Any  # mask: all but the sign
    exponent: Any  # mask: the exponent field
    nan_above: Any  # magnitudes beyond these bits give NaN
    # encode_one
    limit: Any  # magnitudes are clipped to these bits first
    lowest: Any  # the format's smallest normal exponent, as an exponent field
    lift: Any  # added to an exponent field: a number whose last place is the format's; its low bits take the biases' difference off
    shift: Any
    sign: Any  # the sign bit of a code
    nan: Any  # the NaN code
    # cast_one
    unit: Any  # the format's last place in a normal carrier's bits
    half: Any
    normal: Any  # bits of the smallest normal number, 0 where the carrier has the same subnormals
    magic: Any  # bits of the number whose last place is the format's smallest subnormal
    max: Any  # bits of the largest finite number
    over: Any  # bits of what is beyond
    quiet: Any  # bits of the NaN


@lru_cache
def rounding(fmt: Format, dtype: np.dtype[Any], overflow: str) -> Rounding:
    """The parameters of `encode_one` and `cast_one`, for a `plain` format."""
    F, U, places, bias = (np.float32, np.uint32, 23, 127) if dtype == np.float32 else (np.float64, np.uint64, 52, 1023)
    infinity = (2 * bias + 1) << places
    min_exponent = fmt.min_exponent
    lost = places - fmt.mantissa

    def bits(v: float) -> int:
        return int(F(v).view(U))

    saturate = overflow == "saturate"
    nan_on_overflow = not saturate and not fmt.has_inf
    fields = Rounding(
        magnitude=(1 << infinity.bit_length()) - 1,
        exponent=infinity,
        # without infinities, half a unit above the maximum is the last magnitude that rounds to it
        nan_above=bits(fmt.max + 2.0 ** (fmt.max_exponent - fmt.mantissa - 1)) if nan_on_overflow else infinity,
        limit=bits(fmt.max) if saturate or nan_on_overflow else (fmt.max_exponent + 1 + bias) << places,
        lowest=(min_exponent + bias) << places,
        lift=lost << places | -((min_exponent + bias) << fmt.mantissa) % (1 << 8 * np.dtype(fmt.code).itemsize),
        shift=lost,
        sign=1 << (fmt.bits - 1),
        nan=fmt.nan_code or 0,
        unit=1 << lost,
        half=1 << (lost - 1),
        normal=0 if min_exponent == 1 - bias else bits(2.0**min_exponent),
        magic=bits(2.0 ** (min_exponent - fmt.mantissa + places)),
        max=bits(fmt.max),
        over=bits(fmt.max) if saturate or nan_on_overflow else infinity,
        quiet=infinity | 1 << (places - 1),
    )
    return Rounding(*map(U, fields))


# Editing a function here: Numba's caches of the kernels that call it do not notice; touch their files as well.
@njit(nogil=True)
def encode_one(v, r):
    """The code of v, in the low bits of the result (the store into a uint8 or uint16 array drops the rest).

    With q the format's last place at |v|, the sum of |v| and (2^places + an even integer) q is rounded to a multiple of q by the
    addition itself, and its low bits count the q's.
    """
    U = type(r.limit)
    u = flip(v)
    a = U(u & r.magnitude)
    clipped = min(a, r.limit)
    e = max(U(clipped & r.exponent), r.lowest)
    total = flip(flip(clipped) + flip(U(e + r.lift)))  # low bits: |v| / q, hidden bit included, minus the bias of the exponent
    code = U(total + shr(e, r.shift))  # so a carry moves into the exponent by itself
    code = U(code | (r.sign if u > r.magnitude else U(0)))
    return r.nan if a > r.nan_above else code


@njit(nogil=True)
def cast_one(v, r):
    """The bits, in v's type, of v rounded to the format. Works where encode_one's `big` overflows: bf16 from float32."""
    U = type(r.limit)
    u = flip(v)
    a = U(u & r.magnitude)
    even = U(a + (r.half if U(a & r.unit) != U(0) else U(r.half - U(1))))
    normal = U(even & U(~U(r.unit - U(1))))
    tiny = flip((flip(a) + flip(r.magic)) - flip(r.magic))
    y = tiny if a < r.normal else normal
    y = r.over if y > r.max else y
    y = U(y | U(u & U(~r.magnitude)))
    return r.quiet if a > r.nan_above else y


MAGNITUDE, INFINITY = np.uint64((1 << 63) - 1), np.uint64(0x7FF << 52)
COUNTER = 2.0**52  # added to a whole number below it, the sum's bits count
COUNTER_BITS = np.uint64(1075 << 52)


class AnyRounding(NamedTuple):
    """float64 to a format, in any rounding. Unsigned integers of 64 bits unless said otherwise."""

    limit: np.uint64  # bits of the power of two above the maximum: magnitudes are clipped to it
    lowest: np.uint64  # smallest exponent, as an exponent field
    inverse: np.uint64  # less an exponent field: the bits of 1 / (last place)
    unit: np.uint64  # taken off an exponent field: the bits of the last place
    shift: np.uint64
    threshold: float  # rounds up where the fraction is above; not used by half-even and stochastic
    even: bool
    least: float  # the smallest count of last places
    first: np.uint64  # and what that is as an integer: codes count from it
    max_code: np.uint64
    over: np.uint64  # code of a finite number beyond the maximum
    over_inf: np.uint64  # code of infinity
    over_value: float
    over_inf_value: float
    seen: np.uint64  # mask: what decides whether a number is NaN: all bits where there is no sign
    nan_above: np.uint64  # bits under that mask, less `first`, above which the result is NaN
    nan: np.uint64  # the NaN code
    sign: np.uint64
    keep: np.uint64  # added to a magnitude's code: zero if nothing is to carry a sign


@lru_cache
def any_rounding(fmt: Format, overflow: str, mode: str) -> AnyRounding:
    """The parameters of `round_any`."""
    U, m, first = np.uint64, fmt.mantissa, int(not fmt.signed)
    no_nan = (1 << 64) - 1  # a code that no number has, and a magnitude that is not exceeded
    nan = no_nan if fmt.nan_code is None else fmt.nan_code
    beyond = (fmt.max_code, fmt.max) if overflow == "saturate" else (fmt.max_code + 1, np.inf) if fmt.has_inf else (nan, np.nan)
    finite = (fmt.max_code, fmt.max) if mode == "zero" else beyond
    # half-away: fractions of at least a half are those above the number before it
    threshold = {"half-away": float(np.nextafter(0.5, 0.0)), "half-zero": 0.5}.get(mode, 1.0)
    return AnyRounding(
        limit=U((fmt.max_exponent + 1 + 1023) << 52),
        lowest=U((fmt.min_exponent + 1023) << 52),
        inverse=U((2046 + m) << 52),
        unit=U(m << 52),
        shift=U(52 - m),
        threshold=threshold,
        even=mode == "half-even",
        least=float(first),
        first=U(first),
        max_code=U(fmt.max_code),
        over=U(finite[0]),
        over_inf=U(beyond[0]),
        over_value=float(finite[1]),
        over_inf_value=float(beyond[1]),
        seen=MAGNITUDE if fmt.signed else U(no_nan),
        nan_above=U(int(INFINITY) - first if fmt.nan_code is not None else no_nan),
        nan=U(nan),
        sign=U(1 << (fmt.bits - 1) if fmt.signed else 0),
        keep=U(fmt.negative_zero),
    )


@njit(nogil=True)
def round_any(v, threshold, g):
    """(code, value in float64) of v; up where the fraction of the last place that is cut off is above threshold, or half-even."""
    u = flip(np.float64(v))
    a = np.uint64(u & MAGNITUDE)
    clipped = np.uint64(0) if a > INFINITY else min(a, g.limit)
    e = max(np.uint64(clipped & INFINITY), g.lowest)
    q = flip(clipped) * flip(np.uint64(g.inverse - e))  # |v| in last places, exact
    down = np.floor(q)
    n = np.rint(q) if g.even else (down + 1.0 if q - down > threshold else down)
    n = max(n, g.least)
    count = np.uint64(flip(n + COUNTER) - COUNTER_BITS)
    code = np.uint64(np.uint64(count + shr(np.uint64(e - g.lowest), g.shift)) - g.first)
    value = n * flip(np.uint64(e - g.unit))
    if code > g.max_code:
        code = g.over_inf if a == INFINITY else g.over
        value = g.over_inf_value if a == INFINITY else g.over_value
    nan = np.uint64(np.uint64(u & g.seen) - g.first) > g.nan_above or code == g.nan
    negative = u > MAGNITUDE and np.uint64(code + g.keep) != np.uint64(0)
    code = g.nan if nan else (np.uint64(code | g.sign) if negative else code)
    return code, np.nan if nan else (-value if negative else value)


class Decoding(NamedTuple):
    """Format to float32: with the magnitude's bits in a float32's place, only the exponent's bias is wrong."""

    magnitude: np.uint32
    step: np.uint32  # moves a code's bits into place
    rebias: np.float32  # power of two; the product is exact, subnormals included
    max_code: np.uint32
    inf: np.float32  # the value of max_code + 1
    # NaN where (code & nan_mask) ^ nan_flip > nan_above
    nan_mask: np.uint32
    nan_flip: np.uint32
    nan_above: np.uint32


@lru_cache
def decoding(fmt: Format) -> Decoding:
    """The parameters of `decode_one`, for a format with a sign."""
    magnitude = (1 << (fmt.bits - 1)) - 1
    inf = np.float32(np.inf if fmt.has_inf else np.nan)
    # NaN is what is beyond infinity; or it has -0's code, which the flip makes the largest.
    mask, turn, above = (magnitude, 0, fmt.max_code + 1) if fmt.negative_zero else (2 * magnitude + 1, magnitude, 2 * magnitude)
    step, rebias = np.uint32(1 << (23 - fmt.mantissa)), np.float32(2.0 ** (127 - fmt.bias))
    return Decoding(np.uint32(magnitude), step, rebias, np.uint32(fmt.max_code), inf, np.uint32(mask), np.uint32(turn), np.uint32(above))


@njit(nogil=True)
def decode_one(code, d):
    """The float32 value of a code."""
    c = np.uint32(code)
    a = np.uint32(c & d.magnitude)
    y = np.float32(flip(np.uint32(a * d.step)) * d.rebias)
    y = d.inf if a > d.max_code else y
    y = np.float32(np.nan) if np.uint32(np.uint32(c & d.nan_mask) ^ d.nan_flip) > d.nan_above else y
    return -y if c > d.magnitude else y
