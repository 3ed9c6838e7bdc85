"""The auxiliary-loss-free router (noaux_tc): scores, group-limited top-k with a correction bias, gate weights, and their gradient."""

import math
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from ._common import array_of, choice, floats, integer, need, run

SCORINGS = ("sigmoid", "softmax", "sqrtsoftplus")
SIGMOID, SOFTMAX, SQRTSOFTPLUS = range(3)
MASK_FILLS = ("-inf", "0")
COST = 8  # elements of a copy that one logit's work is worth, for `run`


@njit(nogil=True, error_model="numpy")
def _sigmoid(z):
    one = type(z)(1)
    e = math.exp(-abs(z))  # never overflows
    return (one if z >= type(z)(0) else e) / (one + e)


@njit(nogil=True, error_model="numpy")
def _sqrtsoftplus(z):
    """(s, ds/dz) of s = sqrt(log(1 + e^z)), accurate where e^z underflows: s = e^(z/2) sqrt(log(1 + e^z) / e^z)."""
    F = type(z)
    one, zero, half = F(1), F(0), F(0.5)
    if z > zero:
        s = math.sqrt(z + math.log1p(math.exp(-z)))
        return s, half / ((one + math.exp(-z)) * s)
    h = math.exp(half * z)
    e = h * h
    root = math.sqrt(math.log1p(e) / e) if e > F(1e-30) else one
    return h * root, half * h / ((one + e) * root)


@njit(nogil=True, error_model="numpy")
def _finite_row(z):
    finite = True
    for i in range(z.size):
        finite &= abs(z[i]) < np.inf
    return finite


@njit(nogil=True, error_model="numpy")
def _scores(z, scoring, s):
    """s[e] = the scores of logits z[e]."""
    if scoring == SIGMOID:
        for i in range(z.size):
            s[i] = _sigmoid(z[i])
    elif scoring == SQRTSOFTPLUS:
        for i in range(z.size):
            s[i] = _sqrtsoftplus(z[i])[0]
    else:
        top = z[0]
        for i in range(z.size):
            top = max(top, z[i])
        total = 0.0
        for i in range(z.size):
            s[i] = math.exp(z[i] - top)
            total += np.float64(s[i])
        for i in range(z.size):
            s[i] = s[i] / z.dtype.type(total)


@njit(nogil=True)
def _offer(value, index, values, indices, held):
    """Insert into the `held` best so far, best first. Indices are offered in rising order, so that strict > lets the lowest win ties."""
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


@njit(nogil=True, error_model="numpy", cache=True)
def _forward(lo, hi, logits, bias, scoring, n_group, topk_group, fill_zero, normalise, factor, eps, topk_idx, topk_weight):
    """Rows lo to hi. False if a logit is NaN or infinite."""
    F = logits.dtype.type
    e, k = logits.shape[1], topk_idx.shape[1]
    width = e // n_group
    s, t = np.empty(e, logits.dtype), np.empty(e, logits.dtype)
    best = np.empty(k, logits.dtype)
    pair, pair_idx = np.empty(2, logits.dtype), np.empty(2, np.int64)
    group_best, groups = np.empty(topk_group, logits.dtype), np.empty(topk_group, np.int64)
    kept = np.ones(n_group, np.bool_)
    for n in range(lo, hi):
        if not _finite_row(logits[n]):
            return False
        _scores(logits[n], scoring, s)
        for i in range(e):
            t[i] = s[i] + bias[i]
        if n_group > 1:
            held = 0
            for g in range(n_group):
                two = 0
                for i in range(g * width, (g + 1) * width):
                    two = _offer(t[i], i, pair, pair_idx, two)
                held = _offer(pair[0] + pair[1], g, group_best, groups, held)
            kept[:] = False
            for g in groups:
                kept[g] = True
        idx = topk_idx[n]
        held = 0
        for g in range(n_group):
            if kept[g]:
                for i in range(g * width, (g + 1) * width):
                    held = _offer(t[i], i, best, idx, held)
            elif fill_zero:  # -inf never wins: the groups kept hold at least k experts
                for i in range(g * width, (g + 1) * width):
                    held = _offer(F(0), i, best, idx, held)
        total = 0.0
        for j in range(k):
            total += np.float64(s[idx[j]])
        denominator = F(total) + eps if normalise else F(1)
        for j in range(k):
            topk_weight[n, j] = s[idx[j]] / denominator * factor
    return True


