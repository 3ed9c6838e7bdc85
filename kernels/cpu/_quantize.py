"""Kernels that quantise: a scale for each tile, then codes. Tiles of one row, or of several rows in panels that fit in the cache."""

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from ._common import array_of, choice, flip, floats, need, output, run
from ._formats import FORMATS, AnyRounding, Rounding, any_rounding, decode_one, decoding, encode_one, round_any, rounding
from ._recipes import DIVIDE, RECIPES, scale_of, scaling

GROUP = 4  # tiles that a row takes through each step together: one after the other, each would wait for its own amax and division
# Panels are as wide as the matrix, since reading on and on is what memory does best, unless they would be too few for the threads or
# too large for a cache.
PANELS, PANEL = 8, 1 << 21
QUANTISED = ("e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz", "e5m6", "e2m1")
TIES = ("half-even", "half-zero")


class Encoding(NamedTuple):
    """How values become codes."""

    plain: bool  # by encode_one, else by round_any
    has_nan: bool  # where there is none, what 0/0 becomes is left to round_any
    near: Rounding
    any: AnyRounding


@njit(nogil=True)
def _codes_of(values, c, g):
    for j in range(c.size):
        c[j] = round_any(values[j], g.threshold, g)[0]


@njit(nogil=True, error_model="numpy", cache=True)
def quantize_rows(lo, hi, x, codes, scale, tile, p, r):
    """Tiles of 1 x tile in rows lo to hi. False if one holds a NaN."""
    U, near = type(p.unit), r.near
    bits = np.empty(GROUP, U)
    by = np.empty(GROUP, x.dtype)
    values = np.empty(min(tile, x.shape[1]), x.dtype)
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
                s[t], by[t] = scale_of(flip(bits[t]), p)
            for t in range(s.size):
                v = x[i, (first + t) * tile : (first + t + 1) * tile]
                c = codes[i, (first + t) * tile : (first + t + 1) * tile]
                f = by[t]
                if not r.plain or not (r.has_nan or (f > 0 and flip(f) < p.infinity)):
                    for j in range(v.size):
                        values[j] = v[j] / f if p.value == DIVIDE else v[j] * f
                    _codes_of(values, c, r.any)
                elif p.value == DIVIDE:
                    for j in range(v.size):
                        c[j] = encode_one(v[j] / f, near)
                else:
                    for j in range(v.size):
                        c[j] = encode_one(v[j] * f, near)
    return True


