"""Casts between a carrier (float32 or float64) and the formats e4m3fn, e5m2, bf16 and fp16.

    e4m3fn, e5m2, bf16, fp16         the values, on the carrier: cast.<format>
    encode.<format>                  the bit patterns
    decode.<format>                  the values of bit patterns, float32

One rounding, to nearest, ties to even, from either carrier. The kernels are branch-free; a format is data (`Rounding`, `Decoding`),
so that each compiles once per carrier and not once per format.
"""

from collections.abc import Callable
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from ._common import array_of, choice, flip, floats, output, run, shr

OVERFLOWS = ("saturate", "nan")


class Format(NamedTuple):
    """A floating-point format: what the kernels' parameters follow from."""

    name: str
    mantissa: int  # explicit mantissa bits
    bias: int
    max_code: int  # bit pattern of the largest finite number; infinity is the next one, except in e4m3fn
    nan_code: int
    overflow: str  # what its casts do by default

    @property
    def code(self) -> type:
        return np.uint8 if self.max_code < 0x80 else np.uint16

    @property
    def max_exponent(self) -> int:
        return (self.max_code >> self.mantissa) - self.bias

    @property
    def max(self) -> float:
        fraction = self.max_code & ((1 << self.mantissa) - 1)
        return (1 + fraction / (1 << self.mantissa)) * 2.0**self.max_exponent

    @property
    def has_inf(self) -> bool:
        return self.max_code + 1 != self.nan_code


