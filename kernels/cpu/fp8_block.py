"""Block-wise quantisation of weights to FP8, a scale for each block x block, and its inverse."""

from typing import Any

from numpy.typing import NDArray

from ._common import integer
from ._quantize import dequantize, quantize


def quantize_block(
    w: NDArray[Any],
    *,
    recipe: str = "v3",
    block: int = 128,
    format: str = "e4m3fn",
    rounding: str = "half-even",
    out: tuple[NDArray[Any], NDArray[Any]] | None = None,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """codes[o,d], scale with w[o,d] ~ decode(codes[o,d]) * scale[o // block, d // block]. Blocks at the edges may be ragged.

    Recipes, formats, rounding, `out`, arithmetic and errors as quantize_tile.
    """
    block = integer("quantize_block", "block", block)
    return quantize("quantize_block", "w", w, recipe, block, block, format, rounding, out)


def dequantize_block(
    codes: NDArray[Any], scale: NDArray[Any], *, block: int = 128, format: str = "e4m3fn", out: NDArray[Any] | None = None
) -> NDArray[Any]:
    """w[o,d] = decode(codes[o,d]) * scale[o // block, d // block], one rounding in scale's dtype.

    `out` receives the result. ValueError: codes are not two-dimensional of the format's dtype, scale is not float32 or float64 of shape
    [ceil(o / block), ceil(d / block)], an attribute has no such value.
    """
    block = integer("dequantize_block", "block", block)
    return dequantize("dequantize_block", codes, scale, block, block, format, out)
