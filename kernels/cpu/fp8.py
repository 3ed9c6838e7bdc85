"""Tile-wise quantisation to FP8 with the scale recipes that production code uses, and its inverse."""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from ._common import array_of, choice, flip, floats, integer, need, output, run
from .cast import FORMATS, Format, decode_one, decoding, encode_one, rounding

AS_IS, LOG2, BITS = range(3)  # what becomes of the scale: nothing, 2^ceil(log2 s), next power of two
DIVIDE, TIMES_INVERSE, TIMES_MAX_OVER_A = range(3)  # the value: x / s, x * (1/s), x * (MAX/a)
LN2 = float(np.log(2.0))
GROUP = 4  # tiles that axis=1 takes through each step together: one after the other, each would wait for its own amax and division
COLUMNS = 512  # of a block that axis=0 works on: 128 rows of them fit in the L2 cache


class Recipe(NamedTuple):
    """How a tile's largest magnitude a becomes a scale s and a value v."""

    clamp: bool = True  # a = max(a, 1e-4)
    exact: bool = True  # s = a / MAX, else a * (1/MAX)
    clamp_scale: bool = False  # s = max(s, 1e-4)
    power: int = AS_IS
    value: int = DIVIDE


RECIPES = {
    "v3-unclamped": Recipe(clamp=False),
    "v3": Recipe(),
    "v3-ue8m0": Recipe(power=LOG2),
    "v32": Recipe(exact=False),
    "v32-ue8m0": Recipe(exact=False, power=BITS),
    "deepgemm": Recipe(value=TIMES_INVERSE),
    "deepgemm-ue8m0": Recipe(power=BITS, value=TIMES_INVERSE),
    "deepep": Recipe(exact=False, value=TIMES_MAX_OVER_A),
    "deepep-ue8m0": Recipe(exact=False, power=BITS, value=TIMES_INVERSE),
    "tilekernels": Recipe(value=TIMES_MAX_OVER_A),
    "tilekernels-ue8m0": Recipe(power=BITS, value=TIMES_INVERSE),
    "flashmla": Recipe(clamp=False, clamp_scale=True, power=LOG2),
}
FP8 = ("e4m3fn", "e5m2")


class Scaling(NamedTuple):
    """A recipe for one format and carrier. The first four are in the carrier's dtype, the masks are its bits."""

    floor: Any
    scale_floor: Any
    max: Any
    inverse_max: Any
    magnitude: Any
    infinity: Any
    fraction: Any  # mask
    unit: Any  # one in the exponent field
    bias: int
    exact: bool
    power: int
    value: int


@lru_cache
def scaling(recipe: Recipe, fmt: Format, dtype: np.dtype[Any]) -> Scaling:
    """The parameters of `_scale_of`."""
    F, U, places, bias = (np.float32, np.uint32, 23, 127) if dtype == np.float32 else (np.float64, np.uint64, 52, 1023)
    floor = F(1e-4 if recipe.clamp else 0.0)
    scale_floor = F(1e-4 if recipe.clamp_scale else 0.0)
    infinity = F(np.inf).view(U)
    fraction = (1 << places) - 1
    masks = U(int(infinity) | fraction), infinity, U(fraction), U(1 << places)
    return Scaling(floor, scale_floor, F(fmt.max), F(1) / F(fmt.max), *masks, bias, recipe.exact, recipe.power, recipe.value)


