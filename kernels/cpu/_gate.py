"""A router's work on one row of logits: scores, group-limited selection, weights, and their gradient."""

import math

import numpy as np
from numba import njit

from ._common import flip
from ._softmax import _exp, _highest, _sum
from .cast import cast_one

SIGMOID, SOFTMAX, SQRTSOFTPLUS = range(3)
LANES = 64  # of the softmax's sums


@njit(nogil=True, error_model="numpy")
def sigmoid(z):
    one = type(z)(1)
    e = _exp(-abs(z))  # never overflows
    return (one if z >= type(z)(0) else e) / (one + e)


@njit(nogil=True, error_model="numpy")
def sqrtsoftplus(z):
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
def finite_row(z):
    finite = True
    for i in range(z.size):
        finite &= abs(z[i]) < np.inf
    return finite


@njit(nogil=True, error_model="numpy")
def scores(z, scoring, narrow, rounding, s, lanes):
    """s[e] = the scores of logits z[e]; `narrow` rounds both to bfloat16."""
    if narrow:
        for i in range(z.size):
            s[i] = flip(cast_one(z[i], rounding))
        z = s
    if scoring == SIGMOID:
        for i in range(z.size):
            s[i] = sigmoid(z[i])
    elif scoring == SQRTSOFTPLUS:
        for i in range(z.size):
            s[i] = sqrtsoftplus(z[i])[0]
    else:
        top = _highest(z, lanes)
        for i in range(z.size):
            s[i] = _exp(z[i] - top)
        total = z.dtype.type(_sum(s, lanes))
        for i in range(z.size):
            s[i] = s[i] / total
    if narrow:
        for i in range(s.size):
            s[i] = flip(cast_one(s[i], rounding))


@njit(nogil=True, cache=True)
def fault(topk_idx, least, e):
    """The first slot, by number, that is not from `least` to e - 1 or repeats an expert of its row; -1 if none does."""
    last = np.full(e, -1)  # the row that chose each expert last
    n, k = topk_idx.shape
    for i in range(n):
        for j in range(k):
            v = topk_idx[i, j]
            if v < least or v >= e:
                return i * k + j
            if v >= 0:
                if last[v] == i:
                    return i * k + j
                last[v] = i
    return -1


@njit(nogil=True)
def offer(value, index, values, indices, held):
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


@njit(nogil=True, error_model="numpy")
def two_largest(t):
    """Four running pairs side by side, then the pairs' own: one pair's comparisons would wait for each other. Of one element: it, -inf."""
    none = t.dtype.type(-np.inf)
    a, b, c, d = none, none, none, none
    p, q, r, s = none, none, none, none
    even = t.size - t.size % 4
    for i in range(0, even, 4):
        v, w, x, y = t[i], t[i + 1], t[i + 2], t[i + 3]
        p, q, r, s = max(p, min(a, v)), max(q, min(b, w)), max(r, min(c, x)), max(s, min(d, y))
        a, b, c, d = max(a, v), max(b, w), max(c, x), max(d, y)
    for i in range(even, t.size):
        p, a = max(p, min(a, t[i])), max(a, t[i])
    p, a = max(max(p, q), min(a, b)), max(a, b)
    r, c = max(max(r, s), min(c, d)), max(c, d)
    return max(a, c), max(max(p, r), min(a, c))


@njit(nogil=True, error_model="numpy")
def weigh(s, idx, normalise, clamp, factor, eps, weight):
    """weight[k] = factor s[idx] / D"""
    F = s.dtype.type
    total = 0.0
    for j in range(idx.size):
        total += np.float64(s[idx[j]])
    denominator = F(1)
    if normalise:
        denominator = max(F(total), eps) if clamp else F(total) + eps
    for j in range(idx.size):
        weight[j] = s[idx[j]] / denominator * factor


@njit(nogil=True, error_model="numpy", cache=True)
def weights(lo, hi, logits, topk_idx, scoring, narrow, rounding, normalise, clamp, factor, eps, topk_weight):
    """The weights of a choice that is kept, rows lo to hi."""
    s, lanes = np.empty(logits.shape[1], logits.dtype), np.empty(LANES, logits.dtype)
    for n in range(lo, hi):
        scores(logits[n], scoring, narrow, rounding, s, lanes)
        weigh(s, topk_idx[n], normalise, clamp, factor, eps, topk_weight[n])


