"""Casts between a carrier (float32 or float64) and the narrow formats.

    cast.<format>       the values, on the carrier: e4m3fn e5m2 e4m3fnuz e5m2fnuz e2m1 e8m0 e5m6 bf16 fp16 tf32
    encode.<format>     the bit patterns (not of tf32)
    decode.<format>     the values of bit patterns, float32

One rounding, from either carrier. The kernels are branch-free; a format is data (_formats.py), so that each compiles once per carrier and
not once per format.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from ._common import array_of, choice, describe, flip, floats, need, output, run, shr
from ._formats import FORMATS, ROUNDINGS, Format, any_rounding, cast_one, decode_one, decoding, encode_one, round_any, rounding
from ._formats import Decoding as Decoding  # Numba's caches on disk may name these two as this module's
from ._formats import Rounding as Rounding

OVERFLOWS = ("saturate", "nan")


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
def _encode_any(lo, hi, x, random, out, g):
    x, out = x[lo:hi], out[lo:hi]
    if random is None:
        for i in range(x.size):
            out[i] = round_any(x[i], g.threshold, g)[0]
    else:
        random = random[lo:hi]
        for i in range(x.size):
            out[i] = round_any(x[i], random[i], g)[0]


@njit(nogil=True, cache=True)
def _cast_any(lo, hi, x, random, out, g):
    x, out = x[lo:hi], out[lo:hi]
    if random is None:
        for i in range(x.size):
            out[i] = round_any(x[i], g.threshold, g)[1]
    else:
        random = random[lo:hi]
        for i in range(x.size):
            out[i] = round_any(x[i], random[i], g)[1]


@njit(nogil=True, cache=True)
def _decode(lo, hi, codes, out, d):
    codes, out = codes[lo:hi], out[lo:hi]
    for i in range(codes.size):
        out[i] = decode_one(codes[i], d)


@njit(nogil=True, cache=True)
def _decode_e8m0(lo, hi, codes, out):
    """A code is a float32's exponent field; the smallest value is the subnormal 2^-127."""
    codes, out = codes[lo:hi], out[lo:hi]
    for i in range(codes.size):
        c = np.uint32(codes[i])
        y = flip(max(np.uint32(c * np.uint32(1 << 23)), np.uint32(1 << 22)))
        out[i] = np.float32(np.nan) if c == np.uint32(0xFF) else y


@njit(nogil=True, cache=True)
def _largest(lo, hi, codes):
    codes = codes[lo:hi]
    most = codes[0]
    for i in range(codes.size):
        most = max(most, codes[i])
    return most


@njit(nogil=True, cache=True)
def _any_nan(lo, hi, x):
    x, found = x[lo:hi], False
    for i in range(x.size):
        found |= x[i] != x[i]
    return found


@njit(nogil=True, cache=True)
def _in_unit_interval(lo, hi, x):
    x, ok = x[lo:hi], True
    for i in range(x.size):
        ok &= (x[i] >= 0) & (x[i] < 1)
    return ok


def largest(codes: NDArray[Any]) -> int:
    """The largest code, -1 of none."""
    return max(map(int, run(_largest, codes.size, 1, codes.reshape(-1))), default=-1)


def _round(
    op: str,
    fmt: Format,
    x: NDArray[Any],
    random: NDArray[Any] | None,
    overflow: str,
    mode: str,
    out: NDArray[Any] | None,
    dtype: type | None,
    plain: Callable[..., None],
    other: Callable[..., None],
) -> NDArray[Any]:
    """cast and encode: arguments checked, then the kernel `plain` (half-even) or `other`. dtype is the result's, None for x's."""
    choice(op, "overflow", overflow, OVERFLOWS)
    choice(op, "rounding", mode, ROUNDINGS)
    need(fmt.nan_code is not None or overflow == "saturate", op, "overflow", "'nan'", f"'saturate'; {fmt.name} has no NaN")
    x = floats(op, "x", x)
    if (mode == "stochastic") != (random is not None):
        given = "missing" if random is None else "given"
        raise ValueError(f"{op}: random is {given}; rounding='stochastic' takes it, no other does")
    if random is not None:
        random = floats(op, "random", random)
        need(random.shape == x.shape, op, "random", describe(random), f"x's shape {x.shape}")
        random = random.reshape(-1)
        inside = all(run(_in_unit_interval, random.size, 1, random))
        need(inside, op, "random", "an array with values outside [0, 1)", "uniform random numbers in it")
    flat = x.reshape(-1)
    if fmt.nan_code is None and any(run(_any_nan, x.size, 1, flat)):
        at = ", ".join(map(str, np.argwhere(np.isnan(x))[0]))
        raise ValueError(f"{op}: x[{at}] is NaN; {fmt.name} has none")
    y = output(op, "out", out, x.shape, dtype or x.dtype, *(a for a in (x, random) if a is not None))
    if fmt.plain and mode == "half-even":
        run(plain, x.size, 1, flat, y.reshape(-1), rounding(fmt, x.dtype, overflow))
    else:
        run(other, x.size, 1, flat, random, y.reshape(-1), any_rounding(fmt, overflow, mode))
    return y


