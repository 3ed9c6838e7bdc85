"""Decoding of multi-head latent attention over a paged cache, of numbers or of bytes, in 50-digit arithmetic; shares nothing with `ref`.

Equation: token t of sequence i is at place t % page of page block_table[i, t // page], t < cache_seqlens[i]; every head attends to all of
the token as the key and to its first channels as the value, causal aligned at the last token. No other slot is read.
A cache of bytes holds [c_kv | k_pe] as `cache` reads them.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from .attention import attend, softmax_scale, visible
from .cache import Layout, check_pages, read_token
from .edges import carrier, choose, fill
from .linear import Arrays, expect, integers, packed, rounded, scalars
from .tape import mpfs

Token = Callable[[int, int], list[Any]]  # (page, place) -> the key, as mpf


def cached_keys(token: Token, pages: int, page_size: int, table: list[int], length: int) -> list[list[Any]]:
    """The keys of one sequence."""
    if not 0 <= length <= page_size * len(table):
        raise ValueError(f"cache_seqlens {length}: there are {page_size * len(table)} slots in the block table")
    for place in table[: -(-length // page_size)]:
        if not 0 <= place < pages:
            raise ValueError(f"block_table names page {place} of {pages}")
    return [token(table[j // page_size], j % page_size) for j in range(length)]


def _decode(inputs: Arrays, at: dict[str, Any], c: int, token: Token, pages: int, page_size: int) -> Arrays:
    """(o, lse) over the tokens of a cache; values are the first c channels of the keys."""
    q, sink, causal = inputs["q"], inputs.get("sink"), choose("causal", at["causal"], (True, False))
    carrier(q)
    b, s, h, width = q.shape
    if not 0 <= c <= width:
        raise ValueError(f"values of {c} channels from keys of {width}")
    expect(inputs, {"block_table": (b, inputs["block_table"].shape[1]), "cache_seqlens": (b,), "sink": (h,)})
    sinks = [None] * h if sink is None else scalars(sink).tolist()
    o, lse = np.zeros((b, s, h, c), np.float64), np.full((b, h, s), np.inf)
    tables, lengths = integers(inputs["block_table"], "block_table"), integers(inputs["cache_seqlens"], "cache_seqlens")
    for n, (table, t) in enumerate(zip(tables, lengths, strict=True)):
        keys, queries = cached_keys(token, pages, page_size, table, t), scalars(q[n])
        values = [key[:c] for key in keys]
        for i, head in np.ndindex(s, h):
            seen = visible(i, s, t, causal)
            if seen:
                scale = softmax_scale(at["scale"], width)
                row, mass = attend(queries[i, head].tolist(), keys[:seen], values[:seen], scale, sinks[head])
                o[n, i, head], lse[n, head, i] = rounded(packed(row, (c,))), rounded(packed([mass], ()))
    return {"o": o, "lse": lse}


def forward(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """mla.decode: q, kv_cache, block_table, cache_seqlens, and perhaps sink -> o, lse."""
    at, kv_cache = fill({"scale": 0.0, "causal": True, "kv_lora_rank": 512}, attrs), inputs["kv_cache"]
    carrier(kv_cache)
    pages, page_size, _ = kv_cache.shape
    expect(inputs, {"kv_cache": (pages, page_size, inputs["q"].shape[3])})
    return _decode(inputs, at, at["kv_lora_rank"], lambda p, j: scalars(kv_cache[p, j]).tolist(), pages, page_size)


def fp8(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """mla.decode_fp8: q, kv_cache, block_table, cache_seqlens, and perhaps sink -> o, lse."""
    sizes = {"head_dim_v": 512, "qk_rope_head_dim": 64, "page_size": 64}
    at = fill({**sizes, "layout": "fp8_v32", "scale": 0.0, "causal": True}, attrs)
    r = at["qk_rope_head_dim"]
    layout = Layout(at["layout"], inputs["q"].shape[3] - r, r, at["page_size"])
    pages = check_pages(inputs["kv_cache"], layout)

    def token(page: int, place: int) -> list[Any]:
        c_kv, k_pe = read_token(pages[page], place, layout)
        return mpfs(c_kv + k_pe)

    return _decode(inputs, at, at["head_dim_v"], token, len(pages), layout.page_size)
