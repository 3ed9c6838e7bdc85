"""The serial kernels of MLA decode: query rows lie side by side in vectors, and a cached token is read where it lies.

Scores z[token, row] and the result o[row, channel] are both blocks of `_tile`: a token's channels, and a row's probabilities, are the
numbers that multiply; the queries, and a token's channels again, are the vectors.
"""

import math
from typing import NamedTuple

import numpy as np
from numba import njit

from ._common import flip
from ._tile import ROWS, VECTORS, block, block_onto, block_onto_narrow, block_row
from .mla_cache import read_tokens

TOKENS = 64  # scored at a time: their keys, scores and the queries fit in the L2 cache
LOG2E, LN2_HIGH, LN2_LOW = 1 / math.log(2), 0.693359375, math.log(2) - 0.693359375
MAGIC = 12582912.0  # 1.5 * 2^23: a float32 of this size has no fraction
LOWEST = -106.0  # float32's exp is 0 from here down


class Shape(NamedTuple):
    """What the kernels know of a call."""

    s: int
    h: int
    k: int
    dv: int
    rows: int  # s * h
    across: int  # query rows of a task, filled up to whole panels
    chunks: int  # tasks side by side
    panel: int  # query rows of a block
    page: int  # tokens
    causal: bool
    scale: float
    wide: bool


@njit(nogil=True, error_model="numpy")
def _exp(x):
    """e^x of a float32 x <= 0 to an ulp or two, 0 below LOWEST; NaN stays NaN. math.exp would be called once an element."""
    F = np.float32
    x = F(LOWEST) if x < F(LOWEST) else x
    n = F(F(x * F(LOG2E)) + F(MAGIC)) - F(MAGIC)
    r = F(x - n * F(LN2_HIGH)) - n * F(LN2_LOW)
    low = n < F(-100)
    n = n + F(64) if low else n  # in two steps where 2^n is subnormal
    p = F(1 / 5040)
    p = p * r + F(1 / 720)
    p = p * r + F(1 / 120)
    p = p * r + F(1 / 24)
    p = p * r + F(1 / 6)
    p = p * r + F(0.5)
    p = F(p * r) * r + r + F(1)
    power = flip(np.uint32(flip(F(n + F(MAGIC + 127))) << np.uint32(23)))
    return F(p * power) * (F(2.0**-64) if low else F(1))


@njit(nogil=True, error_model="numpy")
def _softmax(z, tokens, first, limit, p, top, total, factor):
    """z[token, row] becomes exp(scale z - top), 0 where the row does not see the token; top, total and factor (what the old sums are
    worth) follow. A NaN is no maximum and makes the total NaN."""
    F = z.dtype.type
    scale, none = F(p.scale), F(-np.inf)
    n = p.across
    high, base, part = np.empty(n, z.dtype), np.empty(n, z.dtype), np.zeros(n, z.dtype)
    high[:] = top
    hidden = p.causal and limit.min() < first + tokens
    for t in range(tokens):
        v = z[t]
        if hidden:
            for c in range(n):
                v[c] = v[c] * scale if first + t < limit[c] else none
        else:
            for c in range(n):
                v[c] *= scale
        for c in range(n):
            high[c] = v[c] if v[c] > high[c] else high[c]
    for c in range(n):
        base[c] = F(0) if high[c] == none else high[c]
        factor[c] = math.exp(top[c] - base[c])
        top[c] = high[c]
    for t in range(tokens):
        v = z[t]
        if p.wide:
            for c in range(n):
                v[c] = math.exp(v[c] - base[c])
        else:
            for c in range(n):
                v[c] = _exp(v[c] - base[c])
        for c in range(n):
            part[c] += v[c]
    for c in range(n):
        total[c] = total[c] * factor[c] + part[c]


