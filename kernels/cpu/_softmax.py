"""The passes over a block of scores, in place: softmax with its statistics, and what the backward makes of scores and dP."""

import math
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

from ._common import flip

LANES = 64  # sums and maxima side by side, as in the norm: additions keep their order, so one running sum could not be vectorised
F = np.float32
LOG2E, LN2_HIGH, LN2_LOW = F(1.4426950408889634), F(0.693145751953125), F(1.4286068203094172e-06)  # HIGH has 15 bits: k·HIGH is exact
ROUND = F(1.5 * 2**23)  # adding it rounds to an integer, which then stands in the low bits
C2, C3, C4, C5, C6, C7 = (F(1 / math.factorial(i)) for i in range(2, 8))
LOWEST, ONE, SHRINK = F(-104.0), F(1.0), F(2.0**-24)
UNSHRINK = np.uint32(127 + 24)


def _exp(x):
    raise NotImplementedError("compiled code only")


@overload(_exp)
def _exp_of(x):
    """exp(x) for x <= 70; in float32 a branch-free one that the compiler can vectorise, right to about one unit, denormals included."""
    if x != types.float32:
        return lambda x: math.exp(x)

    def single(x):
        x = LOWEST if x < LOWEST else x  # NaN stays
        shifted = x * LOG2E + ROUND
        k = shifted - ROUND
        r = (x - k * LN2_HIGH) - k * LN2_LOW
        p = C2 + r * (C3 + r * (C4 + r * (C5 + r * (C6 + r * C7))))
        p = ONE + (r + r * r * p)
        power = flip(np.uint32((flip(shifted) + UNSHRINK) << np.uint32(23)))  # 2^(k+24): never denormal
        return (p * power) * SHRINK

    return single


@njit(nogil=True, error_model="numpy")
def _settle(m, total, sink, empty):
    """What the sums of a row are multiplied by, and its lse. Without a sink `sink` is -inf."""
    if total == 0.0:
        return 0.0, empty
    lse = m + math.log(total)
    return 1.0 / (total * (1.0 + math.exp(sink - lse))), lse


@njit(nogil=True, error_model="numpy")
def _highest(row, lanes):
    """The largest element, -inf of none; NaN is left out (its exp is NaN whatever is subtracted)"""
    lanes[:] = -np.inf
    even = row.size - row.size % LANES
    for j in range(0, even, LANES):
        part = row[j : j + LANES]
        for k in range(LANES):
            lanes[k] = part[k] if part[k] > lanes[k] else lanes[k]
    for k in range(row.size - even):
        lanes[k] = row[even + k] if row[even + k] > lanes[k] else lanes[k]
    half = LANES // 2
    while half:
        for k in range(half):
            lanes[k] = lanes[half + k] if lanes[half + k] > lanes[k] else lanes[k]
        half //= 2
    return lanes[0]


@njit(nogil=True, error_model="numpy")
def _sum(row, lanes):
    """Element j goes to lane j % LANES, then lanes pairwise"""
    lanes[:] = 0.0
    even = row.size - row.size % LANES
    for j in range(0, even, LANES):
        part = row[j : j + LANES]
        for k in range(LANES):
            lanes[k] += part[k]
    for k in range(row.size - even):
        lanes[k] += row[even + k]
    half = LANES // 2
    while half:
        for k in range(half):
            lanes[k] += lanes[half + k]
        half //= 2
    return np.float64(lanes[0])


@njit(nogil=True, error_model="numpy", cache=True)
def softmax(lo, hi, z, rows, seen, scale, m, total, shrink, whole, sinks, empty, lse):
    """z[r,:] becomes exp(scale z - m[r]), zero where masked: row r = (head, i), i < rows, sees the first seen + i keys of the block.

    m, total are the running maximum and sum of each row, shrink what its earlier sums are to be multiplied by. If the block is the whole
    row, z is normalised and lse set.
    """
    dtype = z.dtype.type
    width = z.shape[1]
    lanes = np.empty(LANES, z.dtype)
    scale = dtype(scale)
    for r in range(lo, hi):
        n = min(max(seen + r % rows, 0), width)
        row = z[r, :n]
        for j in range(n):
            row[j] *= scale
        top = max(m[r], _highest(row, lanes))
        base = top if top > -np.inf else dtype(0.0)
        for j in range(n):
            row[j] = _exp(row[j] - base)
        add = _sum(row, lanes)
        z[r, n:] = 0.0
        if whole:
            factor, logsum = _settle(np.float64(top), add, sinks[r // rows], empty)
            factor, lse[r] = dtype(factor), logsum
            for j in range(n):
                row[j] *= factor
        else:
            shrink[r] = _exp(m[r] - base)
            total[r] = total[r] * np.float64(shrink[r]) + add
            m[r] = top


@njit(nogil=True, error_model="numpy", cache=True)
def fold(lo, hi, o, new, shrink):
    """o = shrink[r] o + new"""
    for r in range(lo, hi):
        for j in range(o.shape[1]):
            o[r, j] = o[r, j] * shrink[r] + new[r, j]


@njit(nogil=True, error_model="numpy", cache=True)
def finish(lo, hi, o, rows, m, total, sinks, empty, lse):
    """o divided by its sum; lse"""
    for r in range(lo, hi):
        factor, lse[r] = _settle(np.float64(m[r]), total[r], sinks[r // rows], empty)
        factor = o.dtype.type(factor)
        for j in range(o.shape[1]):
            o[r, j] *= factor


@njit(nogil=True, error_model="numpy", cache=True)
def gradients(lo, hi, z, dp, rows, seen, scale, lse, pull):
    """z becomes P = exp(scale z - lse), dp becomes scale P (dp + pull), zero where masked and in rows without a key."""
    dtype = z.dtype.type
    width = z.shape[1]
    scale = dtype(scale)
    for r in range(lo, hi):
        base, shift = lse[r], pull[r]
        n = min(max(seen + r % rows, 0), width) if abs(base) < np.inf else 0
        row, grad = z[r, :n], dp[r, :n]
        for j in range(n):
            p = _exp(row[j] * scale - base)
            row[j] = p
            grad[j] = p * (grad[j] + shift) * scale
        z[r, n:] = 0.0
        dp[r, n:] = 0.0


def no_sinks(h: int) -> Any:
    """The sink of heads that have none: exp of it is 0"""
    return np.full(h, -np.inf)
