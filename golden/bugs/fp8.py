"""Bugs of fine-grained quantisation. That a subject follows another recipe is a convention, and is found by the attribute `recipe`."""

from typing import Any

from ...ref.cast import encode
from ...ref.formats import FORMATS
from ...ref.fp8 import RECIPES, _amax_and_linear_scale, _round_scale_up, _spread, dequantize_tile_fwd, quantize_tile_fwd
from ...ref.xp import Array, xp_of
from . import Bug


def _with_scale(change: Any) -> Any:
    """quantize_tile with the scale changed before it is used."""

    def fwd(x: Array, **attrs: Any) -> tuple[tuple[Array, Array], tuple]:
        (_, scale), _ = quantize_tile_fwd(x, **attrs)
        return quantize_tile_fwd(x, **{**attrs, "scale": change(scale, attrs)})

    return fwd


def _max_240(x: Array, **attrs: Any) -> tuple[tuple[Array, Array], tuple]:
    """s from a/240, operation by operation as the recipe has it."""
    o = {"recipe": "v3", "tile": 128, "axis": 1, **attrs}
    xp, rule = xp_of(x), RECIPES[o["recipe"]]
    rows = x if o["axis"] == 1 else xp.permute_dims(x, (1, 0))
    _, s = _amax_and_linear_scale(rows, rule, o["tile"], 240.0)
    s = s if rule.power_of_two == "no" else _round_scale_up(s, rule.power_of_two)
    return quantize_tile_fwd(x, **{**attrs, "scale": s if o["axis"] == 1 else xp.permute_dims(s, (1, 0))})


def _exponent_floor(scale: Array, attrs: dict) -> Array:
    return _round_scale_up(scale, "bits") / 2


def _whole_row(x: Array, **attrs: Any) -> tuple[tuple[Array, Array], tuple]:
    """One scale a row, repeated for every tile."""
    (_, scale), _ = quantize_tile_fwd(x, **attrs)
    axis = 1 if attrs.get("axis", 1) == 1 else 0
    xp = xp_of(x)
    top = xp.broadcast_to(xp.max(scale, axis=axis, keepdims=True), scale.shape)
    return quantize_tile_fwd(x, **{**attrs, "scale": top})


def _returns_inverse(x: Array, **attrs: Any) -> tuple[tuple[Array, Array], tuple]:
    (codes, scale), saved = quantize_tile_fwd(x, **attrs)
    return (codes, 1 / scale), saved


def _multiplied(x: Array, **attrs: Any) -> tuple[tuple[Array, Array], tuple]:
    """x·(1/s) where the recipe divides."""
    attrs = {"recipe": "v3", "tile": 128, "axis": 1, "format": "e4m3fn", **attrs}
    (codes, scale), saved = quantize_tile_fwd(x, **attrs)
    if attrs["axis"] == 1 and RECIPES[attrs["recipe"]].value == "x/s":
        codes = encode(FORMATS[attrs["format"]], x * _spread(1 / scale, attrs["tile"], x.shape[1]), overflow="saturate")
    return (codes, scale), saved


def _divided(codes: Array, scale: Array, **attrs: Any) -> tuple[Array, tuple]:
    return dequantize_tile_fwd(codes, 1 / scale, **attrs)


def _dropped(codes: Array, scale: Array, **attrs: Any) -> tuple[Array, tuple]:
    return dequantize_tile_fwd(codes, xp_of(scale).ones_like(scale), **attrs)


QUANTIZE, DEQUANTIZE = ("fp8.quantize_tile",), ("fp8.dequantize_tile",)
BUGS = [
    Bug("fp8-max-wrong", QUANTIZE, "The scale is amax/240 instead of amax/448.", fwd=_max_240),
    Bug(
        "fp8-scale-exponent-floor", QUANTIZE, "The power-of-two scale is rounded down, so codes saturate.", fwd=_with_scale(_exponent_floor)
    ),
    Bug("fp8-scale-per-row", QUANTIZE, "One scale for the whole row instead of one a tile.", fwd=_whole_row),
    Bug("scale-inverted", QUANTIZE, "1/scale is stored where the scale that multiplies is expected.", fwd=_returns_inverse),
    Bug(
        "scale-reciprocal-multiply",
        QUANTIZE,
        "x·(1/s) instead of x/s: one unit in the last place flips codes near midpoints.",
        fwd=_multiplied,
    ),
    Bug("scale-inverted", DEQUANTIZE, "Divides by the scale; despite the name weight_scale_inv it multiplies.", fwd=_divided),
    Bug("scale-dropped", DEQUANTIZE, "The scale is not applied: a bare cast.", fwd=_dropped),
]