@njit(nogil=True, error_model="numpy", cache=True)
def forward(
    lo,
    hi,
    logits,
    bias,
    scoring,
    narrow,
    rounding,
    pair,
    n_group,
    topk_group,
    fill_zero,
    normalise,
    clamp,
    factor,
    eps,
    topk_idx,
    topk_weight,
):
    """Rows lo to hi; `pair` logits make a group's score. False if a logit is NaN or infinite."""
    F = logits.dtype.type
    e, k = logits.shape[1], topk_idx.shape[1]
    width = e // n_group
    s, t = np.empty(e, logits.dtype), np.empty(e, logits.dtype)
    best, lanes = np.empty(k, logits.dtype), np.empty(LANES, logits.dtype)
    group_best, groups = np.empty(topk_group, logits.dtype), np.empty(topk_group, np.int64)
    seconds, among = np.empty(n_group, logits.dtype), np.empty(width, np.int64)
    kept = np.ones(n_group, np.bool_)
    for n in range(lo, hi):
        if not finite_row(logits[n]):
            return False
        scores(logits[n], scoring, narrow, rounding, s, lanes)
        for i in range(e):
            t[i] = s[i] + bias[i]
        least = F(-np.inf)
        if n_group > 1:
            held = 0
            for g in range(n_group):
                first, seconds[g] = two_largest(t[g * width : (g + 1) * width])
                held = offer(first if pair == 1 else first + seconds[g], g, group_best, groups, held)
            kept[:] = False
            for g in groups:
                kept[g] = True
            if k <= 2 * topk_group:  # so many are no smaller than the least second of the groups kept, hence nor is any of the k largest
                least = F(np.inf)
                for g in groups:
                    least = min(least, seconds[g])
        idx = topk_idx[n]
        held = 0
        for g in range(n_group):
            if kept[g]:
                start, found = g * width, 0
                for i in range(width):
                    among[found] = start + i
                    found += t[start + i] >= least
                for j in range(found):
                    held = offer(t[among[j]], among[j], best, idx, held)
            elif fill_zero:  # -inf never wins: the groups kept hold at least k experts
                for i in range(g * width, (g + 1) * width):
                    held = offer(F(0), i, best, idx, held)
        weigh(s, idx, normalise, clamp, factor, eps, topk_weight[n])
    return True


@njit(nogil=True, error_model="numpy", cache=True)
def backward(lo, hi, logits, topk_idx, dtopk_weight, scoring, narrow, rounding, normalise, clamp, factor, eps, dlogits):
    """Rows lo to hi. False if a logit is NaN or infinite."""
    F = logits.dtype.type
    one, e, k = F(1), logits.shape[1], topk_idx.shape[1]
    all_s, s, slope = np.empty(e, logits.dtype), np.empty(k, logits.dtype), np.empty(k, logits.dtype)
    lanes = np.empty(LANES, logits.dtype)
    for n in range(lo, hi):
        z, idx, dw, dz = logits[n], topk_idx[n], dtopk_weight[n], dlogits[n]
        if not finite_row(z):
            return False
        if scoring == SOFTMAX or narrow:
            scores(z, scoring, narrow, rounding, all_s, lanes)
        for j in range(k):  # s and ds/dz of the experts chosen
            zj = z[idx[j]]
            if scoring == SOFTMAX:  # the diagonal part
                s[j] = slope[j] = all_s[idx[j]]
            elif scoring == SIGMOID:
                s[j] = all_s[idx[j]] if narrow else sigmoid(zj)
                slope[j] = s[j] * (one - s[j]) if narrow else s[j] * sigmoid(-zj)
            elif narrow:
                s[j] = all_s[idx[j]]
                slope[j] = sigmoid(zj) / (F(2) * s[j]) if s[j] > F(0) else F(0)
            else:
                s[j], slope[j] = sqrtsoftplus(zj)
        denominator, mean = one, F(0)
        if normalise:  # w = c s / D with D = sum s + eps, so ds = c (dw - sum(dw s) / D) / D
            total = product = 0.0
            for j in range(k):
                total += np.float64(s[j])
                product += np.float64(dw[j]) * np.float64(s[j])
            denominator = max(F(total), eps) if clamp else F(total) + eps
            if not clamp or F(total) >= eps:  # else D = eps, a constant
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