@njit(nogil=True, error_model="numpy")
def _attend(keys, start, tokens, first, queries, limit, p, z, top, total, factor, o):
    """Adds `tokens` keys, at `start` of the flat keys, the sequence's tokens from `first` on, to top, total and o[row, channel]."""
    flat, out = z.reshape(-1), o.reshape(-1)
    step = p.k * p.panel
    for i in range(0, tokens - tokens % ROWS, ROWS):
        for j in range(p.across // p.panel):
            block(keys, start + i * p.k, p.k, 1, queries, j * step, p.panel, flat, i * p.across + j * p.panel, p.across, p.k, factor, 0)
    for i in range(tokens - tokens % ROWS, tokens):
        for j in range(p.across // p.panel):
            block_row(keys, start + i * p.k, p.k, 1, queries, j * step, p.panel, flat, i * p.across + j * p.panel, p.across, p.k, factor, 0)
    _softmax(z, tokens, first, limit, p, top, total, factor)
    # o[row, channel] = o * factor[row] + sum_token z[token, row] * key[token, channel]
    vector, channel = p.panel // VECTORS, 0
    while channel + vector <= p.dv:
        if channel + p.panel <= p.dv:
            for i in range(0, p.across, ROWS):
                block_onto(flat, i, 1, p.across, keys, start + channel, p.k, out, i * p.dv + channel, p.dv, tokens, factor, i)
            channel += p.panel
        else:
            for i in range(0, p.across, ROWS):
                block_onto_narrow(flat, i, 1, p.across, keys, start + channel, p.k, out, i * p.dv + channel, p.dv, tokens, factor, i)
            channel += vector
    for i in range(p.across if channel < p.dv else 0):
        for d in range(channel, p.dv):
            added = z.dtype.type(0)
            for t in range(tokens):
                added += z[t, i] * keys[start + t * p.k + d]
            o[i, d] = o[i, d] * factor[i] + added


@njit(nogil=True, error_model="numpy", cache=True)
def pack(lo, hi, q, p, packed):
    """packed[chunk, panel, k, row] of q[b, row, k], zeros where there are no more rows; a chunk of a sequence an index."""
    for i in range(lo, hi):
        queries, target = q[i // p.chunks], packed[i]
        for row in range(p.across):
            column, source = target[row // p.panel], i % p.chunks * p.across + row
            for k in range(p.k):
                column[k, row % p.panel] = queries[source, k] if source < p.rows else 0


@njit(nogil=True, error_model="numpy")
def _rows_of(task, lengths, p):
    """Sequence, chunk, first and last token, and how many tokens each row of the chunk sees."""
    i, chunk, begin, end = task[0], task[1], task[2], task[3]
    limit = np.empty(p.across, np.int64)
    for c in range(p.across):
        # the position of a row; bottom-right aligned
        limit[c] = max(lengths[i] - p.s + (chunk * p.across + c) // p.h + 1, 0) if p.causal else lengths[i]
    return i, chunk, begin, end, limit


@njit(nogil=True, error_model="numpy", cache=True)
def over_pages(lo, hi, tasks, keys, table, lengths, packed, p, top, total, o):
    """Tasks lo to hi over a cache of numbers: tokens in place where a page has TOKENS of them, else gathered."""
    z, factor, gathered = np.zeros((TOKENS, p.across), o.dtype), np.zeros(p.across, o.dtype), np.empty(TOKENS * p.k, o.dtype)
    for n in range(lo, hi):
        i, chunk, begin, end, limit = _rows_of(tasks[n], lengths, p)
        top[n], total[n], o[n] = -np.inf, 0, 0
        queries = packed[i * p.chunks + chunk].reshape(-1)
        t = begin
        while t < end:
            place = t % p.page
            count = min(TOKENS, end - t)
            if count <= p.page - place or p.page >= TOKENS:
                count = min(count, p.page - place)
                start = (table[i, t // p.page] * p.page + place) * p.k
                _attend(keys, start, count, t, queries, limit, p, z, top[n], total[n], factor, o[n])
            else:
                for j in range(count):
                    source = (table[i, (t + j) // p.page] * p.page + (t + j) % p.page) * p.k
                    row, key = gathered[j * p.k : (j + 1) * p.k], keys[source : source + p.k]
                    for k in range(p.k):
                        row[k] = key[k]
                _attend(gathered, 0, count, t, queries, limit, p, z, top[n], total[n], factor, o[n])
            t += count


@njit(nogil=True, error_model="numpy")
def _join(first, second, target):
    for k in range(first.size):
        target[k] = first[k]
    for k in range(second.size):
        target[first.size + k] = second[k]


@njit(nogil=True, error_model="numpy", cache=True)
def over_halves(lo, hi, tasks, latents, ropes, new_latents, new_ropes, lengths, packed, p, top, total, o):
    """Tasks lo to hi over latents[b,t,c] and ropes[b,t,r], then the new ones of s tokens: TOKENS tokens are joined at a time."""
    z, factor, keys = np.zeros((TOKENS, p.across), o.dtype), np.zeros(p.across, o.dtype), np.empty(TOKENS * p.k, o.dtype)
    cached = latents.shape[1]
    for n in range(lo, hi):
        i, chunk, begin, end, limit = _rows_of(tasks[n], lengths, p)
        top[n], total[n], o[n] = -np.inf, 0, 0
        queries = packed[i * p.chunks + chunk].reshape(-1)
        for t in range(begin, end, TOKENS):
            count = min(TOKENS, end - t)
            for j in range(count):
                target = keys[j * p.k : (j + 1) * p.k]
                if t + j < cached:
                    _join(latents[i, t + j], ropes[i, t + j], target)
                else:
                    _join(new_latents[i, t + j - cached], new_ropes[i, t + j - cached], target)
            _attend(keys, 0, count, t, queries, limit, p, z, top[n], total[n], factor, o[n])


@njit(nogil=True, error_model="numpy", cache=True)
def over_bytes(lo, hi, tasks, cache, table, lengths, packed, p, layout, r, d, top, total, o):
    """Tasks lo to hi over a cache of bytes: TOKENS tokens are unpacked at a time."""
    z, factor, keys = np.zeros((TOKENS, p.across), o.dtype), np.zeros(p.across, o.dtype), np.empty(TOKENS * p.k, o.dtype)
    slots = np.empty(TOKENS, np.int64)
    for n in range(lo, hi):
        i, chunk, begin, end, limit = _rows_of(tasks[n], lengths, p)
        top[n], total[n], o[n] = -np.inf, 0, 0
        queries = packed[i * p.chunks + chunk].reshape(-1)
        for t in range(begin, end, TOKENS):
            count = min(TOKENS, end - t)
            for j in range(count):
                slots[j] = table[i, (t + j) // p.page] * p.page + (t + j) % p.page
            read_tokens(0, count, cache, slots, layout, r, d, keys, p.k, keys, layout.c, p.k)
            _attend(keys, 0, count, t, queries, limit, p, z, top[n], total[n], factor, o[n])


@njit(nogil=True, error_model="numpy", cache=True)
def merge(lo, hi, firsts, sink, p, top, total, o, y, lse):
    """y[b, row, channel] and lse[b, h, s] of rows lo to hi of b * rows, from the tasks firsts[chunk] to firsts[chunk + 1] of theirs."""
    F = y.dtype.type
    added = np.empty(p.dv)
    for i in range(lo, hi):
        b, row = i // p.rows, i % p.rows
        chunk, c = b * p.chunks + row // p.across, row % p.across
        highest = -np.inf
        for n in range(firsts[chunk], firsts[chunk + 1]):
            highest = max(highest, np.float64(top[n, c]))
        base = 0.0 if highest == -np.inf else highest
        summed = 0.0
        added[:] = 0.0
        for n in range(firsts[chunk], firsts[chunk + 1]):
            share, part = math.exp(top[n, c] - base), o[n, c]
            summed += total[n, c] * share
            for d in range(p.dv):
                added[d] += share * part[d]
        logsum = base + math.log(summed) if summed != 0 else 0.0
        keep = 1 / (1 + math.exp(sink[row % p.h] - logsum)) if sink.size else 1.0
        for d in range(p.dv):
            y[b, row, d] = F(added[d] / summed * keep) if summed != 0 else F(0)
        lse[b, row % p.h, row // p.h] = F(logsum if summed != 0 else np.inf)
