"""Fine-grained FP8: 1×128 (or 128×1) tiles with a scale each, in the recipes that are in production. Spec §4.2.

A recipe is a value. The recipes differ by one unit in the last place of the scale, which flips 0.03 to 0.07% of the codes.
"""

import itertools
from dataclasses import dataclass
from typing import Literal

from array_api_compat import device

from .cast import decode, encode
from .formats import FORMATS
from .op import Case, Op, declare, signature
from .xp import Array, floor_log2, power_of_two, xp_of


@dataclass(frozen=True)
class Recipe:
    """How a tile's largest magnitude a becomes a scale s, and how x becomes the number that is encoded. M is the format's maximum."""

    amax_min: float = 1e-4  # a := max(a, amax_min)
    reciprocal: bool = False  # s = a·(1/M), else s = a/M
    scale_min: float = 0.0  # s := max(s, scale_min)
    power_of_two: Literal["no", "bits", "log2"] = "no"  # s := 2^⌈log2 s⌉: exactly, or with log2 rounded to the working dtype
    value: Literal["x/s", "x*(1/s)", "x*(M/a)"] = "x/s"


RECIPES: dict[str, Recipe] = {
    "v3": Recipe(),  # DeepSeek-V3 inference/kernel.py since 2025-08-27
    "v3-unclamped": Recipe(amax_min=0.0),  # and before: a zero tile is 0/0
    "v3-ue8m0": Recipe(power_of_two="log2"),
    "v32": Recipe(reciprocal=True),  # V3.2 and V4 native
    "v32-ue8m0": Recipe(reciprocal=True, power_of_two="bits"),
    "deepgemm": Recipe(value="x*(1/s)"),
    "deepgemm-ue8m0": Recipe(power_of_two="bits", value="x*(1/s)"),
    "deepep": Recipe(reciprocal=True, value="x*(M/a)"),
    "deepep-ue8m0": Recipe(reciprocal=True, power_of_two="bits", value="x*(1/s)"),
    "tilekernels": Recipe(value="x*(M/a)"),
    "tilekernels-ue8m0": Recipe(power_of_two="bits", value="x*(1/s)"),
    "flashmla": Recipe(amax_min=0.0, scale_min=1e-4, power_of_two="log2"),  # the clamp is on the scale
}
RecipeName = Literal[
    "v3",
    "v3-unclamped",
    "v3-ue8m0",
    "v32",
    "v32-ue8m0",
    "deepgemm",
    "deepgemm-ue8m0",
    "deepep",
    "deepep-ue8m0",
    "tilekernels",
    "tilekernels-ue8m0",
    "flashmla",
]
FP8Name = Literal["e4m3fn", "e5m2"]


