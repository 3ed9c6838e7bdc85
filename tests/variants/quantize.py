"""fp8.quantize_tile and fp8.dequantize_tile, and of blocks: how a tile's maximum is found, how codes are made, as real kernels differ."""

import math

import numpy as np

from .casts import encode_by
from .decodes import shifted, table, viewed
from .floats import LAYOUTS, Array

MAX = {"e4m3fn": 448.0, "e5m2": 57344.0, "e4m3fnuz": 240.0, "e5m2fnuz": 57344.0, "e5m6": 65024.0, "e2m1": 6.0}
NOT_CLAMPED = {"v3-unclamped", "flashmla", "te", "te-ue8m0"}
TIMES_RECIPROCAL = {"v32", "v32-ue8m0", "deepep", "deepep-ue8m0", "mxfp4"}  # s = a·(1/M)
LOG2 = {"v3-ue8m0", "flashmla"}
BITS = {"v32-ue8m0", "deepgemm-ue8m0", "deepep-ue8m0", "tilekernels-ue8m0", "mxfp4"}
TIMES_INVERSE = {"deepgemm", *BITS} - {"v32-ue8m0", "mxfp4"}  # v = x·(1/s)
TIMES_RATIO = {"deepep", "tilekernels"}  # v = x·(M/a)


def least(recipe: str) -> float:
    """What amax is at least"""
    return 6 * 2.0**-126 if recipe == "mxfp4" else 0.0 if recipe in NOT_CLAMPED else 1e-4


def up_by_frexp(s: Array) -> Array:
    """The smallest power of two that is s or more."""
    m, e = np.frexp(np.where(np.isfinite(s), s, 1))
    p = np.ldexp(s.dtype.type(1), np.where(m == 0.5, e - 1, e))
    return np.where(np.isfinite(s) & (s > 0), p, s)


def up_by_bits(s: Array) -> Array:
    """float32: everything below the exponent field carries into it."""
    u = s.view(np.uint32)
    return np.where(np.isinf(s), s, ((u + np.uint32(0x7FFFFF)) & np.uint32(0x7F800000)).view(np.float32))


def up_by_log2(s: Array) -> Array:
    """2^⌈log2 s⌉ with log2 in s's own dtype."""
    safe = np.where((s > 0) & np.isfinite(s), s, s.dtype.type(1))
    p = np.ldexp(s.dtype.type(1), np.ceil(np.log2(safe)).astype(np.int32))
    return np.where((s > 0) & np.isfinite(s), p, s)


def up_by_wide_log2(s: Array) -> Array:
    """The same with log2 in Python's float, rounded to s's dtype."""
    flat = [math.ldexp(1.0, math.ceil(s.dtype.type(math.log2(v)))) if 0 < v < math.inf else v for v in s.ravel().tolist()]
    return np.array(flat, dtype=s.dtype).reshape(s.shape)


def transformer_engine(a: Array, recipe: str, top: float) -> tuple[Array, Array, bool]:
    """M/a is what is found, rounded down to a power of two if need be, and the scale is its inverse."""
    real = a.dtype.type
    usable = (a > 0) & np.isfinite(a)
    i = np.where(usable, np.minimum(real(top) / np.where(usable, a, real(1)), np.finfo(a.dtype).max), real(1)).astype(a.dtype)
    if recipe == "te":
        return real(1) / i, i, True
    p = np.ldexp(real(1), np.frexp(i)[1] - 1).astype(a.dtype)
    return real(1) / p, real(1) / (real(1) / p), True


def scale_and_factor(a: Array, recipe: str, top: float, bits=up_by_frexp, log2=up_by_log2) -> tuple[Array, Array, bool]:
    """A tile's scale; what x is divided by or multiplied with; which of the two."""
    if recipe.startswith("te"):
        return transformer_engine(a, recipe, top)
    real = a.dtype.type
    if recipe not in NOT_CLAMPED:
        a = np.maximum(a, real(least(recipe)))
    s = a * (real(1) / real(top)) if recipe in TIMES_RECIPROCAL else a / real(top)
    if recipe == "flashmla":
        s = np.maximum(s, real(1e-4))
    s = bits(s) if recipe in BITS else log2(s) if recipe in LOG2 else s
    if recipe in TIMES_INVERSE:
        return s, real(1) / s, True
    return (s, real(top) / a, True) if recipe in TIMES_RATIO else (s, s, False)


def codes_of(x: Array, factor: Array, multiply: bool, format: str, way: str, rounding: str) -> Array:
    v = x * factor if multiply else x / factor
    return encoded(v, format, way, rounding)


def encoded(v: Array, format: str, way: str, rounding: str) -> Array:
    return encode_by(way, LAYOUTS[format], v.ravel(), "saturate", rounding).reshape(v.shape)