@njit(nogil=True, error_model="numpy")
def _power_of_two(s, p):
    """[bits]: the smallest power of two >= s. [log2]: 2^ceil(log2(s) rounded to s's dtype). s is normal or infinite."""
    U = type(p.unit)
    u = flip(s)
    f = U(u & p.fraction)
    low = U(u - f)  # the bits of 2^e <= s
    if u == p.infinity or f == U(0):
        return s
    if p.power == LOG2:
        # log2(s) = e + log2(1 + f) rounds to e itself when log2(1 + f) is under half the gap between e and the next number. That
        # decides the ceiling exactly; an evaluated log2 would have to be correctly rounded. f is tiny here: log2(1 + f) = f / ln 2.
        e = type(s)(np.int64(low // p.unit) - p.bias)
        above = flip(U(flip(e) - U(1) if e < type(s)(0) else flip(e) + U(1)))
        if np.float64(f) / np.float64(p.unit) < 0.5 * LN2 * np.float64(above - e):
            return flip(low)
    return flip(U(low + p.unit))


@njit(nogil=True, error_model="numpy")
def _scale_of(a, p):
    """(scale, the number that x is divided or multiplied by) of a tile whose largest magnitude is a."""
    one = type(a)(1)
    a = max(a, p.floor)
    s = a / p.max if p.exact else a * p.inverse_max
    s = max(s, p.scale_floor)
    if p.power != AS_IS:
        s = _power_of_two(s, p)
    if p.value == DIVIDE:
        return s, s
    return s, (one / s if p.value == TIMES_INVERSE else p.max / a)


@njit(nogil=True, error_model="numpy", cache=True)
def _quantize_rows(lo, hi, x, codes, scale, tile, p, r):
    """Tiles of 1 x tile in rows lo to hi. False if one holds a NaN."""
    U = type(p.unit)
    bits = np.empty(GROUP, U)
    by = np.empty(GROUP, x.dtype)
    for i in range(lo, hi):
        for first in range(0, scale.shape[1], GROUP):
            s = scale[i, first : first + GROUP]
            worst = U(0)
            for t in range(s.size):
                v = x[i, (first + t) * tile : (first + t + 1) * tile]
                amax = U(0)  # on bits: an integer maximum vectorises, and NaNs come out on top
                for j in range(v.size):
                    amax = max(amax, U(flip(v[j]) & p.magnitude))
                bits[t] = amax
                worst = max(worst, amax)
            if worst > p.infinity:
                return False
            for t in range(s.size):
                s[t], by[t] = _scale_of(flip(bits[t]), p)
            for t in range(s.size):
                v = x[i, (first + t) * tile : (first + t + 1) * tile]
                c = codes[i, (first + t) * tile : (first + t + 1) * tile]
                f = by[t]
                if p.value == DIVIDE:
                    for j in range(v.size):
                        c[j] = encode_one(v[j] / f, r)
                else:
                    for j in range(v.size):
                        c[j] = encode_one(v[j] * f, r)
    return True


@njit(nogil=True, error_model="numpy", cache=True)
def _quantize_columns(lo, hi, x, codes, scale, tile, p, r):
    """Tiles of tile x 1, in blocks of `tile` rows and COLUMNS columns numbered row by row. False if one holds a NaN."""
    U = type(p.unit)
    n, d = x.shape
    across = (d + COLUMNS - 1) // COLUMNS
    all_bits, all_by = np.empty(COLUMNS, U), np.empty(COLUMNS, x.dtype)
    for block in range(lo, hi):
        t, left = block // across, block % across * COLUMNS
        top, bottom, right = t * tile, min((t + 1) * tile, n), min(left + COLUMNS, d)
        s, bits, by = scale[t, left:right], all_bits[: right - left], all_by[: right - left]
        bits[:] = U(0)
        for i in range(top, bottom):
            v = x[i, left:right]
            for j in range(v.size):
                bits[j] = max(bits[j], U(flip(v[j]) & p.magnitude))
        worst = U(0)
        for j in range(bits.size):
            worst = max(worst, bits[j])
        if worst > p.infinity:
            return False
        for j in range(bits.size):
            s[j], by[j] = _scale_of(flip(bits[j]), p)
        for i in range(top, bottom):
            v, c = x[i, left:right], codes[i, left:right]
            if p.value == DIVIDE:
                for j in range(v.size):
                    c[j] = encode_one(v[j] / by[j], r)
            else:
                for j in range(v.size):
                    c[j] = encode_one(v[j] * by[j], r)
    return True


@njit(nogil=True, cache=True)
def _dequantize(lo, hi, codes, scale, x, down, across, d):
    """x = decode(codes) * scale for tiles of down x across."""
    F = type(scale[0, 0])
    for i in range(lo, hi):
        if across == 1:
            c, s, y = codes[i], scale[i // down], x[i]
            for j in range(c.size):
                y[j] = F(decode_one(c[j], d)) * s[j]
        else:
            for t in range(scale.shape[1]):
                c, y, s = codes[i, t * across : (t + 1) * across], x[i, t * across : (t + 1) * across], scale[i // down, t]
                for j in range(c.size):
                    y[j] = F(decode_one(c[j], d)) * s


def _scale_shape(shape: tuple[int, ...], tile: int, axis: int) -> tuple[int, int]:
    n, d = shape
    return (n, -(-d // tile)) if axis == 1 else (-(-n // tile), d)


def _attributes(op: str, tile: Any, axis: Any, format: Any) -> int:
    tile = integer(op, "tile", tile)
    need(not isinstance(axis, bool) and axis in (0, 1), op, "axis", repr(axis), "0 or 1")
    choice(op, "format", format, FP8)
    return tile


def quantize_tile(
    x: NDArray[Any],
    *,
    recipe: str = "v3",
    tile: int = 128,
    axis: int = 1,
    format: str = "e4m3fn",
    out: tuple[NDArray[Any], NDArray[Any]] | None = None,
) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """codes[n,d], scale with x[n,d] ~ decode(codes[n,d]) * scale[n, d // tile] (axis=1: tiles of 1 x tile)
    or * scale[n // tile, d] (axis=0: tiles of tile x 1). The last tile may be ragged.

    From a = max |x| over the tile, `recipe` (see RECIPES) makes the scale and the value; codes are the value, saturated, in `format`
    ("e4m3fn" or "e5m2"), uint8. All arithmetic in x's dtype, float32 or float64, which is also the scale's. Infinities are
    allowed and follow IEEE arithmetic. `out` = (codes, scale) receives the result.

    ValueError: x is not two-dimensional float32 or float64, x holds a NaN (the first is named), an attribute has no such value.
    """
    op = "quantize_tile"
    choice(op, "recipe", recipe, RECIPES)
    tile = _attributes(op, tile, axis, format)
    x = floats(op, "x", x, 2)
    need(out is None or (isinstance(out, tuple) and len(out) == 2), op, "out", type(out).__name__, "a pair of arrays (codes, scale)")
    codes = output(op, "out[0]", out and out[0], x.shape, np.uint8, x)
    scale = output(op, "out[1]", out and out[1], _scale_shape(x.shape, tile, axis), x.dtype, x, codes)
    n, d = x.shape
    p = scaling(RECIPES[recipe], FORMATS[format], x.dtype)
    r = rounding(FORMATS[format], x.dtype, "saturate")
    if axis == 1:
        clean = run(_quantize_rows, n, d, x, codes, scale, tile, p, r)
    else:
        blocks = scale.shape[0] * -(-d // COLUMNS)
        clean = run(_quantize_columns, blocks, min(tile, n) * COLUMNS, x, codes, scale, tile, p, r)
    if not all(clean):
        i, j = np.argwhere(np.isnan(x))[0]
        raise ValueError(f"{op}: x[{i}, {j}] is NaN; expected no NaN")
    return codes, scale


def dequantize_tile(
    codes: NDArray[np.uint8],
    scale: NDArray[Any],
    *,
    tile: int = 128,
    axis: int = 1,
    format: str = "e4m3fn",
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """x[n,d] = decode(codes[n,d]) * scale, one rounding in scale's dtype: scale[n, d // tile] (axis=1) or scale[n // tile, d] (axis=0).

    `out` receives the result. ValueError: codes are not two-dimensional uint8, scale is not float32 or float64 of the shape that
    quantize_tile gives, an attribute has no such value.
    """
    op = "dequantize_tile"
    tile = _attributes(op, tile, axis, format)
    codes = array_of(op, "codes", codes, (np.uint8,), 2)
    scale = floats(op, "scale", scale, 2)
    shape = _scale_shape(codes.shape, tile, axis)
    need(scale.shape == shape, op, "scale", f"of shape {scale.shape}", f"shape {shape} for codes of shape {codes.shape} and tile={tile}")
    x = output(op, "out", out, codes.shape, scale.dtype, codes, scale)
    down, across = (1, tile) if axis == 1 else (tile, 1)
    run(_dequantize, *codes.shape, codes, scale, x, down, across, decoding(FORMATS[format]))
    return x