@njit(nogil=True, error_model="numpy", cache=True)
def quantize_panels(lo, hi, x, codes, scale, down, across, width, p, r):
    """Tiles of down x across, in panels of down rows and width columns numbered row by row. False if one holds a NaN."""
    U, near = type(p.unit), r.near
    n, d = x.shape
    panels = (d + width - 1) // width
    all_bits, all_by, values = np.empty(width, U), np.empty(width, x.dtype), np.empty(width, x.dtype)
    for panel in range(lo, hi):
        i, left = panel // panels, panel % panels * width
        top, bottom, right = i * down, min((i + 1) * down, n), min(left + width, d)
        bits, by = all_bits[: right - left], all_by[: right - left]
        bits[:] = U(0)
        for k in range(top, bottom, 4):  # four rows for each pass over bits; past the last row, that row again
            v0, v1 = x[k, left:right], x[min(k + 1, bottom - 1), left:right]
            v2, v3 = x[min(k + 2, bottom - 1), left:right], x[min(k + 3, bottom - 1), left:right]
            for j in range(v0.size):
                first = max(U(flip(v0[j]) & p.magnitude), U(flip(v1[j]) & p.magnitude))
                second = max(U(flip(v2[j]) & p.magnitude), U(flip(v3[j]) & p.magnitude))
                bits[j] = max(bits[j], max(first, second))
        s = scale[i, left // across : (right + across - 1) // across]
        plain = r.plain
        for t in range(s.size):
            amax = U(0)
            part = bits[t * across : (t + 1) * across]
            for j in range(part.size):
                amax = max(amax, part[j])
            if amax > p.infinity:
                return False
            s[t], f = scale_of(flip(amax), p)
            by[t * across : (t + 1) * across] = f
            plain &= r.has_nan or (f > 0 and flip(f) < p.infinity)
        for k in range(top, bottom):
            v, c = x[k, left:right], codes[k, left:right]
            if not plain:
                for j in range(v.size):
                    values[j] = v[j] / by[j] if p.value == DIVIDE else v[j] * by[j]
                _codes_of(values, c, r.any)
            elif p.value == DIVIDE:
                for j in range(v.size):
                    c[j] = encode_one(v[j] / by[j], near)
            else:
                for j in range(v.size):
                    c[j] = encode_one(v[j] * by[j], near)
    return True


@njit(nogil=True, cache=True)
def dequantize_rows(lo, hi, codes, scale, x, down, across, d):
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


def tiles_of(shape: tuple[int, ...], down: int, across: int) -> tuple[int, int]:
    """The scale's shape."""
    n, d = shape
    return -(-n // down), -(-d // across)


def quantize(
    op: str,
    name: str,
    x: NDArray[Any],
    recipe: str,
    down: int,
    across: int,
    format: str,
    ties: str,
    out: tuple[NDArray[Any], NDArray[Any]] | None,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """(codes, scale) of x, called `name`, in tiles of down x across. `quantize_tile` says what the rest is."""
    choice(op, "recipe", recipe, RECIPES)
    choice(op, "format", format, QUANTISED)
    choice(op, "rounding", ties, TIES)
    x = floats(op, name, x, 2)
    need(out is None or (isinstance(out, tuple) and len(out) == 2), op, "out", type(out).__name__, "a pair of arrays (codes, scale)")
    fmt = FORMATS[format]
    codes = output(op, "out[0]", out and out[0], x.shape, fmt.code, x)
    scale = output(op, "out[1]", out and out[1], tiles_of(x.shape, down, across), x.dtype, x, codes)
    n, d = x.shape
    p = scaling(RECIPES[recipe], fmt, x.dtype)
    plain = fmt.plain and ties == "half-even"
    near = FORMATS["e4m3fn"] if not fmt.plain else fmt  # what is not used has to be there all the same
    r = Encoding(plain, fmt.nan_code is not None, rounding(near, x.dtype, "saturate"), any_rounding(fmt, "saturate", ties))
    if down == 1:
        clean = run(quantize_rows, n, d, x, codes, scale, across, p, r)
    else:
        height, tiles = min(down, n), scale.shape[1]
        wide = -(-tiles // -(-PANELS // max(1, scale.shape[0])))  # in tiles, so that there are PANELS panels
        width = max(1, min(wide, PANEL // max(1, height * across))) * across
        clean = run(quantize_panels, scale.shape[0] * -(-d // width), height * min(width, d), x, codes, scale, down, across, width, p, r)
    if not all(clean):
        i, j = np.argwhere(np.isnan(x))[0]
        raise ValueError(f"{op}: {name}[{i}, {j}] is NaN; expected no NaN")
    if fmt.nan_code is None and not np.all((scale > 0) & np.isfinite(scale)):
        own = np.repeat(np.repeat(scale, down, axis=0)[:n], across, axis=1)[:, :d]
        lost = np.argwhere((np.isinf(own) & np.isinf(x)) | ((own == 0) & (x == 0)))  # inf/inf, 0/0
        if len(lost):
            i, j = lost[0]
            raise ValueError(f"{op}: {name}[{i}, {j}] = {x[i, j]} by the scale {own[i, j]} gives NaN; {format} has none")
    return codes, scale


def dequantize(
    op: str, codes: NDArray[Any], scale: NDArray[Any], down: int, across: int, format: str, out: NDArray[Any] | None
) -> NDArray[Any]:
    """decode(codes) * scale in tiles of down x across."""
    choice(op, "format", format, QUANTISED)
    fmt = FORMATS[format]
    codes = array_of(op, "codes", codes, (fmt.code,), 2)
    if fmt.bits % 8 and (beyond := np.argwhere(codes >= 2**fmt.bits)).size:
        i, j = beyond[0]
        raise ValueError(f"{op}: codes[{i}, {j}] is {codes[i, j]}; expected a code below {2**fmt.bits}")
    scale = floats(op, "scale", scale, 2)
    shape = tiles_of(codes.shape, down, across)
    expected = f"shape {shape} for codes of shape {codes.shape} in tiles of {down} x {across}"
    need(scale.shape == shape, op, "scale", f"of shape {scale.shape}", expected)
    x = output(op, "out", out, codes.shape, scale.dtype, codes, scale)
    run(dequantize_rows, *codes.shape, codes, scale, x, down, across, decoding(fmt))
    return x
