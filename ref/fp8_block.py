"""Weights in FP8: blocks of 128×128 (or 32×32) with a scale each, as checkpoints store them. Spec §4.2, §9."""

import itertools
from typing import Literal

from array_api_compat import device

from .cast import decode
from .formats import FORMATS
from .fp8 import spread, tile_amax
from .fp8_recipes import RECIPES, FP8Name, RecipeName, check_codes, check_quantised, codes_of, regret_of_power, scale_of
from .op import Case, Op, declare, signature
from .xp import Array, xp_of


def block_amax(w: Array, block: int) -> Array:
    """max |w| of each block; edge blocks are smaller: [⌈o/block⌉,⌈d/block⌉]"""
    xp = xp_of(w)
    if w.shape[0] == 0 or w.shape[1] == 0:
        return xp.zeros((-(-w.shape[0] // block), -(-w.shape[1] // block)), dtype=w.dtype, device=device(w))
    down = tile_amax(xp.permute_dims(tile_amax(w, block), (1, 0)), block)  # [⌈d/block⌉,⌈o/block⌉]
    return xp.permute_dims(down, (1, 0))


def spread_block(scale: Array, block: int, o: int, d: int) -> Array:
    """scale[⌈o/block⌉,⌈d/block⌉] to one number an element: [o,d]"""
    return xp_of(scale).repeat(spread(scale, block, d), block, axis=0)[:o, :]


@signature("w[o,d] -> codes[o,d]:code scale[o/block,d/block]:exact")
def quantize_block_fwd(
    w: Array,
    *,
    recipe: RecipeName = "v3",
    block: int = 128,
    format: FP8Name = "e4m3fn",
    rounding: Literal["half-even", "half-zero"] = "half-even",
    scale: Array | None = None,
) -> tuple[tuple[Array, Array], tuple]:
    """codes[o,d] = encode(w[o,d] / scale[o//block,d//block]),   scale[i,j] = recipe(max over block (i,j) of |w|)

    scale multiplies on dequantising (a checkpoint calls it weight_scale_inv). Edge blocks hold what is left of the matrix: 576 rows have
    5 rows of blocks. Arithmetic as in fp8.quantize_tile; NaN is refused. A given `scale` is used as it is.
    """
    check_quantised("fp8.quantize_block", w, "w", block, "block")
    rule, fmt, (o, d) = RECIPES[recipe], FORMATS[format], w.shape
    if scale is not None and tuple(scale.shape) != (-(-o // block), -(-d // block)):
        raise ValueError(f"fp8.quantize_block: scale has shape {tuple(scale.shape)}; expected {(-(-o // block), -(-d // block))}")
    amax = block_amax(w, block)
    if scale is None:
        scale = scale_of(amax, rule, fmt.max)
    assert scale is not None
    codes = codes_of(w, spread_block(amax, block, o, d), spread_block(scale, block, o, d), rule, fmt, rounding)
    return (codes, scale), ()


def block_scale_regret(
    w: Array, *, scale: Array, recipe: RecipeName = "v3", block: int = 128, format: FP8Name = "e4m3fn", rounding: str = "half-even"
) -> Array:
    """How far a given scale is from the recipe's: see regret_of_power."""
    return regret_of_power(block_amax(w, block), scale, recipe, format)


@signature("codes[o,d]:code scale[p,q]:const -> w[o,d]:exact")
def dequantize_block_fwd(codes: Array, scale: Array, *, block: int = 128, format: FP8Name = "e4m3fn") -> tuple[Array, tuple]:
    """w[o,d] = decode(codes[o,d]) scale[o//block,d//block], rounded once to scale's dtype

    scale[p,q] is [⌈o/block⌉,⌈d/block⌉].
    """
    xp, (o, d) = xp_of(codes), codes.shape
    if block < 1:
        raise ValueError(f"fp8.dequantize_block: block is {block}; expected block >= 1")
    check_codes("fp8.dequantize_block", "codes", codes, format)
    expected = (-(-o // block), -(-d // block))
    if tuple(scale.shape) != expected:
        raise ValueError(f"fp8.dequantize_block: scale has shape {tuple(scale.shape)}; expected {expected} for blocks of {block}")
    return xp.astype(decode(FORMATS[format], codes), scale.dtype) * spread_block(scale, block, o, d), ()


def _cases() -> tuple[Case, ...]:
    draws = {
        "ragged": ((70, 75), ("rows_wide", -12, 12), "blocks at both edges, rows of very different size"),
        "edges": ((40, 32), ("tile_edges", 32), "amax within a few ulp of a power of two times 448"),
    }
    cases = [
        Case(f"{name}.{recipe}", {"o": o, "d": d}, {"w": draw}, {"recipe": recipe, "block": 32}, note)
        for recipe, (name, ((o, d), draw, note)) in itertools.product([r for r in RECIPES if r != "mxfp4"], draws.items())
    ]
    zero = Case("zero-block", {"o": 130, "d": 140}, {"w": ("const", 0.0)}, {}, "0/0 without the clamp")
    kv_a = Case("kv_a", {"o": 576, "d": 512}, {"w": ("outliers", 0.02, 20.0)}, {"recipe": "v32-ue8m0"}, "4.5 blocks, as V3's kv_a_proj")
    wide = Case("fnuz", {"o": 70, "d": 40}, {"w": ("normal", 1.0)}, {"format": "e4m3fnuz", "block": 32})
    middle = Case(
        "midpoints",
        {"o": 33, "d": 256},
        {"w": ("tile_midpoints", 32)},
        {"block": 32},
        "values next to the midpoints of codes times the scale: one ulp in w/s flips a code",
    )
    return (*cases, zero, kv_a, wide, middle)


quantize_block = declare(
    Op(
        "fp8.quantize_block",
        quantize_block_fwd,
        None,
        _cases(),
        "4*o*d",
        "spec §4.2; DeepSeek-V3 paper §3.3.2",
        vary="od",
        choice=("scale", block_scale_regret),
    )
)

dequantize_block = declare(
    Op(
        "fp8.dequantize_block",
        dequantize_block_fwd,
        None,
        (
            Case("ragged", {"o": 70, "d": 300, "p": 3, "q": 10}, {"codes": ("codes",), "scale": ("wide", -20, 4)}, {"block": 32}),
            Case(
                "square",
                {"o": 256, "d": 256, "p": 2, "q": 2},
                {"codes": ("codes",), "scale": ("wide", -20, 4)},
                {},
                "a grid no shape tells",
            ),
            Case("e5m2", {"o": 9, "d": 256, "p": 1, "q": 2}, {"codes": ("codes",), "scale": ("wide", -20, 4)}, {"format": "e5m2"}),
            Case(
                "kv_a",
                {"o": 576, "d": 256, "p": 5, "q": 2},
                {"codes": ("codes",), "scale": ("wide", -20, 4)},
                {},
                "V3's kv_a_proj: 4.5 blocks",
            ),
        ),
        "o*d",
        "spec §4.2, §9; DeepSeek-V3 README_WEIGHTS (the name says inv, it multiplies)",
        vary="",
    )
)
