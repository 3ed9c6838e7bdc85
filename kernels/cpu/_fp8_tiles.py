"""Blocks of an FP8 product: a few rows by WIDTH outputs, part by part along d, each part's sum scaled and added.

Operands come decoded: the left one as [rows,d], rows filled up with zeros, the right one in panels [d,width] of `width` outputs.
"""

import numpy as np
from numba import njit

from ._align import TOGETHER, WIDTH, aligned, keep, units
from ._common import flip
from ._tile import ROWS, block

TALL = 64  # rows that go through a panel together
GROUP = 32  # products that a tensor core aligns and adds at once
NO_POWER = -64  # the exponent of a zero: with any other it is below all sums of two, and two of them fit in an int8


@njit(nogil=True, error_model="numpy", cache=True)
def decode_rows(lo, hi, codes, values, powers, out, out_powers, part, special, keep):
    """Rows lo to hi of codes[n,d] by the tables. A NaN or an infinity becomes 0 unless `keep`; special[n,parts] says where."""
    for i in range(lo, hi):
        c, x, e, s = codes[i], out[i], out_powers[i], special[i]
        for k in range(c.size):
            v = values[c[k]]
            x[k], e[k] = v, powers[c[k]]
            if not (keep or np.isfinite(v)):
                x[k], s[k // part] = 0, True


@njit(nogil=True, error_model="numpy", cache=True)
def decode_panels(lo, hi, codes, values, powers, out, out_powers, part, special, keep):
    """Panels lo to hi of codes[o,d], as decode_rows: out[panel,d,width]."""
    o, d = codes.shape
    width = out.shape[2]
    for p in range(lo, hi):
        first = p * width
        c = codes[first : min(first + width, o)]
        for k in range(d):
            x, e = out[p, k], out_powers[p, k]
            for j in range(c.shape[0]):
                v = values[c[j, k]]
                x[j], e[j] = v, powers[c[j, k]]
                if not (keep or np.isfinite(v)):
                    x[j], special[first + j, k // part] = 0, True


@njit(nogil=True, error_model="numpy")
def _add_specials(dots, codes_a, codes_b, values, r0, rows, o0, columns, width, k0, k1, t, special_a, special_b):
    """Where a NaN or an infinity takes part, the sum is that of the products that are none or infinite: NaN or an infinity."""
    for i in range(rows):
        for j in range(columns):
            if special_a[r0 + i, t] or special_b[o0 + j, t]:
                total = np.float32(0)
                for k in range(k0, k1):
                    product = values[codes_a[r0 + i, k]] * values[codes_b[o0 + j, k]]
                    if not np.isfinite(product):
                        total += product
                dots[i * width + j] = total


@njit(nogil=True, error_model="numpy")
def _promote(dots, sa, sb, y, rows, product_first):
    """y[i,j] += dots[i,j] sa[i] sb[j]: three roundings, none of them skipped"""
    F, width = type(y[0]), sb.size
    for i in range(rows):
        s, d, out = sa[i], dots[i * width : (i + 1) * width], y[i * width : (i + 1) * width]
        if product_first:
            for j in range(sb.size):
                out[j] += F(d[j]) * (s * sb[j])
        else:
            for j in range(sb.size):
                out[j] += F(d[j]) * s * sb[j]


@njit(nogil=True, error_model="numpy")
def _wide_sums(a, a0, a_row, b, b0, depth, by, total):
    """`aligned` for fractions whose products an int32 cannot hold."""
    for i in range(TOGETHER):
        t, f = total[i * WIDTH : (i + 1) * WIDTH], by[i * WIDTH : (i + 1) * WIDTH]
        for k in range(depth):
            v, w = np.float64(a[a0 + i * a_row + k]), b[b0 + k * WIDTH : b0 + (k + 1) * WIDTH]
            for j in range(t.size):
                t[j] += np.trunc(v * np.float64(w[j]) * np.float64(f[j]))


@njit(nogil=True, error_model="numpy", cache=True)
def aligned_blocks(lo, hi, a, ea, b, eb, sa, sb, y, part, tile, product_first, fraction, at_once, mask, codes, specials):
    """Blocks lo to hi of TALL rows by WIDTH outputs of y, summed as the accumulator does: `at_once` products in int32 (0: in float64),
    the group's total in the mask's width, of which the mask keeps what the accumulator holds.
    """
    (n, o), d, a_row = y.shape, a.shape[1], a.shape[1]
    codes_a, codes_b, values = codes
    any_special, special_a, special_b = specials
    af, eaf, size = a.reshape(-1), ea.reshape(-1), TOGETHER * WIDTH
    by, unit, c = np.empty(size, np.float32), np.empty(size, np.float32), np.empty(size, np.float32)
    total = np.empty(size, type(flip(mask)))
    own = np.empty(TALL * WIDTH, y.dtype)
    down = (n + TALL - 1) // TALL
    for index in range(lo, hi):
        p, first = index // down, index % down * TALL
        last, o0 = min(first + TALL, n), p * WIDTH
        columns = min(WIDTH, o - o0)
        bf, ebf = b[p].reshape(-1), eb[p].reshape(-1)
        own[:] = 0
        for k0 in range(0, d, part):
            k1, t = min(k0 + part, d), k0 // tile
            for r in range(first, last, TOGETHER):
                rows = min(TOGETHER, last - r)
                c[:] = 0
                for k in range(k0, k1, GROUP):
                    depth = min(GROUP, k1 - k)
                    at = r * a_row + k
                    units(eaf, at, a_row, ebf, k * WIDTH, depth, c, fraction, by, unit, total)
                    if at_once == 0:
                        _wide_sums(af, at, a_row, bf, k * WIDTH, depth, by, total)
                    else:
                        for s in range(0, depth, at_once):
                            aligned(af, at + s, a_row, bf, (k + s) * WIDTH, min(at_once, depth - s), by, total)
                    keep(total, mask, unit, c)
                if any_special:
                    _add_specials(c, codes_a, codes_b, values, r, rows, o0, columns, WIDTH, k0, k1, k0 // part, special_a, special_b)
                _promote(c, sa[t, r : r + rows], sb[t, o0 : o0 + WIDTH], own[(r - first) * WIDTH :], rows, product_first)
        for r in range(first, last):
            y[r, o0 : o0 + columns] = own[(r - first) * WIDTH : (r - first) * WIDTH + columns]


@njit(nogil=True, error_model="numpy", cache=True)
def plain_blocks(lo, hi, a, b, sa, sb, y, part, tile, product_first):
    """Blocks lo to hi of TALL rows by `width` outputs of y, summed in the operands' dtype."""
    (n, o), d, width = y.shape, a.shape[1], b.shape[2]
    af, ones = a.reshape(-1), np.ones(1, a.dtype)
    dots, own = np.empty(ROWS * width, a.dtype), np.empty(TALL * width, y.dtype)
    down = (n + TALL - 1) // TALL
    for index in range(lo, hi):
        p, first = index // down, index % down * TALL
        last, o0 = min(first + TALL, n), p * width
        columns, bf = min(width, o - o0), b[p].reshape(-1)
        own[:] = 0
        for k0 in range(0, d, part):
            t, depth = k0 // tile, min(part, d - k0)
            for r in range(first, last, ROWS):
                rows = min(ROWS, last - r)
                block(af, r * d + k0, d, 1, bf, k0 * width, width, dots, 0, width, depth, ones, 0)
                _promote(dots, sa[t, r : r + rows], sb[t, o0 : o0 + width], own[(r - first) * width :], rows, product_first)
        for r in range(first, last):
            y[r, o0 : o0 + columns] = own[(r - first) * width : (r - first) * width + columns]
