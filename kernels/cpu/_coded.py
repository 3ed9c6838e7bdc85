"""Products with FP8 weights as they are stored: a piece of the weight is decoded into the cache, multiplied, and forgotten.

The weight's codes are then all that comes from memory. Decoded first and multiplied later, it would come and go as float32 as well.
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray

from ._common import array_of, need, run
from ._tile import ACROSS, TALL, lanes
from ._weights import E4M3FN, dequantize_weight, rows_to_float32
from .matvec import FEW, LONG, _rows

PIECE = 1 << 16  # elements decoded at a time: half of a core's cache
SLAB = 1 << 21  # and where BLAS multiplies
MANY = 8 * FEW  # vectors, from which on BLAS is faster


# Editing rows_to_float32 or _rows: Numba's cache of this does not notice; touch this file as well.
@njit(nogil=True, error_model="numpy", cache=True)
def _product(lo, hi, codes, scale, x, block, d, height, few, step, tall, y):
    """y[n,i] = sum_k x[n,k] decode(codes[i,k]) scale[i // block, k // block] for i from lo to hi, `height` rows at a time"""
    n, width = x.shape
    decoded = np.empty((height, width), x.dtype)
    part = np.empty(few * height, x.dtype)
    for i in range(lo, hi, height):
        rows = min(height, hi - i)
        rows_to_float32(i, i + rows, codes, scale, decoded, i, block, d)
        for j in range(0, n, few):
            m = min(few, n - j)
            target = part[: m * rows].reshape(1, m, rows)
            _rows(0, rows, decoded[:rows], x[j : j + m].reshape(1, m, width), rows, 0, rows, step, tall, target)
            for a in range(m):
                for b in range(rows):
                    y[j + a, i + b] = target[0, a, b]


def coded_linear(x: NDArray[np.float32], codes: NDArray[np.uint8], scale: NDArray[np.float32], *, block: int = 128) -> NDArray[np.float32]:
    """y[n,o] = sum_d x[n,d] decode(codes[o,d]) scale[o // block, d // block], products and sums in float32.

    Arrays as in dequantize_weight. The sums' order depends on the sizes only. ValueError: dtypes or shapes do not fit.
    """
    op = "coded_linear"
    x = array_of(op, "x", x, (np.float32,), 2)
    codes = array_of(op, "codes", codes, (np.uint8,), 2)
    scale = array_of(op, "scale", scale, (np.float32,), 2)
    need(x.shape[1] == codes.shape[1], op, "x", f"of shape {x.shape}", f"{codes.shape[1]} columns, as codes")
    shape = tuple(-(-n // block) for n in codes.shape)
    need(scale.shape == shape, op, "scale", f"of shape {scale.shape}", f"shape {shape} for codes of shape {codes.shape} and block={block}")
    if len(x) >= MANY:
        return _by_blas(x, codes, scale, block)
    o, d = codes.shape
    y = np.empty((len(x), o), np.float32)
    height = max(TALL, PIECE // max(d, 1) // TALL * TALL)
    tall = min(len(x), FEW) * d * 4 >= LONG
    run(_product, o, d * max(len(x) // FEW, 1), codes, scale, x, block, E4M3FN, height, FEW, ACROSS * lanes(4), tall, y)
    return y


def _by_blas(x: NDArray[np.float32], codes: NDArray[np.uint8], scale: NDArray[np.float32], block: int) -> NDArray[np.float32]:
    """coded_linear with many vectors: whole blocks decoded into one buffer, one BLAS product each."""
    o, d = codes.shape
    high = max(1, SLAB // max(d * block, 1)) * block
    decoded, y = np.empty((min(high, o), d), np.float32), np.empty((len(x), o), np.float32)
    for i in range(0, o, high):
        rows = min(high, o - i)
        w = dequantize_weight(codes[i : i + rows], scale[i // block : -(-(i + rows) // block)], block=block, out=decoded[:rows])
        np.matmul(x, w.T, out=y[:, i : i + rows])
    return y
