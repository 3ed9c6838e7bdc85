"""decode, six ways; each is generic over the formats and gives float32."""

import functools
import struct

import numpy as np

from .floats import LAYOUTS, Array, Layout


def special(f: Layout, codes: Array, x: Array) -> Array:
    """What lies above the largest finite code: infinity and NaN."""
    magnitude = codes.astype(np.int64) & ((1 << (f.bits - 1)) - 1)
    x = np.where((magnitude == f.beyond) & (f.name != "e4m3fn"), np.copysign(np.float32(np.inf), x), x)
    return np.where(magnitude > (f.top if f.name == "e4m3fn" else f.beyond), np.float32(np.nan), x)


def parts(f: Layout, codes: Array) -> tuple[Array, Array, Array]:
    c = codes.astype(np.int64)
    return c >> (f.bits - 1), (c >> f.mantissa_bits) & ((1 << f.exponent_bits) - 1), c & ((1 << f.mantissa_bits) - 1)


@functools.cache
def _table(f: Layout) -> Array:
    half = 1 << (f.bits - 1)
    finite = [f.value(code) for code in range(f.top + 1)]
    inf = [] if f.name == "e4m3fn" else [float("inf")]
    positive = finite + inf + [float("nan")] * (half - len(finite) - len(inf))
    return np.array(positive + [-v for v in positive], dtype=np.float32)


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
    """As another type: e5m2 is the upper half of a float16, bfloat16 that of a float32, e4m3fn a float16 with another bias."""
    if f.name == "bf16":
        return (codes.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if f.name == "fp16":
        return codes.view(np.float16).astype(np.float32)
    if f.name == "e5m2":
        return (codes.astype(np.uint16) << np.uint16(8)).view(np.float16).astype(np.float32)
    c = codes.astype(np.uint16)
    half = ((c & np.uint16(0x80)) << np.uint16(8)) | ((c & np.uint16(0x7F)) << np.uint16(7))
    return special(f, codes, half.view(np.float16).astype(np.float32) * np.float32(256))


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
        if code & 0x7F == 0x7F:
            return float("nan")
        field, mantissa = divmod(code & 0x7F, 8)
        return (-1.0) ** (code >> 7) * (mantissa / 512 if field == 0 else (1 + mantissa / 8) * 2.0 ** (field - 7))

    return np.array([one(c) for c in codes.tolist()], dtype=np.float32)


NAMES = {"table": table, "shifted": shifted, "ldexp": ldexp, "viewed": viewed, "summed": summed, "scalar": scalar}


def decoder(name: str, format: str):
    def decode(codes: Array) -> Array:
        return NAMES[name](LAYOUTS[format], codes)

    return decode