def _tiles(x: Array, tile: int) -> Array:
    """x[n,d] as [n, ⌈d/tile⌉, tile]; a ragged last tile is filled with zeros, which change no maximum."""
    xp = xp_of(x)
    n, d = x.shape
    count = -(-d // tile)
    padded = xp.concat([x, xp.zeros((n, count * tile - d), dtype=x.dtype, device=device(x))], axis=1)
    return xp.reshape(padded, (n, count, tile))


def _spread(scale: Array, tile: int, d: int) -> Array:
    """scale[n, ⌈d/tile⌉] to one number an element: [n,d]"""
    return xp_of(scale).repeat(scale, tile, axis=1)[:, :d]


def _amax_and_linear_scale(x: Array, recipe: Recipe, tile: int, top: float) -> tuple[Array, Array]:
    """a and s before any rounding to a power of two: [n, ⌈d/tile⌉] each"""
    xp = xp_of(x)
    if x.shape[1] == 0:
        return x, x  # no tiles: [n,0]
    tiles = _tiles(x, tile)
    a = xp.clip(xp.max(xp.abs(tiles), axis=2), _as(x, recipe.amax_min), None)
    s = a * (1 / _as(x, top)) if recipe.reciprocal else a / _as(x, top)
    return a, xp.clip(s, _as(x, recipe.scale_min), None)


def _as(x: Array, value: float) -> Array:
    """A constant in x's dtype: in production it is a float32 before it meets the data."""
    return xp_of(x).asarray(value, dtype=x.dtype, device=device(x))


def _round_scale_up(s: Array, how: str) -> Array:
    """2^⌈log2 s⌉. "bits" is exact. "log2" rounds log2(s) to s's dtype first, so an s just above a power of two may become that power."""
    xp = xp_of(s)
    if how == "bits":
        e = floor_log2(xp, s)
        p = power_of_two(xp, e, s.dtype, device(s))
        up = power_of_two(xp, e + 1, s.dtype, device(s))
        p = xp.where(s > p, up, p)
    else:
        safe = xp.where(s > 0, s, xp.ones_like(s))
        log2 = xp.astype(xp.log2(xp.astype(safe, xp.float64)), s.dtype)
        finite = xp.where(xp.isinf(log2), xp.zeros_like(log2), log2)
        p = power_of_two(xp, xp.astype(xp.ceil(finite), xp.int64), s.dtype, device(s))
    return xp.where((s > 0) & ~xp.isinf(s), p, s)


@signature("x[n,d] -> codes[n,d]:code scale[n,d/tile]:exact")
def quantize_tile_fwd(
    x: Array,
    *,
    recipe: RecipeName = "v3",
    tile: int = 128,
    axis: Literal[0, 1] = 1,
    format: FP8Name = "e4m3fn",
    scale: Array | None = None,
) -> tuple[tuple[Array, Array], tuple]:
    """codes[n,d] = encode(x[n,d] / scale[n,d//tile]),   scale[n,j] = recipe(max_{d in tile j} |x[n,d]|)

    scale multiplies on dequantising. axis=1 has tiles of 1×tile along d, scale[n,⌈d/tile⌉]; axis=0 (Wgrad's form) has tiles of tile×1
    along n, scale[⌈n/tile⌉,d]. The last tile may be ragged. Arithmetic is that of the recipe, operation by operation, in x's dtype
    (production has float32). Infinities follow IEEE arithmetic; NaN is refused. A given `scale` is used as it is.
    """
    xp = xp_of(x)
    if tile < 1:
        raise ValueError(f"fp8.quantize_tile: tile is {tile}; expected tile >= 1")
    if bool(xp.any(xp.isnan(x))):
        i, j = (int(v[0]) for v in xp.nonzero(xp.isnan(x)))
        raise ValueError(f"fp8.quantize_tile: x[{i}, {j}] is NaN; expected no NaN")
    if axis == 0:
        (codes, scale), saved = quantize_tile_fwd(
            xp.permute_dims(x, (1, 0)),
            recipe=recipe,
            tile=tile,
            format=format,
            scale=None if scale is None else xp.permute_dims(scale, (1, 0)),
        )
        return (xp.permute_dims(codes, (1, 0)), xp.permute_dims(scale, (1, 0))), saved
    rule, fmt = RECIPES[recipe], FORMATS[format]
    if scale is not None and tuple(scale.shape) != (x.shape[0], -(-x.shape[1] // tile)):
        raise ValueError(f"fp8.quantize_tile: scale has shape {tuple(scale.shape)}; expected one number a tile of {tile}")
    a, s = _amax_and_linear_scale(x, rule, tile, fmt.max)
    if scale is None:
        scale = s if rule.power_of_two == "no" else _round_scale_up(s, rule.power_of_two)
    assert scale is not None
    d = x.shape[1]
    if rule.value == "x/s":
        value = x / _spread(scale, tile, d)
    elif rule.value == "x*(1/s)":
        value = x * _spread(1 / scale, tile, d)
    else:
        value = x * _spread(_as(x, fmt.max) / a, tile, d)
    return (encode(fmt, value, overflow="saturate"), scale), ()


def scale_regret(x: Array, *, scale: Array, recipe: RecipeName = "v3", tile: int = 128, axis: int = 1, format: FP8Name = "e4m3fn") -> Array:
    """How far log2 of the linear scale would have to move for `scale` to be its power of two; inf where the recipe leaves no room.

    Only a recipe that goes through a rounded log2 leaves any: implementations of log2 differ in the last place.
    """
    xp = xp_of(x)
    rule, top = RECIPES[recipe], FORMATS[format].max
    if axis == 0:
        x, scale = xp.permute_dims(x, (1, 0)), xp.permute_dims(scale, (1, 0))
    _, s = _amax_and_linear_scale(x, rule, tile, top)
    never = xp.full_like(s, float("inf"))
    if rule.power_of_two == "log2":
        power = power_of_two(xp, floor_log2(xp, scale), scale.dtype, device(scale)) == scale
        usable = power & (s > 0) & ~xp.isinf(s)
        e, t = xp.log2(xp.where(usable, scale, xp.ones_like(s))), xp.log2(xp.where(usable, s, xp.ones_like(s)))
        gap = xp.clip(xp.where(t > e, t - e, e - 1 - t), 0.0, None)
        regret = xp.where(usable, gap, never)
    else:
        regret = never
    return xp.permute_dims(regret, (1, 0)) if axis == 0 else regret


@signature("codes[n,d]:code scale[p,q]:const -> x[n,d]:exact")
def dequantize_tile_fwd(
    codes: Array, scale: Array, *, tile: int = 128, axis: Literal[0, 1] = 1, format: FP8Name = "e4m3fn"
) -> tuple[Array, tuple]:
    """x[n,d] = decode(codes[n,d]) scale[n,d//tile], rounded once to scale's dtype

    scale[p,q] is [n,⌈d/tile⌉] for axis=1 and [⌈n/tile⌉,d] for axis=0, where it is scale[n//tile,d] that multiplies.
    """
    xp = xp_of(codes)
    n, d = codes.shape
    if tile < 1:
        raise ValueError(f"fp8.dequantize_tile: tile is {tile}; expected tile >= 1")
    expected = (n, -(-d // tile)) if axis == 1 else (-(-n // tile), d)
    if codes.dtype != xp.uint8:
        raise ValueError(f"fp8.dequantize_tile: codes are {codes.dtype}; expected uint8")
    if tuple(scale.shape) != expected:
        raise ValueError(
            f"fp8.dequantize_tile: scale has shape {tuple(scale.shape)}; expected {expected} for tiles of {tile} on axis {axis}"
        )
    values = xp.astype(decode(FORMATS[format], codes), scale.dtype)
    if axis == 0:
        return values * xp.repeat(scale, tile, axis=0)[:n, :], ()
    return values * _spread(scale, tile, d), ()


def _cases() -> tuple[Case, ...]:
    draws = {
        "normal": ((3, 300), ("normal", 1.0), "a ragged last tile"),
        "spread": ((5, 129), ("rows_wide", -20, 12), "rows of very different size, zero tiles, tiles below the clamp"),
        "midpoints": (
            (12, 256),
            ("tile_midpoints", 128),
            "values next to the midpoints of codes times the scale: one ulp in x/s flips a code",
        ),
        "edges": ((24, 128), ("tile_edges", 128), "amax within a few ulp of a power of two times 448"),
    }
    cases = []
    for recipe, (name, ((n, d), draw, note)) in itertools.product(RECIPES, draws.items()):
        cases.append(Case(f"{name}.{recipe}", {"n": n, "d": d}, {"x": draw}, {"recipe": recipe}, note))
    wgrad = Case("wgrad", {"n": 130, "d": 3}, {"x": ("normal", 1.0)}, {"axis": 0}, "128×1 tiles for Wgrad")
    ties = Case("ties", {"n": 4, "d": 256}, {"x": ("tile_ties", 128)}, {}, "scales that are powers of two and values on midpoints of codes")
    e5m2 = Case("e5m2", {"n": 3, "d": 200}, {"x": ("normal", 1.0)}, {"format": "e5m2"})
    narrow = Case("tile-64", {"n": 3, "d": 200}, {"x": ("normal", 1.0)}, {"tile": 64, "recipe": "v32-ue8m0"}, "V4's cache has blocks of 64")
    real = Case("model", {"n": 64, "d": 7168}, {"x": ("outliers", 1.0, 60.0)}, {"recipe": "v32-ue8m0"}, "V3's width, real outliers")
    return (*cases, wgrad, ties, e5m2, narrow, real)


quantize_tile = declare(
    Op(
        "fp8.quantize_tile",
        quantize_tile_fwd,
        None,
        _cases(),
        "4*n*d",
        "spec §4.2; DeepSeek-V3 paper §3.3.2; DeepSeek-V3 inference/kernel.py, act_quant",
        vary="nd",
        choice=("scale", scale_regret),
    )
)

dequantize_tile = declare(
    Op(
        "fp8.dequantize_tile",
        dequantize_tile_fwd,
        None,
        (
            Case("ragged", {"n": 3, "d": 300, "p": 3, "q": 3}, {"codes": ("codes",), "scale": ("wide", -20, 4)}),
            Case("wgrad", {"n": 130, "d": 3, "p": 2, "q": 3}, {"codes": ("codes",), "scale": ("wide", -20, 4)}, {"axis": 0}),
            Case("e5m2", {"n": 3, "d": 256, "p": 3, "q": 2}, {"codes": ("codes",), "scale": ("wide", -20, 4)}, {"format": "e5m2"}),
            Case("model", {"n": 16, "d": 7168, "p": 16, "q": 56}, {"codes": ("codes",), "scale": ("wide", -20, 4)}),
        ),
        "n*d",
        "spec §4.2; DeepSeek-V3 README_WEIGHTS (the name says inv, it multiplies)",
        vary="",
    )
)
