"""Launchers of rmsnorm.cu: RMSNorm forward and backward, and RMSNorm with FP8 quantisation in one pass."""

from typing import Any

import numpy as np

from ....ref.fp8_recipes import RECIPES
from .launch import Launch, aligned, checked, fits, need, runner, taken
from .quantize import INPUTS, recipe_arguments

THREADS, WIDEST = 256, 8192  # what a block holds in registers, three rows of it in the backward
ORDERS = ("weight_then_cast", "cast_then_weight")


def _rows(
    kernel: str, x: Any, weight: Any, eps: float, cast_order: str
) -> tuple[Any, Any, tuple[tuple[str, str | int], ...], tuple[Any, ...]]:
    need(eps >= 0, kernel, "eps", eps, "eps >= 0")
    need(cast_order in ORDERS, kernel, "cast_order", repr(cast_order), " or ".join(ORDERS))
    x = taken(kernel, "x", x, tuple(INPUTS), 2)
    weight = taken(kernel, "weight", weight, (x.dtype,), 1)
    d, v = x.shape[1], 16 // x.dtype.itemsize
    need(weight.shape == (d,), kernel, "weight", f"of shape {weight.shape}", f"({d},), the width of x")
    fits(d <= WIDEST, kernel, "x", f"of width {d}", f"at most {WIDEST}")
    chunks = next(c for c in (1, 2, 4, 8) if c * THREADS * v >= d)
    defines = (("TYPE", INPUTS[np.dtype(x.dtype)]), ("CHUNKS", chunks), ("TWO_ROUNDINGS", int(cast_order == ORDERS[1])))
    whole = d % v == 0 and aligned(x, weight)
    return x, weight, defines, (np.int32(d), np.int32(whole), np.float32(eps))


def rmsnorm(x: Any, weight: Any, *, eps: float = 1e-6, cast_order: str = "weight_then_cast") -> Any:
    """y[n,d] = weight[d] x[n,d] (mean_d x² + eps)^(-1/2), in x's type: float32, or bfloat16 as its bits in uint16"""
    x, weight, defines, settings = _rows("rmsnorm", x, weight, eps, cast_order)
    y = runner().empty(x.shape, x.dtype)
    if x.shape[0] and x.shape[1]:
        runner().launch(Launch("rmsnorm", "rmsnorm", defines, (x.shape[0],), THREADS, (x, weight, y, *settings)))
    return y


def rmsnorm_quantize(
    x: Any, weight: Any, *, eps: float = 1e-6, cast_order: str = "weight_then_cast", recipe: str = "v3"
) -> tuple[Any, Any]:
    """codes[n,d], scale[n,⌈d/128⌉] = fp8.quantize_tile(rmsnorm(x, weight)), bit for bit, without y in memory"""
    need(recipe in RECIPES, "rmsnorm_quantize", "recipe", repr(recipe), f"one of {', '.join(RECIPES)}")
    x, weight, defines, settings = _rows("rmsnorm_quantize", x, weight, eps, cast_order)
    (n, d), on = x.shape, runner()
    codes, scale, found = on.empty((n, d), np.uint8), on.empty((n, -(-d // 128)), np.float32), on.zeros((1,), np.int32)
    if n and d:
        args = (x, weight, codes, scale, found, *settings, *recipe_arguments(RECIPES[recipe]))
        on.launch(Launch("rmsnorm", "rmsnorm_quantize", defines, (n,), THREADS, args))
    if checked() and int(found[0]):
        raise ValueError("rmsnorm_quantize: x or weight makes a NaN; expected none")
    return codes, scale


def rmsnorm_bwd(dy: Any, x: Any, weight: Any, *, eps: float = 1e-6, cast_order: str = "weight_then_cast") -> tuple[Any, Any]:
    """dx[n,d] = rstd (g - xhat mean_d(g xhat)),   dweight[d] = Σ_n dy xhat,   g = dy weight"""
    x, weight, defines, settings = _rows("rmsnorm_bwd", x, weight, eps, cast_order)
    dy = taken("rmsnorm_bwd", "dy", dy, (x.dtype,), 2)
    need(dy.shape == x.shape, "rmsnorm_bwd", "dy", f"of shape {dy.shape}", f"{x.shape}, that of x")
    (n, d), on = x.shape, runner()
    dx, dweight = on.empty(x.shape, x.dtype), on.zeros((d,), x.dtype)
    if n and d:
        blocks = min(n, 4 * on.multiprocessors)
        parts = on.empty((blocks, d), np.float32)
        settings = (settings[0], np.int32(int(settings[1]) and aligned(dy)), settings[2])
        args = (dy, x, weight, dx, parts, np.int32(n), *settings)
        on.launch(Launch("rmsnorm", "rmsnorm_backward", defines, (blocks,), THREADS, args))
        args = (parts, dweight, np.int32(blocks), np.int32(d))
        on.launch(Launch("rmsnorm", "sum_rows", defines, (-(-d // THREADS),), THREADS, args))
    return dx, dweight
