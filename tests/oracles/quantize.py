"""Quantisation in tiles and blocks, every operation one correctly rounded IEEE operation in x's dtype; shares nothing with `ref`.

Equation: codes = encode(v, "saturate") with, per tile or block, a = max|x|, then clamp, scale s, power of two and value v as `RECIPES`
tabulates.
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
from .edges import carrier, choose, code_dtype, code_list, fill, positive, refuse
from .floats import BINARY32, CAST_FORMATS, ROUNDINGS, FloatFormat, decode, divide, multiply, round_fraction
from .tape import CTX

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Arithmetic:
    """The carrier's operations, and the constants as the carrier holds them."""

    fmt: FloatFormat
    max_value: float

    @property
    def largest(self) -> float:
        return decode(self.fmt.max_code, self.fmt)

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


def _ratio(ar: Arithmetic, a: float) -> float:
    """i = MAX/a as "1 / (MAX/a)" has it: 1 for a of zero or infinity, and never more than the carrier's largest number."""
    return 1.0 if a == 0 or math.isinf(a) else min(ar.div(ar.max_value, a), ar.largest)


def _inverted(ar: Arithmetic, a: float) -> float:
    return ar.div(1.0, _ratio(ar, a))


def _inverted_power(ar: Arithmetic, a: float) -> float:
    """1 / the largest power of two <= i"""
    num, den = _ratio(ar, a).as_integer_ratio()  # den is a power of two
    return ar.div(1.0, math.ldexp(1.0, num.bit_length() - den.bit_length()))


def _divided(ar: Arithmetic, a: float) -> float:
    return ar.div(a, ar.max_value)


def _multiplied(ar: Arithmetic, a: float) -> float:
    return ar.mul(a, ar.inverse_max)


@dataclass(frozen=True)
class Recipe:
    """One row of the contract's table."""

    scale: Step  # a -> s
    value: str  # "x / s" | "x * (1/s)" | "x * (MAX/a)" | "x * i"
    clamp: str = "a"  # what max(., floor) acts on: "a" | "s" | "none"
    power: Step | None = None
    floor: Fraction = Fraction(1, 10_000)


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
    "te": Recipe(_inverted, "x * i", clamp="none"),
    "te-ue8m0": Recipe(_inverted_power, "x * (1/s)", clamp="none"),
    "mxfp4": Recipe(_multiplied, "x / s", power=power_bits, floor=6 * Fraction(1, 2**126)),
}
FORMATS = ("e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz", "e5m6", "e2m1")


def quantize_values(xs: list[float], recipe: Recipe, ar: Arithmetic, given: float | None = None) -> tuple[list[float], float]:
    """(v of every element, s) of one tile, or for the scale that is given."""
    a, floor = max(abs(x) for x in xs), round_fraction(recipe.floor, ar.fmt)
    if recipe.clamp == "a":
        a = max(a, floor)
    s = recipe.scale(ar, a)
    if recipe.clamp == "s":
        s = max(s, floor)
    if recipe.power is not None:
        s = recipe.power(ar, s)
    if given is not None:
        s = given
    if recipe.value == "x / s":
        return [ar.div(x, s) for x in xs], s
    if recipe.value == "x * (1/s)":
        factor = ar.div(1.0, s)
    else:
        factor = ar.div(ar.max_value, a) if recipe.value == "x * (MAX/a)" else _ratio(ar, a)
    return [ar.mul(x, factor) for x in xs], s


Place = tuple[int, int]


@dataclass(frozen=True)
class Grid:
    """A matrix cut into rectangles of height x width, those at the far edges smaller."""

    shape: tuple[int, ...]
    height: int
    width: int

    @property
    def counts(self) -> Place:
        n, d = self.shape
        return -(-n // self.height), -(-d // self.width)

    def cells(self) -> Iterator[tuple[Place, list[Place]]]:
        """(place in scale, places in x) of every rectangle."""
        n, d = self.shape
        for i, j in np.ndindex(*self.counts):
            rows = range(i * self.height, min(n, (i + 1) * self.height))
            yield (i, j), [(r, c) for r in rows for c in range(j * self.width, min(d, (j + 1) * self.width))]


def _tiles(shape: tuple[int, ...], at: dict[str, Any]) -> Grid:
    tile = positive("tile", at["tile"])
    return Grid(shape, 1, tile) if choose("axis", at["axis"], (0, 1)) == 1 else Grid(shape, tile, 1)


def _blocks(shape: tuple[int, ...], at: dict[str, Any]) -> Grid:
    block = positive("block", at["block"])
    return Grid(shape, block, block)


def _format(at: dict[str, Any]) -> FloatFormat:
    return CAST_FORMATS[choose("format", at["format"], FORMATS)]


def _quantize(name: str, inputs: Arrays, grid: Grid, at: dict[str, Any]) -> Arrays:
    recipe, fmt = RECIPES[choose("recipe", at["recipe"], RECIPES)], _format(at)
    up = ROUNDINGS[choose("rounding", at["rounding"], ("half-even", "half-zero"))]
    x = inputs[name]
    ar = Arithmetic(carrier(x), decode(fmt.max_code, fmt))
    refuse(x, name, infinite=False)
    rows = x.tolist()
    codes, scale = np.zeros(x.shape, code_dtype(fmt)), np.zeros(grid.counts, x.dtype)
    given = inputs.get("scale")
    for place, cells in grid.cells():
        own = None if given is None else float(given[place])
        values, scale[place] = quantize_values([rows[i][j] for i, j in cells], recipe, ar, own)
        for cell, v in zip(cells, values, strict=True):
            codes[cell] = encode_value(v, fmt, "saturate", up)
    return {"codes": codes, "scale": scale}


def _dequantize(name: str, inputs: Arrays, grid: Grid, at: dict[str, Any]) -> Arrays:
    codes, scale, fmt = inputs["codes"], inputs["scale"], _format(at)
    values = [decode(c, fmt) for c in code_list(codes, fmt)]
    arithmetic, scales, columns = carrier(scale), scale.tolist(), codes.shape[1]
    if scale.shape != grid.counts:
        raise ValueError(f"scale has shape {scale.shape}, expected {grid.counts}")
    x = np.zeros(codes.shape, scale.dtype)
    for (i, j), cells in grid.cells():
        for r, c in cells:
            x[r, c] = multiply(values[r * columns + c], scales[i][j], arithmetic)
    return {name: x}


QUANTIZE = {"recipe": "v3", "format": "e4m3fn", "rounding": "half-even"}


def quantize_tile(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """fp8.quantize_tile: x -> codes, scale."""
    at = fill({**QUANTIZE, "tile": 128, "axis": 1}, attrs)
    return _quantize("x", inputs, _tiles(inputs["x"].shape, at), at)


def dequantize_tile(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """fp8.dequantize_tile: codes, scale -> x."""
    at = fill({"tile": 128, "axis": 1, "format": "e4m3fn"}, attrs)
    return _dequantize("x", inputs, _tiles(inputs["codes"].shape, at), at)


def quantize_block(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """fp8.quantize_block: w -> codes, scale."""
    at = fill({**QUANTIZE, "block": 128}, attrs)
    return _quantize("w", inputs, _blocks(inputs["w"].shape, at), at)


def dequantize_block(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """fp8.dequantize_block: codes, scale -> w."""
    at = fill({"block": 128, "format": "e4m3fn"}, attrs)
    return _dequantize("w", inputs, _blocks(inputs["codes"].shape, at), at)
