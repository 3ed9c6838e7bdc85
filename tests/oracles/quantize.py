"""fp8 tile quantisation, every operation one correctly rounded IEEE operation in x's dtype; shares nothing with `ref`.

Equation: codes = encode(v, "saturate") with, per tile, a = max|x|, then clamp, scale s, power of two and value v as `RECIPES` tabulates.
Dequantisation: x = decode(codes) * s, rounded once to the scale's dtype.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from mpmath.libmp import to_rational

from .cast import encode_value
from .edges import carrier, choose, fill, refuse
from .floats import BINARY32, CAST_FORMATS, FloatFormat, decode, divide, multiply, round_fraction
from .tape import CTX

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Arithmetic:
    """The carrier's operations, and the constants as the carrier holds them."""

    fmt: FloatFormat
    max_value: float

    @property
    def floor(self) -> float:
        return round_fraction(Fraction(1, 10_000), self.fmt)

    @property
    def inverse_max(self) -> float:
        return round_fraction(1 / Fraction(self.max_value), self.fmt)

    def div(self, a: float, b: float) -> float:
        return divide(a, b, self.fmt)

    def mul(self, a: float, b: float) -> float:
        return multiply(a, b, self.fmt)


Step = Callable[[Arithmetic, float], float]


def _ceil_log2(s: float) -> int:
    """The exact ceil(log2 s), by integers: the least k with numerator <= 2^k * denominator."""
    num, den = s.as_integer_ratio()  # den is a power of two
    return (num - 1).bit_length() - (den.bit_length() - 1)


def power_bits(_: Arithmetic, s: float) -> float:
    """[bits]: the smallest power of two >= s > 0."""
    return s if math.isinf(s) else math.ldexp(1.0, _ceil_log2(s))


def power_log2(ar: Arithmetic, s: float) -> float:
    """[log2]: 2^ceil(log2(s) rounded to the carrier). 50 digits decide the rounding: log2 is irrational off the powers of two."""
    if math.isinf(s):
        return s
    log = Fraction(_ceil_log2(s)) if power_bits(ar, s) == s else Fraction(*map(int, to_rational(CTX.log(s, 2)._mpf_)))
    return math.ldexp(1.0, math.ceil(round_fraction(log, ar.fmt)))


def power_deepgemm(ar: Arithmetic, s: float) -> float:
    """[bits] within float32's normal powers of two; an infinite scale stays infinite."""
    power = power_bits(ar, s)
    return power if ar.fmt is not BINARY32 or math.isinf(power) else min(max(power, 2.0**-126), 2.0**127)


def _divided(ar: Arithmetic, a: float) -> float:
    return ar.div(a, ar.max_value)


def _multiplied(ar: Arithmetic, a: float) -> float:
    return ar.mul(a, ar.inverse_max)


@dataclass(frozen=True)
class Recipe:
    """One row of the contract's table."""

    scale: Step  # a -> s
    value: str  # "x / s" | "x * (1/s)" | "x * (MAX/a)"
    clamp: str = "a"  # what max(., 1e-4) acts on: "a" | "s" | "none"
    power: Step | None = None


RECIPES: dict[str, Recipe] = {
    "v3-unclamped": Recipe(_divided, "x / s", clamp="none"),
    "v3": Recipe(_divided, "x / s"),
    "v3-ue8m0": Recipe(_divided, "x / s", power=power_log2),
    "v32": Recipe(_multiplied, "x / s"),
    "v32-ue8m0": Recipe(_multiplied, "x / s", power=power_bits),
    "deepgemm": Recipe(_divided, "x * (1/s)"),
    "deepgemm-ue8m0": Recipe(_divided, "x * (1/s)", power=power_deepgemm),
    "deepep": Recipe(_multiplied, "x * (MAX/a)"),
    "deepep-ue8m0": Recipe(_multiplied, "x * (1/s)", power=power_bits),
    "tilekernels": Recipe(_divided, "x * (MAX/a)"),
    "tilekernels-ue8m0": Recipe(_divided, "x * (1/s)", power=power_bits),
    "flashmla": Recipe(_divided, "x / s", clamp="s", power=power_log2),
}