@njit(nogil=True, error_model="numpy", cache=True)
def _backward(lo, hi, logits, topk_idx, dtopk_weight, scoring, normalise, factor, eps, dlogits):
    """Rows lo to hi. False if a logit is NaN or infinite."""
    F = logits.dtype.type
    e, k = logits.shape[1], topk_idx.shape[1]
    all_s, s, slope = np.empty(e, logits.dtype), np.empty(k, logits.dtype), np.empty(k, logits.dtype)
    for n in range(lo, hi):
        z, idx, dw, dz = logits[n], topk_idx[n], dtopk_weight[n], dlogits[n]
        if not _finite_row(z):
            return False
        if scoring == SOFTMAX:
            _scores(z, scoring, all_s)
        for j in range(k):  # s and ds/dz of the experts chosen
            zj = z[idx[j]]
            if scoring == SIGMOID:
                s[j] = _sigmoid(zj)
                slope[j] = s[j] * _sigmoid(-zj)
            elif scoring == SQRTSOFTPLUS:
                s[j], slope[j] = _sqrtsoftplus(zj)
            else:  # the diagonal part
                s[j] = slope[j] = all_s[idx[j]]
        denominator, mean = F(1), F(0)
        if normalise:  # w = c s / D with D = sum s + eps, so ds = c (dw - sum(dw s) / D) / D
            total = product = 0.0
            for j in range(k):
                total += np.float64(s[j])
                product += np.float64(dw[j]) * np.float64(s[j])
            denominator = F(total) + eps
            mean = F(product) / denominator
        dz[:] = F(0)
        product = 0.0
        for j in range(k):
            ds = factor * (dw[j] - mean) / denominator
            dz[idx[j]] += ds * slope[j]
            product += np.float64(ds) * np.float64(s[j])
        if scoring == SOFTMAX:  # dz = s (ds - sum(s ds))
            for i in range(e):
                dz[i] -= all_s[i] * F(product)
    return True


