"""Bugs of attention in parts: the merge of split-KV results, and packed sequences."""

from collections.abc import Callable
from typing import Any

from ...ref.attention import attention_fwd
from ...ref.attention_parts import attention_merge_bwd, attention_merge_fwd, attention_varlen_bwd, attention_varlen_fwd
from ...ref.xp import Array, xp_of
from . import Bug
from .attention import LN2, Result, top_left_fwd


def base_two(o_parts: Array, lse_parts: Array) -> Result:
    """2^lse for exp(lse), and log2 for the logarithm."""
    (o, lse), saved = attention_merge_fwd(o_parts, lse_parts * LN2)
    return (o, lse / LN2), saved


def after(change: Callable[[Any, Array, Array, Array, Array], tuple[Array, Array]]) -> Callable:
    """The right o and lse, changed: change(xp, o, lse, o_parts, lse_parts), the parts with -inf for every empty one."""

    def fwd(o_parts: Array, lse_parts: Array) -> Result:
        xp = xp_of(o_parts)
        (o, lse), saved = attention_merge_fwd(o_parts, lse_parts)
        clean = xp.where(xp.isinf(lse_parts), xp.zeros_like(lse_parts) - float("inf"), lse_parts)
        return change(xp, o, lse, o_parts, clean), saved

    return fwd


def per_row(x: Array) -> Array:
    """[…,h,s] to […,s,h,1]: what multiplies o"""
    xp = xp_of(x)
    return xp.permute_dims(x, (*range(x.ndim - 2), x.ndim - 1, x.ndim - 2))[..., None]


def literal(plus_is_empty: bool, guarded: bool) -> Callable:
    """The merge as its formula stands: infinities are not looked at, or of one sign only."""

    def fwd(o_parts: Array, lse_parts: Array) -> Result:
        xp = xp_of(o_parts)
        low = xp.zeros_like(lse_parts) - float("inf")
        read = xp.where(xp.isinf(lse_parts), low, lse_parts) if plus_is_empty else lse_parts
        m = xp.max(read, axis=0)
        base = xp.where(xp.isinf(m) & (m < 0), xp.zeros_like(m), m) if guarded else m
        w = xp.exp(read - base)
        total = xp.sum(w, axis=0)
        none = total == 0
        divisor = xp.where(none, xp.ones_like(total), total)
        o = xp.sum(per_row(w) * xp.where(per_row(w) == 0, xp.zeros_like(o_parts), o_parts), axis=0) / per_row(divisor)
        return (o, xp.where(none, -low[0], base + xp.log(divisor))), (o_parts, w / divisor, o)

    return fwd


def largest_as_one(xp: Any, o: Array, lse: Array, o_parts: Array, lse_parts: Array) -> tuple[Array, Array]:
    """Σ exp(lse_p - max) o_p, not divided by the sum of the weights: the right o times that sum."""
    top = xp.max(lse_parts, axis=0)
    return o * per_row(xp.exp(xp.where(xp.isinf(top), xp.zeros_like(top), lse - top))), lse


def zero_times_nan(xp: Any, o: Array, lse: Array, o_parts: Array, lse_parts: Array) -> tuple[Array, Array]:
    """A part of weight 0 is multiplied by 0 instead of left out."""
    return o + xp.sum(0 * o_parts, axis=0), lse


