"""Tile-wise quantisation to FP8, FP4 and E5M6 with the scale recipes that production code uses, and its inverse."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._common import integer, need
from ._quantize import dequantize, quantize
from .fp8_block import dequantize_block, quantize_block

__all__ = ["dequantize_block", "dequantize_tile", "quantize_block", "quantize_tile"]


def _tile(op: str, tile: Any, axis: Any) -> tuple[int, int]:
    """Rows and columns of a tile."""
    tile = integer(op, "tile", tile)
    need(not isinstance(axis, (bool, np.bool_)) and axis in (0, 1), op, "axis", repr(axis), "0 or 1")
    return (1, tile) if axis == 1 else (tile, 1)


def quantize_tile(
    x: NDArray[Any],
    *,
    recipe: str = "v3",
    tile: int = 128,
    axis: int = 1,
    format: str = "e4m3fn",
    rounding: str = "half-even",
    out: tuple[NDArray[Any], NDArray[Any]] | None = None,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """codes[n,d], scale with x[n,d] ~ decode(codes[n,d]) * scale[n, d // tile] (axis=1: tiles of 1 x tile)
    or * scale[n // tile, d] (axis=0: tiles of tile x 1). The last tile may be ragged.

    From a = max |x| over the tile, `recipe` (see _recipes.py) makes the scale and the value; codes are the value, saturated, in `format`:
    e4m3fn, e5m2, e4m3fnuz, e5m2fnuz and e2m1 (uint8), e5m6 (uint16). rounding="half-zero" sends ties toward zero. All arithmetic in
    x's dtype, float32 or float64, which is also the scale's. Infinities are allowed and follow IEEE arithmetic. `out` = (codes, scale)
    receives the result.

    ValueError: x is not two-dimensional float32 or float64, x holds a NaN (the first is named), an attribute has no such value.
    """
    return quantize("quantize_tile", "x", x, recipe, *_tile("quantize_tile", tile, axis), format, rounding, out)


def dequantize_tile(
    codes: NDArray[Any],
    scale: NDArray[Any],
    *,
    tile: int = 128,
    axis: int = 1,
    format: str = "e4m3fn",
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """x[n,d] = decode(codes[n,d]) * scale, one rounding in scale's dtype: scale[n, d // tile] (axis=1) or scale[n // tile, d] (axis=0).

    `out` receives the result. ValueError: codes are not two-dimensional of the format's dtype, scale is not float32 or float64 of the
    shape that quantize_tile gives, an attribute has no such value.
    """
    return dequantize("dequantize_tile", codes, scale, *_tile("dequantize_tile", tile, axis), format, out)
