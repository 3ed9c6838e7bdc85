"""Casts between float32/float64 and the small formats, one exact rounding each; shares nothing with `ref`.

Equation: cast(x) = decode(encode(x)); encode(x) = sign | round_code(|x|) where that is at most the largest finite code, else sign |
overflow code (`saturate`: the largest finite code; `nan`: the format's infinity, or, unsigned, its NaN where it has none).
Every NaN encodes as the format's one NaN. e8m0, having neither sign nor zero, has NaN for both.
"""

import math
from fractions import Fraction
from typing import Any

import numpy as np

from .edges import carrier, cast_format, choose, code_dtype, code_list, fill, refuse
from .floats import BINARY32, ROUNDINGS, FloatFormat, Up, code_fraction, half_even, round_code, stochastic, toward_zero
from .floats import decode as decode_code

Arrays = dict[str, np.ndarray]
OVERFLOWS = ("saturate", "nan")


def default_overflow(name: str) -> str:
    """What the contract takes when `overflow` is not given."""
    return "nan" if name in ("e5m6", "fp16", "bf16", "tf32") else "saturate"


def _nan(fmt: FloatFormat) -> int:
    if fmt.nan_code is None:
        raise ValueError("nan, which the format does not have")
    return fmt.nan_code


def encode_value(x: float, fmt: FloatFormat, overflow: str, up: Up = half_even) -> int:
    """The code of one value."""
    if math.isnan(x) or (not fmt.signed and x <= 0):
        return _nan(fmt)
    code = fmt.max_code + 1 if math.isinf(x) else round_code(*abs(x).as_integer_ratio(), fmt, up)
    if up is toward_zero and not math.isinf(x):
        code = min(code, fmt.max_code)
    if code > fmt.max_code:
        if overflow == "saturate":
            code = fmt.max_code
        elif fmt.inf_code is None:
            return _nan(fmt)  # a NaN has no sign to keep
        else:
            code = fmt.inf_code
    negative = math.copysign(1.0, x) < 0 and (code > 0 or fmt.negative_zero)
    return code | fmt.sign_bit if negative else code


def _ups(x: np.ndarray, random: np.ndarray | None, rounding: str) -> list[Up]:
    """How each element is rounded."""
    choose("rounding", rounding, (*ROUNDINGS, "stochastic"))
    if (random is None) == (rounding == "stochastic"):
        raise ValueError(f"random is {'missing' if random is None else 'given'} with rounding={rounding!r}")
    if random is None:
        return [ROUNDINGS[rounding]] * x.size
    if random.shape != x.shape:
        raise ValueError(f"random has shape {random.shape}, expected {x.shape}")
    for place, value in zip(np.ndindex(random.shape), random.ravel().tolist(), strict=True):
        if not 0 <= value < 1:
            raise ValueError(f"random{list(place)} is {value}, expected a number of [0, 1)")
    return [stochastic(float(value)) for value in random.ravel().tolist()]


def _codes(name: str, inputs: Arrays, attrs: dict[str, Any]) -> list[int]:
    fmt, x = cast_format(name), inputs["x"]
    at = fill({"overflow": default_overflow(name), "rounding": "half-even"}, attrs)
    overflow = choose("overflow", at["overflow"], OVERFLOWS if fmt.nan_code is not None else OVERFLOWS[:1])
    carrier(x)  # refuses other dtypes
    if fmt.nan_code is None:
        refuse(x, "x", infinite=False)
    ups = _ups(x, inputs.get("random"), at["rounding"])
    return [encode_value(v, fmt, overflow, up) for v, up in zip(x.ravel().tolist(), ups, strict=True)]


def encode(name: str, inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """encode.<name>: x, random? -> codes."""
    return {"codes": np.array(_codes(name, inputs, attrs), code_dtype(cast_format(name))).reshape(inputs["x"].shape)}


def cast(name: str, inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """cast.<name>: x, random? -> y, on x's dtype."""
    x, fmt = inputs["x"], cast_format(name)
    return {"y": np.array([decode_code(c, fmt) for c in _codes(name, inputs, attrs)], x.dtype).reshape(x.shape)}


def decode(name: str, inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """decode.<name>: codes -> x, float32 (which holds every value of every format)."""
    fill({}, attrs)
    codes, fmt = inputs["codes"], cast_format(name)
    return {"x": np.array([decode_code(c, fmt) for c in code_list(codes, fmt)], np.float32).reshape(codes.shape)}


def boundaries(name: str, overflow: str) -> tuple[np.ndarray, np.ndarray]:
    """(thresholds, codes): the whole encoder of float32 as a staircase, for exhaustive tests.

    `thresholds` is float32, sorted, first 0.0; `codes[i]` is the code from `thresholds[i]` up to the next threshold, exclusive.
    A non-negative pattern p <= 0x7f800000 (uint32) has the code codes[searchsorted(thresholds.view(uint32), p, side="right") - 1].
    Negative patterns (0x80000000..0xff800000): `mirrored` of the code of p & 0x7fffffff. NaN patterns: the format's NaN code, whatever
    their sign.
    Threshold of code c: the midpoint of its value and its predecessor's where c is even (the tie is c's), else the next float32 above it.
    In e8m0 every tie is c's, and what is positive has a code.
    """
    fmt = cast_format(name)
    choose("overflow", overflow, OVERFLOWS)
    patterns, codes = [0], [0]
    below = Fraction(0)
    if not fmt.signed:
        patterns, codes = [0, 1], [_nan(fmt), 0]
        below = code_fraction(0, fmt)
    for code in range(1, fmt.max_code + 2):  # the last one is the first value that overflows
        value = code_fraction(code, fmt)
        middle, below = (below + value) / 2, value
        if code > fmt.max_code and overflow == "saturate":
            break
        # The rounding may have gone down, and a midpoint that is a float32 itself belongs to the even neighbour.
        pattern = round_code(middle.numerator, middle.denominator, BINARY32)
        reached = code_fraction(pattern, BINARY32)
        patterns.append(pattern + (reached < middle or (reached == middle and code % 2 == 1 and fmt.signed)))
        codes.append(code if code <= fmt.max_code else _nan(fmt) if fmt.inf_code is None else fmt.inf_code)
    return np.array(patterns, np.uint32).view(np.float32), np.array(codes, code_dtype(fmt))


def mirrored(name: str, codes: np.ndarray) -> np.ndarray:
    """The codes of -x, given those of x >= 0 (+0 included): NaN stays, e8m0 has NaN for all, a format without -0 keeps its 0."""
    fmt = cast_format(name)
    flipped = [
        _nan(fmt) if not fmt.signed else c if c == fmt.nan_code or (c == 0 and not fmt.negative_zero) else c | fmt.sign_bit
        for c in codes.ravel().tolist()
    ]
    return np.array(flipped, codes.dtype).reshape(codes.shape)
