"""attention.merge, and MLA's decode over pages of numbers or of FP8 bytes."""

from collections.abc import Callable
from typing import Any

import numpy as np

from .attention import LN2, LOG2E, Core, Two, attend, blocks, causal_mask, divided, eager, exp2_fast, key_by_key, split, tf32, whole, wide
from .cache import READERS
from .floats import Array, to_bf16
from .linear import product, product_double, product_sequential, product_split, product_steps, product_tf32

# attention.merge: [p,b,s,h,v] and [p,b,h,s]


def heads_last(x: Array) -> Array:
    """[...,h,s] to [...,s,h,1]"""
    return np.swapaxes(x, -1, -2)[..., None]


def no_part(lse_parts: Array) -> Array:
    return np.where(np.isinf(lse_parts), lse_parts.dtype.type(-np.inf), lse_parts)


def merge_at_once(o_parts: Array, lse_parts: Array) -> Two:
    """Weights of all parts, then one sum."""
    lse = no_part(lse_parts)
    m = lse.max(0)
    m = np.where(np.isinf(m), m.dtype.type(0), m)
    e = np.exp(lse - m)
    total = e.sum(0)
    w = heads_last(divided(e, total[None]))
    o = np.where(w > 0, o_parts * w, o_parts.dtype.type(0)).sum(0)
    return o, np.where(total > 0, np.log(np.where(total > 0, total, total.dtype.type(1))) + m, total.dtype.type(np.inf))


def merge_base2(o_parts: Array, lse_parts: Array) -> Two:
    """In powers of two of the differences: the weights are 2^((lse_p - m) log2 e - log2 Σ)."""
    lse = no_part(lse_parts)
    m = lse.max(0)
    m = np.where(np.isinf(m), m.dtype.type(0), m)
    gap = (lse - m) * LOG2E
    total = np.exp2(gap).sum(0)
    more = np.log2(np.where(total > 0, total, total.dtype.type(1)))
    w = heads_last(np.exp2(gap - more))
    o = np.zeros_like(o_parts[0])
    for part, weight in zip(o_parts, w, strict=True):
        o = o + np.where(weight > 0, part, part.dtype.type(0)) * weight
    return o, np.where(total > 0, m + more * LN2, total.dtype.type(np.inf))


def merge_in_pairs(o_parts: Array, lse_parts: Array) -> Two:
    """Part after part onto a running result, by logaddexp."""
    lse = no_part(lse_parts)
    o, have = np.zeros_like(o_parts[0]), np.full_like(lse[0], -np.inf)
    for part, own in zip(o_parts, lse, strict=True):
        both = np.logaddexp(have, own)
        safe = np.where(np.isinf(both), both.dtype.type(0), both)
        left, right = heads_last(np.exp(have - safe)), heads_last(np.exp(own - safe))
        o = o * left + np.where(right > 0, part, part.dtype.type(0)) * right
        have = both
    return o, np.where(np.isinf(have), have.dtype.type(np.inf), have)


def merge_difference(o_parts: Array, lse_parts: Array) -> Two:
    """o + σ(lse_p - lse) (o_p - o), from whichever of the two weighs more; the last part first"""
    lse = no_part(lse_parts)
    one = lse.dtype.type(1)
    o, have = np.zeros_like(o_parts[0]), np.full_like(lse[0], -np.inf)
    for part, own in zip(o_parts[::-1], lse[::-1], strict=True):
        gap = np.where(np.isinf(own), -np.inf, np.where(np.isinf(have), np.inf, own - np.where(np.isinf(have), 0, have))).astype(lse.dtype)
        share = heads_last(one / (one + np.exp(np.abs(gap))))  # of the lighter
        turned = heads_last(gap > 0)
        heavy, light = np.where(turned, part, o), np.where(turned, o, part)
        o = heavy + np.where(share > 0, share * (np.where(share > 0, light, one) - heavy), one * 0)
        have = np.where(gap == -np.inf, have, np.where(gap == np.inf, own, np.maximum(own, have) + np.log1p(np.exp(-np.abs(gap)))))
    return o, np.where(np.isinf(have), have.dtype.type(np.inf), have)


def merge_double(o_parts: Array, lse_parts: Array) -> Two:
    o, lse = merge_at_once(o_parts.astype(np.float64), lse_parts.astype(np.float64))
    return o.astype(o_parts.dtype), lse.astype(lse_parts.dtype)


