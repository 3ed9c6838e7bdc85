"""Attention in parts: the merge of split-KV partial results, and sequences of any length packed one after the other. Spec §2.1."""

from typing import Any

from array_api_compat import device

from .attention import attention_bwd, attention_fwd
from .op import Case, Op, declare, signature
from .xp import Array, rescaled, stored, xp_of


@signature("o_parts[p,b,s,h,v] lse_parts[p,b,h,s] -> o[b,s,h,v] lse[b,h,s]")
def attention_merge_fwd(o_parts: Array, lse_parts: Array) -> tuple[tuple[Array, Array], tuple]:
    """lse[b,h,s] = log Σ_p exp lse_parts,   o[b,s,h,v] = Σ_p exp(lse_parts[p] - lse) o_parts[p]

    A part that saw no key has lse = ±inf (both conventions are read) and weighs nothing, whatever its o holds. All parts empty: o = 0 and
    lse = +inf.
    """
    xp = xp_of(o_parts)
    if o_parts.shape[0] == 0:
        raise ValueError("attention.merge: o_parts has no parts; expected one at least")
    empty = xp.isinf(lse_parts)  # [p,b,h,s]
    low = xp.full_like(lse_parts, float("-inf"))
    clean = xp.where(empty, low, rescaled(lse_parts))
    m = xp.max(clean, axis=0)
    base = xp.where(xp.isinf(m), xp.zeros_like(m), m)
    total = xp.sum(xp.exp(clean - base), axis=0)
    none = total == 0
    logsum = base + xp.log(xp.where(none, xp.ones_like(total), total))
    w = xp.exp(clean - logsum)  # [p,b,h,s]
    spread = xp.permute_dims(w, (0, 1, 3, 2))[..., None]  # [p,b,s,h,1]
    o = xp.sum(xp.where(spread > 0, o_parts, xp.zeros_like(o_parts)) * spread, axis=0)
    lse = xp.where(none, -low[0, ...], logsum)
    return (o, lse), (o_parts, w, stored(o))


def attention_merge_bwd(do: Array, dlse: Array, saved: tuple) -> tuple[Array, Array]:
    """w_p = exp(lse_p - lse):   do_parts[p] = w_p do,   dlse_parts[p] = w_p (Σ_v do o_p - Σ_v do o + dlse)"""
    o_parts, w, o = saved
    xp = xp_of(o_parts)
    spread = xp.permute_dims(w, (0, 1, 3, 2))[..., None]  # [p,b,s,h,1]
    clean = xp.where(spread > 0, o_parts, xp.zeros_like(o_parts))
    inner = xp.sum(do * (clean - o), axis=-1)  # [p,b,s,h]
    pull = xp.permute_dims(inner, (0, 1, 3, 2)) + dlse
    return spread * do, xp.where(w > 0, w * pull, xp.zeros_like(w))


def check_packed(op: str, name: str, cu_seqlens: Array, tokens: int) -> list[int]:
    """The boundaries as integers: from 0 to the number of tokens, never falling."""
    ends = [int(cu_seqlens[i]) for i in range(cu_seqlens.shape[0])]
    if not ends or ends[0] != 0 or ends[-1] != tokens:
        raise ValueError(
            f"{op}: {name} runs from {ends[0] if ends else 'nothing'} to {ends[-1] if ends else 'nothing'}; expected 0 to {tokens}"
        )
    for i in range(1, len(ends)):
        if ends[i] < ends[i - 1]:
            raise ValueError(f"{op}: {name}[{i}] is {ends[i]}; expected at least {ends[i - 1]}, the one before")
    return ends


@signature("q[n,h,k] k[m,g,k] v[m,g,v] cu_seqlens_q[j]:index cu_seqlens_k[j]:index -> o[n,h,v] lse[h,n]")
def attention_varlen_fwd(
    q: Array, k: Array, v: Array, cu_seqlens_q: Array, cu_seqlens_k: Array, *, scale: float = 0.0, causal: bool = True
) -> tuple[tuple[Array, Array], tuple]:
    """o[n], lse[:,n] = attention of q[n] over k[m], v[m] of its own sequence i:   cu_q[i] <= n < cu_q[i+1],   cu_k[i] <= m < cu_k[i+1]

    Sequences lie one after the other without padding; sequence i has cu_seqlens[i+1] - cu_seqlens[i] tokens, perhaps none. Each is
    `attention` by itself: causal is aligned with the end of each, a query that sees no key has o = 0 and lse = +inf.
    """
    ends_q = check_packed("attention.varlen", "cu_seqlens_q", cu_seqlens_q, q.shape[0])
    ends_k = check_packed("attention.varlen", "cu_seqlens_k", cu_seqlens_k, k.shape[0])
    xp, places, saved = xp_of(q), [], []
    o = [xp.zeros((0, q.shape[1], v.shape[2]), dtype=q.dtype, device=device(q))]
    lse = [xp.zeros((q.shape[1], 0), dtype=q.dtype, device=device(q))]
    for i in range(len(ends_q) - 1):
        qs, ks = slice(ends_q[i], ends_q[i + 1]), slice(ends_k[i], ends_k[i + 1])
        (o_i, lse_i), saved_i = attention_fwd(q[None, qs, ...], k[None, ks, ...], v[None, ks, ...], scale=scale, causal=causal)
        o.append(o_i[0, ...])
        lse.append(lse_i[0, ...])
        places.append((qs, ks))
        saved.append(saved_i)
    return (xp.concat(o, axis=0), xp.concat(lse, axis=1)), (q, k, v, places, saved)


