"""Casts between a carrier (float32 or float64) and the narrow formats: cast.<format>, encode.<format>, decode.<format>.

A thread rounds one number, in float64, where every step but the rounding is exact. A format is data: each kernel compiles once per carrier.
"""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from ...ref.cast import Overflow, Rounding
from ...ref.formats import CASTS, Format
from ._call import arrays, empty, kernel_of, need
from ._device import cuda, device_function, each, kernel

HALF_EVEN, HALF_AWAY, HALF_ZERO, ZERO, STOCHASTIC = range(5)
MODES = ("half-even", "half-away", "half-zero", "zero", "stochastic")
Array = Any


class Grid(NamedTuple):
    """A format and what becomes of numbers that it does not hold, as numbers that a kernel can be passed."""

    bits: int
    mantissa: int
    emin: int
    max_code: int
    top: float  # the power of two above the largest number
    signed: int  # 1 or 0. Without a sign there is no zero: codes count from 1
    negative_zero: bool
    over_code: int  # of what rounds beyond the largest number, and its magnitude
    over: float
    zero_code: int  # the same where a finite number is truncated
    zero_over: float
    nan_code: int
    inf_code: int
    mode: int


def grid_of(fmt: Format, overflow: str = "saturate", rounding: str = "half-even") -> Grid:
    nan, inf = (-1 if code is None else code for code in (fmt.nan_code, fmt.inf_code))
    largest = (fmt.max_code, fmt.max)
    over = largest if overflow == "saturate" else (nan, math.nan) if inf < 0 else (inf, math.inf)
    finite = largest if rounding == "zero" else over
    top = 2.0 ** (math.floor(math.log2(fmt.max)) + 1)
    fixed = fmt.bits, fmt.mantissa_bits, fmt.emin, fmt.max_code, top, int(fmt.signed), fmt.negative_zero
    return Grid(*fixed, *over, *finite, nan, inf, MODES.index(rounding))


@device_function
def round_one(v, random, g):
    """(code, value) of a float64: |v| in units of its last place is rounded to a whole number, and codes count units."""
    if v != v or (g.signed == 0 and not v > 0.0):
        return g.nan_code, math.nan
    a = min(abs(v), g.top)
    _, e = math.frexp(a)
    e = max(e - 1, g.emin) if a > 0.0 else g.emin
    q = math.ldexp(a, g.mantissa - e)
    down = math.floor(q)
    fraction = q - down
    n = int(down)
    if g.mode == HALF_EVEN:
        up = fraction > 0.5 or (fraction == 0.5 and n % 2 == 1)
    elif g.mode == HALF_AWAY:
        up = fraction >= 0.5
    elif g.mode == HALF_ZERO:
        up = fraction > 0.5
    else:
        up = g.mode == STOCHASTIC and fraction > random
    n = max(n + int(up), 1 - g.signed)
    code = (e - g.emin) * (1 << g.mantissa) + n - (1 - g.signed)  # a carry out of the mantissa moves into the exponent by itself
    value = math.ldexp(float(n), e - g.mantissa)
    if abs(v) == math.inf:
        code, value = g.over_code, g.over
    elif code > g.max_code:
        code, value = g.zero_code, g.zero_over
    if value != value:  # a NaN has no sign to keep
        return code, value
    if math.copysign(1.0, v) < 0.0 and (g.negative_zero or code > 0):
        return code | (1 << (g.bits - 1)), -value
    return code, value


@device_function
def decode_one(code, g):
    """The value of a bit pattern, in float64."""
    sign = g.bits - g.signed
    magnitude = code % (1 << sign)
    field, fraction = magnitude >> g.mantissa, magnitude % (1 << g.mantissa)
    if g.signed == 1 and field == 0:
        value = math.ldexp(float(fraction), g.emin - g.mantissa)
    else:
        value = math.ldexp(float(fraction + (1 << g.mantissa)), field - g.signed + g.emin - g.mantissa)
    if magnitude > g.max_code:
        value = math.inf if magnitude == g.inf_code else math.nan
    if code >> sign == 1 and g.signed == 1:
        value = -value
    return math.nan if code == g.nan_code else value


@kernel
def _cast(x, random, g, y):
    for i in range(cuda.grid(1), x.size, cuda.gridsize(1)):
        y[i] = round_one(np.float64(x[i]), np.float64(random[i]) if g.mode == STOCHASTIC else 0.0, g)[1]