def _cast_op(fmt: Format) -> Callable[..., NDArray[Any]]:
    def cast(
        x: NDArray[Any],
        random: NDArray[Any] | None = None,
        *,
        overflow: str = fmt.overflow,
        rounding: str = "half-even",
        out: NDArray[Any] | None = None,
    ) -> NDArray[Any]:
        return _round(f"cast.{fmt.name}", fmt, x, random, overflow, rounding, out, None, _cast, _cast_any)

    limits = f'overflow="saturate" gives {fmt.max:g} beyond the format\'s range, "nan" gives {"infinity" if fmt.has_inf else "NaN"}'
    nan = "NaN is refused" if fmt.nan_code is None else "NaN stays NaN"
    zero = "zeros keep their sign" if fmt.plain else "there is no -0" if fmt.signed else "what is not above zero is NaN"
    cast.__doc__ = f"""y[n] = x[n] rounded once to {fmt.name}, in x's dtype; x of any shape, float32 or float64.

    rounding: "half-even" (to nearest, ties to even), "half-away", "half-zero" (other ties), "zero" (truncates) or "stochastic": up where
    random[n], in [0, 1), is below the fraction that is cut off. {limits if fmt.nan_code is not None else "Saturates"}; {nan}; {zero}.
    `out` receives the result. ValueError on another dtype, attribute or shape, a number outside [0, 1), an out that does not fit."""
    cast.__name__ = cast.__qualname__ = fmt.name
    return cast


def _encode_op(fmt: Format) -> Callable[..., NDArray[Any]]:
    def encode(
        x: NDArray[Any],
        random: NDArray[Any] | None = None,
        *,
        overflow: str = fmt.overflow,
        rounding: str = "half-even",
        out: NDArray[Any] | None = None,
    ) -> NDArray[Any]:
        top_half = fmt.name == "bf16" and isinstance(x, np.ndarray) and x.dtype == np.float32
        plain = _encode_top_half if top_half else _encode
        return _round(f"encode.{fmt.name}", fmt, x, random, overflow, rounding, out, fmt.code, plain, _encode_any)

    nan = "NaN is refused." if fmt.nan_code is None else f"NaN encodes as {fmt.nan_code:#x} whatever its sign."
    encode.__doc__ = f"""codes[n] = the bit pattern of cast.{fmt.name}(x[n]), {np.dtype(fmt.code)}; x of any shape, float32 or float64.

    {nan} Attributes, `out` and errors as cast.{fmt.name}."""
    encode.__name__ = encode.__qualname__ = fmt.name
    return encode


def _decode_op(fmt: Format) -> Callable[..., NDArray[Any]]:
    def decode(codes: NDArray[Any], *, out: NDArray[Any] | None = None) -> NDArray[Any]:
        op = f"decode.{fmt.name}"
        codes = array_of(op, "codes", codes, (fmt.code,))
        if fmt.bits % 8:
            most = largest(codes)
            need(most < 1 << fmt.bits, op, "codes", f"an array that reaches {most}", f"{fmt.bits} bits, below {1 << fmt.bits}")
        x = output(op, "out", out, codes.shape, np.float32, codes)
        if fmt.signed:
            run(_decode, codes.size, 1, codes.reshape(-1), x.reshape(-1), decoding(fmt))
        else:
            run(_decode_e8m0, codes.size, 1, codes.reshape(-1), x.reshape(-1))
        return x

    below = f" below {1 << fmt.bits}" if fmt.bits % 8 else ""
    decode.__doc__ = f"""x[n] = the value of the {fmt.name} bit pattern codes[n], float32, exact.

    codes: {np.dtype(fmt.code)}{below}, of any shape. `out` receives the result. ValueError on another dtype, a code out of range or an
    out that does not fit."""
    decode.__name__ = decode.__qualname__ = fmt.name
    return decode


STORED = {name: fmt for name, fmt in FORMATS.items() if fmt.bits <= 16}  # the rest is stored as float32
e4m3fn, e5m2, e4m3fnuz, e5m2fnuz, e2m1, e8m0, e5m6, bf16, fp16, tf32 = map(_cast_op, FORMATS.values())
encode = SimpleNamespace(**{name: _encode_op(fmt) for name, fmt in STORED.items()})
decode = SimpleNamespace(**{name: _decode_op(fmt) for name, fmt in STORED.items()})
