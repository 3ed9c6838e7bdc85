"""RMSNorm, forward and backward."""

import math
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from ._common import CHUNK, choice, floats, need, run

CAST_ORDERS = ("weight_then_cast", "cast_then_weight")
PARTS = 64  # at most about so many partial sums of dweight
LANES = 256  # partial sums side by side, a power of two: one running sum could not be vectorised, since additions keep their order


@njit(nogil=True, error_model="numpy")
def _dot(x, y, lanes):
    """sum_d x y. Products and sums in float64 (so exact products for float32): element d goes to lane d % LANES, then lanes pairwise."""
    lanes[:] = 0.0
    for j in range(0, x.size, LANES):
        xs, ys = x[j : j + LANES], y[j : j + LANES]
        for k in range(xs.size):
            lanes[k] += np.float64(xs[k]) * np.float64(ys[k])
    half = LANES // 2
    while half:
        for k in range(half):
            lanes[k] += lanes[k + half]
        half //= 2
    return lanes[0]


@njit(nogil=True, error_model="numpy", cache=True)
def _forward(lo, hi, x, weight, eps, y):
    lanes = np.empty(LANES)
    d = weight.size
    for i in range(lo, hi):
        xi, yi = x[i], y[i]
        rstd = x.dtype.type(1.0 / math.sqrt(_dot(xi, xi, lanes) / d + eps))
        for j in range(d):
            yi[j] = xi[j] * rstd * weight[j]


@njit(nogil=True, error_model="numpy", cache=True)
def _backward(lo, hi, x, weight, dy, eps, dx):
    """dx of rows lo to hi; returns their part of dweight in float64."""
    lanes = np.empty(LANES)
    d = weight.size
    F = x.dtype.type
    g = np.empty(d, x.dtype)
    dweight = np.zeros(d)
    for i in range(lo, hi):
        xi, dyi, dxi = x[i], dy[i], dx[i]
        r = 1.0 / math.sqrt(_dot(xi, xi, lanes) / d + eps)
        for j in range(d):
            g[j] = dyi[j] * weight[j]
        # dx = rstd (g - xhat mean(g xhat)) with mean(g xhat) = rstd mean(g x)
        rstd, mean = F(r), F(r * _dot(g, xi, lanes) / d)
        for j in range(d):
            xhat = xi[j] * rstd
            dxi[j] = rstd * (g[j] - xhat * mean)
            dweight[j] += np.float64(dyi[j]) * np.float64(xhat)
    return dweight


def _arguments(op: str, x: Any, weight: Any, eps: Any, cast_order: str) -> tuple[NDArray[Any], NDArray[Any], float]:
    choice(op, "cast_order", cast_order, CAST_ORDERS)
    ok = isinstance(eps, (int, float, np.integer, np.floating)) and 0 <= eps < math.inf
    need(ok, op, "eps", repr(eps), "a finite number >= 0")
    x, weight = floats(op, "x", x, 2), floats(op, "weight", weight, 1)
    ok = weight.shape == x.shape[1:] and weight.dtype == x.dtype
    need(ok, op, "weight", f"{weight.dtype}{list(weight.shape)}", f"{x.dtype}[{x.shape[1]}] for x of shape {x.shape}")
    return x, weight, float(eps)


def rmsnorm(x: NDArray[Any], weight: NDArray[Any], *, eps: float = 1e-6, cast_order: str = "weight_then_cast") -> NDArray[Any]:
    """y[n,d] = x[n,d] * rstd[n] * weight[d],  rstd[n] = (mean_d x[n,d]^2 + eps)^(-1/2).

    x[n,d] and weight[d] are float32 or float64 alike, and so is y. The mean and rstd are computed in float64, rstd is then rounded to
    x's dtype. cast_order ("weight_then_cast", "cast_then_weight") says where a bf16 implementation rounds; it changes nothing here.

    ValueError: dtypes or shapes do not fit, eps is negative or not finite, another cast_order.
    """
    x, weight, eps = _arguments("rmsnorm", x, weight, eps, cast_order)
    y = np.empty_like(x)
    run(_forward, *x.shape, x, weight, eps, y)
    return y


def rmsnorm_bwd(
    x: NDArray[Any], weight: NDArray[Any], dy: NDArray[Any], *, eps: float = 1e-6, cast_order: str = "weight_then_cast"
) -> tuple[NDArray[Any], NDArray[Any]]:
    """dx[n,d], dweight[d] for the gradient dy[n,d] of rmsnorm's y. With xhat = x * rstd and g = dy * weight:

        dx[n,d] = rstd[n] * (g[n,d] - xhat[n,d] * mean_d(g * xhat)),   dweight[d] = sum_n dy[n,d] * xhat[n,d].

    Means and sums in float64, the rest in x's dtype. Errors as rmsnorm; dy must have x's shape and dtype.
    """
    op = "rmsnorm_bwd"
    x, weight, eps = _arguments(op, x, weight, eps, cast_order)
    dy = floats(op, "dy", dy, 2)
    need(dy.shape == x.shape and dy.dtype == x.dtype, op, "dy", f"{dy.dtype}{list(dy.shape)}", f"{x.dtype}{list(x.shape)} like x")
    dx = np.empty_like(x)
    parts = run(_backward, *x.shape, x, weight, dy, eps, dx, largest=max(CHUNK, x.size // PARTS))
    return dx, np.sum(parts, axis=0, dtype=np.float64).astype(x.dtype) if parts else np.zeros_like(weight)
