"""MLA decode over a paged latent cache, of numbers or of bytes: keys and values are one head, read once.

Work is cut into tasks of some query rows (position and head) by some tokens of one sequence, whose results are merged by their sums.
"""

import math
import numbers
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._common import array_of, floats, integer, need, run
from ._decode import TOKENS, Shape, merge, over_bytes, over_halves, over_pages, pack
from ._tile import VECTORS, lanes
from .matvec import readonly
from .mla_cache import INTEGERS, pages_of, reading

WIDEST = 128  # query rows of a task
LEAST = 512  # tokens of a task, where a sequence has as many
TASKS = 64  # that are aimed at: a sequence is cut into more parts where there are fewer sequences


def _plan(lengths: NDArray[np.int64], p: Shape) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tasks (sequence, chunk, first and last token) and where each chunk's begin. They depend on the sizes only, not on the threads."""
    parts = max(1, -(-TASKS // max(1, lengths.size * p.chunks)))
    tasks, firsts = [], [0]
    for i, length in enumerate(lengths.tolist()):
        step = max(LEAST, -(-length // parts // TOKENS) * TOKENS)
        for chunk in range(p.chunks):
            tasks += [(i, chunk, t, min(t + step, length)) for t in range(0, length, step)]
            firsts.append(len(tasks))
    return np.array(tasks, np.int64).reshape(-1, 4), np.array(firsts, np.int64)


def _decode(
    op: str,
    q: NDArray[Any],
    lengths: NDArray[np.int64],
    sink: NDArray[Any] | None,
    dv: int,
    page: int,
    scale: float,
    causal: Any,
    over: Callable,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """o and lse; over(tasks, packed, p, top, total, o) runs the tasks."""
    b, s, h, k = q.shape
    panel = VECTORS * lanes(q.itemsize)
    across = min(WIDEST, -(-s * h // panel) * panel)
    chunks = -(-s * h // max(across, 1))
    p = Shape(s, h, k, dv, s * h, across, chunks, panel, page, causal, scale, q.dtype == np.float64)
    y, lse = np.empty((b, s, h, dv), q.dtype), np.empty((b, h, s), q.dtype)
    if not y.size:
        return y, lse
    tasks, firsts = _plan(lengths, p)
    packed = np.empty((b * chunks, across // panel, k, panel), q.dtype)
    run(pack, b * chunks, across * k, q.reshape(b, s * h, k), p, packed)
    top, total, o = (np.empty(shape, q.dtype) for shape in ((len(tasks), across), (len(tasks), across), (len(tasks), across, dv)))
    over(tasks, packed, p, top, total, o)
    sink = floats(op, "sink", np.empty(0, q.dtype)) if sink is None else sink  # Numba tells read-only arrays from others
    run(merge, b * s * h, 4 * dv, firsts, sink, p, top, total, o, y.reshape(b, s * h, dv), lse)
    return y, lse


def _work(tasks: NDArray[np.int64], p: Shape) -> int:
    """Elements of a copy that a task is worth, for `run`."""
    return int((tasks[:, 3] - tasks[:, 2]).max(initial=1)) * p.across * (p.k + p.dv) // 16


def _common(
    op: str, q: Any, block_table: Any, cache_seqlens: Any, sink: Any, scale: Any, causal: Any
) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64], NDArray[Any] | None]:
    """q, block_table and cache_seqlens as int64, sink, after checks that need no cache."""
    ok = isinstance(scale, numbers.Real) and not isinstance(scale, bool) and math.isfinite(scale)
    need(ok, op, "scale", repr(scale), "a finite number")
    need(isinstance(causal, (bool, np.bool_)), op, "causal", repr(causal), "True or False")
    q = floats(op, "q", q, 4)
    table, lengths = array_of(op, "block_table", block_table, INTEGERS, 2), array_of(op, "cache_seqlens", cache_seqlens, INTEGERS, 1)
    b, _, h, k = q.shape
    need(k > 0, op, "q", f"of shape {q.shape}", "at least one channel")
    need(table.shape[0] == b, op, "block_table", f"of shape {table.shape}", f"shape ({b}, blocks) for q of shape {q.shape}")
    need(lengths.shape == (b,), op, "cache_seqlens", f"of shape {lengths.shape}", f"shape ({b},) for q of shape {q.shape}")
    if sink is not None:
        sink = floats(op, "sink", sink, 1)
        need(sink.shape == (h,) and sink.dtype == q.dtype, op, "sink", f"{sink.dtype}{list(sink.shape)}", f"{q.dtype}[{h}] for q")
    return q, table, lengths, sink


def _check_table(op: str, table: NDArray[Any], lengths: NDArray[Any], pages: int, page: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Both as int64, after checks that each sequence lies in its blocks and each of those in the cache."""
    blocks = table.shape[1]
    for i, length in enumerate(lengths.tolist()):
        need(0 <= length <= blocks * page, op, f"cache_seqlens[{i}]", length, f"0 to {blocks * page}, {blocks} blocks of {page}")
        used = table[i, : -(-length // page)]
        outside = (used < 0) | (used >= pages)
        if outside.any():
            j = int(np.argmax(outside))
            need(False, op, f"block_table[{i}, {j}]", used[j], f"0 to {pages - 1}")
    return table.astype(np.int64), lengths.astype(np.int64)


def decode_halves(
    op: str, q: NDArray[Any], cached: tuple[NDArray[Any], NDArray[Any]], new: tuple[NDArray[Any], NDArray[Any]], scale: float
) -> NDArray[Any]:
    """mla_decode's o[b,s,h,c], causal, over cached c_kv[b,t,c] and k_pe[b,t,r] and those of the s new tokens, for checked arrays."""
    b, s = q.shape[:2]
    latents, ropes, new_latents, new_ropes = (readonly(a) for a in (*cached, *new))
    lengths = np.full(b, latents.shape[1] + s, np.int64)

    def over(tasks: Any, packed: Any, p: Shape, top: Any, total: Any, o: Any) -> None:
        keys = latents, ropes, new_latents, new_ropes
        run(over_halves, len(tasks), _work(tasks, p), tasks, *keys, lengths, packed, p, top, total, o)

    return _decode(op, readonly(q), lengths, None, latents.shape[2], TOKENS, scale, True, over)[0]


def mla_decode(
    q: NDArray[Any],
    kv_cache: NDArray[Any],
    block_table: NDArray[Any],
    cache_seqlens: NDArray[Any],
    sink: NDArray[Any] | None = None,
    *,
    kv_lora_rank: int = 512,
    scale: float = 0.0,
    causal: bool = True,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """z = scale sum_k q[b,s,h,k] K_b[t,k],  lse[b,h,s] = log sum_t exp z,  o[b,s,h,c] = sum_t exp(z - lse) K_b[t,c],  c < kv_lora_rank.

    K_b[t] = kv_cache[block_table[b, t // page], t % page] for t < cache_seqlens[b]: one key head [c_kv | k_pe]. q[b,s,h,k],
    kv_cache[pages,page,k], sink[h], o[b,s,h,kv_lora_rank] and lse[b,h,s] are float32 or float64 alike, block_table[b,blocks] and
    cache_seqlens[b] integers. causal: query i of a sequence sees its first cache_seqlens[b] - s + i + 1 tokens. Memory beyond a sequence's
    length is not read. scale=0 stands for k^(-1/2). No keys: o = 0, lse = +inf. A sink is one more logit of its head in the denominator:
    o gains the factor 1/(1 + exp(sink - lse)), lse stays.

    Sums over tokens in blocks of 64, the blocks' in order, long sequences in parts that are merged: the same bits on any number of
    threads. ValueError: dtypes or shapes do not fit, a length or a block is outside, an attribute has no such value.
    """
    op = "mla_decode"
    dv = integer(op, "kv_lora_rank", kv_lora_rank)
    q, table, lengths, sink = _common(op, q, block_table, cache_seqlens, sink, scale, causal)
    kv_cache = floats(op, "kv_cache", kv_cache, 3)
    pages, page, k = kv_cache.shape
    ok = k == q.shape[3] and kv_cache.dtype == q.dtype and page > 0
    need(ok, op, "kv_cache", f"{kv_cache.dtype}{list(kv_cache.shape)}", f"{q.dtype}[pages, page, {q.shape[3]}] for q, page >= 1")
    need(dv <= k, op, "kv_lora_rank", dv, f"1 to {k}, the cache's width")
    table, lengths = _check_table(op, table, lengths, pages, page)

    def over(tasks: Any, packed: Any, p: Shape, top: Any, total: Any, o: Any) -> None:
        run(over_pages, len(tasks), _work(tasks, p), tasks, kv_cache.reshape(-1), table, lengths, packed, p, top, total, o)

    return _decode(op, q, lengths, sink, dv, page, float(scale) or k**-0.5, causal, over)


def mla_decode_fp8(
    q: NDArray[Any],
    kv_cache: NDArray[np.uint8],
    block_table: NDArray[Any],
    cache_seqlens: NDArray[Any],
    sink: NDArray[Any] | None = None,
    *,
    head_dim_v: int = 512,
    qk_rope_head_dim: int = 64,
    layout: str = "fp8_v32",
    page_size: int = 64,
    scale: float = 0.0,
    causal: bool = True,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """z = scale sum_k q[b,s,h,k] K_b[t,k],  lse[b,h,s] = log sum_t exp z,  o[b,s,h,v] = sum_t exp(z - lse) K_b[t,v],  v < head_dim_v.

    K_b[t] = [c_kv | k_pe] as cache_read gives token t % page_size of page block_table[b, t // page_size] of kv_cache[pages,bytes] uint8:
    bfloat16 values, unpacked 64 tokens at a time. The rest as mla_decode. A cached NaN that is read is NaN.

    ValueError: dtypes or shapes do not fit, a length or a block is outside, an attribute has no such value.
    """
    op = "mla_decode_fp8"
    dv, r = integer(op, "head_dim_v", head_dim_v), integer(op, "qk_rope_head_dim", qk_rope_head_dim)
    q, table, lengths, sink = _common(op, q, block_table, cache_seqlens, sink, scale, causal)
    k = q.shape[3]
    need(dv <= k, op, "head_dim_v", dv, f"1 to {k}, the width of q")
    need(r < k, op, "qk_rope_head_dim", r, f"1 to {k - 1}, less than the width of q")
    cache, where = pages_of(op, kv_cache, layout, page_size, k - r, r)
    table, lengths = _check_table(op, table, lengths, cache.shape[0], page_size)

    def over(tasks: Any, packed: Any, p: Shape, top: Any, total: Any, o: Any) -> None:
        sizes = len(tasks), _work(tasks, p)
        run(over_bytes, *sizes, tasks, cache.reshape(-1), table, lengths, packed, p, where, *reading(), top, total, o)

    return _decode(op, q, lengths, sink, dv, page_size, float(scale) or k**-0.5, causal, over)
