"""The linear layer in FP8, forward and backward: quantised by tiles and blocks, three products as a tensor core adds."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...ref.fp8_linear import check_finite, check_linear
from ...ref.fp8_recipes import CACHE_RECIPE
from ._declared import declared
from .fp8 import dequantize_tile, quantize_tile
from .fp8_block import quantize_block
from .fp8_gemm import fp8_gemm

Array = NDArray[Any]


def _checked(direction: str, arrays: dict[str, Any], attrs: dict[str, Any]) -> tuple[Any, ...]:
    """The arrays and all attributes."""
    views, attrs, _ = declared("fp8.linear", direction, arrays, attrs)
    check_linear(views["x"], views["weight"], attrs["accumulator"], attrs["promote"])
    return *views.values(), attrs


def _exactly(x: Array) -> Array:
    """x as float32: a scale in float64 would be another scale"""
    return x.astype(np.float32, copy=False)


def _product(a: tuple[Array, Array], b: tuple[Array, Array], dtype: Any, attrs: dict[str, Any]) -> Array:
    """fp8.gemm of (codes, scale) pairs, in the working dtype"""
    scales = (s.astype(dtype, copy=False) for s in (a[1], b[1]))
    how = {name: attrs[name] for name in ("accumulator", "promote", "scale_order")}
    return fp8_gemm(a[0], next(scales), b[0], next(scales), **how)


def _turned(quantised: tuple[Array, Array]) -> tuple[Array, Array]:
    return quantised[0].T, quantised[1].T


def fp8_linear(x: Array, weight: Array, **attrs: Any) -> Array:
    """y[n,o] = sum_d x8[n,d] weight8[o,d]: x8 in tiles of 1×128, weight8 in blocks of 128×128, E4M3, products as fp8.gemm has them.

    x[n,d] and weight[o,d] are float32 or float64 alike, and so is y; they are quantised as float32. Attributes are those of the
    reference's fp8.linear: recipe, weight_recipe, accumulator, promote, scale_order, and cache, which changes nothing here.
    ValueError: dtypes or shapes do not fit, a number is not finite, the weight has an empty side, an attribute has no such value.
    """
    x, weight, attrs = _checked("forward", {"x": x, "weight": weight}, attrs)
    x8, weight8 = quantize_tile(_exactly(x), recipe=attrs["recipe"]), quantize_block(_exactly(weight), recipe=attrs["weight_recipe"])
    return _product(x8, weight8, x.dtype, attrs)


def fp8_linear_bwd(x: Array, weight: Array, dy: Array, **attrs: Any) -> tuple[Array, Array]:
    """dx[n,d] = sum_o dy8[n,o] weight8[o,d],   dweight[o,d] = sum_n dy8'[n,o] x8'[n,d]

    dy8 is dy in tiles of 1×128 along o, dy8' in tiles of 128×1 along n; x8' is what the forward keeps of x (cache: its E4M3 codes, or x in
    E5M6 with power-of-two scales), dequantised and quantised again along n. Arguments and errors as fp8_linear.
    """
    x, weight, dy, attrs = _checked("backward", {"x": x, "weight": weight, "dy": dy}, attrs)
    check_finite("dy", dy)
    dy32, recipe = _exactly(dy), attrs["recipe"]
    weight8 = quantize_block(_exactly(weight), recipe=attrs["weight_recipe"])
    dx = _product(quantize_tile(dy32, recipe=recipe), _turned(weight8), dy.dtype, attrs)
    if dy.shape[0] == 0:
        return dx, np.zeros_like(weight)
    again = CACHE_RECIPE if attrs["cache"] == "e5m6" else recipe
    kept = quantize_tile(_exactly(x), recipe=again, format=attrs["cache"])
    x8 = quantize_tile(dequantize_tile(*kept, format=attrs["cache"]), recipe=again, axis=0)
    dweight = _product(_turned(quantize_tile(dy32, recipe=recipe, axis=0)), _turned(x8), dy.dtype, attrs)
    return dx, dweight
