"""Attention's forward: every order of keys, bases of the exponential and places of the scale that kernels have.

A core takes the products z = q·k of one head [n,m], values [m,v], which are seen [n,m], the scale, the head's sink and `to`, which rounds
what is stored on the way (exp(z), before its product with v). It returns o[n,v] and lse[n] (+inf where nothing is seen).
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .floats import Array, to_bf16, to_tf32
from .linear import product, product_double, product_folded, product_sequential, product_split, product_steps, product_tf32
from .router import exp2_polynomial

Two = tuple[Array, Array]
Core = Callable[[Array, Array, Array, float, Any, Callable], Two]
LOG2E = math.log2(math.e)
LN2 = math.log(2.0)


def divided(a: Array, b: Array) -> Array:
    """a/b, and 0 where b is 0"""
    return a / np.where(b > 0, b, b.dtype.type(1))


def exp2_fast(y: Array) -> Array:
    """By a polynomial; below float32's range 0"""
    return np.where(y < -126, np.float32(0), exp2_polynomial(np.maximum(y, np.float32(-126))))


def finish(o: Array, m: Array, total: Array, sink: Any) -> Two:
    """lse = m + log Σ; the sink as a factor"""
    lse = np.where(total > 0, m + np.log(np.where(total > 0, total, total.dtype.type(1))), total.dtype.type(np.inf))
    if sink is not None:
        o = o * np.where(total > 0, 1 / (1 + np.exp(sink - lse)), total.dtype.type(0))[:, None]
    return o, lse


def whole(z: Array, v: Array, seen: Array, scale: float, sink: Any, to: Callable) -> Two:
    """Rows at once; P is divided by its sum before it is stored. The sink is one more column, of value 0."""
    low = z.dtype.type(-np.inf)
    z = np.where(seen, z * scale, low)
    m = z.max(-1, initial=low)
    m = np.where(np.isinf(m), z.dtype.type(0), m)
    e = np.exp(z - m[:, None])
    total = e.sum(-1)
    every = total if sink is None else total + np.exp(sink - m)
    return to(divided(e, every[:, None])) @ v, finish(v, m, total, None)[1]


def whole_late(z: Array, v: Array, seen: Array, scale: float, sink: Any, to: Callable) -> Two:
    """Rows at once; the product with v is divided by the sum, as are its halves."""
    low = z.dtype.type(-np.inf)
    z = np.where(seen, z, low)
    m = z.max(-1, initial=low)
    m = np.where(np.isinf(m), z.dtype.type(0), m)
    e = np.exp((z - m[:, None]) * scale)  # the scale after the maximum
    total = np.add.accumulate(e, axis=-1)[:, -1] if z.shape[1] else e.sum(-1)
    half = z.shape[1] // 2
    p = to(e)
    o = divided(p[:, :half] @ v[:half] + p[:, half:] @ v[half:], total[:, None])
    return finish(o, m * scale, total, sink)


def blocks(step: int, base2: bool = False, backwards: bool = False, slack: float = 0.0, exp2: Callable = np.exp2) -> Core:
    """Online softmax over blocks of keys. base2: 2^(z·scale·log2 e), the constants folded. slack: the maximum is moved only where it grows
    by more, so that exp(z - m) may exceed 1."""

    def core(z: Array, v: Array, seen: Array, scale: float, sink: Any, to: Callable) -> Two:
        low, zero = z.dtype.type(-np.inf), z.dtype.type(0)
        exp = exp2 if base2 else np.exp
        z = np.where(seen, z * (scale * LOG2E if base2 else scale), low)
        m, total, acc = np.full(len(z), low), np.zeros(len(z), z.dtype), np.zeros((len(z), v.shape[1]), z.dtype)
        starts = range(0, z.shape[1], step)
        for start in reversed(starts) if backwards else starts:
            part = z[:, start : start + step]
            new = np.maximum(m, part.max(-1))
            new = np.where((new - m <= slack) & (m > low), m, new)
            safe = np.where(np.isinf(new), zero, new)
            p, shrink = exp(part - safe[:, None]), exp(m - safe)
            total = total * shrink + p.sum(-1)
            acc = acc * shrink[:, None] + to(p) @ v[start : start + step]
            m = new
        m = np.where(total > 0, m, zero)
        if not base2:
            return finish(divided(acc, total[:, None]), m, total, sink)
        lse = np.where(total > 0, (m + np.log2(np.where(total > 0, total, z.dtype.type(1)))) * LN2, z.dtype.type(np.inf))
        every = total if sink is None else total + np.where(total > 0, exp(sink * LOG2E - m), zero)
        return acc * divided(np.ones_like(every), every)[:, None], lse

    return core


