"""Routers: V3's auxiliary-loss-free one (noaux_tc) and V2's softmax, forward and backward.

A thread routes a token, so that the choice reads as the equation does: nothing is shared and nothing waits.
"""

import math
from typing import Any, Literal

import numpy as np

from ...ref.formats import BF16
from ...ref.router import GateDtype, Scoring
from ...ref.selection import MaskFill, check_chosen, check_finite, check_sizes
from ._call import arrays, empty, kernel_of, zeros
from ._device import cuda, device_function, each, kernel
from .cast import grid_of, round_one
from .swiglu import sigmoid

Array = Any
SIGMOID, SOFTMAX, SQRTSOFTPLUS = range(3)
SCORINGS = ("sigmoid", "softmax", "sqrtsoftplus")


@device_function
def narrowed(z, narrow, g):
    """z rounded to bfloat16 where the gate computes in it"""
    return type(z)(round_one(np.float64(z), 0.0, g)[1]) if narrow else z


@device_function
def score_all(z, scoring, narrow, g, s):
    """s[e] = the scores of a token's logits z[e]"""
    F, e = s.dtype.type, z.size
    for i in range(e):
        s[i] = narrowed(z[i], narrow, g)
    if scoring == SOFTMAX:
        top, total = s[0], F(0)
        for i in range(e):
            top = max(top, s[i])
        for i in range(e):
            s[i] = F(math.exp(s[i] - top))
            total += s[i]
        for i in range(e):
            s[i] = s[i] / total
    elif scoring == SIGMOID:
        for i in range(e):
            s[i] = sigmoid(s[i])
    else:
        for i in range(e):
            s[i] = F(math.sqrt(F(math.log1p(F(math.exp(-abs(s[i]))))) + max(s[i], F(0))))
    for i in range(e):
        s[i] = narrowed(s[i], narrow, g)


@device_function
def offer(value, index, held, values, indices):
    """Inserts into the `held` best so far, best first; how many there are then. Indices come in rising order: the lowest wins a tie."""
    j = held
    if held == values.size:
        j = held - 1
        if not value > values[j]:
            return held
    while j > 0 and value > values[j - 1]:
        values[j], indices[j] = values[j - 1], indices[j - 1]
        j -= 1
    values[j], indices[j] = value, index
    return min(held + 1, values.size)


@device_function
def denominator(s, idx, normalise, clamp, eps):
    """(what the weights are divided by, sum_k s): 1 if they are not normalised"""
    F = s.dtype.type
    total = F(0)
    for j in range(idx.size):
        total += s[idx[j]]
    if not normalise:
        return F(1), total
    return (max(total, eps) if clamp else total + eps), total


@kernel
def _forward(logits, bias, gate, best, fill_zero, weighing, s, group_best, groups, topk_best, topk_idx, topk_weight):
    """best: of a group's t, how many make its score. s[n,e], group_best and groups[n,topk_group], topk_best[n,k] are scratch."""
    scoring, narrow, g = gate
    n_group, normalise, clamp, factor, eps = weighing
    F, (n, e) = logits.dtype.type, logits.shape
    width = e // n_group
    for t in range(cuda.grid(1), n, cuda.gridsize(1)):
        score_all(logits[t], scoring, narrow, g, s[t])
        held = 0
        for group in range(n_group):
            first, second = F(-math.inf), F(-math.inf)
            for i in range(group * width, (group + 1) * width):
                v = s[t, i] + bias[i]
                if v > first:
                    first, second = v, first
                elif v > second:
                    second = v
            held = offer(first if best == 1 or n_group == 1 else first + second, group, held, group_best[t], groups[t])
        held = 0
        for group in range(n_group):
            kept = False
            for j in range(groups.shape[1]):
                kept = kept or groups[t, j] == group
            for i in range(group * width, (group + 1) * width):
                if kept:
                    held = offer(s[t, i] + bias[i], i, held, topk_best[t], topk_idx[t])
                elif fill_zero:  # -inf never wins: the groups kept hold at least k experts
                    held = offer(F(0), i, held, topk_best[t], topk_idx[t])
        by, _ = denominator(s[t], topk_idx[t], normalise, clamp, eps)
        for j in range(topk_idx.shape[1]):
            topk_weight[t, j] = s[t, topk_idx[t, j]] / by * factor