def attention_varlen_bwd(do: Array, dlse: Array, saved: tuple) -> tuple[Array, Array, Array]:
    """dq[n], dk[m], dv[m] = attention's backward of the sequence that holds them; nothing crosses a boundary"""
    q, k, v, places, parts = saved
    xp = xp_of(q)
    grads = [[0 * a[:0, ...]] for a in (q, k, v)]
    for (qs, _), part in zip(places, parts, strict=True):
        for grad, piece in zip(grads, attention_bwd(do[None, qs, ...], dlse[None, :, qs], part), strict=True):
            grad.append(piece[0, ...])
    dq, dk, dv = (xp.concat(grad, axis=0) for grad in grads)
    return dq, dk, dv


_MERGE: dict[str, tuple] = {"o_parts": ("normal", 1.0), "do": ("normal", 1.0), "dlse": ("normal", 1.0)}
attention_merge = declare(
    Op(
        "attention.merge",
        attention_merge_fwd,
        attention_merge_bwd,
        (
            Case("two", {"p": 2, "b": 1, "s": 2, "h": 3, "v": 16}, {**_MERGE, "lse_parts": ("normal", 2.0)}),
            Case("one", {"p": 1, "b": 1, "s": 1, "h": 1, "v": 8}, {**_MERGE, "lse_parts": ("normal", 2.0)}, note="a single part is itself"),
            Case(
                "far-apart",
                {"p": 5, "b": 2, "s": 1, "h": 2, "v": 16},
                {**_MERGE, "lse_parts": ("normal", 80.0)},
                note="exp of lse overflows",
            ),
            Case(
                "empty-parts",
                {"p": 4, "b": 1, "s": 3, "h": 2, "v": 8},
                {**_MERGE, "lse_parts": ("some_infinite", 2.0)},
                note="lse = ±inf: a split without keys",
            ),
            Case(
                "empty-garbage",
                {"p": 3, "b": 1, "s": 3, "h": 2, "v": 8},
                {**_MERGE, "lse_parts": ("some_infinite", 2.0), "o_parts": ("nan_tail", 1.0, 0, 0, 2)},
                note="the last query saw nothing in any part: its o_parts hold NaN",
            ),
        ),
        "2*p*b*s*h*v",
        "spec §2.1; FlashMLA csrc, combine",
        vary="h",
    )
)


def _packed(name: str, ends_q: tuple[int, ...], ends_k: tuple[int, ...], note: str = "", **attrs: Any) -> Case:
    dims = {"n": ends_q[-1], "m": ends_k[-1], "h": 2, "g": 2, "k": 24, "v": 16, "j": len(ends_q)}
    draws: dict[str, tuple] = dict.fromkeys(("q", "k", "v", "do", "dlse"), ("normal", 1.0))
    return Case(name, dims, {**draws, "cu_seqlens_q": ("positions", *ends_q), "cu_seqlens_k": ("positions", *ends_k)}, attrs, note)


attention_varlen = declare(
    Op(
        "attention.varlen",
        attention_varlen_fwd,
        attention_varlen_bwd,
        (
            _packed("packed", (0, 5, 6, 13), (0, 5, 6, 13), "three sequences, one of a single token"),
            _packed("chunked", (0, 3, 7), (0, 11, 15), "the last 3 of 11 tokens, and 4 of 4"),
            _packed("empty", (0, 0, 4, 6), (0, 3, 3, 5), "a sequence without queries, one without keys"),
            _packed("all-keys", (0, 2, 5), (0, 6, 10), causal=False, scale=0.13523378),
        ),
        "2*n*m*h*(k+v)",
        "spec §2.1; FlashAttention's and FlashMLA's varlen interfaces",
        vary="",
    )
)
