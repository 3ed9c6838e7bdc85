"""The products of experts with their tokens, every weight read once and where it lies.

Forward, tokens are the vectors' lanes: a panel is [k,width] of what a product runs over and `width` tokens. Backward through a weight's
rows, tokens are the block's rows and the weight's columns the lanes. Weights come flat, with the elements from one expert to the next.
Experts, blocks and depths depend on sizes only, and so do all sums.
"""

import numpy as np
from numba import njit

from ._gate import sigmoid
from ._tile import ROWS, VECTORS, block, block_onto, block_onto_narrow
from .swiglu import clipped, slopes

TALL, DEPTH = 64, 512  # rows and depth of the piece of a weight that stays in the cache, where its columns are summed over
WIDE, SHORT = 256, 128  # columns and depth, where its rows are


@njit(nogil=True, error_model="numpy")
def _fetch(source, at, stride, rows, width, target, pitch):
    """target[r pitch + i] = source[at + r stride + i]"""
    for r in range(rows):
        a, b = source[at + r * stride : at + r * stride + width], target[r * pitch : r * pitch + width]
        for i in range(b.size):
            b[i] = a[i]


@njit(nogil=True, error_model="numpy", cache=True)
def panels(lo, hi, x, source, k, first, start, width, out):
    """x's rows by expert, in panels: expert e has rows first[e] to first[e + 1] of source, columns start[e] to start[e + 1] of out."""
    d = x.shape[1]
    for e in range(lo, hi):
        for c0 in range(start[e], start[e + 1], width):
            wide = min(width, start[e + 1] - c0)
            panel = out[c0 * d : (c0 + wide) * d].reshape(d, wide)
            for j in range(wide):
                row = first[e] + c0 - start[e] + j
                if row < first[e + 1]:
                    values = x[source[row] // k]
                    for i in range(d):
                        panel[i, j] = values[i]
                else:
                    for i in range(d):
                        panel[i, j] = 0


@njit(nogil=True, error_model="numpy")
def _columns(weight, at, rows, d, xt, columns, buffer, ones, lanes, c):
    """c[TALL,columns] = weight[at + r d + k] times the panels xt, over k < d; rows are filled up with zeros."""
    full = VECTORS * lanes
    c[: TALL * columns] = 0
    buffer[rows * DEPTH :] = 0
    padded = (rows + ROWS - 1) // ROWS * ROWS
    for k0 in range(0, d, DEPTH):
        depth = min(DEPTH, d - k0)
        _fetch(weight, at + k0, d, rows, depth, buffer, DEPTH)
        for r in range(0, padded, ROWS):
            c0 = 0
            while c0 < columns:
                if columns - c0 >= full:
                    place = c0 * d + k0 * full
                    block_onto(buffer, r * DEPTH, DEPTH, 1, xt, place, full, c, r * columns + c0, columns, depth, ones, 0)
                    c0 += full
                else:
                    place = c0 * d + k0 * lanes
                    block_onto_narrow(buffer, r * DEPTH, DEPTH, 1, xt, place, lanes, c, r * columns + c0, columns, depth, ones, 0)
                    c0 += lanes


@njit(nogil=True, error_model="numpy", cache=True)
def hidden(lo, hi, gate, gate_step, up, up_step, xt, active, first, start, d, f, limit, lanes, act, keep, gates, ups):
    """Panels act[f] = silu(gate x) * (up x) for each block of TALL rows of each active expert; kept also as gates[m,f], ups[m,f]."""
    blocks, full, low = (f + TALL - 1) // TALL, VECTORS * lanes, -limit
    most = 0
    for e in active:
        most = max(most, start[e + 1] - start[e])
    buffer, ones = np.empty(TALL * DEPTH, act.dtype), np.ones(ROWS, act.dtype)
    g, u = np.empty(TALL * most, act.dtype), np.empty(TALL * most, act.dtype)
    for task in range(lo, hi):
        e, f0 = active[task // blocks], task % blocks * TALL
        rows, columns = min(TALL, f - f0), start[e + 1] - start[e]
        x = xt[start[e] * d : start[e + 1] * d]
        _columns(gate, e * gate_step + f0 * d, rows, d, x, columns, buffer, ones, lanes, g)
        _columns(up, e * up_step + f0 * d, rows, d, x, columns, buffer, ones, lanes, u)
        if keep:
            for j in range(first[e + 1] - first[e]):
                a, b = gates[first[e] + j, f0 : f0 + rows], ups[first[e] + j, f0 : f0 + rows]
                for r in range(rows):
                    a[r], b[r] = g[r * columns + j], u[r * columns + j]
        for c0 in range(0, columns, full):
            wide = min(full, columns - c0)
            panel = act[(start[e] + c0) * f + f0 * wide : (start[e] + c0) * f + (f0 + rows) * wide]
            for r in range(rows):
                p, q = g[r * columns + c0 : r * columns + c0 + wide], u[r * columns + c0 : r * columns + c0 + wide]
                target = panel[r * wide : r * wide + wide]
                for j in range(target.size):
                    v = limit if p[j] > limit else p[j]
                    target[j] = v * sigmoid(v) * clipped(q[j], low, limit)


@njit(nogil=True, error_model="numpy", cache=True)
def down(lo, hi, weight, step, act, active, first, start, source, k, slot_weight, d, f, lanes, y):
    """y[token] += slot_weight times (weight act), expert after expert, for each block of TALL of y's columns."""
    most = 0
    for e in active:
        most = max(most, start[e + 1] - start[e])
    buffer, ones, c = np.empty(TALL * DEPTH, y.dtype), np.ones(ROWS, y.dtype), np.empty(TALL * most, y.dtype)
    for task in range(lo, hi):
        d0 = task * TALL
        rows = min(TALL, d - d0)
        for e in active:
            columns = start[e + 1] - start[e]
            a = act[start[e] * f : start[e + 1] * f]
            _columns(weight, e * step + d0 * f, rows, f, a, columns, buffer, ones, lanes, c)
            for j in range(first[e + 1] - first[e]):
                slot = source[first[e] + j]
                w, target = slot_weight[slot], y[slot // k, d0 : d0 + rows]
                for r in range(rows):
                    target[r] += w * c[r * columns + j]


@njit(nogil=True, error_model="numpy")
def _rows(weight, at, pitch, total, wide, x, row0, count, pad, buffer, left, ones, full, c):
    """c[pad,WIDE] += x[row0 + i, k] times weight[at + k pitch + j], over k < total, j < wide: x's rows are filled up with zeros."""
    for k0 in range(0, total, SHORT):
        depth = min(SHORT, total - k0)
        for j0 in range(0, wide, full):  # the weight's piece in panels of `full` columns
            width = min(full, wide - j0)
            panel = buffer[j0 * SHORT : (j0 + full) * SHORT]
            if width < full:
                panel[:] = 0
            _fetch(weight, at + k0 * pitch + j0, pitch, depth, width, panel, full)
        for i in range(count):
            a, b = x[row0 + i, k0 : k0 + depth], left[i * SHORT : i * SHORT + depth]
            for t in range(b.size):
                b[t] = a[t]
        for j0 in range(0, wide, full):
            for i in range(0, pad, ROWS):
                block_onto(left, i * SHORT, SHORT, 1, buffer, j0 * SHORT, full, c, i * WIDE + j0, WIDE, depth, ones, 0)


@njit(nogil=True, error_model="numpy")
def _scratch(active, first, dtype):
    """The most rows of an expert, filled up; a weight's piece, the tokens', ones, a product."""
    most = 0
    for e in active:
        most = max(most, first[e + 1] - first[e])
    most = (most + ROWS - 1) // ROWS * ROWS
    return np.empty(SHORT * WIDE, dtype), np.zeros(most * SHORT, dtype), np.ones(ROWS, dtype), np.empty(most * WIDE, dtype)


@njit(nogil=True, error_model="numpy", cache=True)
def hidden_bwd(lo, hi, weight, step, dys, active, first, source, slot_weight, d, f, limit, lanes, gates, ups, dgates, dups, acts, parts):
    """From dys[m,d], by blocks of WIDE of f: with da = dy w_down, dgates, dups[m,f] of slot_weight da, acts[m,f] = slot_weight times the
    activation, parts[block,m] = sum_f da times the activation, which makes the slot weight's gradient."""
    blocks, full = (f + WIDE - 1) // WIDE, VECTORS * lanes
    buffer, left, ones, c = _scratch(active, first, dys.dtype)
    for task in range(lo, hi):
        e, block = active[task // blocks], task % blocks
        f0 = block * WIDE
        wide, count = min(WIDE, f - f0), first[e + 1] - first[e]
        pad = (count + ROWS - 1) // ROWS * ROWS
        c[: pad * WIDE] = 0
        left[count * SHORT :] = 0
        _rows(weight, e * step + f0, f, d, wide, dys, first[e], count, pad, buffer, left, ones, full, c)
        for i in range(count):
            row = first[e] + i
            w, da = slot_weight[source[row]], c[i * WIDE : i * WIDE + wide]
            g, u, a = gates[row, f0 : f0 + wide], ups[row, f0 : f0 + wide], acts[row, f0 : f0 + wide]
            dg, du = dgates[row, f0 : f0 + wide], dups[row, f0 : f0 + wide]
            for j in range(a.size):
                a[j], dg[j], du[j] = slopes(g[j], u[j], da[j] * w, limit)
            total = 0.0
            for j in range(a.size):
                total += np.float64(da[j]) * np.float64(a[j])
                a[j] *= w
            parts[block, row] = total


@njit(nogil=True, error_model="numpy", cache=True)
def input_bwd(lo, hi, gate, gate_step, up, up_step, dgates, dups, active, first, source, k, d, f, lanes, dx):
    """dx[token] += dgates w_gate + dups w_up, expert after expert, for each block of WIDE of dx's columns."""
    full = VECTORS * lanes
    buffer, left, ones, c = _scratch(active, first, dx.dtype)
    for task in range(lo, hi):
        d0 = task * WIDE
        wide = min(WIDE, d - d0)
        for e in active:
            count = first[e + 1] - first[e]
            pad = (count + ROWS - 1) // ROWS * ROWS
            c[: pad * WIDE] = 0
            left[count * SHORT :] = 0
            _rows(gate, e * gate_step + d0, d, f, wide, dgates, first[e], count, pad, buffer, left, ones, full, c)
            _rows(up, e * up_step + d0, d, f, wide, dups, first[e], count, pad, buffer, left, ones, full, c)
            for i in range(count):
                a, b = c[i * WIDE : i * WIDE + wide], dx[source[first[e] + i] // k, d0 : d0 + wide]
                for j in range(b.size):
                    b[j] += a[j]


@njit(nogil=True, error_model="numpy", cache=True)
def outer(lo, hi, a, b, first, lanes, out):
    """out[e,i,j] = sum over e's rows n of a[n,i] b[n,j], for each block of TALL of i of each expert; zeros for one without rows."""
    rows_all, d = out.shape[1], out.shape[2]
    blocks, full = (rows_all + TALL - 1) // TALL, VECTORS * lanes
    left, right, ones = np.empty(TALL * SHORT, out.dtype), np.empty(SHORT * WIDE, out.dtype), np.ones(ROWS, out.dtype)
    c, flat = np.empty(TALL * WIDE, out.dtype), out.reshape(-1)
    for task in range(lo, hi):
        e, i0 = task // blocks, task % blocks * TALL
        rows, start, end = min(TALL, rows_all - i0), first[e], first[e + 1]
        at = (e * rows_all + i0) * d
        if start == end:
            flat[at : at + rows * d] = 0
            continue
        padded = (rows + ROWS - 1) // ROWS * ROWS
        for n0 in range(start, end, SHORT):
            depth = min(SHORT, end - n0)
            left[:] = 0
            for n in range(depth):
                values = a[n0 + n, i0 : i0 + rows]
                for i in range(rows):
                    left[i * SHORT + n] = values[i]
            for j0 in range(0, d, WIDE):
                wide = min(WIDE, d - j0)
                for p0 in range(0, wide, full):
                    width = min(full, wide - p0)
                    panel = right[p0 * SHORT : (p0 + full) * SHORT]
                    if width < full:
                        panel[:] = 0
                    for n in range(depth):
                        values, target = b[n0 + n, j0 + p0 : j0 + p0 + width], panel[n * full : n * full + width]
                        for j in range(target.size):
                            target[j] = values[j]
                    direct = width == full and padded == rows and n0 == start
                    for i in range(0, padded, ROWS):
                        if direct:
                            block(left, i * SHORT, SHORT, 1, right, p0 * SHORT, full, flat, at + i * d + j0 + p0, d, depth, ones, 0)
                        else:
                            block(left, i * SHORT, SHORT, 1, right, p0 * SHORT, full, c, i * WIDE, WIDE, depth, ones, 0)
                            for r in range(i, min(i + ROWS, rows)):
                                target = flat[at + r * d + j0 + p0 : at + r * d + j0 + p0 + width]
                                values = c[r * WIDE : r * WIDE + width]
                                for j in range(target.size):
                                    target[j] = values[j] if n0 == start else target[j] + values[j]