def looped(x: Array, *, recipe: str = "v3", tile: int = 128, axis: int = 1, format: str = "e4m3fn", rounding: str = "half-even"):
    """Tile after tile."""
    with np.errstate(all="ignore"):
        if axis == 0:
            return tuple(y.T for y in looped(x.T, recipe=recipe, tile=tile, format=format, rounding=rounding))
        n, d = x.shape
        scale, v = np.empty((n, -(-d // tile)), x.dtype), np.empty_like(x)
        for i in range(n):
            for j in range(scale.shape[1]):
                part = x[i, j * tile : (j + 1) * tile]
                s, f, multiply = scale_and_factor(np.abs(part).max(keepdims=True), recipe, MAX[format], log2=up_by_wide_log2)
                scale[i, j] = s[0]
                v[i, j * tile : (j + 1) * tile] = part * f if multiply else part / f
        return encoded(v, format, "integer" if x.dtype == np.float32 else "midpoints", rounding), scale


def padded(x: Array, *, recipe: str = "v3", tile: int = 128, axis: int = 1, format: str = "e4m3fn", rounding: str = "half-even"):
    """Filled up to whole tiles, reshaped, cut again."""
    with np.errstate(all="ignore"):
        if axis == 0:
            return tuple(y.T for y in padded(x.T, recipe=recipe, tile=tile, format=format, rounding=rounding))
        n, d = x.shape
        blocks = np.pad(x, ((0, 0), (0, -d % tile))).reshape(n, -1, tile)
        s, f, multiply = scale_and_factor(np.abs(blocks).max(-1), recipe, MAX[format])
        return codes_of(blocks, f[..., None], multiply, format, "frexp", rounding).reshape(n, -1)[:, :d], s


def reduced(x: Array, *, recipe: str = "v3", tile: int = 128, axis: int = 1, format: str = "e4m3fn", rounding: str = "half-even"):
    """np.maximum.reduceat along either axis; the scales gathered by index."""
    with np.errstate(all="ignore"):
        a = np.maximum.reduceat(np.abs(x), np.arange(0, x.shape[axis], tile), axis=axis)
        s, f, multiply = scale_and_factor(a, recipe, MAX[format])
        return codes_of(x, np.take(f, np.arange(x.shape[axis]) // tile, axis=axis), multiply, format, "magic", rounding), s


def columns(x: Array, *, recipe: str = "v3", tile: int = 128, axis: int = 1, format: str = "e4m3fn", rounding: str = "half-even"):
    """A block of the tiled axis at a time; the maximum is max(max x, -min x)."""
    with np.errstate(all="ignore"):
        codes, scales = [], []
        for start in range(0, x.shape[axis], tile):
            block = np.take(x, np.arange(start, min(start + tile, x.shape[axis])), axis=axis)
            a = np.abs(np.maximum(block.max(axis=axis, keepdims=True), -block.min(axis=axis, keepdims=True)))  # -0 becomes 0
            s, f, multiply = scale_and_factor(a, recipe, MAX[format], log2=up_by_wide_log2)
            codes.append(codes_of(block, f, multiply, format, "midpoints", rounding))
            scales.append(s)
        return np.concatenate(codes, axis), np.concatenate(scales, axis)


def patterns(x: Array, *, recipe: str = "v3", tile: int = 128, axis: int = 1, format: str = "e4m3fn", rounding: str = "half-even"):
    """float32 only, and no float64 anywhere: the maximum of bit patterns, the power of two by a carry, codes by integers and a table."""
    with np.errstate(all="ignore"):
        if axis == 0:
            return tuple(y.T for y in patterns(np.ascontiguousarray(x.T), recipe=recipe, tile=tile, format=format, rounding=rounding))
        n, d = x.shape
        bits = np.zeros((n, -(-d // tile) * tile), np.uint32)
        bits[:, :d] = x.view(np.uint32) & np.uint32(0x7FFFFFFF)
        a = np.ascontiguousarray(bits.reshape(n, -1, tile).max(-1)).view(np.float32)
        s, f, multiply = scale_and_factor(a, recipe, MAX[format], bits=up_by_bits)
        return codes_of(x, np.repeat(f, tile, axis=1)[:, :d], multiply, format, "integer" if format == "e5m6" else "halfway", rounding), s


def strided(x: Array, *, recipe: str = "v3", tile: int = 128, axis: int = 1, format: str = "e4m3fn", rounding: str = "half-even"):
    """A running maximum over the places within a tile, all tiles at once."""
    with np.errstate(all="ignore"):
        if axis == 0:
            return tuple(y.T for y in strided(x.T, recipe=recipe, tile=tile, format=format, rounding=rounding))
        a = np.zeros((x.shape[0], -(-x.shape[1] // tile)), x.dtype)
        for place in range(min(tile, x.shape[1])):
            here = np.abs(x[:, place::tile])
            a[:, : here.shape[1]] = np.where(here > a[:, : here.shape[1]], here, a[:, : here.shape[1]])
        s, f, multiply = scale_and_factor(a, recipe, MAX[format])
        return codes_of(x, np.kron(f, np.ones(tile, x.dtype))[:, : x.shape[1]], multiply, format, "split", rounding), s


def wide(x: Array, *, recipe: str = "v3", tile: int = 128, axis: int = 1, format: str = "e4m3fn", rounding: str = "half-even"):
    """float32 only: every operation in float64, rounded to float32 after it (one quotient or product: as good as one rounding)."""
    single = np.float32
    with np.errstate(all="ignore"):
        if axis == 0:
            return tuple(y.T for y in wide(x.T, recipe=recipe, tile=tile, format=format, rounding=rounding))
        n, d = x.shape
        double = np.pad(x.astype(np.float64), ((0, 0), (0, -d % tile))).reshape(n, -1, tile)
        a = np.sqrt(np.max(double * double, axis=-1))  # exact: the squares are
        a = np.maximum(a, float(single(least(recipe))))
        if recipe.startswith("te"):
            i = np.minimum(MAX[format] / np.where((a > 0) & np.isfinite(a), a, 1), np.finfo(single).max).astype(single)
            i = np.where((a > 0) & np.isfinite(a), i, single(1))
            p = i if recipe == "te" else (i.view(np.uint32) & np.uint32(0x7F800000)).view(single)
            s = (1 / p.astype(np.float64)).astype(single)
            v = double * (p if recipe == "te" else single(1) / s).astype(np.float64)[..., None]
            return encoded(single(v).reshape(n, -1)[:, :d], format, "integer", rounding), s
        s = a * float(single(1 / MAX[format])) if recipe in TIMES_RECIPROCAL else a / MAX[format]
        s = np.maximum(single(s), single(1e-4) if recipe == "flashmla" else single(0))
        s = up_by_bits(s) if recipe in BITS else up_by_wide_log2(s) if recipe in LOG2 else s
        if recipe in TIMES_INVERSE:
            v = double * (1 / s.astype(np.float64)).astype(single)[..., None]
        elif recipe in TIMES_RATIO:
            v = double * (MAX[format] / a).astype(single)[..., None]
        else:
            v = double / s.astype(np.float64)[..., None]
        return encoded(single(v).reshape(n, -1)[:, :d], format, "integer", rounding), s


QUANTIZE = (looped, padded, reduced, columns, patterns, strided, wide)
SINGLE = {"patterns", "wide"}


# dequantize


def repeated(codes: Array, scale: Array, *, tile: int = 128, axis: int = 1, format: str = "e4m3fn") -> Array:
    each = np.repeat(scale, tile, axis=axis)[: codes.shape[0], : codes.shape[1]]
    return table(LAYOUTS[format], codes).astype(scale.dtype) * each


def gathered(codes: Array, scale: Array, *, tile: int = 128, axis: int = 1, format: str = "e4m3fn") -> Array:
    """The scale by index arithmetic, on flat arrays."""
    n, d = codes.shape
    i, j = np.divmod(np.arange(n * d), d)
    where = i * scale.shape[1] + j // tile if axis == 1 else (i // tile) * scale.shape[1] + j
    return (scale.ravel()[where] * shifted(LAYOUTS[format], codes.ravel())).reshape(n, d)


def tiles(codes: Array, scale: Array, *, tile: int = 128, axis: int = 1, format: str = "e4m3fn") -> Array:
    """Tile after tile, in place."""
    out = viewed(LAYOUTS[format], codes).astype(scale.dtype)
    for p in range(scale.shape[axis]):
        part = slice(p * tile, (p + 1) * tile)
        if axis == 1:
            out[:, part] *= scale[:, p : p + 1]
        else:
            out[part] *= scale[p]
    return out


def blocks(codes: Array, scale: Array, *, tile: int = 128, axis: int = 1, format: str = "e4m3fn") -> Array:
    """Filled up to whole tiles and broadcast."""
    if axis == 0:
        return blocks(codes.T, scale.T, tile=tile, format=format).T
    n, d = codes.shape
    x = shifted(LAYOUTS[format], np.pad(codes, ((0, 0), (0, -d % tile)))).astype(scale.dtype).reshape(n, -1, tile)
    return (x * scale[..., None]).reshape(n, -1)[:, :d]


def product_table(codes: Array, scale: Array, *, tile: int = 128, axis: int = 1, format: str = "e4m3fn") -> Array:
    """All 256 products of a tile's scale first, then a look-up."""
    if axis == 0:
        return product_table(codes.T, scale.T, tile=tile, format=format).T
    products = table(LAYOUTS[format], np.arange(256)).astype(scale.dtype) * scale[..., None]  # [n,q,256]
    rows, cols = np.arange(codes.shape[0])[:, None], np.arange(codes.shape[1])[None] // tile
    return products[rows, cols, codes]


def wide_product(codes: Array, scale: Array, *, tile: int = 128, axis: int = 1, format: str = "e4m3fn") -> Array:
    """The product in float64 (exact for float32 scales), rounded once."""
    index = np.arange(codes.shape[axis]) // tile
    return (viewed(LAYOUTS[format], codes).astype(np.float64) * np.take(scale, index, axis=axis)).astype(scale.dtype)


DEQUANTIZE = (repeated, gathered, tiles, blocks, product_table, wide_product)
