"""Checkpoint weights: FP8 codes in square blocks to float32 or to bf16 bits, decoded, scaled and rounded in one pass."""

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from ._common import array_of, flip, integer, need, output, run, shr
from .cast import FORMATS, decode_one, decoding

E4M3FN = decoding(FORMATS["e4m3fn"])


@njit(nogil=True)
def _bf16_bits(v):
    """The bits of v rounded to bf16 (nearest, ties to even). A NaN that decode_one made has zeros below, so nothing carries out of it."""
    u = flip(v)
    odd = np.uint32(shr(u, np.uint32(16)) & np.uint32(1))
    return shr(np.uint32(u + odd + np.uint32(0x7FFF)), np.uint32(16))


# Editing decode_one: Numba's cache of these two does not notice; touch this file as well.
@njit(nogil=True, cache=True)
def rows_to_float32(lo, hi, codes, scale, out, first, block, d):
    """out[i - first] = decode(codes[i]) * scale[i // block] for rows lo to hi."""
    for i in range(lo, hi):
        for t in range(scale.shape[1]):
            c, y = codes[i, t * block : (t + 1) * block], out[i - first, t * block : (t + 1) * block]
            s = scale[i // block, t]
            for j in range(c.size):
                y[j] = decode_one(c[j], d) * s


@njit(nogil=True, cache=True)
def rows_to_bf16(lo, hi, codes, scale, out, first, block, d):
    """rows_to_float32, each product rounded to bf16."""
    for i in range(lo, hi):
        for t in range(scale.shape[1]):
            c, y = codes[i, t * block : (t + 1) * block], out[i - first, t * block : (t + 1) * block]
            s = scale[i // block, t]
            for j in range(c.size):
                y[j] = _bf16_bits(np.float32(decode_one(c[j], d) * s))


ROWS = {"fp32": rows_to_float32, "bf16": rows_to_bf16}
CARRIER = {"fp32": np.float32, "bf16": np.uint16}


def dequantize_weight(
    codes: NDArray[np.uint8], scale: NDArray[np.float32], *, block: int = 128, dtype: str = "fp32", out: NDArray[Any] | None = None
) -> NDArray[Any]:
    """w[o,d] = decode(codes[o,d]) * scale[o // block, d // block], one rounding to float32; dtype="bf16" rounds that to bf16 bits.

    Edge blocks may be ragged. `out` receives the result. ValueError: codes are not two-dimensional uint8, scale is not float32 of shape
    [ceil(o / block), ceil(d / block)], dtype is neither.
    """
    op = "dequantize_weight"
    block = integer(op, "block", block)
    need(dtype in ROWS, op, "dtype", repr(dtype), "fp32 or bf16")
    codes = array_of(op, "codes", codes, (np.uint8,), 2)
    scale = array_of(op, "scale", scale, (np.float32,), 2)
    shape = tuple(-(-n // block) for n in codes.shape)
    need(scale.shape == shape, op, "scale", f"of shape {scale.shape}", f"shape {shape} for codes of shape {codes.shape} and block={block}")
    w = output(op, "out", out, codes.shape, CARRIER[dtype], codes, scale)
    run(ROWS[dtype], *codes.shape, codes, scale, w, 0, block, E4M3FN)
    return w
