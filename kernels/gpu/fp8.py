"""Tile-wise and block-wise quantisation with the scale recipes of production code, and its inverse. A block of threads takes a tile."""

import math
from typing import Any, Literal, NamedTuple

import numpy as np

from ...ref.formats import FORMATS, Format
from ...ref.fp8_recipes import RECIPES, FP8Name, Recipe, RecipeName, check_codes, check_quantised
from ._call import arrays, empty, kernel_of, need
from ._device import THREADS, block_each, cuda, device_function, each, kernel
from .cast import decode_one, grid_of, round_one

Array = Any
SCALES, POWERS, VALUES = ("a/M", "a*(1/M)", "1/(M/a)"), ("no", "bits", "log2"), ("x/s", "x*(1/s)", "x*(M/a)")
INVERSE = SCALES.index("1/(M/a)")
AS_IS, BITS, LOG2 = range(3)
DIVIDE, TIMES_INVERSE, TIMES_M_OVER_A = range(3)


class Rule(NamedTuple):
    """A recipe for one format, the numbers in the carrier's dtype: production has them in float32 before they meet the data."""

    amax_min: Any
    scale_min: Any
    top: Any
    one_over_top: Any
    largest: Any
    scale: int
    power: int
    value: int


def rule_of(recipe: Recipe, fmt: Format, dtype: Any) -> Rule:
    F = np.dtype(dtype).type
    numbers = F(recipe.amax_min), F(recipe.scale_min), F(fmt.max), F(1) / F(fmt.max), np.finfo(F).max
    return Rule(*numbers, SCALES.index(recipe.scale), POWERS.index(recipe.power_of_two), VALUES.index(recipe.value))


@device_function
def power_of_two(s, how):
    """2^ceil(log2 s): exact, or (LOG2) of a logarithm rounded to s's dtype first, which may be the power of two just below s."""
    F = type(s)
    if not (s > F(0)) or s == F(math.inf):
        return s
    if how == LOG2:
        return F(math.ldexp(1.0, math.ceil(F(math.log2(np.float64(s))))))
    m, e = math.frexp(np.float64(s))  # s = m 2^e, 1/2 <= m < 1
    return F(math.ldexp(1.0, e - 1 if m == 0.5 else e))


@device_function
def scale_of(amax, r):
    """(scale, the number that x is divided or multiplied by) of a tile whose largest magnitude is amax, in amax's dtype throughout."""
    F = type(amax)
    a = max(amax, r.amax_min)
    if r.scale == INVERSE:
        inverse = min(r.top / a, r.largest) if a > F(0) and a < F(math.inf) else F(1)
        s = F(1) / inverse
        if r.power != AS_IS:  # M/a rounded down is the scale rounded up
            _, e = math.frexp(np.float64(inverse))
            s = F(1) / F(math.ldexp(1.0, e - 1))
        return s, inverse if r.value == TIMES_M_OVER_A else F(1) / s
    s = max(a * r.one_over_top if r.scale == 1 else a / r.top, r.scale_min)
    if r.power != AS_IS:
        s = power_of_two(s, r.power)
    if r.value == DIVIDE:
        return s, s
    return s, F(1) / s if r.value == TIMES_INVERSE else r.top / a