FORMATS = {
    f.name: f
    for f in (
        Format("e4m3fn", 3, 7, 0x7E, 0x7F, "saturate"),
        Format("e5m2", 2, 15, 0x7B, 0x7E, "saturate"),
        Format("bf16", 7, 127, 0x7F7F, 0x7FC0, "nan"),
        Format("fp16", 10, 15, 0x7BFF, 0x7E00, "nan"),
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
    """The parameters of `encode_one` and `cast_one`."""
    F, U, places, bias = (np.float32, np.uint32, 23, 127) if dtype == np.float32 else (np.float64, np.uint64, 52, 1023)
    infinity = (2 * bias + 1) << places
    min_exponent = 1 - fmt.bias
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
        sign=0x80 if fmt.code is np.uint8 else 0x8000,
        nan=fmt.nan_code,
        unit=1 << lost,
        half=1 << (lost - 1),
        normal=0 if min_exponent == 1 - bias else bits(2.0**min_exponent),
        magic=bits(2.0 ** (min_exponent - fmt.mantissa + places)),
        max=bits(fmt.max),
        over=bits(fmt.max) if saturate or nan_on_overflow else infinity,
        quiet=infinity | 1 << (places - 1),
    )
    return Rounding(*map(U, fields))


# Editing encode_one, cast_one or decode_one: Numba's cache of fp8.py's kernels does not notice; touch fp8.py as well.
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


class Decoding(NamedTuple):
    """Format to float32: with the magnitude's bits in a float32's place, only the exponent's bias is wrong."""

    magnitude: np.uint32
    step: np.uint32  # moves a code's bits into place
    rebias: np.float32  # power of two; the product is exact, subnormals included
    max_code: np.uint32
    inf: np.float32  # the value of max_code + 1; everything above is NaN


@lru_cache
def decoding(fmt: Format) -> Decoding:
    """The parameters of `decode_one`."""
    magnitude = 0x7F if fmt.code is np.uint8 else 0x7FFF
    inf = np.float32(np.inf if fmt.has_inf else np.nan)
    return Decoding(
        np.uint32(magnitude), np.uint32(1 << (23 - fmt.mantissa)), np.float32(2.0 ** (127 - fmt.bias)), np.uint32(fmt.max_code), inf
    )


@njit(nogil=True)
def decode_one(code, d):
    """The float32 value of a code."""
    a = np.uint32(np.uint32(code) & d.magnitude)
    y = np.float32(flip(np.uint32(a * d.step)) * d.rebias)
    y = d.inf if a > d.max_code else y
    y = np.float32(np.nan) if a > np.uint32(d.max_code + np.uint32(1)) else y
    return -y if np.uint32(code) > d.magnitude else y


# The kernels slice before they loop: an index that starts at a variable would be tested for wrap-around and not vectorise.
@njit(nogil=True, cache=True)
def _encode(lo, hi, x, out, r):
    x, out = x[lo:hi], out[lo:hi]
    for i in range(x.size):
        out[i] = encode_one(x[i], r)


@njit(nogil=True, cache=True)
def _encode_top_half(lo, hi, x, out, r):
    x, out = x[lo:hi], out[lo:hi]
    for i in range(x.size):
        out[i] = shr(cast_one(x[i], r), np.uint32(16))


@njit(nogil=True, cache=True)
def _cast(lo, hi, x, out, r):
    x, out = x[lo:hi], out[lo:hi]
    for i in range(x.size):
        out[i] = flip(cast_one(x[i], r))


@njit(nogil=True, cache=True)
def _decode(lo, hi, codes, out, d):
    codes, out = codes[lo:hi], out[lo:hi]
    for i in range(codes.size):
        out[i] = decode_one(codes[i], d)


def _cast_op(fmt: Format) -> Callable[..., NDArray[Any]]:
    def cast(x: NDArray[Any], *, overflow: str = fmt.overflow, out: NDArray[Any] | None = None) -> NDArray[Any]:
        op = f"cast.{fmt.name}"
        choice(op, "overflow", overflow, OVERFLOWS)
        x = floats(op, "x", x)
        y = output(op, "out", out, x.shape, x.dtype, x)
        run(_cast, x.size, 1, x.reshape(-1), y.reshape(-1), rounding(fmt, x.dtype, overflow))
        return y

    cast.__doc__ = f"""y[n] = x[n] rounded once to {fmt.name} (nearest, ties to even), in x's dtype; x of any shape, float32 or float64.

    overflow="saturate" gives +-{fmt.max:g} beyond the format's range, "nan" gives {"infinity" if fmt.has_inf else "NaN"}. NaN stays NaN,
    zeros keep their sign. `out` receives the result. ValueError on another dtype, another overflow, an out that does not fit."""
    cast.__name__ = cast.__qualname__ = fmt.name
    return cast


def _encode_op(fmt: Format) -> Callable[..., NDArray[Any]]:
    def encode(x: NDArray[Any], *, overflow: str = fmt.overflow, out: NDArray[Any] | None = None) -> NDArray[Any]:
        op = f"encode.{fmt.name}"
        choice(op, "overflow", overflow, OVERFLOWS)
        x = floats(op, "x", x)
        codes = output(op, "out", out, x.shape, fmt.code, x)
        kernel = _encode_top_half if fmt.name == "bf16" and x.dtype == np.float32 else _encode
        run(kernel, x.size, 1, x.reshape(-1), codes.reshape(-1), rounding(fmt, x.dtype, overflow))
        return codes

    encode.__doc__ = f"""codes[n] = the bit pattern of cast.{fmt.name}(x[n]), {np.dtype(fmt.code)}; x of any shape, float32 or float64.

    NaN encodes as {fmt.nan_code:#x} whatever its sign. Attributes, `out` and errors as cast.{fmt.name}."""
    encode.__name__ = encode.__qualname__ = fmt.name
    return encode


def _decode_op(fmt: Format) -> Callable[..., NDArray[Any]]:
    def decode(codes: NDArray[Any], *, out: NDArray[Any] | None = None) -> NDArray[Any]:
        op = f"decode.{fmt.name}"
        codes = array_of(op, "codes", codes, (fmt.code,))
        x = output(op, "out", out, codes.shape, np.float32, codes)
        run(_decode, codes.size, 1, codes.reshape(-1), x.reshape(-1), decoding(fmt))
        return x

    decode.__doc__ = f"""x[n] = the value of the {fmt.name} bit pattern codes[n], float32, exact; codes of any shape, {np.dtype(fmt.code)}.

    `out` receives the result. ValueError on another dtype or an out that does not fit."""
    decode.__name__ = decode.__qualname__ = fmt.name
    return decode


e4m3fn, e5m2, bf16, fp16 = map(_cast_op, FORMATS.values())
encode = SimpleNamespace(**{name: _encode_op(fmt) for name, fmt in FORMATS.items()})
decode = SimpleNamespace(**{name: _decode_op(fmt) for name, fmt in FORMATS.items()})
