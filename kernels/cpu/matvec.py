"""Products of a weight with few vectors, which take as long as reading the weight: its rows are shared out among threads, each read once.

BLAS's product with one or a few columns does not reach the memory's rate. These do, up to about FEW vectors; beyond, BLAS is faster. The
sums' order depends on the sizes only, not on the number of threads.
"""

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from ._common import run
from ._tile import ACROSS, TALL, dots_four, dots_one, dots_two, lanes, tall_four, tall_one, tall_two

FEW = 4  # vectors, up to which reading the weight is what takes the time
CHUNK = 1 << 19  # elements of the weight that a thread takes at a time
LONG = 1 << 14  # bytes of a vector from which it would be read out of the L2 cache again for every row: TALL rows then share it


@njit(nogil=True, error_model="numpy", cache=True)
def _rows(lo, hi, weight, x, per, first, rows, step, tall, y):
    """y[h,n,i] for i + rows * h from lo to hi; the first d - d % step elements of a row in vectors, if `tall` of TALL rows at a time."""
    (vectors, d), flat, xs, ys = x.shape[1:], weight.reshape(-1), x.reshape(-1), y.reshape(-1)
    depth, i = d // step, lo
    while i < hi:
        h = i // rows
        together = TALL if tall and i + TALL <= hi and i % rows + TALL <= rows else 1
        w0, x0, y0 = (h * per + first + i % rows) * d, h * vectors * d, h * vectors * rows + i % rows
        n = 0
        while n < vectors and depth:
            x1, y1 = x0 + n * d, y0 + n * rows
            if n + 4 <= vectors:
                if together > 1:
                    tall_four(flat, w0, d, xs, x1, d, 4 * depth, ys, y1, rows)
                else:
                    dots_four(flat, w0, d, xs, x1, d, 2 * depth, ys, y1, rows)
                n += 4
            elif n + 2 <= vectors:
                if together > 1:
                    tall_two(flat, w0, d, xs, x1, d, 4 * depth, ys, y1, rows)
                else:
                    dots_two(flat, w0, d, xs, x1, d, depth, ys, y1, rows)
                n += 2
            else:
                if together > 1:
                    tall_one(flat, w0, d, xs, x1, d, 2 * depth, ys, y1, rows)
                else:
                    dots_one(flat, w0, d, xs, x1, d, depth, ys, y1, rows)
                n += 1
        for n in range(vectors):
            for j in range(together):
                at = y0 + n * rows + j
                rest = ys[at] if depth else y.dtype.type(0)
                for k in range(depth * step, d):
                    rest += flat[w0 + j * d + k] * xs[x0 + n * d + k]
                ys[at] = rest
        i += together


@njit(nogil=True, error_model="numpy", cache=True)
def _columns(lo, hi, weight, x, per, first, y):
    """y[h] for heads lo to hi."""
    for h in range(lo, hi):
        y[h] = 0
        for i in range(x.shape[2]):
            w = weight[h * per + first + i]
            for n in range(x.shape[1]):
                v, target = x[h, n, i], y[h, n]
                for d in range(w.size):
                    target[d] += v * w[d]


def matvec(weight: NDArray[Any], x: NDArray[Any]) -> NDArray[Any]:
    """y[n,o] = sum_d x[n,d] weight[o,d], for checked C-contiguous arrays of one dtype (float32 or float64) and n <= FEW."""
    return head_matvec(weight, x[None], weight.shape[0], 0)[0]


def head_matvec(weight: NDArray[Any], x: NDArray[Any], rows: int, first: int) -> NDArray[Any]:
    """y[h,n,i] = sum_d x[h,n,d] weight[h,first+i,d], i < rows, where weight[o,d] is each head's o/h rows after another's: W_UV o_c."""
    h, n, d = x.shape
    y = np.empty((h, n, rows), x.dtype)
    step, tall = ACROSS * lanes(x.itemsize), n * d * x.itemsize >= LONG
    run(_rows, h * rows, d, readonly(weight), readonly(x), weight.shape[0] // h, first, rows, step, tall, y, largest=CHUNK)
    return y


def head_vecmat(weight: NDArray[Any], x: NDArray[Any], first: int) -> NDArray[Any]:
    """y[h,n,d] = sum_i x[h,n,i] weight[h,first+i,d], where weight[o,d] is each head's o/h rows after another's: q_nope W_UK."""
    h, n, rows = x.shape
    y = np.empty((h, n, weight.shape[1]), x.dtype)
    run(_columns, h, rows * weight.shape[1], readonly(weight), readonly(x), weight.shape[0] // h, first, y, largest=CHUNK)
    return y


def readonly(x: NDArray[Any]) -> NDArray[Any]:
    """Numba compiles read-only and writable arrays separately, and one is enough."""
    view = x.view()
    view.flags.writeable = False
    return view