@kernel
def _backward(logits, topk_idx, dtopk_weight, gate, weighing, s, dlogits):
    """dlogits comes as zeros: an expert that was not chosen has no gradient but through softmax."""
    scoring, narrow, g = gate
    _, normalise, clamp, factor, eps = weighing
    F, (n, e), k = logits.dtype.type, logits.shape, topk_idx.shape[1]
    for t in range(cuda.grid(1), n, cuda.gridsize(1)):
        score_all(logits[t], scoring, narrow, g, s[t])
        by, total = denominator(s[t], topk_idx[t], normalise, clamp, eps)
        pull = F(0)  # sum_k dw s / D: what the denominator takes back, unless it is clamped
        if normalise and (not clamp or total >= eps):
            for j in range(k):
                pull += dtopk_weight[t, j] * (s[t, topk_idx[t, j]] / by)
        coupled = F(0)  # sum_e ds s
        for j in range(k):
            i = topk_idx[t, j]
            v, ds = s[t, i], (dtopk_weight[t, j] - pull) / by * factor
            coupled += ds * v
            if scoring == SIGMOID:
                dlogits[t, i] = ds * v * (F(1) - v)
            elif scoring == SOFTMAX:
                dlogits[t, i] = ds * v
            elif v > F(0):
                dlogits[t, i] = ds * sigmoid(logits[t, i]) / (F(2) * v)
        if scoring == SOFTMAX:
            for i in range(e):
                dlogits[t, i] -= s[t, i] * coupled


def _gate(scoring: str, gate_dtype: str) -> tuple:
    return SCORINGS.index(scoring), gate_dtype == "bfloat16", grid_of(BF16, "nan")


def _weighing(F: Any, n_group: int, normalise: bool, place: str, factor: float, eps: float) -> tuple:
    return n_group, normalise, place == "clamp", F(factor), F(eps)


def _route(logits: Array, bias: Array, sizes: tuple[int, int], gate: tuple, best: int, mask_fill: str, weighing: tuple) -> tuple:
    (n, _), (k, topk_group), F = logits.shape, sizes, logits.dtype
    topk_idx, topk_weight, topk_best = empty((n, k), arrays().int64), empty((n, k), F), empty((n, k), F)
    s, group_best, groups = empty(logits.shape, F), empty((n, topk_group), F), empty((n, topk_group), arrays().int64)
    each(_forward, n, logits, bias, gate, best, mask_fill == "0", weighing, s, group_best, groups, topk_best, topk_idx, topk_weight)
    return topk_idx, topk_weight


def _route_bwd(op: str, logits: Array, topk_idx: Array, dtopk_weight: Array, k: int, gate: tuple, weighing: tuple) -> Array:
    check_chosen(op, topk_idx, logits.shape[0], k, logits.shape[1])
    dlogits = zeros(logits.shape, logits.dtype)
    each(_backward, logits.shape[0], logits, topk_idx, dtopk_weight, gate, weighing, empty(logits.shape, logits.dtype), dlogits)
    return dlogits


@kernel_of("router.noaux_tc")
def noaux_tc(
    logits: Array,
    bias: Array,
    *,
    k: int = 8,
    n_group: int = 8,
    topk_group: int = 4,
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 2.5,
    scoring: Scoring = "sigmoid",
    denominator_eps: float = 1e-20,
    denominator_place: Literal["add", "clamp"] = "add",
    mask_fill: MaskFill = "-inf",
    gate_dtype: GateDtype = "float32",
) -> tuple[Array, Array]:
    """topk_idx[n,k] int64, topk_weight[n,k] of logits[n,e], bias[e].

        s = sigmoid(logits) | softmax_e(logits) | sqrt(softplus(logits)),   t = s + bias
        group score = sum of its two largest t; the topk_group best of n_group groups stay, t := mask_fill elsewhere
        topk_idx = the k largest t, descending;   w[n,k] = s[n, topk_idx]
        topk_weight = routed_scaling_factor (w / D if norm_topk_prob else w),   D = sum_k w + denominator_eps | max(sum_k w, eps)

    Ties go to the lowest index, of groups and of experts. The rest, and the errors, as kernels.cpu's; sums in logits' dtype.
    """
    op, F = "router.noaux_tc", logits.dtype.type
    check_sizes(op, logits.shape[1], k, n_group, topk_group, best=2)
    check_finite(op, logits=logits, bias=bias)
    weighing = _weighing(F, n_group, norm_topk_prob, denominator_place, routed_scaling_factor, denominator_eps)
    return _route(logits, bias, (k, topk_group), _gate(scoring, gate_dtype), 2, mask_fill, weighing)


