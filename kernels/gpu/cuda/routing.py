"""Launchers of router.cu: both routers, one warp a token."""

from typing import Any

import numpy as np

from .launch import Launch, aligned, checked, fits, need, runner, taken
from .quantize import INPUTS

WARPS, SIZES = 4, (1, 2, 4, 8, 12, 16)
SCORINGS = ("sigmoid", "softmax", "sqrtsoftplus")


def _route(
    kernel: str, logits: Any, bias: Any, k: int, n_group: int, topk_group: int, scoring: str, fill: str, *rest: Any
) -> tuple[Any, Any]:
    """rest: bfloat16 gate, normalise, clamp, eps, factor."""
    best = 1 if bias is None else 2
    logits = taken(kernel, "logits", logits, tuple(INPUTS), 2)
    n, e = logits.shape
    fits(1 <= e <= 32 * SIZES[-1], kernel, "logits", f"of {e} experts", f"1 to {32 * SIZES[-1]}")
    need(n_group >= 1 and e % n_group == 0, kernel, "n_group", n_group, f"a divisor of the {e} experts")
    fits(n_group <= 32, kernel, "n_group", n_group, "at most 32")
    need(n_group == 1 or e // n_group >= best, kernel, "n_group", f"{n_group} of {e} experts", f"{best} experts a group at least")
    need(1 <= topk_group <= n_group, kernel, "topk_group", topk_group, f"1 to n_group = {n_group}")
    need(1 <= k <= e // n_group * topk_group, kernel, "k", k, f"1 to {e // n_group * topk_group}")
    fits(k <= 32, kernel, "k", k, "at most 32")
    need(scoring in SCORINGS, kernel, "scoring", repr(scoring), f"one of {', '.join(SCORINGS)}")
    need(fill in ("-inf", "0"), kernel, "mask_fill", repr(fill), "-inf or 0")
    if bias is not None:
        bias = taken(kernel, "bias", bias, (np.float32,), 1)
        need(bias.shape == (e,), kernel, "bias", f"of shape {bias.shape}", f"({e},), one number an expert")
    on, (bf16_gate, normalise, clamp, eps, factor) = runner(), rest
    idx, weight, found = on.empty((n, k), np.int32), on.empty((n, k), logits.dtype), on.zeros((1,), np.int32)
    if n == 0:
        return idx, weight
    per = next(s for s in SIZES if 32 * s >= e)
    defines = (("TYPE", INPUTS[np.dtype(logits.dtype)]), ("PER", per), ("BEST", best), ("BIAS", int(bias is not None)))
    whole = per % 4 == 0 and e % 4 == 0 and aligned(logits)
    numbers = (n, e, whole, k, n_group, topk_group, SCORINGS.index(scoring), bf16_gate, fill == "0", normalise, clamp)
    args = (logits, bias, idx, weight, found, *(np.int32(v) for v in numbers), np.float32(eps), np.float32(factor))
    on.launch(Launch("router", "router", defines, (-(-n // WARPS),), 32 * WARPS, args))
    need(
        not checked() or not int(found[0]),
        kernel,
        "logits" + (" or bias" if bias is not None else ""),
        "not finite somewhere",
        "finite numbers",
    )
    return idx, weight


def router_noaux_tc(
    logits: Any,
    bias: Any,
    *,
    k: int = 8,
    n_group: int = 8,
    topk_group: int = 4,
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 2.5,
    scoring: str = "sigmoid",
    denominator_eps: float = 1e-20,
    denominator_place: str = "add",
    mask_fill: str = "-inf",
    gate_dtype: str = "float32",
) -> tuple[Any, Any]:
    """topk_idx[n,k] (int32) = Topk(s + bias in the best groups),   topk_weight[n,k] = factor s[n,idx] / Σ_k s[n,idx]"""
    name = "router.noaux_tc"
    need(denominator_place in ("add", "clamp"), name, "denominator_place", repr(denominator_place), "add or clamp")
    need(gate_dtype in ("float32", "bfloat16"), name, "gate_dtype", repr(gate_dtype), "float32 or bfloat16")
    rest = gate_dtype == "bfloat16", norm_topk_prob, denominator_place == "clamp", denominator_eps, routed_scaling_factor
    return _route(name, logits, bias, k, n_group, topk_group, scoring, mask_fill, *rest)


def router_softmax(
    logits: Any,
    *,
    k: int = 6,
    n_group: int = 8,
    topk_group: int = 3,
    norm_topk_prob: bool = False,
    routed_scaling_factor: float = 16.0,
    denominator_eps: float = 1e-20,
    mask_fill: str = "-inf",
) -> tuple[Any, Any]:
    """topk_idx[n,k] (int32) = Topk(s in the best groups),   topk_weight[n,k] = factor s[n,idx],   s = softmax(logits)"""
    rest = False, norm_topk_prob, False, denominator_eps, routed_scaling_factor
    return _route("router.softmax", logits, None, k, n_group, topk_group, "softmax", mask_fill, *rest)
