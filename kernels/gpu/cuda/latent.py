"""Launchers of mla_decode.cu and merge.cu: absorbed MLA over a paged cache of bfloat16 numbers or FP8 bytes, in parts that are merged."""

from typing import Any

import numpy as np

from ....ref.mla_cache import LAYOUTS
from .launch import Launch, aligned, checked, fits, need, runner, taken
from .quantize import INPUTS

ROWS, KEYS, THREADS, MOST_SHARED = 64, 64, 256, {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 120: 99 << 10}
FP8 = {"fp8_v32": 1, "fp8_v4": 2}
INTEGERS = (np.int32, np.int64)


def shared_of(width: int, stages: int, token_bytes: int) -> int:
    """Dynamic shared memory: queries, key blocks, weights, an exchange of row statistics, FP8 tokens as they come"""
    row = -(-width // 64) * 128
    return ROWS * row * (1 + stages) + ROWS * KEYS * 2 + 2 * ROWS * 4 + KEYS * token_bytes


def most_shared() -> int:
    """Bytes of shared memory that a block can have here"""
    return MOST_SHARED[max(m for m in MOST_SHARED if m <= runner().capability)]


def parts_of(multiprocessors: int, tiles: int, key_blocks: int) -> int:
    """How many parts the keys are split into: enough to give every multiprocessor one"""
    return max(1, min(multiprocessors // max(tiles, 1), key_blocks, 32))


def _decode(
    kernel: str, q: Any, kv_cache: Any, table: Any, seqlens: Any, sink: Any, c: int, scale: float, causal: bool, layout: int, *paged: Any
) -> tuple[Any, Any]:
    """paged: page, page_bytes, token_bytes, rope."""
    (b, s, h, k), on, (page, page_bytes, token_bytes, rope) = q.shape, runner(), paged
    fits(k % 8 == 0 and c % 8 == 0 and rope % 8 == 0, kernel, "q", f"of width {k} for {c} values", "widths that are multiples of 8")
    need(0 < c <= k, kernel, "the width of values", c, f"1 to {k}, the width of q")
    fits(b <= 65535, kernel, "q", f"of {b} sequences", "at most 65535")
    table, seqlens = taken(kernel, "block_table", table, INTEGERS, 2), taken(kernel, "cache_seqlens", seqlens, INTEGERS, 1)
    blocks, pages = table.shape[1], kv_cache.shape[0]
    need(table.shape[0] == b and seqlens.shape == (b,), kernel, "block_table", f"of {table.shape[0]} sequences", f"{b}, those of q")
    if b and checked():
        need(
            bool(((seqlens >= 0) & (seqlens <= blocks * page)).all()), kernel, "cache_seqlens", "outside its range", f"0 to {blocks * page}"
        )
        starts = on.array(np.arange(blocks) * page)
        used = starts[None, :] < seqlens[:, None]
        need(not bool((used & ((table < 0) | (table >= pages))).any()), kernel, "block_table", "outside its range", f"0 to {pages - 1}")
    if sink is not None:
        sink = taken(kernel, "sink", sink, (np.float32,), 1)
        need(sink.shape == (h,), kernel, "sink", f"of shape {sink.shape}", f"({h},), one number a head")
    table, seqlens = on.array(table.astype(np.int32)), on.array(seqlens.astype(np.int32))
    most = most_shared()
    stages = 2 if layout == 0 and shared_of(k, 2, token_bytes) <= most else 1
    shared = shared_of(k, stages, token_bytes)
    fits(shared <= most, kernel, "q", f"of width {k}: {shared} bytes of shared memory", f"at most {most}")
    need(aligned(q, kv_cache), kernel, "q or kv_cache", "not aligned", "addresses that are multiples of 16")
    o, lse = on.empty((b, s, h, c), np.uint16), on.empty((b, h, s), np.float32)
    if b * s * h == 0:
        return o, lse
    tiles = -(-s * h // ROWS)
    parts = parts_of(on.multiprocessors, tiles * b, -(-blocks * page // KEYS))
    o_parts, lse_parts = (on.empty((parts, b, s, h, c), np.float32), on.empty((parts, b, h, s), np.float32)) if parts > 1 else (None, lse)
    piece = 16 if token_bytes % 16 == 0 and page_bytes % 16 == 0 else 4
    defines = (("K", k), ("C", c), ("LAYOUT", layout), ("ROPE", rope), ("STAGES", stages), ("PIECE", piece))
    numbers = (
        np.int32(s),
        np.int32(h),
        np.int32(blocks),
        np.int32(page),
        np.int64(page_bytes),
        np.float32(scale or k**-0.5),
        np.int32(causal),
    )
    args = (q, kv_cache, table, seqlens, sink, o, lse_parts, o_parts, *numbers)
    on.launch(Launch("mla_decode", "mla_decode", defines, (tiles, b, parts), THREADS, args, shared))
    if parts > 1:
        _merge(o_parts, lse_parts, sink, o, lse)
    return o, lse


def _merge(o_parts: Any, lse_parts: Any, sink: Any, o: Any, lse: Any) -> None:
    p, b, s, h, v = o_parts.shape
    args = o_parts, lse_parts, sink, o, lse, *(np.int32(n) for n in (p, s, h, v))
    runner().launch(Launch("merge", "merge", (("TYPE", INPUTS[np.dtype(o.dtype)]),), (b * s * h,), 128, args))


def attention_merge(o_parts: Any, lse_parts: Any) -> tuple[Any, Any]:
    """lse = log Σ_p exp lse_parts,   o[b,s,h,v] = Σ_p exp(lse_parts[p] - lse) o_parts[p], in float32; lse = ±inf marks an empty part"""
    name, on = "attention.merge", runner()
    o_parts, lse_parts = taken(name, "o_parts", o_parts, (np.float32,), 5), taken(name, "lse_parts", lse_parts, (np.float32,), 4)
    p, b, s, h, v = o_parts.shape
    need(p >= 1, name, "o_parts", "without parts", "one at least")
    need(lse_parts.shape == (p, b, h, s), name, "lse_parts", f"of shape {lse_parts.shape}", f"{(p, b, h, s)}")
    o, lse = on.empty((b, s, h, v), np.float32), on.empty((b, h, s), np.float32)
    if b * s * h:
        _merge(o_parts, lse_parts, None, o, lse)
    return o, lse


def mla_decode(
    q: Any,
    kv_cache: Any,
    block_table: Any,
    cache_seqlens: Any,
    sink: Any = None,
    *,
    kv_lora_rank: int = 512,
    scale: float = 0.0,
    causal: bool = True,
) -> tuple[Any, Any]:
    """o[b,s,h,kv_lora_rank] (bfloat16 bits) and lse[b,h,s] (float32); q[b,s,h,k] and kv_cache[pages,page,k] are bfloat16 bits in uint16

    Widths are multiples of 8. No keys: o = 0, lse = +inf.
    """
    name = "mla.decode"
    q, kv_cache = taken(name, "q", q, (np.uint16,), 4), taken(name, "kv_cache", kv_cache, (np.uint16,), 3)
    _, page, width = kv_cache.shape
    need(width == q.shape[3], name, "kv_cache", f"of width {width}", f"{q.shape[3]}, that of q")
    args = (q, kv_cache, block_table, cache_seqlens, sink, kv_lora_rank, scale, causal, 0)
    return _decode(name, *args, page, page * width * 2, 0, 0)


def mla_decode_fp8(
    q: Any,
    kv_cache: Any,
    block_table: Any,
    cache_seqlens: Any,
    sink: Any = None,
    *,
    head_dim_v: int = 512,
    qk_rope_head_dim: int = 64,
    layout: str = "fp8_v32",
    page_size: int = 64,
    scale: float = 0.0,
    causal: bool = True,
) -> tuple[Any, Any]:
    """mla.decode over kv_cache[pages,bytes] (uint8) in FlashMLA's FP8 layouts, fp8_v32 and fp8_v4 (ref/mla_cache.py)"""
    name = "mla.decode_fp8"
    q, kv_cache = taken(name, "q", q, (np.uint16,), 4), taken(name, "kv_cache", kv_cache, (np.uint8,), 2)
    need(layout in FP8, name, "layout", repr(layout), " or ".join(FP8))
    k, r = q.shape[3], qk_rope_head_dim
    need(0 < r < k, name, "qk_rope_head_dim", r, f"1 to {k - 1}, less than the width of q")
    page_bytes, (token_bytes, _) = LAYOUTS[layout].page_bytes(page_size, k - r, r), LAYOUTS[layout].token_bytes(k - r, r)
    need(kv_cache.shape[1] == page_bytes, name, "kv_cache", f"of {kv_cache.shape[1]} bytes a page", f"{page_bytes}")
    args = (q, kv_cache, block_table, cache_seqlens, sink, head_dim_v, scale, causal, FP8[layout])
    return _decode(name, *args, page_size, page_bytes, token_bytes, r)