@kernel_of("router.noaux_tc", "backward")
def noaux_tc_bwd(
    logits: Array,
    bias: Array,
    topk_idx: Array,
    dtopk_weight: Array,
    *,
    k: int = 8,
    n_group: int = 8,
    topk_group: int = 4,
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 2.5,
    scoring: Scoring = "sigmoid",
    denominator_eps: float = 1e-20,
    denominator_place: Literal["add", "clamp"] = "add",
    mask_fill: MaskFill = "-inf",
    gate_dtype: GateDtype = "float32",
) -> Array:
    """dlogits[n,e] for the gradient dtopk_weight[n,k] of noaux_tc's topk_weight, at the experts topk_idx[n,k] that it chose.

        ds = routed_scaling_factor (dw - sum_k(dw s) / D) / D   (without norm_topk_prob: factor dw; D clamped: factor dw / D)
        dlogits = ds s'(logits);  softmax: s (ds - sum_e s ds)

    None to the bias, none through the choice. Roundings to bfloat16 are passed straight through.
    """
    op, F = "router.noaux_tc_bwd", logits.dtype.type
    check_sizes(op, logits.shape[1], k, n_group, topk_group, best=2)
    check_finite(op, logits=logits, bias=bias)
    weighing = _weighing(F, n_group, norm_topk_prob, denominator_place, routed_scaling_factor, denominator_eps)
    return _route_bwd(op, logits, topk_idx, dtopk_weight, k, _gate(scoring, gate_dtype), weighing)


@kernel_of("router.softmax")
def softmax(
    logits: Array,
    *,
    k: int = 6,
    n_group: int = 8,
    topk_group: int = 3,
    norm_topk_prob: bool = False,
    routed_scaling_factor: float = 16.0,
    denominator_eps: float = 1e-20,
    mask_fill: MaskFill = "-inf",
) -> tuple[Array, Array]:
    """topk_idx[n,k] int64, topk_weight[n,k] = routed_scaling_factor s[n, topk_idx] of s = softmax_e(logits[n,e]).

    A group's score is its largest s; the rest as noaux_tc without a bias, errors too.
    """
    op, F = "router.softmax", logits.dtype.type
    check_sizes(op, logits.shape[1], k, n_group, topk_group, best=1)
    check_finite(op, logits=logits)
    weighing = _weighing(F, n_group, norm_topk_prob, "add", routed_scaling_factor, denominator_eps)
    bias = zeros(logits.shape[1:], logits.dtype)
    return _route(logits, bias, (k, topk_group), _gate("softmax", "float32"), 1, mask_fill, weighing)


@kernel_of("router.softmax", "backward")
def softmax_bwd(
    logits: Array,
    topk_idx: Array,
    dtopk_weight: Array,
    *,
    k: int = 6,
    n_group: int = 8,
    topk_group: int = 3,
    norm_topk_prob: bool = False,
    routed_scaling_factor: float = 16.0,
    denominator_eps: float = 1e-20,
    mask_fill: MaskFill = "-inf",
) -> Array:
    """dlogits[n,e] = s (ds - sum_e s ds),   ds = routed_scaling_factor dtopk_weight at the experts topk_idx[n,k], 0 elsewhere.

    With norm_topk_prob ds as in noaux_tc_bwd.
    """
    op, F = "router.softmax_bwd", logits.dtype.type
    check_sizes(op, logits.shape[1], k, n_group, topk_group, best=1)
    check_finite(op, logits=logits)
    weighing = _weighing(F, n_group, norm_topk_prob, "add", routed_scaling_factor, denominator_eps)
    return _route_bwd(op, logits, topk_idx, dtopk_weight, k, _gate("softmax", "float32"), weighing)