def _quantize_values(xs: list[float], recipe: Recipe, ar: Arithmetic) -> tuple[list[float], float]:
    """(v of every element, s) of one tile."""
    a = max(abs(x) for x in xs)
    if recipe.clamp == "a":
        a = max(a, ar.floor)
    s = recipe.scale(ar, a)
    if recipe.clamp == "s":
        s = max(s, ar.floor)
    if recipe.power is not None:
        s = recipe.power(ar, s)
    if recipe.value == "x / s":
        return [ar.div(x, s) for x in xs], s
    factor = ar.div(1.0, s) if recipe.value == "x * (1/s)" else ar.div(ar.max_value, a)
    return [ar.mul(x, factor) for x in xs], s


def _tiles(shape: tuple[int, ...], tile: int, axis: int) -> Iterator[tuple[tuple[int, int], list[tuple[int, int]]]]:
    """(place in scale, places in x) of every tile; the last one along `axis` may be ragged."""
    n, d = shape
    for i in range(n if axis == 1 else math.ceil(n / tile)):
        for j in range(d if axis == 0 else math.ceil(d / tile)):
            if axis == 1:
                yield (i, j), [(i, c) for c in range(j * tile, min(d, (j + 1) * tile))]
            else:
                yield (i, j), [(r, j) for r in range(i * tile, min(n, (i + 1) * tile))]


def _scale_shape(shape: tuple[int, ...], tile: int, axis: int) -> tuple[int, int]:
    n, d = shape
    return (n, math.ceil(d / tile)) if axis == 1 else (math.ceil(n / tile), d)


def _fp8(name: str) -> FloatFormat:
    return CAST_FORMATS[choose("format", name, ("e4m3fn", "e5m2"))]


def quantize_tile(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """fp8.quantize_tile: x -> codes, scale."""
    at = fill({"recipe": "v3", "tile": 128, "axis": 1, "format": "e4m3fn"}, attrs)
    recipe, fmt = RECIPES[choose("recipe", at["recipe"], RECIPES)], _fp8(at["format"])
    x, tile, axis = inputs["x"], at["tile"], choose("axis", at["axis"], (0, 1))
    ar = Arithmetic(carrier(x), decode(fmt.max_code, fmt))
    refuse(x, "x", infinite=False)
    rows = x.tolist()
    codes = np.zeros(x.shape, np.uint8)
    scale = np.zeros(_scale_shape(x.shape, tile, axis), x.dtype)
    for place, cells in _tiles(x.shape, tile, axis):
        values, scale[place] = _quantize_values([rows[i][j] for i, j in cells], recipe, ar)
        for cell, v in zip(cells, values, strict=True):
            codes[cell] = encode_value(v, fmt, "saturate")
    return {"codes": codes, "scale": scale}


def dequantize_tile(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """fp8.dequantize_tile: codes, scale -> x."""
    at = fill({"tile": 128, "axis": 1, "format": "e4m3fn"}, attrs)
    codes, scale, fmt = inputs["codes"], inputs["scale"], _fp8(at["format"])
    tile, axis = at["tile"], choose("axis", at["axis"], (0, 1))
    arithmetic, scales, rows = carrier(scale), scale.tolist(), codes.tolist()
    if scale.shape != _scale_shape(codes.shape, tile, axis):
        raise ValueError(f"scale has shape {scale.shape}, expected {_scale_shape(codes.shape, tile, axis)}")
    x = np.zeros(codes.shape, scale.dtype)
    for (i, j), cells in _tiles(codes.shape, tile, axis):
        for row, column in cells:
            x[row, column] = multiply(decode(rows[row][column], fmt), scales[i][j], arithmetic)
    return {"x": x}