def merge_eager(o_parts: Array, lse_parts: Array) -> Two:
    """Every operation rounds to bfloat16; sums accumulate in float32."""
    r = to_bf16
    lse = no_part(lse_parts)
    m = lse.max(0)
    m = np.where(np.isinf(m), np.float32(0), m)
    total = r(r(np.exp(r(lse - m))).sum(0))
    whole_lse = r(r(np.log(np.where(total > 0, total, np.float32(1)))) + m)
    w = heads_last(r(np.exp(r(lse - whole_lse))))
    o = r(r(np.where(w > 0, o_parts, np.float32(0)) * w).sum(0))
    return o, np.where(total > 0, whole_lse, np.float32(np.inf))


MERGES = (merge_at_once, merge_base2, merge_in_pairs, merge_difference, merge_double)


def _merge_back(forward: Callable, order: str) -> Callable:
    def backward(o_parts: Array, lse_parts: Array, do: Array, dlse: Array, *, to: Callable) -> Two:
        o, lse = forward(o_parts, lse_parts)
        dead = np.isinf(lse_parts)
        safe = np.where(np.isinf(lse), lse.dtype.type(0), lse)
        gap = np.where(dead, lse.dtype.type(-np.inf), lse_parts - safe)
        w = np.exp2(gap * LOG2E) if order == "base-2" else np.exp(gap)
        spread = heads_last(w)
        parts = np.where(heads_last(dead), o_parts.dtype.type(0), o_parts)
        if order == "once":
            inner = np.einsum("bshv,pbshv->pbhs", do, parts - o)
        else:  # two sums, the second of the stored o
            inner = np.swapaxes((do * parts).sum(-1), -1, -2) - np.swapaxes((do * to(o)).sum(-1), -1, -2)
        return spread * do, np.where(dead, lse.dtype.type(0), w * (inner + np.where(np.isinf(lse), lse.dtype.type(0), dlse)))

    return backward


def merge_back_weights(o_parts: Array, lse_parts: Array, do: Array, dlse: Array, *, to: Callable) -> Two:
    """The softmax's own backward: a_p = <do, o_p>, less Σ_q w_q a_q; o is not needed."""
    lse = no_part(lse_parts)
    m = lse.max(0)
    e = np.exp(lse - np.where(np.isinf(m), m.dtype.type(0), m))
    w = divided(e, e.sum(0)[None])
    parts = np.where(heads_last(w) > 0, o_parts, o_parts.dtype.type(0))
    a = np.swapaxes(np.add.accumulate(do * parts, axis=-1)[..., -1], -1, -2)
    return heads_last(w) * do, np.where(w > 0, w * (a - (w * a).sum(0) + dlse), w.dtype.type(0))


def merge_back_double(o_parts: Array, lse_parts: Array, do: Array, dlse: Array, *, to: Callable) -> Two:
    arrays = (a.astype(np.float64) for a in (o_parts, lse_parts, do, dlse))
    a, b = merge_back_weights(*arrays, to=to)
    return a.astype(do.dtype), b.astype(do.dtype)


def merge_back_eager(o_parts: Array, lse_parts: Array, do: Array, dlse: Array, *, to: Callable) -> Two:
    r = to_bf16
    o, lse = merge_eager(o_parts, lse_parts)
    dead = np.isinf(lse_parts)
    w = r(np.exp(r(np.where(dead, np.float32(-np.inf), lse_parts - np.where(np.isinf(lse), np.float32(0), lse)))))
    parts = np.where(heads_last(dead), np.float32(0), o_parts)
    inner = np.swapaxes(r(r(do * r(parts - o)).sum(-1)), -1, -2)
    return r(heads_last(w) * do), np.where(dead, np.float32(0), r(w * r(inner + dlse)))


MERGES_BACK = {
    "at-once": _merge_back(merge_at_once, "once"),
    "base-2-two-sums": _merge_back(merge_base2, "base-2"),
    "pairs-two-sums": _merge_back(merge_in_pairs, "two"),
    "difference": _merge_back(merge_difference, "once"),
    "weights": merge_back_weights,
    "double": merge_back_double,
}

# decode: keys of sequence i, and how they are attended to