def split(parts: int, inner: Core) -> Core:
    """Split-KV: each range of keys by itself, then a merge by their lse."""

    def core(z: Array, v: Array, seen: Array, scale: float, sink: Any, to: Callable) -> Two:
        bounds = np.linspace(0, z.shape[1], parts + 1).astype(int)
        ranges = [slice(i, j) for i, j in itertools.pairwise(bounds)]
        done = [inner(z[:, at], v[at], seen[:, at], scale, None, to) for at in ranges]
        lse = np.stack([np.where(np.isposinf(lse), z.dtype.type(-np.inf), lse) for _, lse in done])
        m = lse.max(0)
        m = np.where(np.isinf(m), z.dtype.type(0), m)
        weight = np.exp(lse - m)
        total = weight.sum(0)
        o = np.zeros((len(z), v.shape[1]), z.dtype)
        for w, (part, _) in zip(weight, done, strict=True):
            o = o + divided(w, total)[:, None] * part
        return finish(o, m, total, sink)

    return core


def key_by_key(z: Array, v: Array, seen: Array, scale: float, sink: Any, to: Callable) -> Two:
    """Two passes: the maximum, then one sum for o and one for Σ, key after key."""
    low = z.dtype.type(-np.inf)
    z = np.where(seen, z * scale, low)
    m = np.maximum.reduce(z, axis=-1, initial=low)
    m = np.where(np.isinf(m), z.dtype.type(0), m)
    total, o = np.zeros_like(m), np.zeros((len(z), v.shape[1]), z.dtype)
    for j in range(z.shape[1]):
        p = np.exp(z[:, j] - m)
        total += p
        o += np.multiply.outer(to(p), v[j])
    return finish(divided(o, total[:, None]), m, total, sink)


def wide(z: Array, v: Array, seen: Array, scale: float, sink: Any, to: Callable) -> Two:
    """float64 from the products on; nothing is stored."""
    o, lse = whole(z.astype(np.float64), v.astype(np.float64), seen, scale, sink, lambda p: p)
    return o.astype(z.dtype), lse.astype(z.dtype)


def tf32(z: Array, v: Array, seen: Array, scale: float, sink: Any, to: Callable) -> Two:
    """exp(z) as TF32 for its product with v: 10 bits of mantissa, no fewer than 16-bit formats have."""
    return blocks(8)(z, v, seen, scale, sink, to_tf32)


def eager(z: Array, v: Array, seen: Array, scale: float, sink: Any, to: Callable) -> Two:
    """Every operation rounds to bfloat16; sums accumulate in float32."""
    r, low = to_bf16, np.float32(-np.inf)
    z = np.where(seen, r(r(z) * np.float32(scale)), low)
    m = z.max(-1, initial=low)
    m = np.where(np.isinf(m), np.float32(0), m)
    e = r(np.exp(r(z - m[:, None])))
    total = r(e.sum(-1))
    lse = np.where(total > 0, r(m + r(np.log(np.where(total > 0, total, np.float32(1))))), np.float32(np.inf))
    o = r(r(divided(e, total[:, None])) @ v)
    if sink is not None:
        o = r(o * np.where(total > 0, r(1 / r(1 + r(np.exp(r(sink - lse))))), np.float32(0))[:, None])
    return o, lse


# One head after another: q[b,s,h,k] k[b,t,g,k] v[b,t,g,v]


def causal_mask(s: int, t: int, causal: bool) -> Array:
    """[s,t]: bottom-right aligned"""
    return np.tril(np.ones((s, t), bool), t - s) if causal else np.ones((s, t), bool)


