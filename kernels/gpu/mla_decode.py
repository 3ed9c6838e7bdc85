"""MLA decode over a paged latent cache, of numbers or of bytes: keys and values are one head, the values the keys' first channels.

A block of threads takes one query row (sequence, position, head) and walks over its tokens, 64 at a time: each thread scores a token,
all see the scores, and each sums up every 64th channel.
"""

import math
from typing import Any

import numpy as np

from ...ref.formats import BF16, E4M3FN, FP32
from ...ref.mla_cache import LAYOUTS, LayoutName, check_cache
from ...ref.mla_decode import check_table
from ._call import arrays, empty, kernel_of, need, zeros
from ._device import THREADS, block_each, cuda, device_function, each, kernel
from .cast import decode_one, grid_of, round_one
from .norm import total

Array = Any


@device_function
def highest(part, start):
    """The largest of start and what the threads have put there. NaN is left out: its exp is NaN whatever is subtracted."""
    m = start
    for k in range(THREADS):
        m = part[k] if part[k] > m else m
    return m


@kernel
def _attend(q, keys, table, lengths, sink, sunk, scale, causal, o, lse):
    """keys[pages,page,k]: token t of sequence b is keys[table[b, t // page], t % page]."""
    z = cuda.shared.array(THREADS, q.dtype)
    F, none, me = q.dtype.type, q.dtype.type(-math.inf), cuda.threadIdx.x
    batch, s, h, width = q.shape
    page, dv = keys.shape[1], o.shape[3]
    for row in range(cuda.blockIdx.x, batch * s * h, cuda.gridDim.x):
        b, i, head = row // (s * h), row // h % s, row % h
        seen = lengths[b]
        if causal:
            seen = max(seen - s + i + 1, 0)
        top, sums = none, F(0)
        for c in range(me, dv, THREADS):
            o[b, i, head, c] = F(0)
        for first in range(0, seen, THREADS):
            here = min(THREADS, seen - first)
            score = F(0)
            if me < here:
                token = first + me
                block, slot = table[b, token // page], token % page
                for c in range(width):
                    score += q[b, i, head, c] * keys[block, slot, c]
            z[me] = score * scale if me < here else none
            cuda.syncthreads()
            high = highest(z, top)
            base = F(0) if high == none else high
            factor = F(math.exp(top - base))  # what the sums so far are worth
            weight = F(math.exp(z[me] - base))
            top = high
            cuda.syncthreads()  # every thread has seen the scores
            z[me] = weight
            cuda.syncthreads()
            sums = sums * factor + total(z)
            for c in range(me, dv, THREADS):
                add = F(0)
                for t in range(here):
                    token = first + t
                    add += z[t] * keys[table[b, token // page], token % page, c]
                o[b, i, head, c] = o[b, i, head, c] * factor + add
            cuda.syncthreads()  # z is written again in the next round
        if sums == F(0):  # no keys
            logsum, by = F(math.inf), F(0)
        else:
            logsum = top + F(math.log(sums))
            by = F(1) / sums
            if sunk:  # one more logit in the denominator: 1 / (1 + e^(sink - lse))
                more = sink[head] - logsum
                small = F(math.exp(-abs(more)))
                by *= (small if more > F(0) else F(1)) / (F(1) + small)
        for c in range(me, dv, THREADS):
            o[b, i, head, c] = o[b, i, head, c] * by
        if me == 0:
            lse[b, head, i] = logsum


@device_function
def little_endian(cache, page, at, count):
    """`count` bytes as an integer, the lowest first"""
    bits = 0
    for i in range(count):
        bits += int(cache[page, at + i]) << (8 * i)
    return bits


@kernel
def _read(cache, page_size, c, tile, apart, own, g8, g16, g32, keys):
    """keys[pages,page_size,c+r] = the bfloat16 values of a cache in bytes, a thread a channel.

    own: a token's bytes among the tokens. tile: channels of c to a scale, 0 where they are bfloat16. apart: the scales, e8m0, follow all
    tokens of the page, tiles and one byte each; else they are float32 and stand behind the channels.
    """
    width = keys.shape[2]
    tiles = (c + tile - 1) // tile if tile > 0 else 0
    for at in range(cuda.grid(1), keys.size, cuda.gridsize(1)):
        page, token, j = at // (width * page_size), at // width % page_size, at % width
        start = token * own
        if tile == 0:
            value = decode_one(little_endian(cache, page, start + 2 * j, 2), g16)
        elif j >= c:
            first = start + c if apart else start + c + 4 * tiles
            value = decode_one(little_endian(cache, page, first + 2 * (j - c), 2), g16)
        else:
            if apart:
                byte = int(cache[page, page_size * own + token * (tiles + 1) + j // tile])
                scale = math.nan if byte == 255 else math.ldexp(1.0, byte - 127)
            else:
                scale = decode_one(little_endian(cache, page, start + c + 4 * (j // tile), 4), g32)
            product = np.float32(np.float32(decode_one(int(cache[page, start + j]), g8)) * np.float32(scale))
            value = round_one(np.float64(product), 0.0, g16)[1]
        keys[page, token, j] = value


def _decoded(
    op: str, q: Array, keys: Array, table: Array, lengths: Array, sink: Array | None, dv: int, scale: float, causal: bool
) -> tuple[Array, Array]:
    (b, s, h, k), F = q.shape, q.dtype.type
    check_table(op, table, lengths, keys.shape[0], keys.shape[1])
    o, lse = empty((b, s, h, dv), q.dtype), empty((b, h, s), q.dtype)
    table, lengths = table.astype(arrays().int64), lengths.astype(arrays().int64)
    sinks = zeros((1,), q.dtype) if sink is None else sink
    block_each(_attend, b * s * h, q, keys, table, lengths, sinks, sink is not None, F(scale or k**-0.5), causal, o, lse)
    return o, lse


@kernel_of("mla.decode")
def mla_decode(
    q: Array,
    kv_cache: Array,
    block_table: Array,
    cache_seqlens: Array,
    sink: Array | None = None,
    *,
    kv_lora_rank: int = 512,
    scale: float = 0.0,
    causal: bool = True,
) -> tuple[Array, Array]:
    """z = scale sum_k q[b,s,h,k] K_b[t,k],   lse[b,h,s] = log sum_t exp z,   o[b,s,h,c] = sum_t exp(z - lse) K_b[t,c],   c < kv_lora_rank.

    K_b[t] = kv_cache[block_table[b, t // page], t % page] for t < cache_seqlens[b]: one key head [c_kv | k_pe]. Query i of a causal
    sequence sees its first cache_seqlens[b] - s + i + 1 tokens; memory beyond a sequence's length is not read. scale=0 stands for k^(-1/2).
    No keys: o = 0, lse = +inf. A sink is one more logit of its head in the denominator: o gains 1/(1 + exp(sink - lse)), lse stays.

    ValueError: dtypes or shapes do not fit, a length or a block is outside, an attribute has no such value.
    """
    op, (_, page, k) = "mla.decode", kv_cache.shape
    need(k > 0 and page > 0, op, "kv_cache", f"of shape {kv_cache.shape}", "at least one token a page and one channel")
    need(0 < kv_lora_rank <= k, op, "kv_lora_rank", kv_lora_rank, f"1 to {k}, the cache's width")
    return _decoded(op, q, kv_cache, block_table, cache_seqlens, sink, int(kv_lora_rank), scale, bool(causal))


@kernel_of("mla.decode_fp8")
def mla_decode_fp8(
    q: Array,
    kv_cache: Array,
    block_table: Array,
    cache_seqlens: Array,
    sink: Array | None = None,
    *,
    head_dim_v: int = 512,
    qk_rope_head_dim: int = 64,
    layout: LayoutName = "fp8_v32",
    page_size: int = 64,
    scale: float = 0.0,
    causal: bool = True,
) -> tuple[Array, Array]:
    """mla_decode over kv_cache[pages,bytes] uint8, whose pages are read into numbers first: K_b[t] = [c_kv | k_pe] as bfloat16 values.

    o[b,s,h,v] for v < head_dim_v. A cached NaN that is read is NaN. ValueError as mla_decode, and: no page of so many bytes.
    """
    op, k, r = "mla.decode_fp8", q.shape[3], int(qk_rope_head_dim)
    need(0 < head_dim_v <= k, op, "head_dim_v", head_dim_v, f"1 to {k}, the width of q")
    need(0 < r < k, op, "qk_rope_head_dim", r, f"1 to {k - 1}, less than the width of q")
    check_cache(op, kv_cache, layout, page_size, k - r, r)
    how = LAYOUTS[layout]
    keys = empty((kv_cache.shape[0], int(page_size), k), q.dtype)
    grids = grid_of(E4M3FN), grid_of(BF16, "nan"), grid_of(FP32, "nan")
    each(_read, keys.size, kv_cache, page_size, k - r, how.tile, how.apart, how.token_bytes(k - r, r)[0], *grids, keys)
    return _decoded(op, q, keys, block_table, cache_seqlens, sink, int(head_dim_v), scale, bool(causal))
