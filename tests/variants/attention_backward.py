"""Attention's backward. A core takes one head's q, k, v, which are seen, the scale, the sink, do and dlse, and gives dq, dk, dv, dsink.

`to` rounds what 16-bit kernels store: the forward's o, and P and dz before their products.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from .attention import LOG2E, Two, blocks, causal_mask, key_by_key, packed_mask, spans, whole_late
from .floats import Array, to_bf16
from .linear import product, product_folded, product_sequential, product_split, product_steps

Grads = tuple[Array, Array, Array, Any]


def total_lse(lse: Array, sink: Any) -> Array:
    """With the sink; +inf where nothing is seen"""
    return lse if sink is None else np.where(np.isposinf(lse), lse, np.logaddexp(lse, sink))


def keep_of(lse: Array, sink: Any) -> Array:
    """What the sink leaves"""
    return np.ones_like(lse) if sink is None else 1 / (1 + np.exp(sink - np.where(np.isposinf(lse), sink, lse)))


def clean(lse: Array, dlse: Array) -> Two:
    """lse and dlse, 0 where nothing is seen"""
    none = np.isposinf(lse)
    return np.where(none, lse.dtype.type(0), lse), np.where(none, lse.dtype.type(0), dlse)


def sink_share(delta: Array, lse: Array, sink: Any) -> Any:
    """-Σ exp(sink - lse with the sink) D"""
    return None if sink is None else -np.sum(np.where(np.isposinf(lse), 0, np.exp(sink - total_lse(lse, sink))) * delta, dtype=delta.dtype)


def flash(q: Array, k: Array, v: Array, seen: Array, scale: float, sink: Any, do: Array, dlse: Array, to: Callable) -> Grads:
    """D = Σ do·o of the stored o; P from lse with the sink in it; dz unscaled when it is stored, dq and dk scaled last."""
    o, lse = blocks(16)(product(q, k), v, seen, scale, sink, to)
    delta = np.sum(do * to(o), axis=-1)
    every, _ = clean(total_lse(lse, sink), dlse)
    plain, dlse = clean(lse, dlse)
    z = np.where(seen, product(q, k) * scale, z_low(q))
    p = np.exp(z - every[:, None])
    dz = p * (product(do, v) - delta[:, None])
    dz = dz + (p * dlse[:, None] if sink is None else np.exp(z - plain[:, None]) * dlse[:, None])
    dz = to(dz)
    return (dz @ k) * scale, (dz.T @ q) * scale, to(p).T @ do, sink_share(delta, lse, sink)


def z_low(q: Array) -> Any:
    return q.dtype.type(-np.inf)


def flash_base2(q: Array, k: Array, v: Array, seen: Array, scale: float, sink: Any, do: Array, dlse: Array, to: Callable) -> Grads:
    """Tiles of 4 keys, the last first; 2^(z·scale·log2 e - lse·log2 e); dq gathers tile after tile; dlse is taken off D first."""
    o, lse = blocks(64, base2=True)(product_steps(q, k), v, seen, scale, sink, to)
    delta = np.einsum("nv,nv->n", do, to(o))
    keep = keep_of(lse, sink)
    plain, dlse = clean(lse, dlse)
    less = delta - np.where(keep > 0, dlse / np.where(keep > 0, keep, 1), 0).astype(q.dtype)
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for start in reversed(range(0, len(k), 4)):
        at = slice(start, start + 4)
        z = product_steps(q, k[at]) * (scale * LOG2E)
        p = np.where(seen[:, at], np.exp2(z - (plain * LOG2E)[:, None]) * keep[:, None], q.dtype.type(0))
        dz = to(p * (product_steps(do, v[at]) - less[:, None]) * q.dtype.type(scale))
        dq = dq + dz @ k[at]
        dk[at], dv[at] = dz.T @ q, to(p).T @ do
    return dq, dk, dv, sink_share(delta, lse, sink)


def textbook(q: Array, k: Array, v: Array, seen: Array, scale: float, sink: Any, do: Array, dlse: Array, to: Callable) -> Grads:
    """P from maximum and sum, normalised; D = Σ P dP, and o is not needed."""
    z = np.where(seen, product_split(q, k) * scale, z_low(q))
    m = z.max(-1, initial=z_low(q))
    m = np.where(np.isinf(m), q.dtype.type(0), m)
    e = np.exp(z - m[:, None])
    plain = e.sum(-1)
    every = plain if sink is None else plain + np.exp(sink - m)
    every, some = np.where(plain > 0, every, q.dtype.type(1)), np.where(plain > 0, plain, q.dtype.type(1))
    p, dp = e / every[:, None], product_split(do, v)
    delta = np.sum(p * dp, axis=-1)
    dz = (p * (dp - delta[:, None]) + e * (np.where(plain > 0, dlse, q.dtype.type(0)) / some)[:, None]) * scale
    dsink = None if sink is None else -np.sum(np.where(plain > 0, np.exp(sink - m) / every * delta, 0), dtype=q.dtype)
    dz = to(dz)
    return dz @ k, (q.T @ dz).T, (do.T @ to(p)).T, dsink


def sequential_keys(q: Array, k: Array, v: Array, seen: Array, scale: float, sink: Any, do: Array, dlse: Array, to: Callable) -> Grads:
    """Key after key, as a thread block with one key has it: dk and dv are its own, dq is added to."""
    o, lse = key_by_key(product_sequential(q, k), v, seen, scale, sink, to)
    delta, keep = np.add.accumulate(do * to(o), axis=-1)[:, -1], keep_of(lse, sink)
    plain, dlse = clean(lse, dlse)
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for j in range(len(k)):
        z = product_sequential(q, k[j : j + 1])[:, 0] * scale
        p = np.where(seen[:, j], np.exp(z - plain), q.dtype.type(0))
        dp = product_sequential(do, v[j : j + 1])[:, 0]
        dz = to(p * (keep * (dp - delta) + dlse) * scale)
        dq += np.multiply.outer(dz, k[j])
        dk[j] = np.add.accumulate(dz[:, None] * q, axis=0)[-1] if len(q) else 0
        dv[j] = np.add.accumulate(to(p * keep)[:, None] * do, axis=0)[-1] if len(q) else 0
    return dq, dk, dv, sink_share(delta, lse, sink)


def scaled_q(q: Array, k: Array, v: Array, seen: Array, scale: float, sink: Any, do: Array, dlse: Array, to: Callable) -> Grads:
    """The softmax's Jacobian row by row, of probabilities that are divided by their own sum; q scaled first; the sink's factor on do."""
    zs = product_folded(q * q.dtype.type(scale), k)
    o, lse = whole_late(zs, v, seen, 1.0, None, to)
    keep = keep_of(lse, sink)
    plain, dlse = clean(lse, dlse)
    p = np.exp(np.where(seen, zs, z_low(q)) - plain[:, None])
    total = p.sum(-1, keepdims=True)  # 1 but for the rounding of lse, which D = Σ P dP would feel
    p = p / np.where(total > 0, total, q.dtype.type(1))
    inner = np.sum(do * o, axis=-1)  # of the plain o, in float32
    g = do * keep[:, None]
    dp = product_folded(g, v)
    dz = np.stack([row * dp_row - row * (row @ dp_row) + row * through for row, dp_row, through in zip(p, dp, dlse, strict=True)])
    dsink = None
    if sink is not None:
        through = inner * keep * (1 - keep)  # what the factor itself carries, through lse
        dz = dz + p * through[:, None]
        dsink = -np.sum(np.where(np.isposinf(lse), 0, through), dtype=q.dtype)
    dz = to(dz)
    return dz @ k * scale, (dz.T @ q) * q.dtype.type(scale), to(p * keep[:, None]).T @ do, dsink


def wide(q: Array, k: Array, v: Array, seen: Array, scale: float, sink: Any, do: Array, dlse: Array, to: Callable) -> Grads:
    """All of it in float64."""
    a, b, c, d, e = (x.astype(np.float64) for x in (q, k, v, do, dlse))
    grads = textbook(a, b, c, seen, scale, None if sink is None else np.float64(sink), d, e, lambda x: x)
    return tuple(None if g is None else np.asarray(g).astype(q.dtype) for g in grads)  # type: ignore[return-value]


def eager(q: Array, k: Array, v: Array, seen: Array, scale: float, sink: Any, do: Array, dlse: Array, to: Callable) -> Grads:
    """Every operation rounds to bfloat16; sums accumulate in float32."""
    r = to_bf16
    z = np.where(seen, r(r(q @ k.T) * np.float32(scale)), np.float32(-np.inf))
    m = z.max(-1, initial=np.float32(-np.inf))
    m = np.where(np.isinf(m), np.float32(0), m)
    e = r(np.exp(r(z - m[:, None])))
    total = r(e.sum(-1))
    lse = np.where(total > 0, r(m + r(np.log(np.where(total > 0, total, np.float32(1))))), np.float32(np.inf))
    p = r(e / np.where(total > 0, total, np.float32(1))[:, None])
    keep = r(keep_of(lse, sink))
    o = r(r(p @ v) * keep[:, None])
    delta = r(np.sum(r(do * o), axis=-1))
    g = r(do * keep[:, None]) if sink is not None else do
    _, dlse = clean(lse, dlse)
    pull = delta if sink is None else r(delta - r(delta * r(1 - keep)))
    dz = r(r(p * r(r(r(g @ v.T) - pull[:, None]) + dlse[:, None])) * np.float32(scale))
    dsink = None if sink is None else r(-np.sum(r(np.where(np.isposinf(lse), 0, delta) * r(1 - keep)), dtype=np.float32))
    return r(dz @ k), r(dz.T @ q), r(p.T @ g), dsink


def attend_back(core: Callable, to: Callable, q: Array, k: Array, v: Array, seen: Array, scale: float, sink: Any, do: Array, dlse: Array):
    """dq[s,h,k], dk[t,g,k], dv[t,g,v] and dsink[h] of one sequence"""
    _, h, width = q.shape
    g = k.shape[1]
    scale = scale or width**-0.5
    dq, dk, dv, dsink = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v), np.zeros(h, q.dtype)
    for i in range(h):
        j = i * g // h
        a, b, c, d = core(q[:, i], k[:, j], v[:, j], seen, scale, None if sink is None else sink[i], do[:, i], dlse[i], to)
        dq[:, i] = a
        dk[:, j] += b
        dv[:, j] += c
        dsink[i] = 0 if d is None else d
    return dq, dk, dv, dsink


CORES: dict[str, Callable] = {
    "flash": flash,
    "flash-base-2": flash_base2,
    "textbook": textbook,
    "key-by-key": sequential_keys,
    "jacobian": scaled_q,
    "double": wide,
}


def _attention(core: Callable) -> Callable:
    def backward(
        q: Array,
        k: Array,
        v: Array,
        do: Array,
        dlse: Array,
        sink: Array | None = None,
        *,
        to: Callable,
        scale: float = 0.0,
        causal: bool = True,
        **_: Any,
    ) -> tuple[Array, ...]:
        seen = causal_mask(q.shape[1], k.shape[1], causal)
        done = [attend_back(core, to, q[i], k[i], v[i], seen, scale, sink, do[i], dlse[i]) for i in range(len(q))]
        dq, dk, dv, dsink = (np.stack(part) for part in zip(*done, strict=True))
        return (dq, dk, dv) if sink is None else (dq, dk, dv, dsink.sum(0))

    return backward


def _packed(core: Callable, masked: bool) -> Callable:
    def backward(
        q: Array,
        k: Array,
        v: Array,
        cu_seqlens_q: Array,
        cu_seqlens_k: Array,
        do: Array,
        dlse: Array,
        *,
        to: Callable,
        scale: float = 0.0,
        causal: bool = True,
    ) -> tuple[Array, ...]:
        if masked:
            return attend_back(core, to, q, k, v, packed_mask(cu_seqlens_q, cu_seqlens_k, causal), scale, None, do, dlse)[:3]
        grads = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
        for (a, b), (c, d) in zip(spans(cu_seqlens_q), spans(cu_seqlens_k), strict=True):
            seen = causal_mask(b - a, d - c, causal)
            found = attend_back(core, to, q[a:b], k[c:d], v[c:d], seen, scale, None, do[a:b], dlse[:, a:b])
            for whole_grad, part, at in zip(grads, found[:3], (slice(a, b), slice(c, d), slice(c, d)), strict=True):
                whole_grad[at] = part
        return grads

    return backward


BACKWARD = {name: _attention(core) for name, core in CORES.items()}
VARLEN = {name: _packed(core, i % 2 == 0) for i, (name, core) in enumerate(CORES.items())}
EAGER = _attention(eager)
VARLEN_EAGER = _packed(eager, False)
