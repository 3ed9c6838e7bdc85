"""Casts between float32/float64 and the small formats, one exact rounding each; shares nothing with `ref`.

Equation: cast(x) = decode(encode(x)); encode(x) = sign | round_code(|x|) where that is at most the largest finite code, else sign |
overflow code (`saturate`: the largest finite code; `nan`: the format's infinity, or, unsigned, its NaN where it has none).
Every NaN encodes as the positive quiet NaN.
"""

import math
from fractions import Fraction
from typing import Any

import numpy as np

from .edges import carrier, cast_format, choose, code_dtype, fill
from .floats import BINARY32, FloatFormat, code_fraction, round_code
from .floats import decode as decode_code

Arrays = dict[str, np.ndarray]
OVERFLOWS = ("saturate", "nan")


def default_overflow(name: str) -> str:
    """What the contract takes when `overflow` is not given."""
    return "saturate" if name in ("e4m3fn", "e5m2") else "nan"


def encode_value(x: float, fmt: FloatFormat, overflow: str) -> int:
    """The code of one value."""
    if math.isnan(x):
        return fmt.nan_code
    code = fmt.max_code + 1 if math.isinf(x) else round_code(*abs(x).as_integer_ratio(), fmt)
    if code > fmt.max_code:
        if overflow == "saturate":
            code = fmt.max_code
        elif fmt.inf_code is None:
            return fmt.nan_code  # a NaN has no sign to keep
        else:
            code = fmt.inf_code
    return code | fmt.sign_bit if math.copysign(1.0, x) < 0 else code


def _codes(name: str, inputs: Arrays, attrs: dict[str, Any]) -> list[int]:
    fmt = cast_format(name)
    overflow = choose("overflow", fill({"overflow": default_overflow(name)}, attrs)["overflow"], OVERFLOWS)
    carrier(inputs["x"])  # refuses other dtypes
    return [encode_value(x, fmt, overflow) for x in inputs["x"].ravel().tolist()]


def encode(name: str, inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """encode.<name>: x -> codes."""
    return {"codes": np.array(_codes(name, inputs, attrs), code_dtype(cast_format(name))).reshape(inputs["x"].shape)}


def cast(name: str, inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """cast.<name>: x -> y, on x's dtype."""
    x, fmt = inputs["x"], cast_format(name)
    return {"y": np.array([decode_code(c, fmt) for c in _codes(name, inputs, attrs)], x.dtype).reshape(x.shape)}


def decode(name: str, inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """decode.<name>: codes -> x, float32 (which holds every value of every format)."""
    fill({}, attrs)
    codes, fmt = inputs["codes"], cast_format(name)
    if codes.dtype != code_dtype(fmt):
        raise TypeError(f"codes of {name} are {np.dtype(code_dtype(fmt))}, got {codes.dtype}")
    return {"x": np.array([decode_code(c, fmt) for c in codes.ravel().tolist()], np.float32).reshape(codes.shape)}


def boundaries(name: str, overflow: str) -> tuple[np.ndarray, np.ndarray]:
    """(thresholds, codes): the whole encoder of float32 as a staircase, for exhaustive tests.

    `thresholds` is float32, sorted, first 0.0; `codes[i]` is the code from `thresholds[i]` up to the next threshold, exclusive.
    A non-negative pattern p <= 0x7f800000 (uint32) has the code codes[searchsorted(thresholds.view(uint32), p, side="right") - 1].
    Negative patterns (0x80000000..0xff800000): the code of p & 0x7fffffff with the format's sign bit set, except that the NaN code
    (e4m3fn with overflow="nan") stays positive. NaN patterns: the format's NaN code, whatever their sign.
    Threshold of code c: the midpoint of its value and its predecessor's where c is even (the tie is c's), else the next float32 above it.
    """
    fmt = cast_format(name)
    choose("overflow", overflow, OVERFLOWS)
    patterns, codes = [0], [0]
    below = Fraction(0)
    for code in range(1, fmt.max_code + 2):  # the last one is the first value that overflows
        value = code_fraction(code, fmt)
        middle, below = (below + value) / 2, value
        if code > fmt.max_code and overflow == "saturate":
            break
        # The rounding may have gone down, and a midpoint that is a float32 itself belongs to the even neighbour.
        pattern = round_code(middle.numerator, middle.denominator, BINARY32)
        reached = code_fraction(pattern, BINARY32)
        patterns.append(pattern + (reached < middle or (reached == middle and code % 2 == 1)))
        codes.append(code if code <= fmt.max_code else fmt.nan_code if fmt.inf_code is None else fmt.inf_code)
    return np.array(patterns, np.uint32).view(np.float32), np.array(codes, code_dtype(fmt))