@kernel
def _quantize(x, down, across, r, g, codes, scale, undefined):
    """Tiles of down x across. undefined[0]: the first element whose value, inf/inf or 0/0, has no code."""
    part = cuda.shared.array(THREADS, x.dtype)
    n, d = x.shape
    wide = scale.shape[1]
    for tile in range(cuda.blockIdx.x, scale.shape[0] * wide, cuda.gridDim.x):
        top, left = tile // wide * down, tile % wide * across
        width = min(across, d - left)
        size = width * min(down, n - top)
        own = x.dtype.type(0)
        for k in range(cuda.threadIdx.x, size, THREADS):
            own = max(own, abs(x[top + k // width, left + k % width]))
        part[cuda.threadIdx.x] = own
        cuda.syncthreads()
        amax = part[0]
        for k in range(1, THREADS):
            amax = max(amax, part[k])
        cuda.syncthreads()  # part is written again in the next round
        s, by = scale_of(amax, r)
        if cuda.threadIdx.x == 0:
            scale[tile // wide, tile % wide] = s
        for k in range(cuda.threadIdx.x, size, THREADS):
            i, j = top + k // width, left + k % width
            v = x[i, j] / by if r.value == DIVIDE else x[i, j] * by
            if v != v and g.nan_code < 0:
                cuda.atomic.min(undefined, 0, i * d + j)
            else:
                codes[i, j] = round_one(np.float64(v), 0.0, g)[0]


@kernel
def _dequantize(codes, scale, down, across, g, x):
    d = codes.shape[1]
    for k in range(cuda.grid(1), codes.size, cuda.gridsize(1)):
        i, j = k // d, k % d
        x[i, j] = x.dtype.type(decode_one(int(codes[i, j]), g)) * scale[i // down, j // across]


def _quantised(op: str, name: str, x: Array, recipe: str, down: int, across: int, format: str, rounding: str) -> tuple[Array, Array]:
    fmt, (n, d) = FORMATS[format], x.shape
    codes, scale = empty(x.shape, np.dtype(fmt.code_dtype)), empty((-(-n // down), -(-d // across)), x.dtype)
    undefined = arrays().full(1, x.size, np.int64)
    rule, grid = rule_of(RECIPES[recipe], fmt, x.dtype), grid_of(fmt, "saturate", rounding)
    block_each(_quantize, scale.size, x, down, across, rule, grid, codes, scale, undefined)
    if (at := int(undefined[0])) < x.size:
        i, j = at // d, at % d
        what = f"{float(x[i, j])} by the scale {float(scale[i // down, j // across])}"
        need(False, op, f"{name}[{i}, {j}]", what, f"no NaN: {format} has none")
    return codes, scale


def _dequantised(op: str, codes: Array, scale: Array, down: int, across: int, format: str) -> Array:
    check_codes(op, "codes", codes, format)
    n, d = codes.shape
    expected = (-(-n // down), -(-d // across))
    what = f"shape {expected} for codes of shape {codes.shape} in tiles of {down} x {across}"
    need(scale.shape == expected, op, "scale", f"of shape {scale.shape}", what)
    x = empty(codes.shape, scale.dtype)
    each(_dequantize, codes.size, codes, scale, down, across, grid_of(FORMATS[format]), x)
    return x


@kernel_of("fp8.quantize_tile")
def quantize_tile(
    x: Array,
    *,
    recipe: RecipeName = "v3",
    tile: int = 128,
    axis: Literal[0, 1] = 1,
    format: FP8Name = "e4m3fn",
    rounding: Literal["half-even", "half-zero"] = "half-even",
) -> tuple[Array, Array]:
    """codes[n,d], scale with x[n,d] ~ decode(codes[n,d]) scale[n, d // tile] (axis=1: tiles of 1 x tile)
    or scale[n // tile, d] (axis=0: tiles of tile x 1). The last tile may be ragged.

    Recipes, formats, roundings and errors as kernels.cpu's; all arithmetic that the recipe names in x's dtype, which is the scale's too.
    """
    check_quantised("fp8.quantize_tile", x, "x", tile)
    return _quantised("fp8.quantize_tile", "x", x, recipe, *((1, tile) if axis == 1 else (tile, 1)), format, rounding)


@kernel_of("fp8.quantize_block")
def quantize_block(
    w: Array,
    *,
    recipe: RecipeName = "v3",
    block: int = 128,
    format: FP8Name = "e4m3fn",
    rounding: Literal["half-even", "half-zero"] = "half-even",
) -> tuple[Array, Array]:
    """codes[o,d], scale with w[o,d] ~ decode(codes[o,d]) scale[o // block, d // block]. Blocks at the edges may be ragged.

    The rest as quantize_tile.
    """
    check_quantised("fp8.quantize_block", w, "w", block, "block")
    return _quantised("fp8.quantize_block", "w", w, recipe, block, block, format, rounding)


@kernel_of("fp8.dequantize_tile")
def dequantize_tile(codes: Array, scale: Array, *, tile: int = 128, axis: Literal[0, 1] = 1, format: FP8Name = "e4m3fn") -> Array:
    """x[n,d] = decode(codes[n,d]) scale, one rounding in scale's dtype: scale[n, d // tile] (axis=1) or scale[n // tile, d] (axis=0)."""
    need(tile >= 1, "fp8.dequantize_tile", "tile", tile, "tile >= 1")
    return _dequantised("fp8.dequantize_tile", codes, scale, *((1, tile) if axis == 1 else (tile, 1)), format)


@kernel_of("fp8.dequantize_block")
def dequantize_block(codes: Array, scale: Array, *, block: int = 128, format: FP8Name = "e4m3fn") -> Array:
    """w[o,d] = decode(codes[o,d]) scale[o // block, d // block], one rounding in scale's dtype."""
    need(block >= 1, "fp8.dequantize_block", "block", block, "block >= 1")
    return _dequantised("fp8.dequantize_block", codes, scale, block, block, format)
