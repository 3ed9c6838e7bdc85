"""The rotation between feature-first activations [h,features,n] and the [h,n,r] that attention takes."""

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from ._common import run


@njit(nogil=True, error_model="numpy", cache=True)
def _turn(lo, hi, x, offset, cos, sin, halves_in, halves_out, y):
    """y[h,n,:] = the pairs of x[h,offset:,n] turned by cos[i,n], sin[i,n]"""
    half, n = cos.shape
    step_in, gap_in = (1, half) if halves_in else (2, 1)
    step_out, gap_out = (1, half) if halves_out else (2, 1)
    for h in range(lo, hi):
        for i in range(half):
            first = offset + i * step_in
            a, b, c, s = x[h, first], x[h, first + gap_in], cos[i], sin[i]
            j, k = i * step_out, i * step_out + gap_out
            for t in range(n):
                y[h, t, j] = a[t] * c[t] - b[t] * s[t]
                y[h, t, k] = a[t] * s[t] + b[t] * c[t]


@njit(nogil=True, error_model="numpy", cache=True)
def _turn_back(lo, hi, dy, cos, sin, halves_in, halves_out, dx, offset):
    """dx[h,offset:,n] = the pairs of dy[h,n,:] turned by minus the angle"""
    half, n = cos.shape
    step_in, gap_in = (1, half) if halves_in else (2, 1)
    step_out, gap_out = (1, half) if halves_out else (2, 1)
    for h in range(lo, hi):
        for i in range(half):
            first = offset + i * step_in
            da, db, c, s = dx[h, first], dx[h, first + gap_in], cos[i], sin[i]
            j, k = i * step_out, i * step_out + gap_out
            for t in range(n):
                v, w = dy[h, t, j], dy[h, t, k]
                da[t] = v * c[t] + w * s[t]
                db[t] = w * c[t] - v * s[t]


def turn(x: NDArray[Any], offset: int, cos: NDArray[Any], sin: NDArray[Any], layout_in: str, layout_out: str) -> NDArray[Any]:
    """y[h,n,r] = rope of x[h,offset:,n] for cos, sin[n,r/2]"""
    h, features, n = x.shape
    y = np.empty((h, n, features - offset), x.dtype)
    cos, sin = (np.ascontiguousarray(a.T) for a in (cos, sin))
    run(_turn, h, n * (features - offset), x, offset, cos, sin, layout_in == "half", layout_out == "half", y)
    return y


def turn_back(
    dy: NDArray[Any], cos: NDArray[Any], sin: NDArray[Any], layout_in: str, layout_out: str, dx: NDArray[Any], offset: int
) -> None:
    """Fills dx[h,offset:,n], the gradient of `turn`'s x, from dy[h,n,r]"""
    cos, sin = (np.ascontiguousarray(a.T) for a in (cos, sin))
    run(_turn_back, len(dy), dy.shape[1] * dy.shape[2], dy, cos, sin, layout_in == "half", layout_out == "half", dx, offset)
