"""A linear layer in FP8, forward and backward, of the oracles' own quantisers and products; shares nothing with `ref`.

Equation: y = x8 weight8^T; dx = dy8 weight8; dweight = dy8'^T x8', each quantised along what its product sums over: x8 and dy8 in tiles
of 1x128, weight8 in blocks of 128x128, dy8' and x8' in tiles of 128x1. All quantisation is float32's.
x8' comes from x8, or, with the cache in E5M6, from that, and then all scales on the way are powers of two.
"""

from fractions import Fraction
from typing import Any

import numpy as np

from . import quantize
from .edges import carrier, choose, fill, refuse
from .floats import BINARY32, round_fraction
from .fp8_gemm import gemm, hardware

Arrays = dict[str, np.ndarray]
POWERS_OF_TWO = "tilekernels-ue8m0"  # whose E5M6 cast has them; other recipes of the kind differ by a unit in amax / 65024, if at all
Quantized = tuple[np.ndarray, np.ndarray]  # codes, scale


def _float32(array: np.ndarray) -> np.ndarray:
    """Rounded to float32, whatever the carrier; zeros keep their sign, infinities and NaN stay."""
    carrier(array)
    values = [v if v == 0 or v - v != 0 else round_fraction(Fraction(v), BINARY32) for v in array.ravel().tolist()]
    return np.array(values, np.float32).reshape(array.shape)


def _product(a: Quantized, b: Quantized, at: dict[str, Any]) -> np.ndarray:
    """sum over the columns of both: float64 [a's rows, b's rows]."""
    inputs = {"a_codes": a[0], "a_scale": a[1], "b_codes": b[0], "b_scale": b[1]}
    return gemm(inputs, {"accumulator": at["accumulator"], "promote": at["promote"]})["y"]


def _tiles(x: np.ndarray, recipe: str, axis: int, form: str = "e4m3fn") -> Quantized:
    out = quantize.quantize_tile({"x": x}, {"recipe": recipe, "axis": axis, "format": form})
    return out["codes"], out["scale"]


def _blocks(w: np.ndarray, recipe: str) -> Quantized:
    out = quantize.quantize_block({"w": w}, {"recipe": recipe})
    return out["codes"], out["scale"]


def _transposed(q: Quantized) -> Quantized:
    return q[0].T, q[1].T


def _again(x: np.ndarray, at: dict[str, Any]) -> Quantized:
    """x8': through its cache's codes, in tiles of 1x128, into tiles of 128x1."""
    recipe = POWERS_OF_TWO if at["cache"] == "e5m6" else at["recipe"]
    codes, scale = _tiles(x, recipe, 1, at["cache"])
    kept = quantize.dequantize_tile({"codes": codes, "scale": scale}, {"format": at["cache"]})["x"]
    return _tiles(kept, recipe, 0)


def _filled(inputs: Arrays, attrs: dict[str, Any]) -> dict[str, Any]:
    at = fill(
        {"recipe": "v3", "weight_recipe": "v3", "accumulator": "wgmma13", "promote": 128, "scale_order": "one by one", "cache": "e4m3fn"},
        attrs,
    )
    for name in ("recipe", "weight_recipe"):
        choose(name, at[name], quantize.RECIPES)
    choose("cache", at["cache"], ("e4m3fn", "e5m6"))
    choose("scale_order", at["scale_order"], ("one by one", "product first"))  # exact products have no order
    hardware(at["accumulator"])
    if at["promote"] < 0 or (at["promote"] and 128 % at["promote"]):
        raise ValueError(f"promote must be 0 or divide 128, got {at['promote']}")
    x, weight = inputs["x"], inputs["weight"]
    if x.shape[1] != weight.shape[1]:
        raise ValueError(f"x has {x.shape[1]} columns, weight {weight.shape[1]}")
    if "dy" in inputs and inputs["dy"].shape != (len(x), len(weight)):
        raise ValueError(f"dy has shape {inputs['dy'].shape}, expected {(len(x), len(weight))}")
    for name, array in inputs.items():
        refuse(array, name, infinite=True)
    return at


def forward(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """fp8.linear: x, weight -> y."""
    at = _filled(inputs, attrs)
    x, weight = _float32(inputs["x"]), _float32(inputs["weight"])
    return {"y": _product(_tiles(x, at["recipe"], 1), _blocks(weight, at["weight_recipe"]), at)}


def backward(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """fp8.linear backward: x, weight, dy -> dx, dweight."""
    at = _filled(inputs, attrs)
    x, weight, dy = (_float32(inputs[name]) for name in ("x", "weight", "dy"))
    dx = _product(_tiles(dy, at["recipe"], 1), _transposed(_blocks(weight, at["weight_recipe"])), at)
    dweight = _product(_transposed(_tiles(dy, at["recipe"], 0)), _transposed(_again(x, at)), at)
    return {"dx": dx, "dweight": dweight}
