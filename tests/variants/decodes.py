"""decode, six ways; each is generic over the formats and gives float32."""

import functools
import math
import struct

import numpy as np

from . import e8m0
from .floats import LAYOUTS, Array, Layout


def special(f: Layout, codes: Array, x: Array) -> Array:
    """What lies above the largest finite code: infinity and NaN."""
    magnitude = codes.astype(np.int64) & ((1 << (f.bits - 1)) - 1)
    x = np.where((magnitude == f.beyond) & f.infinite, np.copysign(np.float32(np.inf), x), x)
    x = np.where(magnitude > (f.beyond if f.infinite else f.top), np.float32(np.nan), x)
    return x if f.negative_zero else np.where(codes == f.nan, np.float32(np.nan), x)


def parts(f: Layout, codes: Array) -> tuple[Array, Array, Array]:
    c = codes.astype(np.int64)
    return c >> (f.bits - 1), (c >> f.mantissa_bits) & ((1 << f.exponent_bits) - 1), c & ((1 << f.mantissa_bits) - 1)


@functools.cache
def _table(f: Layout) -> Array:
    half = 1 << (f.bits - 1)
    finite = [f.value(code) for code in range(f.top + 1)]
    positive = (finite + [float("inf")] * f.infinite + [float("nan")] * half)[:half]
    every = positive + [-v for v in positive]
    if not f.negative_zero:
        every[f.nan] = float("nan")
    return np.array(every, dtype=np.float32)


def table(f: Layout, codes: Array) -> Array:
    """A table of every code, by pure Python."""
    return _table(f)[codes]


def shifted(f: Layout, codes: Array) -> Array:
    """The fields shifted into place in a float32 whose exponent is then mended by one exact multiplication (subnormals included)."""
    c = codes.astype(np.uint32)
    sign = (c >> np.uint32(f.bits - 1)) << np.uint32(31)
    body = (c & np.uint32((1 << (f.bits - 1)) - 1)) << np.uint32(23 - f.mantissa_bits)
    if f.bias == 127:
        return (sign | body).view(np.float32)
    x = body.view(np.float32) * np.float32(2.0 ** (127 - f.bias))
    return special(f, codes, (x.view(np.uint32) | sign).view(np.float32))


def ldexp(f: Layout, codes: Array) -> Array:
    """The significand times a power of two."""
    sign, field, mantissa = parts(f, codes)
    significand = (mantissa + np.where(field > 0, 1 << f.mantissa_bits, 0)).astype(np.float32)
    x = np.ldexp(significand, (np.maximum(field, 1) - f.bias - f.mantissa_bits).astype(np.int32))
    return special(f, codes, np.where(sign == 1, -x, x).astype(np.float32))


def viewed(f: Layout, codes: Array) -> Array:
    """As another type: e5m2 and e5m6 are the upper part of a float16, bfloat16 that of a float32, e4m3fn and e2m1 float16 with another
    bias, the FNUZ formats float64 with another."""
    if f.name == "bf16":
        return (codes.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if f.name == "fp16":
        return codes.view(np.float16).astype(np.float32)
    if f.name in ("e5m2", "e5m6"):
        return (codes.astype(np.uint16) << np.uint16(16 - f.bits)).view(np.float16).astype(np.float32)
    if not f.negative_zero:
        c = codes.astype(np.uint64)
        body = ((c & np.uint64(0x7F)) << np.uint64(52 - f.mantissa_bits)).view(np.float64) * 2.0 ** (1023 - f.bias)
        return special(f, codes, np.where(c >> np.uint64(7), -body, body).astype(np.float32))
    c, top = codes.astype(np.uint16), f.bits - 1
    half = (c >> np.uint16(top) << np.uint16(15)) | ((c & np.uint16((1 << top) - 1)) << np.uint16(10 - f.mantissa_bits))
    return special(f, codes, half.view(np.float16).astype(np.float32) * np.float32(2.0 ** (15 - f.bias)))


@functools.cache
def _steps(f: Layout) -> Array:
    """All magnitudes as running sums of the distances between neighbours (exact)."""
    fields = np.arange(f.top + 1) >> f.mantissa_bits
    return np.r_[0.0, np.cumsum(np.ldexp(f.least, np.maximum(fields, 1) - 1))][:-1]


def summed(f: Layout, codes: Array) -> Array:
    """Each magnitude is the one before plus the distance between them."""
    magnitude = codes.astype(np.int64) & ((1 << (f.bits - 1)) - 1)
    x = _steps(f)[np.minimum(magnitude, f.top)].astype(np.float32)
    return special(f, codes, np.where(codes >> (f.bits - 1), -x, x))


def scalar(f: Layout, codes: Array) -> Array:
    """One code at a time; the wide ones unpacked by struct."""

    def one(code: int) -> float:
        if f.name == "fp16":
            return struct.unpack("<e", struct.pack("<H", code))[0]
        if f.name == "bf16":
            return struct.unpack("<f", struct.pack("<I", code << 16))[0]
        if f.name == "e5m2":
            return struct.unpack("<e", bytes([0, code]))[0]
        sign, rest = divmod(code, 1 << (f.bits - 1))
        if rest > f.top or (code == f.nan and not f.negative_zero):
            return math.copysign(math.inf, -sign) if f.infinite and rest == f.beyond else math.nan
        field, mantissa = divmod(rest, 1 << f.mantissa_bits)
        value = math.ldexp(mantissa + (field > 0) * (1 << f.mantissa_bits), max(field, 1) - f.bias - f.mantissa_bits)
        return -value if sign else value

    return np.array([one(c) for c in codes.tolist()], dtype=np.float32)


NAMES = {"table": table, "shifted": shifted, "ldexp": ldexp, "viewed": viewed, "summed": summed, "scalar": scalar}


def names(format: str) -> tuple[str, ...]:
    return tuple(e8m0.DECODE if format == "e8m0" else NAMES)


def decoder(name: str, format: str):
    def decode(codes: Array) -> Array:
        return e8m0.DECODE[name](codes) if format == "e8m0" else NAMES[name](LAYOUTS[format], codes)

    return decode
