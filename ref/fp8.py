"""Fine-grained FP8: 1×128 (or 128×1) tiles with a scale each, in the recipes that are in production. Spec §4.2."""

import itertools
from typing import Literal

from array_api_compat import device

from .cast import decode
from .formats import FORMATS
from .fp8_recipes import RECIPES, FP8Name, RecipeName, check_codes, check_quantised, codes_of, regret_of_power, scale_of
from .op import Case, Op, declare, signature
from .xp import Array, xp_of


def tile_amax(x: Array, tile: int) -> Array:
    """max |x| of each tile of 1×tile: [n, ⌈d/tile⌉]. A ragged last tile is filled with zeros, which change no maximum."""
    xp = xp_of(x)
    n, d = x.shape
    if d == 0:
        return x
    count = -(-d // tile)
    padded = xp.concat([x, xp.zeros((n, count * tile - d), dtype=x.dtype, device=device(x))], axis=1)
    return xp.max(xp.abs(xp.reshape(padded, (n, count, tile))), axis=2)


def spread(scale: Array, tile: int, d: int) -> Array:
    """scale[n, ⌈d/tile⌉] to one number an element: [n,d]"""
    return xp_of(scale).repeat(scale, tile, axis=1)[:, :d]


def turned(x: Array | None) -> Array | None:
    return None if x is None else xp_of(x).permute_dims(x, (1, 0))


@signature("x[n,d] -> codes[n,d]:code scale[n,d/tile]:exact")
def quantize_tile_fwd(
    x: Array,
    *,
    recipe: RecipeName = "v3",
    tile: int = 128,
    axis: Literal[0, 1] = 1,
    format: FP8Name = "e4m3fn",
    rounding: Literal["half-even", "half-zero"] = "half-even",
    scale: Array | None = None,
) -> tuple[tuple[Array, Array], tuple]:
    """codes[n,d] = encode(x[n,d] / scale[n,d//tile]),   scale[n,j] = recipe(max_{d in tile j} |x[n,d]|)

    scale multiplies on dequantising. axis=1 has tiles of 1×tile along d, scale[n,⌈d/tile⌉]; axis=0 (Wgrad's form) has tiles of tile×1
    along n, scale[⌈n/tile⌉,d]. The last tile may be ragged. Arithmetic is that of the recipe, operation by operation, in x's dtype
    (production has float32). rounding="half-zero" is DeepGEMM's FP4. Infinities follow IEEE arithmetic; NaN is refused. A given `scale`
    is used as it is. Codes are uint8, uint16 for e5m6.
    """
    xp = xp_of(x)
    check_quantised("fp8.quantize_tile", x, "x", tile)
    if axis == 0:
        (codes, scale), saved = quantize_tile_fwd(
            turned(x), recipe=recipe, tile=tile, format=format, rounding=rounding, scale=turned(scale)
        )
        return (xp.permute_dims(codes, (1, 0)), xp.permute_dims(scale, (1, 0))), saved
    rule, fmt, d = RECIPES[recipe], FORMATS[format], x.shape[1]
    if scale is not None and tuple(scale.shape) != (x.shape[0], -(-d // tile)):
        raise ValueError(f"fp8.quantize_tile: scale has shape {tuple(scale.shape)}; expected one number a tile of {tile}")
    amax = tile_amax(x, tile)
    if scale is None:
        scale = scale_of(amax, rule, fmt.max)
    assert scale is not None
    return (codes_of(x, spread(amax, tile, d), spread(scale, tile, d), rule, fmt, rounding), scale), ()


def scale_regret(
    x: Array,
    *,
    scale: Array,
    recipe: RecipeName = "v3",
    tile: int = 128,
    axis: Literal[0, 1] = 1,
    format: FP8Name = "e4m3fn",
    rounding: str = "half-even",
) -> Array:
    """How far a given scale is from the recipe's: see regret_of_power."""
    if axis == 1:
        return regret_of_power(tile_amax(x, tile), scale, recipe, format)
    xp = xp_of(x)
    amax = tile_amax(xp.permute_dims(x, (1, 0)), tile)
    return xp.permute_dims(regret_of_power(amax, xp.permute_dims(scale, (1, 0)), recipe, format), (1, 0))


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
    check_codes("fp8.dequantize_tile", "codes", codes, format)
    if tuple(scale.shape) != expected:
        raise ValueError(
            f"fp8.dequantize_tile: scale has shape {tuple(scale.shape)}; expected {expected} for tiles of {tile} on axis {axis}"
        )
    values = xp.astype(decode(FORMATS[format], codes), scale.dtype)
    if axis == 0:
        return values * xp.repeat(scale, tile, axis=0)[:n, :], ()
    return values * spread(scale, tile, d), ()


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
    for recipe, (name, ((n, d), draw, note)) in itertools.product([r for r in RECIPES if r != "mxfp4"], draws.items()):
        cases.append(Case(f"{name}.{recipe}", {"n": n, "d": d}, {"x": draw}, {"recipe": recipe}, note))
    wgrad = Case("wgrad", {"n": 130, "d": 3}, {"x": ("normal", 1.0)}, {"axis": 0}, "128×1 tiles for Wgrad")
    ties = Case("ties", {"n": 4, "d": 256}, {"x": ("tile_ties", 128)}, {}, "scales that are powers of two and values on midpoints of codes")
    e5m2 = Case("e5m2", {"n": 3, "d": 200}, {"x": ("normal", 1.0)}, {"format": "e5m2"})
    narrow = Case("tile-64", {"n": 3, "d": 200}, {"x": ("normal", 1.0)}, {"tile": 64, "recipe": "v32-ue8m0"}, "V4's cache has blocks of 64")
    fnuz = Case("e4m3fnuz", {"n": 3, "d": 200}, {"x": ("normal", 1.0)}, {"format": "e4m3fnuz"}, "MI300's format, maximum 240")
    cache = Case("e5m6", {"n": 5, "d": 300}, {"x": ("rows_wide", -20, 12)}, {"format": "e5m6", "recipe": "tilekernels-ue8m0"})
    wide = Case("e5m6-wide", {"n": 4, "d": 256}, {"x": ("wide", -40, 20)}, {"format": "e5m6", "recipe": "tilekernels-ue8m0"}, "subnormals")
    fp4 = {"format": "e2m1", "recipe": "mxfp4", "tile": 32}
    expert = Case("mxfp4", {"n": 6, "d": 200}, {"x": ("rows_wide", -20, 12)}, fp4, "V4's experts, 1×32")
    ties4 = Case("mxfp4-ties", {"n": 8, "d": 96}, {"x": ("steps", 24, 0.25)}, fp4, "multiples of 1/4: many on midpoints")
    down4 = Case("mxfp4-half-zero", {"n": 8, "d": 96}, {"x": ("steps", 24, 0.25)}, {**fp4, "rounding": "half-zero"}, "DeepGEMM's ties")
    real = Case("model", {"n": 64, "d": 7168}, {"x": ("outliers", 1.0, 60.0)}, {"recipe": "v32-ue8m0"}, "V3's width, real outliers")
    return (*cases, wgrad, ties, e5m2, narrow, fnuz, cache, wide, expert, ties4, down4, real)


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