def rope_apart(q: Array, k: Array) -> Array:
    """The last eighth of the channels in a product of its own, as latent and rope are kept apart."""
    c = q.shape[1] - max(q.shape[1] // 8, 1)
    return product(q[:, :c], k[:, :c]) + product(q[:, c:], k[:, c:])


PARTS: dict[str, tuple[Callable, Core, bool]] = {
    "gathered": (product, whole, False),
    "page-by-page": (product_steps, blocks(8, base2=True), False),
    "rope-apart": (rope_apart, blocks(64), False),
    "split-kv": (product_split, split(4, blocks(16)), True),
    "key-by-key": (product_sequential, key_by_key, False),
    "lazy-fast-exp": (product, blocks(16, base2=True, slack=8.0, exp2=exp2_fast, backwards=True), False),
    "double": (product_double, wide, False),
}
EAGER_PARTS = (product, eager, False)
SINGLE = ("lazy-fast-exp",)


def over_sequences(parts: tuple, to: Callable, q: Array, keys: list[Array], dv: int, sink: Any, scale: float, causal: bool) -> Two:
    products, core, first = parts
    done = []
    for own, k in zip(q, keys, strict=True):
        seen = causal_mask(len(own), len(k), causal)
        done.append(attend(products, core, to, own, k[:, None, :], k[:, None, :dv], seen, scale, sink, first))
    o, lse = (np.stack(part) for part in zip(*done, strict=True))
    return o, lse


def _decode(name: str, parts: tuple) -> Callable:
    """Odd ones take whole pages and hide what lies beyond the length; the others gather token by token."""
    padded = name in PARTS and list(PARTS).index(name) % 2 == 1

    def forward(
        q: Array,
        kv_cache: Array,
        block_table: Array,
        cache_seqlens: Array,
        sink: Array | None = None,
        *,
        to: Callable,
        kv_lora_rank: int = 512,
        scale: float = 0.0,
        causal: bool = True,
    ) -> Two:
        page = kv_cache.shape[1]
        if not padded:
            keys = [
                np.array([kv_cache[row[t // page], t % page] for t in range(n)]).reshape(n, q.shape[-1]).astype(q.dtype)
                for row, n in zip(block_table.tolist(), cache_seqlens.tolist(), strict=True)
            ]
            return over_sequences(parts, to, q, keys, kv_lora_rank, sink, scale, causal)
        products, core, first = parts
        done = []
        for own, row, n in zip(q, block_table, cache_seqlens.tolist(), strict=True):
            k = kv_cache[row].reshape(-1, q.shape[-1])
            there = np.arange(len(k)) < n
            k = np.where(there[:, None], k, q.dtype.type(0))
            seen = np.broadcast_to(there, (len(own), len(k)))
            if causal:
                seen = np.arange(len(k))[None, :] < n - len(own) + 1 + np.arange(len(own))[:, None]
            done.append(attend(products, core, to, own, k[:, None], k[:, None, :kv_lora_rank], seen & there, scale, sink, first))
        o, lse = (np.stack(part) for part in zip(*done, strict=True))
        return o, lse

    return forward


def _decode_fp8(name: str, parts: tuple) -> Callable:
    names = list(READERS)
    reader = READERS[names[list(PARTS).index(name) % 3 if name in PARTS else 0]]

    def forward(
        q: Array,
        kv_cache: Array,
        block_table: Array,
        cache_seqlens: Array,
        sink: Array | None = None,
        *,
        to: Callable,
        head_dim_v: int = 512,
        qk_rope_head_dim: int = 64,
        layout: str = "fp8_v32",
        page_size: int = 64,
        scale: float = 0.0,
        causal: bool = True,
    ) -> Two:
        keys = []
        for row, n in zip(block_table, cache_seqlens.tolist(), strict=True):
            slots = (row[:, None] * page_size + np.arange(page_size)).reshape(-1)[:n]
            both = reader(kv_cache, slots, q.shape[-1] - qk_rope_head_dim, qk_rope_head_dim, layout, page_size)
            keys.append(np.concatenate(both, axis=1).astype(q.dtype))
        return over_sequences(parts, to, q, keys, head_dim_v, sink, scale, causal)

    return forward


DECODE = {name: _decode(name, parts) for name, parts in PARTS.items()}
DECODE_FP8 = {name: _decode_fp8(name, parts) for name, parts in PARTS.items()}
EAGER = _decode("eager", EAGER_PARTS)
EAGER_FP8 = _decode_fp8("eager", EAGER_PARTS)
TF32 = _decode("tf32", (product_tf32, tf32, False))