def _arguments(
    op: str, logits: Any, bias: Any, k: Any, n_group: Any, topk_group: Any, scoring: str, mask_fill: str, numbers: dict[str, Any]
) -> tuple[NDArray[Any], NDArray[Any], int, int, int]:
    """logits, bias, k, n_group, topk_group after every check that needs no look at the logits themselves."""
    choice(op, "scoring", scoring, SCORINGS)
    choice(op, "mask_fill", mask_fill, MASK_FILLS)
    for name, value in numbers.items():
        need(isinstance(value, (int, float, np.integer, np.floating)) and math.isfinite(value), op, name, repr(value), "a finite number")
    logits, bias = floats(op, "logits", logits, 2), floats(op, "bias", bias, 1)
    e = logits.shape[1]
    ok = bias.shape == (e,) and bias.dtype == logits.dtype
    need(ok, op, "bias", f"{bias.dtype}{list(bias.shape)}", f"{logits.dtype}[{e}] for logits of shape {logits.shape}")
    k, n_group, topk_group = integer(op, "k", k), integer(op, "n_group", n_group), integer(op, "topk_group", topk_group)
    need(e % n_group == 0, op, "n_group", n_group, f"a divisor of the {e} experts")
    need(topk_group <= n_group, op, "topk_group", topk_group, f"at most n_group={n_group}")
    need(n_group == 1 or e // n_group >= 2, op, "n_group", n_group, f"groups of at least 2 of the {e} experts")
    left = topk_group * (e // n_group)
    need(k <= left, op, "k", k, f"at most {left}, the experts in topk_group={topk_group} of n_group={n_group} groups")
    _finite(op, "bias", bias)
    return logits, bias, k, n_group, topk_group


def _finite(op: str, name: str, x: NDArray[Any]) -> None:
    bad = np.argwhere(~np.isfinite(x))
    if len(bad):
        index = tuple(map(int, bad[0]))
        need(False, op, f"{name}[{', '.join(map(str, index))}]", x[index], "a finite number")


def noaux_tc(
    logits: NDArray[Any],
    bias: NDArray[Any],
    *,
    k: int = 8,
    n_group: int = 8,
    topk_group: int = 4,
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 2.5,
    scoring: str = "sigmoid",
    denominator_eps: float = 1e-20,
    mask_fill: str = "-inf",
) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """topk_idx[n,k] int64, topk_weight[n,k] of logits[n,e], bias[e].

        s[n,e] = sigmoid(logits) | softmax_e(logits) | sqrt(softplus(logits)),   t = s + bias
        group score = sum of its two largest t; the topk_group best of n_group groups of consecutive experts stay, t := mask_fill elsewhere
        topk_idx = the k largest t, descending;   w[n,k] = s[n, topk_idx]
        topk_weight = routed_scaling_factor * (w / (sum_k w + denominator_eps) if norm_topk_prob else w)

    Ties go to the lowest index, of groups and of experts. One group: nothing is masked. Arithmetic in logits' dtype, sums in float64.

    ValueError: dtypes or shapes do not fit; n_group does not divide e or leaves groups of one; topk_group > n_group; k > experts left by
    the groups; a logit or bias is NaN or infinite (the first is named); an attribute has no such value.
    """
    op = "router.noaux_tc"
    numbers = {"routed_scaling_factor": routed_scaling_factor, "denominator_eps": denominator_eps}
    logits, bias, k, n_group, topk_group = _arguments(op, logits, bias, k, n_group, topk_group, scoring, mask_fill, numbers)
    n, e = logits.shape
    F = logits.dtype.type
    topk_idx, topk_weight = np.empty((n, k), np.int64), np.empty((n, k), F)
    attributes = SCORINGS.index(scoring), n_group, topk_group, mask_fill == "0", bool(norm_topk_prob)
    numeric = F(routed_scaling_factor), F(denominator_eps)
    if not all(run(_forward, n, e * COST, logits, bias, *attributes, *numeric, topk_idx, topk_weight)):
        _finite(op, "logits", logits)
    return topk_idx, topk_weight


def noaux_tc_bwd(
    logits: NDArray[Any],
    bias: NDArray[Any],
    topk_idx: NDArray[np.int64],
    dtopk_weight: NDArray[Any],
    *,
    k: int = 8,
    n_group: int = 8,
    topk_group: int = 4,
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 2.5,
    scoring: str = "sigmoid",
    denominator_eps: float = 1e-20,
    mask_fill: str = "-inf",
) -> NDArray[Any]:
    """dlogits[n,e] for the gradient dtopk_weight[n,k] of noaux_tc's topk_weight, at the experts topk_idx[n,k] that it chose.

        with D = sum_k s + denominator_eps:  ds = routed_scaling_factor * (dw - sum_k(dw s) / D) / D   (without norm_topk_prob: factor * dw)
        dlogits = ds * s'(logits);  softmax: s * (ds - sum_e s ds)

    No gradient reaches bias or goes through the selection: experts not selected get exactly 0, except under softmax.
    Errors as noaux_tc; topk_idx must be int64 in [0, e) and both [n,k].
    """
    op = "router.noaux_tc_bwd"
    numbers = {"routed_scaling_factor": routed_scaling_factor, "denominator_eps": denominator_eps}
    logits, bias, k, n_group, topk_group = _arguments(op, logits, bias, k, n_group, topk_group, scoring, mask_fill, numbers)
    n, e = logits.shape
    F = logits.dtype.type
    topk_idx = array_of(op, "topk_idx", topk_idx, (np.int64,), 2)
    dtopk_weight = array_of(op, "dtopk_weight", dtopk_weight, (F,), 2)
    for name, x in ("topk_idx", topk_idx), ("dtopk_weight", dtopk_weight):
        need(x.shape == (n, k), op, name, f"of shape {x.shape}", f"shape {(n, k)} for logits of shape {logits.shape} and k={k}")
    bad = np.argwhere((topk_idx < 0) | (topk_idx >= e))
    if len(bad):
        i, j = bad[0]
        need(False, op, f"topk_idx[{i}, {j}]", topk_idx[i, j], f"an expert from 0 to {e - 1}")
    dlogits = np.empty_like(logits)
    attributes = SCORINGS.index(scoring), bool(norm_topk_prob), F(routed_scaling_factor), F(denominator_eps)
    if not all(run(_backward, n, e, logits, topk_idx, dtopk_weight, *attributes, dlogits)):
        _finite(op, "logits", logits)
    return dlogits