def attend(
    products: Callable, core: Core, to: Callable, q: Array, k: Array, v: Array, seen: Array, scale: float, sink: Any, first: bool = False
) -> Two:
    """o[s,h,v], lse[h,s] of q[s,h,k], k[t,g,k], v[t,g,v]. first: the scale is multiplied to q."""
    s, h, width = q.shape
    share = h // k.shape[1]
    scale = scale or width**-0.5
    o, lse = np.zeros((s, h, v.shape[2]), q.dtype), np.zeros((h, s), q.dtype)
    for i in range(h):
        qi = q[:, i] * q.dtype.type(scale) if first else q[:, i]
        z = products(qi, k[:, i // share])
        own = None if sink is None else sink[i]
        o[:, i], lse[i] = core(z, v[:, i // share], seen, 1.0 if first else scale, own, to)
    return o, lse


PARTS: dict[str, tuple[Callable, Core, bool]] = {
    "whole": (product, whole, False),
    "whole-late": (product_split, whole_late, False),
    "one-key-backwards": (product_sequential, blocks(1, backwards=True), False),
    "blocks-of-3-scaled-q": (product_folded, blocks(3), True),
    "blocks-of-64-base-2": (product_steps, blocks(64, base2=True), False),
    "blocks-of-16-lazy-fast-exp": (product, blocks(16, base2=True, slack=8.0, exp2=exp2_fast), False),
    "split-kv": (product_steps, split(3, blocks(5, base2=True)), False),
    "key-by-key": (product_sequential, key_by_key, False),
    "double": (product_double, wide, False),
}
SINGLE = ("blocks-of-16-lazy-fast-exp",)


def _attention(name: str, parts: tuple[Callable, Core, bool]) -> Callable:
    products, core, first = parts

    def forward(
        q: Array, k: Array, v: Array, sink: Array | None = None, *, to: Callable, scale: float = 0.0, causal: bool = True, **_: Any
    ) -> Two:
        seen = causal_mask(q.shape[1], k.shape[1], causal)
        done = [attend(products, core, to, *qkv, seen, scale, sink, first) for qkv in zip(q, k, v, strict=True)]
        o, lse = (np.stack(part) for part in zip(*done, strict=True))
        return o, lse

    return forward


def _packed(name: str, parts: tuple[Callable, Core, bool]) -> Callable:
    """Odd ones sequence after sequence; the others all at once, under one mask."""
    products, core, first = parts
    masked = list(PARTS).index(name) % 2 == 0 if name in PARTS else False

    def forward(
        q: Array, k: Array, v: Array, cu_seqlens_q: Array, cu_seqlens_k: Array, *, to: Callable, scale: float = 0.0, causal: bool = True
    ) -> Two:
        if masked:
            return attend(products, core, to, q, k, v, packed_mask(cu_seqlens_q, cu_seqlens_k, causal), scale, None, first)
        o, lse = np.zeros((*q.shape[:2], v.shape[2]), q.dtype), np.zeros((q.shape[1], len(q)), q.dtype)
        for (a, b), (c, d) in zip(spans(cu_seqlens_q), spans(cu_seqlens_k), strict=True):
            seen = causal_mask(b - a, d - c, causal)
            o[a:b], lse[:, a:b] = attend(products, core, to, q[a:b], k[c:d], v[c:d], seen, scale, None, first)
        return o, lse

    return forward


def spans(ends: Array) -> list[tuple[int, int]]:
    return list(itertools.pairwise(ends.tolist()))


def packed_mask(ends_q: Array, ends_k: Array, causal: bool) -> Array:
    """[n,m]: of one sequence, and not later when both are counted from its end"""
    n, m = np.arange(ends_q[-1]), np.arange(ends_k[-1])
    of_q, of_k = np.searchsorted(ends_q, n, side="right"), np.searchsorted(ends_k, m, side="right")
    left_q, left_k = ends_q[of_q] - n, ends_k[of_k] - m  # how many follow, with itself
    seen = of_q[:, None] == of_k[None, :]
    return seen & (left_k[None, :] >= left_q[:, None]) if causal else seen


EAGER_PARTS, TF32_PARTS = (product, eager, False), (product_tf32, tf32, False)
FORWARD = {name: _attention(name, parts) for name, parts in PARTS.items()}
VARLEN = {name: _packed(name, parts) for name, parts in PARTS.items()}
EAGER = _attention("eager", EAGER_PARTS)
VARLEN_EAGER = _packed("eager", EAGER_PARTS)
TF32, VARLEN_TF32 = _attention("tf32", TF32_PARTS), _packed("tf32", TF32_PARTS)