def other_stride(o_parts: Array, lse_parts: Array) -> Result:
    """Parts after the first are read with a row of 3v/2 numbers, in a buffer whose rows have v."""
    xp, (p, *rows, v) = xp_of(o_parts), o_parts.shape
    count = v
    for size in rows:
        count *= size
    index = xp.arange(count // v)[:, None] * (v + v // 2) + xp.arange(v)[None, :]
    flat = xp.reshape(o_parts[1:, ...], (p - 1, count))
    later = xp.take(flat, xp.reshape(index % count, (-1,)), axis=1)
    return attention_merge_fwd(xp.concat([o_parts[:1, ...], xp.reshape(later, (p - 1, *rows, v))], axis=0), lse_parts)


def one_sequence(q: Array, k: Array, v: Array, cu_q: Array, cu_k: Array, **attrs: Any) -> Result:
    (o, lse), _ = attention_fwd(q[None, ...], k[None, ...], v[None, ...], None, **attrs)
    return (o[0, ...], lse[0, ...]), ()


def keys_by_queries(q: Array, k: Array, v: Array, cu_q: Array, cu_k: Array, **attrs: Any) -> Result:
    n = q.shape[0]
    return attention_varlen_fwd(q, k[:n, ...], v[:n, ...], cu_q, cu_q, **attrs)


def each(piece: Callable) -> Callable:
    """Packed sequences, each by another attention."""

    def fwd(q: Array, k: Array, v: Array, cu_q: Array, cu_k: Array, **attrs: Any) -> Result:
        (o, lse), saved = attention_varlen_fwd(q, k, v, cu_q, cu_k, **attrs)
        xp, os, lses = xp_of(q), [o[:0, ...]], [lse[:, :0]]
        for i in range(cu_q.shape[0] - 1):
            own, keys = (slice(int(cu[i]), int(cu[i + 1])) for cu in (cu_q, cu_k))
            if own.stop > own.start and keys.stop > keys.start:
                (a, b), _ = piece(q[None, own, ...], k[None, keys, ...], v[None, keys, ...], None, **attrs)
                a, b = a[0, ...], b[0, ...]
            else:
                a, b = o[own, ...], lse[:, own]
            os.append(a)
            lses.append(b)
        return (xp.concat(os, axis=0), xp.concat(lses, axis=1)), saved

    return fwd


def unwritten_rows(q: Array, k: Array, v: Array, cu_q: Array, cu_k: Array, **attrs: Any) -> Result:
    """Rows of sequences without keys stay as the buffer was, here NaN."""
    (o, lse), saved = attention_varlen_fwd(q, k, v, cu_q, cu_k, **attrs)
    return (o + void(o, cu_q, cu_k)[:, None, None], lse), saved


def void(x: Array, cu: Array, other: Array) -> Array:
    """[n]: NaN for the tokens of sequences that have none on the other side, else 0"""
    ends, others = ([int(c[i]) for i in range(c.shape[0])] for c in (cu, other))
    flags = [float("nan") if others[i] == others[i + 1] else 0.0 for i in range(len(ends) - 1) for _ in range(ends[i + 1] - ends[i])]
    return xp_of(x).asarray(flags, dtype=x.dtype)


def unwritten_grads(do: Array, dlse: Array, saved: tuple) -> tuple[Array, ...]:
    """dk and dv of sequences without queries stay as the buffer was, here NaN."""
    dq, dk, dv = attention_varlen_bwd(do, dlse, saved)
    xp, places = xp_of(dk), saved[3]
    flags = [float("nan") if own.start == own.stop else 0.0 for own, keys in places for _ in range(keys.stop - keys.start)]
    stale = xp.asarray(flags, dtype=dk.dtype)[:, None, None]
    return dq, dk + stale, dv + stale


MERGE, VARLEN = ("attention.merge",), ("attention.varlen",)
BUGS = [
    Bug(
        "lse-base2-vs-e",
        MERGE,
        "Parts are weighed by 2^lse although lse is a natural logarithm.",
        "sgl-project/sglang#40903, #35045; vllm-project/vllm#52796, #47079, #43919, #28840; flashinfer-ai/flashinfer#2113, #4485, #4547",
        fwd=base_two,
    ),
    Bug("merge-lse-base2", MERGE, "The merged lse is a logarithm to base 2.", fwd=after(lambda xp, o, lse, *_: (o, lse / LN2))),
    Bug(
        "lse-empty-chunk-plus-inf",
        MERGE,
        "A part without keys whose lse is +inf is not taken for empty: it outweighs all others.",
        "vllm-project/vllm#15492, #49294; flashinfer-ai/flashinfer#4452, #3047; sgl-project/sglang#22688, #22291",
        fwd=literal(plus_is_empty=False, guarded=True),
    ),
    Bug(
        "lse-merge-both-neg-inf",
        MERGE,
        "Where every part is empty exp(-inf - -inf) is NaN; o is 0 there.",
        "vllm-project/vllm#27491",
        fwd=literal(plus_is_empty=True, guarded=False),
    ),
    Bug(
        "merge-stride-mismatch",
        MERGE,
        "Parts after the first are read with the stride of a padded buffer, 3v/2 for v (192 for 128).",
        "local-inference-lab/vllm#15, #17",
        fwd=other_stride,
    ),
    Bug(
        "merge-empty-nan-leak", MERGE, "What an empty part holds is multiplied by 0 instead of left out: 0·NaN.", fwd=after(zero_times_nan)
    ),
    Bug(
        "merge-unweighted",
        MERGE,
        "o is the mean of the parts.",
        fwd=after(lambda xp, o, lse, o_parts, lse_parts: (xp.mean(o_parts, axis=0), lse)),
    ),
    Bug("merge-unnormalised", MERGE, "The weights exp(lse_p - max) are not divided by their sum.", fwd=after(largest_as_one)),
    Bug(
        "merge-lse-of-largest",
        MERGE,
        "The merged lse is the largest of the parts'.",
        fwd=after(lambda xp, o, lse, o_parts, lse_parts: (o, xp.where(xp.isinf(lse), lse, xp.max(lse_parts, axis=0)))),
    ),
    Bug(
        "merge-bwd-lse-dropped",
        MERGE,
        "The gradient that comes through the merged lse is left out.",
        bwd=lambda do, dlse, saved: attention_merge_bwd(do, 0 * dlse, saved),
    ),
    Bug(
        "merge-bwd-weights-constant",
        MERGE,
        "The weights are taken for constants: the parts' lse receive nothing from o.",
        bwd=lambda do, dlse, saved: (attention_merge_bwd(do, dlse, saved)[0], attention_merge_bwd(0 * do, dlse, saved)[1]),
    ),
    Bug(
        "merge-bwd-unweighted",
        MERGE,
        "Each part receives all of o's gradient, not its share.",
        bwd=lambda do, dlse, saved: (do + 0 * saved[0], attention_merge_bwd(do, dlse, saved)[1]),
    ),
    Bug(
        "mask-top-left",
        VARLEN,
        "The mask is aligned top-left: query i of a sequence sees its keys 0..i.",
        "Dao-AILab/flash-attention#282, #517; NVIDIA/cutlass#2336",
        fwd=each(top_left_fwd),
    ),
    Bug("varlen-sequences-mixed", VARLEN, "Boundaries are not heeded: all tokens are one sequence.", fwd=one_sequence),
    Bug("varlen-keys-by-queries", VARLEN, "The keys are cut at cu_seqlens_q instead of cu_seqlens_k.", fwd=keys_by_queries),
    Bug(
        "padded-row-stale-output",
        VARLEN,
        "Queries of a sequence without keys keep what the buffer held, here NaN.",
        "vllm-project/vllm#37442; sgl-project/sglang#1779",
        fwd=unwritten_rows,
    ),
    Bug(
        "varlen-bwd-stale-gradient",
        VARLEN,
        "dk and dv of a sequence without queries keep what the buffer held, here NaN.",
        "ROCm/flash-attention#179",
        bwd=unwritten_grads,
    ),
]
