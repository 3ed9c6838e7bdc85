"""Attention of one sequence by blocks of heads, queries and keys: products by BLAS, everything between them in one pass. Spec §2.

Scores are a sum of products: a part is q[h,s,d] with k[h,t,d], or with one k[t,d] for all heads; so no key is ever repeated for each
head, nor joined from its halves. Any strides will do as long as BLAS takes them.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ._common import run
from ._softmax import finish, fold, gradients, no_sinks, softmax

Array = NDArray[Any]
# Queries at a time, at least and at most, and scores at a time: memory is theirs, not s·t. Two blocks of queries at least, where they are
# not too small for BLAS: then a quarter of the scores that a causal mask hides is never made.
FEW, ROWS, SCORES = 128, 512, 1 << 20
WORK = 4  # a score costs about as much as so many elements of a copy


class Part(NamedTuple):
    q: Array  # [h,s,d]
    k: Array  # [h,t,d] or [t,d]


class Block(NamedTuple):
    """Which heads and queries, how many keys they see at most, and how many the first query sees."""

    heads: slice
    rows: slice
    stop: int
    seen: int


def extent(h: int, s: int, t: int, block: int) -> tuple[int, int]:
    """Heads and queries of a block"""
    rows = max(1, min(s, ROWS, max(FEW, -(-s // 2))))
    return max(1, min(h, SCORES // max(1, rows * min(block, t)))), rows


def blocks(h: int, s: int, t: int, causal: bool, block: int) -> Iterator[Block]:
    """The last queries first: they see every key, so what they write to the keys' gradients the others only add to."""
    heads, rows = extent(h, s, t, block)
    for h0 in range(0, h, heads):
        for r0 in range((s - 1) // rows * rows, -1, -rows):
            r1 = min(r0 + rows, s)
            stop = max(0, min(t, r1 + t - s)) if causal else t
            yield Block(slice(h0, min(h0 + heads, h)), slice(r0, r1), stop, r0 + t - s + 1 if causal else t)


def of(k: Array, heads: slice, keys: slice) -> Array:
    """The keys of these heads, or those that all share"""
    return k[keys] if k.ndim == 2 else k[heads, keys]


def stacked(a: Array) -> Array:
    """[h,i,:] as [h·i,:]"""
    return a.reshape(a.shape[0] * a.shape[1], a.shape[2])


def times(a: Array, b: Array, out: Array) -> None:
    """out[h,i,:] = a[h,i,:] b, with b[h,:,:], or with one b for all heads: then as one product"""
    if b.ndim == 3:
        np.matmul(a, b, out=out)
    elif out.flags.c_contiguous:
        np.matmul(stacked(a), b, out=stacked(out))
    else:
        out[...] = np.matmul(stacked(a), b).reshape(out.shape)


def scores(parts: Sequence[Part], at: Block, keys: slice, z: Array, more: Array) -> None:
    for i, part in enumerate(parts):
        times(part.q[at.heads, at.rows], of(part.k, at.heads, keys).swapaxes(-1, -2), z if i == 0 else more)
        if i:
            z += more


def scratch(count: int, h: int, s: int, t: int, block: int, dtype: Any) -> list[Array]:
    """Room for the scores of one block, `count` times"""
    heads, rows = extent(h, s, t, block)
    return [np.empty(heads * rows * min(block, t), dtype) for _ in range(count)]


def shaped(flat: Array, at: Block, keys: slice) -> Array:
    shape = at.heads.stop - at.heads.start, at.rows.stop - at.rows.start, keys.stop - keys.start
    return flat[: shape[0] * shape[1] * shape[2]].reshape(shape)


def attend(
    parts: Sequence[Part], v: Array, o: Array, lse: Array, scale: float, causal: bool, block: int, sink: Array | None, empty: float
) -> None:
    """Fills o[h,s,dv] and lse[h,s]"""
    h, s, dv = o.shape
    t = v.shape[-2]
    dtype = o.dtype
    first, second = scratch(2, h, s, t, block, dtype)
    sinks = no_sinks(h) if sink is None else sink.astype(np.float64)
    for at in blocks(h, s, t, causal, block):
        if at.stop == 0:
            o[at.heads, at.rows], lse[at.heads, at.rows] = 0.0, empty
            continue
        heads, rows = at.heads.stop - at.heads.start, at.rows.stop - at.rows.start
        n, whole = heads * rows, at.stop <= block
        m, total, logsum = np.full(n, -np.inf, dtype), np.zeros(n), np.empty(n, dtype)
        shrink, own = np.empty(n, dtype), sinks[at.heads]
        acc = new = np.empty(0, dtype)
        for k0 in range(0, at.stop, block):
            keys = slice(k0, min(k0 + block, at.stop))
            z = shaped(first, at, keys)
            scores(parts, at, keys, z, shaped(second, at, keys))
            flat = stacked(z)
            run(softmax, n, flat.shape[1] * WORK, flat, rows, at.seen - k0, scale, m, total, shrink, whole, own, empty, logsum)
            if whole:
                times(z, of(v, at.heads, keys), o[at.heads, at.rows])
            elif k0 == 0:
                acc, new = np.empty((heads, rows, dv), dtype), np.empty((heads, rows, dv), dtype)
                times(z, of(v, at.heads, keys), acc)
            else:
                times(z, of(v, at.heads, keys), new)
                run(fold, n, dv, stacked(acc), stacked(new), shrink)
        if not whole:
            run(finish, n, dv, stacked(acc), rows, m, total, own, empty, logsum)
            o[at.heads, at.rows] = acc
        lse[at.heads, at.rows] = logsum.reshape(heads, rows)


def add(target: Array, a: Array, b: Array, first: bool) -> None:
    """target = a b if it is the first, else target gains it"""
    if first:
        np.matmul(a, b, out=target)
    else:
        target += np.matmul(a, b)


def gather(target: Array, a: Array, b: Array, at: Block, keys: slice, first: bool) -> None:
    """target[h,keys,:] (or target[keys,:], summed over heads) gains a[h,i,keys]ᵀ b[h,i,:]"""
    if target.ndim == 3:
        add(target[at.heads, keys], a.swapaxes(-1, -2), b, first)
    else:
        add(target[keys], stacked(a).T, stacked(b), first and at.heads.start == 0)


def attend_bwd(
    parts: Sequence[Part],
    v: Array,
    do: Array,
    lse: Array,
    pull: Array,
    grads: Sequence[Part],
    dv: Array,
    scale: float,
    causal: bool,
    block: int,
) -> None:
    """Fills the gradients of each part and of v. pull[h,s] is what is added to do vᵀ: dlse - D."""
    h, s, _ = do.shape
    t = v.shape[-2]
    if h * s == 0:
        for array in (dv, *(grad.k for grad in grads)):
            array[...] = 0.0
    first, second = scratch(2, h, s, t, block, do.dtype)
    for at in blocks(h, s, t, causal, block):
        rows = at.rows.stop - at.rows.start
        bases, pulls = lse[at.heads, at.rows].ravel(), pull[at.heads, at.rows].ravel()
        if at.stop == 0:
            for grad in grads:
                grad.q[at.heads, at.rows] = 0.0
        for k0 in range(0, at.stop, block):
            keys = slice(k0, min(k0 + block, at.stop))
            z, dp = shaped(first, at, keys), shaped(second, at, keys)
            scores(parts, at, keys, z, dp)
            times(do[at.heads, at.rows], of(v, at.heads, keys).swapaxes(-1, -2), dp)
            n = z.shape[0] * rows
            run(gradients, n, z.shape[2] * WORK, stacked(z), stacked(dp), rows, at.seen - k0, scale, bases, pulls)
            last = at.rows.stop == s
            gather(dv, z, do[at.heads, at.rows], at, keys, last)
            for part, grad in zip(parts, grads, strict=True):
                gather(grad.k, dp, part.q[at.heads, at.rows], at, keys, last)
                k, dq = of(part.k, at.heads, keys), grad.q[at.heads, at.rows]
                if k0 == 0:
                    times(dp, k, dq)
                else:
                    dq += np.matmul(dp, k)
