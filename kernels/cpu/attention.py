"""Attention with log-sum-exp, forward and backward, whole, packed, and merged from parts. Memory grows with the block, not with s·t."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from ...ref.attention_parts import check_packed
from ._attend import Part, attend, attend_bwd
from ._common import need, run
from ._declared import declared

Array = NDArray[Any]


def _groups(h: int, g: int) -> Iterator[tuple[slice, Any]]:
    """Query heads and their key heads: all at once if each has its own, else by the key head that they share."""
    if g == h:
        yield slice(0, h), slice(0, h)
    else:
        for i in range(g):
            yield slice(i * (h // g), (i + 1) * (h // g)), i


def _heads(x: Array) -> Array:
    """[s,h,d] to [h,s,d], a view"""
    return x.swapaxes(0, 1)


def _forward(q: Array, k: Array, v: Array, o: Array, lse: Array, a: dict[str, Any], sink: Array | None = None) -> None:
    """One sequence: q[s,h,k] k[t,g,k] v[t,g,v], filling o[s,h,v] lse[h,s]"""
    q, k, v, o = (_heads(x) for x in (q, k, v, o))
    empty = -math.inf if a.get("empty_lse") == "-inf" else math.inf
    scale = float(a["scale"]) or q.shape[2] ** -0.5
    for heads, own in _groups(q.shape[0], k.shape[0]):
        sinks = None if sink is None else sink[heads]
        attend([Part(q[heads], k[own])], v[own], o[heads], lse[heads], scale, a["causal"], a.get("block", 512), sinks, empty)


def _backward(q: Array, k: Array, v: Array, do: Array, o: Array, lse: Array, dlse: Array, a: dict[str, Any], sink: Array | None) -> tuple:
    """dq, dk, dv, dsink (or None) of one sequence"""
    dq, dk, dv = (np.empty(x.shape, x.dtype) for x in (q, k, v))
    qh, kh, vh, doh, oh, dqh, dkh, dvh = (_heads(x) for x in (q, k, v, do, o, dq, dk, dv))
    inner = np.einsum("hsv,hsv->hs", doh, oh)
    pull, dsink = dlse - inner, None
    if sink is not None:
        # o = keep·a with a the plain attention: a's own D is inner, for do becomes keep·do; keep(lse) adds inner·(1 - keep) to dlse.
        some = np.isfinite(lse)
        keep = np.where(some, 1 / (1 + np.exp(np.where(some, sink[:, None] - lse, 0))), 0)
        lost = inner * np.where(some, 1 - keep, 0)
        pull = (pull + lost).astype(q.dtype)
        dsink = -lost.sum(axis=1)
        doh = doh * keep.astype(q.dtype)[..., None]
    scale = float(a["scale"]) or q.shape[2] ** -0.5
    for heads, own in _groups(qh.shape[0], kh.shape[0]):
        parts, grads = [Part(qh[heads], kh[own])], [Part(dqh[heads], dkh[own])]
        attend_bwd(parts, vh[own], doh[heads], lse[heads], pull[heads], grads, dvh[own], scale, a["causal"], a.get("block", 512))
    return dq, dk, dv, dsink


def _check(op: str, q: Array, k: Array, a: dict[str, Any]) -> None:
    h, g = q.shape[-2], k.shape[-2]
    need(g >= 1 and h % g == 0, op, "k", f"of {g} heads", f"a divisor of the {h} heads of q")
    if "block" in a:
        need(a["block"] >= 1, op, "block", a["block"], "block >= 1")
        need(
            a["empty_rows"] != "refuse" or not a["causal"] or q.shape[1] <= k.shape[1],
            op,
            "q",
            f"of {q.shape[1]} positions and k of {k.shape[1]}",
            "no more queries than keys (empty_rows is 'refuse')",
        )


def _attention(q: Array, k: Array, v: Array, sink: Array | None, a: dict[str, Any]) -> tuple[Array, Array]:
    b, s, h, _ = q.shape
    o, lse = np.empty((b, s, h, v.shape[3]), q.dtype), np.empty((b, h, s), q.dtype)
    with np.errstate(all="ignore"):  # infinities in a block that sees nothing
        for i in range(b):
            _forward(q[i], k[i], v[i], o[i], lse[i], a, sink)
    return o, lse


def attention(q: Array, k: Array, v: Array, sink: Array | None = None, **attrs: Any) -> tuple[Array, Array]:
    """o[b,s,h,v] = sum_t exp(z - lse) v[b,t,g,v],  lse[b,h,s] = log sum_t exp z,  z = scale sum_k q[b,s,h,k] k[b,t,g,k].

    q[b,s,h,k], k[b,t,g,k], v[b,t,g,v] and sink[h] are float32 or float64 alike, and so are o and lse; each of the g key heads is shared
    by h/g consecutive query heads. Attributes: scale (0: k^(-1/2)), causal (True; key j is seen by query i if j <= i + t - s), empty_lse
    ("+inf", "-inf": lse of a row that sees no key; its o is 0), empty_rows ("allow", "refuse"), block (512 keys at a time). A sink is one
    more logit of each head in the denominator of o. Scores are in the inputs' dtype, sums over blocks in float64.

    ValueError: dtypes or shapes do not fit, an attribute has no such value, s > t in a causal call that refuses empty rows.
    """
    arrays, a, _ = declared("attention", "forward", {"q": q, "k": k, "v": v, "sink": sink}, attrs)
    _check("attention", arrays["q"], arrays["k"], a)
    return _attention(arrays["q"], arrays["k"], arrays["v"], arrays["sink"], a)


def attention_bwd(q: Array, k: Array, v: Array, do: Array, dlse: Array, sink: Array | None = None, **attrs: Any) -> tuple[Array, ...]:
    """dq, dk, dv (and dsink, with a sink) for the gradients do[b,s,h,v] and dlse[b,h,s]. With P = exp(z - lse), D = sum_v do o:

        dz = P (do v - D + dlse),   dq = scale dz k,   dk = scale sum_s dz q,   dv = sum_s P do.

    The forward runs again for o and lse; P is made again block by block. Attributes and errors as attention.
    """
    given = {"q": q, "k": k, "v": v, "sink": sink, "do": do, "dlse": dlse}
    arrays, a, _ = declared("attention", "backward", given, attrs)
    q, k, v, sink, do, dlse = arrays.values()
    _check("attention_bwd", q, k, a)
    o, lse = _attention(q, k, v, sink, a)
    grads = [np.empty_like(x) for x in (q, k, v)]
    dsink = np.zeros(q.shape[2])
    with np.errstate(all="ignore"):
        for i in range(q.shape[0]):
            *parts, of_sink = _backward(q[i], k[i], v[i], do[i], o[i], lse[i], dlse[i], a, sink)
            for grad, part in zip(grads, parts, strict=True):
                grad[i] = part
            if of_sink is not None:
                dsink += of_sink
    return tuple(grads) if sink is None else (*grads, dsink.astype(q.dtype))


def _packed(op: str, arrays: dict[str, Any]) -> Iterator[tuple[slice, slice]]:
    """The queries and the keys of each sequence"""
    ends_q = check_packed(op, "cu_seqlens_q", arrays["cu_seqlens_q"], arrays["q"].shape[0])
    ends_k = check_packed(op, "cu_seqlens_k", arrays["cu_seqlens_k"], arrays["k"].shape[0])
    return iter([(slice(*ends_q[i : i + 2]), slice(*ends_k[i : i + 2])) for i in range(len(ends_q) - 1)])


def attention_varlen(q: Array, k: Array, v: Array, cu_seqlens_q: Array, cu_seqlens_k: Array, **attrs: Any) -> tuple[Array, Array]:
    """o[n,h,v], lse[h,n] = attention of q[n,h,k] over k[m,g,k], v[m,g,v] of its own sequence: cu_q[i] <= n < cu_q[i+1], likewise m.

    cu_seqlens_q[j], cu_seqlens_k[j] are integers from 0 to the number of tokens, never falling. Attributes: scale, causal as attention; a
    row that sees no key has o = 0 and lse = +inf. ValueError: as attention; boundaries that do not fit.
    """
    op, given = "attention_varlen", {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    arrays, a, _ = declared("attention.varlen", "forward", given, attrs)
    q, k, v = arrays["q"], arrays["k"], arrays["v"]
    _check(op, q, k, a)
    n, h, _ = q.shape
    o, lse = np.empty((n, h, v.shape[2]), q.dtype), np.empty((h, n), q.dtype)
    with np.errstate(all="ignore"):
        for qs, ks in _packed(op, arrays):
            _forward(q[qs], k[ks], v[ks], o[qs], lse[:, qs], a)
    return o, lse


def attention_varlen_bwd(
    q: Array, k: Array, v: Array, cu_seqlens_q: Array, cu_seqlens_k: Array, do: Array, dlse: Array, **attrs: Any
) -> tuple[Array, ...]:
    """dq[n,h,k], dk[m,g,k], dv[m,g,v]: attention_bwd of each sequence; nothing crosses a boundary. Errors as attention_varlen."""
    op = "attention_varlen_bwd"
    given = {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "do": do, "dlse": dlse}
    arrays, a, _ = declared("attention.varlen", "backward", given, attrs)
    q, k, v, do, dlse = (arrays[name] for name in ("q", "k", "v", "do", "dlse"))
    _check(op, q, k, a)
    dq, dk, dv = (np.empty_like(x) for x in (q, k, v))
    with np.errstate(all="ignore"):
        for qs, ks in _packed(op, arrays):
            o, lse = np.empty_like(do[qs]), np.empty((q.shape[1], qs.stop - qs.start), q.dtype)
            _forward(q[qs], k[ks], v[ks], o, lse, a)
            dq[qs], dk[ks], dv[ks], _ = _backward(q[qs], k[ks], v[ks], do[qs], o, lse, dlse[:, qs], a, None)
    return dq, dk, dv


@njit(nogil=True, error_model="numpy")
def _weights(lse_parts, i, j, row, w):
    """w[p] = exp(lse_p - lse), 0 for a part without keys; returns lse, +inf if no part has any."""
    top = -np.inf
    for p in range(w.size):
        x = np.float64(lse_parts[p, i, j, row])
        w[p] = x if abs(x) != np.inf else -np.inf
        top = w[p] if w[p] > top or w[p] != w[p] else top
    if top == -np.inf:
        w[:] = 0.0
        return np.inf
    total = 0.0
    for p in range(w.size):
        total += math.exp(w[p] - top)
    lse = top + math.log(total)
    for p in range(w.size):
        w[p] = math.exp(w[p] - lse)
    return lse


@njit(nogil=True, error_model="numpy", cache=True)
def _merge(lo, hi, o_parts, lse_parts, o, lse):
    parts, _, s, h, dv = o_parts.shape
    w, acc = np.empty(parts), np.empty(dv)
    for index in range(lo, hi):
        i, row, j = index // (s * h), index // h % s, index % h
        lse[i, j, row] = _weights(lse_parts, i, j, row, w)
        acc[:] = 0.0
        for p in range(parts):
            if w[p] > 0 or w[p] != w[p]:
                x = o_parts[p, i, row, j]
                for k in range(dv):
                    acc[k] += w[p] * np.float64(x[k])
        o[i, row, j] = acc


@njit(nogil=True, error_model="numpy", cache=True)
def _merge_bwd(lo, hi, o_parts, lse_parts, do, dlse, do_parts, dlse_parts):
    parts, _, s, h, dv = o_parts.shape
    w, inner = np.empty(parts), np.empty(parts)
    for index in range(lo, hi):
        i, row, j = index // (s * h), index // h % s, index % h
        _weights(lse_parts, i, j, row, w)
        dy = do[i, row, j]
        mean = 0.0
        for p in range(parts):
            inner[p] = 0.0
            if w[p] > 0 or w[p] != w[p]:
                x = o_parts[p, i, row, j]
                for k in range(dv):
                    inner[p] += np.float64(dy[k]) * np.float64(x[k])
                mean += w[p] * inner[p]
        for p in range(parts):
            used = w[p] > 0 or w[p] != w[p]
            dlse_parts[p, i, j, row] = w[p] * (inner[p] - mean + np.float64(dlse[i, j, row])) if used else 0.0
            dx = do_parts[p, i, row, j]
            for k in range(dv):
                dx[k] = w[p] * np.float64(dy[k])


def attention_merge(o_parts: Array, lse_parts: Array) -> tuple[Array, Array]:
    """lse[b,h,s] = log sum_p exp lse_parts,   o[b,s,h,v] = sum_p exp(lse_parts[p] - lse) o_parts[p]. Weights and sums in float64.

    o_parts[p,b,s,h,v] and lse_parts[p,b,h,s] are float32 or float64 alike. A part with lse = ±inf saw no key and weighs nothing; if none
    saw any, o = 0 and lse = +inf. ValueError: dtypes or shapes do not fit, no parts.
    """
    arrays, _, _ = declared("attention.merge", "forward", {"o_parts": o_parts, "lse_parts": lse_parts}, {})
    o_parts, lse_parts = arrays["o_parts"], arrays["lse_parts"]
    parts, b, s, h, dv = o_parts.shape
    need(parts >= 1, "attention_merge", "o_parts", "of no parts", "one at least")
    o, lse = np.empty((b, s, h, dv), o_parts.dtype), np.empty((b, h, s), o_parts.dtype)
    run(_merge, b * s * h, parts * dv, o_parts, lse_parts, o, lse)
    return o, lse


def attention_merge_bwd(o_parts: Array, lse_parts: Array, do: Array, dlse: Array) -> tuple[Array, Array]:
    """With w_p = exp(lse_p - lse):  do_parts[p] = w_p do,  dlse_parts[p] = w_p (sum_v do o_p - sum_v do o + dlse). Errors as forward."""
    given = {"o_parts": o_parts, "lse_parts": lse_parts, "do": do, "dlse": dlse}
    arrays, _, _ = declared("attention.merge", "backward", given, {})
    o_parts, lse_parts, do, dlse = arrays.values()
    parts, b, s, h, dv = o_parts.shape
    need(parts >= 1, "attention_merge_bwd", "o_parts", "of no parts", "one at least")
    do_parts, dlse_parts = np.empty_like(o_parts), np.empty_like(lse_parts)
    run(_merge_bwd, b * s * h, parts * dv, o_parts, lse_parts, do, dlse, do_parts, dlse_parts)
    return do_parts, dlse_parts