@kernel
def _encode(x, random, g, codes):
    for i in range(cuda.grid(1), x.size, cuda.gridsize(1)):
        codes[i] = round_one(np.float64(x[i]), np.float64(random[i]) if g.mode == STOCHASTIC else 0.0, g)[0]


@kernel
def _decode(codes, g, x):
    for i in range(cuda.grid(1), codes.size, cuda.gridsize(1)):
        x[i] = decode_one(int(codes[i]), g)


def _checked(op: str, fmt: Format, x: Array, random: Array | None, overflow: str, rounding: str) -> None:
    xp = arrays()
    need(fmt.nan_code is not None or overflow == "saturate", op, "overflow", "'nan'", f"'saturate'; {fmt.name} has no NaN")
    given = "missing" if random is None else "given"
    need((rounding == "stochastic") == (random is not None), op, "random", given, "it with rounding='stochastic', and with no other")
    if random is not None:
        need(random.shape == x.shape, op, "random", f"of {random.size} numbers", f"{x.size}, x's shape")
        inside = bool(((random >= 0) & (random < 1)).all())
        need(inside, op, "random", "an array with values outside [0, 1)", "uniform random numbers in it")
    if fmt.nan_code is None and bool(xp.isnan(x).any()):
        need(False, op, f"x[{int(xp.argmax(xp.isnan(x)))}]", "NaN", f"a number; {fmt.name} has no NaN")


def _rounding_op(kind: str, fmt: Format) -> Callable[..., Array]:
    """cast.<format> or encode.<format>"""
    op, to = f"{kind}.{fmt.name}", _cast if kind == "cast" else _encode

    @kernel_of(op, any_shape=True)
    def rounded(
        x: Array,
        random: Array | None = None,
        *,
        overflow: Overflow = "saturate" if fmt.bits <= 8 else "nan",
        rounding: Rounding = "half-even",
    ) -> Array:
        _checked(op, fmt, x, random, overflow, rounding)
        y = empty(x.shape, x.dtype if kind == "cast" else np.dtype(fmt.code_dtype))
        each(to, x.size, x, x if random is None else random, grid_of(fmt, overflow, rounding), y)
        return y

    rounded.__name__ = rounded.__qualname__ = fmt.name
    return rounded


def _cast_op(fmt: Format) -> Callable[..., Array]:
    cast = _rounding_op("cast", fmt)
    cast.__doc__ = f"""y[n] = x[n] rounded once to {fmt.name}, in x's dtype; x of any shape. Attributes and errors as kernels.cpu's."""
    return cast


def _encode_op(fmt: Format) -> Callable[..., Array]:
    encode = _rounding_op("encode", fmt)
    encode.__doc__ = f"""codes[n] = the bit pattern of cast.{fmt.name}(x[n]), {fmt.code_dtype}; x of any shape. The rest as there."""
    return encode


def _decode_op(fmt: Format) -> Callable[..., Array]:
    @kernel_of(f"decode.{fmt.name}", any_shape=True)
    def decode(codes: Array) -> Array:
        op = f"decode.{fmt.name}"
        need(codes.dtype == fmt.code_dtype, op, "codes", f"a {codes.dtype} array", fmt.code_dtype)
        most = int(codes.max()) if codes.size else 0
        need(most < 1 << fmt.bits, op, "codes", f"an array that reaches {most}", f"{fmt.bits} bits, below {1 << fmt.bits}")
        x = empty(codes.shape, np.dtype(np.float32))
        each(_decode, codes.size, codes, grid_of(fmt), x)
        return x

    decode.__doc__ = f"""x[n] = the value of the {fmt.name} bit pattern codes[n], float32, exact; codes of any shape."""
    decode.__name__ = decode.__qualname__ = fmt.name
    return decode


e4m3fn, e5m2, e4m3fnuz, e5m2fnuz, e2m1, e8m0, e5m6, bf16, fp16, tf32 = map(_cast_op, CASTS)
STORED = [fmt for fmt in CASTS if fmt.bits <= 16]  # tf32 is stored as float32
encode = SimpleNamespace(**{fmt.name: _encode_op(fmt) for fmt in STORED})
decode = SimpleNamespace(**{fmt.name: _decode_op(fmt) for fmt in STORED})
