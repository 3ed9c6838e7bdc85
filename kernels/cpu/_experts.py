"""Tokens through their experts and back, by the products of _grouped."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import _grouped, _pool
from ._common import run
from ._tile import VECTORS, lanes
from .moe_permute import Plan, plan_of, rows_of
from .swiglu import limit_of

Array = NDArray[Any]
PIECE = 1 << 19  # elements of weights that a thread takes at a time


class Flat(NamedTuple):
    """A weight [e,o,i] as one run of elements, without a copy where every expert lies in one piece"""

    data: Array
    step: int  # from one expert to the next
    shape: tuple[int, ...]


def flat(weight: Array) -> Flat:
    e, o, i = weight.shape
    size = weight.itemsize
    step = weight.strides[0] if e > 1 else o * i * size
    if weight.size == 0 or (o > 1 and weight.strides[1] != i * size) or (i > 1 and weight.strides[2] != size) or step % size or step < 0:
        weight, step = np.ascontiguousarray(weight), o * i * size
    if not weight.flags.aligned:
        weight, step = weight.copy(), o * i * size
    step //= size
    count = (e - 1) * step + o * i if weight.size else 0
    data = np.lib.stride_tricks.as_strided(weight, (count,), (size,), writeable=False)
    return Flat(data, step, (e, o, i))


class Saved(NamedTuple):
    """What the backward needs of the forward"""

    x: Array
    topk_weight: Array
    weights: tuple[Flat, Flat, Flat]
    plan: Plan
    first: Array  # [e+1]: each expert's rows among the sorted
    active: Array  # the experts that have any
    gates: Array  # [m,f], before the activation
    ups: Array
    limit: Any


def forward(x: Array, topk_idx: Array, topk_weight: Array, weights: Any, limit: Any, y: Array, keep: bool) -> Saved | None:
    """Adds sum_k topk_weight[n,k] FFN_{topk_idx[n,k]}(x[n]) to y, for checked arguments. Saved, if a backward follows."""
    gate, up, down = (flat(w) for w in weights)
    (e, f, d), k, width = gate.shape, max(topk_idx.shape[1], 1), lanes(x.itemsize)
    plan, limit = plan_of(topk_idx, e), limit_of("moe", limit, x.dtype)
    first = np.concatenate([[0], np.cumsum(plan.counts)])
    start = np.concatenate([[0], np.cumsum(-(-plan.counts // width) * width)])
    active = np.flatnonzero(plan.counts)
    kept = [np.empty((plan.source.size if keep else 0, f), x.dtype) for _ in range(2)]
    if active.size and d and f:
        xt, act = np.empty(start[-1] * d, x.dtype), np.empty(start[-1] * f, x.dtype)
        run(_grouped.panels, e, max(xt.size // e, 1), x, plan.source, k, first, start, VECTORS * width, xt)
        places = active, first, start
        tasks, piece = active.size * -(-f // _grouped.TALL), 2 * _grouped.TALL * d
        weighted = gate.data, gate.step, up.data, up.step
        run(_grouped.hidden, tasks, piece, *weighted, xt, *places, d, f, limit, width, act, keep, *kept, largest=PIECE)
        del xt
        tasks, piece = -(-d // _grouped.TALL), active.size * _grouped.TALL * f
        rest = act, *places, plan.source, k, topk_weight.reshape(-1), d, f, width, y
        run(_grouped.down, tasks, piece, down.data, down.step, *rest, largest=PIECE)
    elif keep:
        for a in kept:
            a[:] = 0
    return Saved(x, topk_weight, (gate, up, down), plan, first, active, kept[0], kept[1], limit) if keep else None


def dense_forward(x: Array, weights: Any, limit: Any, y: Array, keep: bool) -> Saved | None:
    """Adds FFN(x[n]), of weights [f,d], [f,d] and [d,f], to y: one expert that every token goes to. Saved, if a backward follows."""
    everyone = np.zeros((x.shape[0], 1), np.int64), np.ones((x.shape[0], 1), x.dtype)
    return forward(x, *everyone, [w[None] for w in weights], limit, y, keep)


def backward(saved: Saved, dy: Array, dx: Array, out: Any = (None, None, None)) -> tuple[Array, ...]:
    """Adds to dx; returns dtopk_weight[n,k] and each weight's gradient, in the arrays of `out` where there are any."""
    x, topk_weight, (gate, up, down), plan, first, active, gates, ups, limit = saved
    (e, f, d), k, width, m = gate.shape, max(topk_weight.shape[1], 1), lanes(x.itemsize), plan.source.size
    slot_weight = topk_weight.reshape(-1)
    blocks = -(-f // _grouped.WIDE)
    dgates, dups, acts = (np.empty_like(gates) for _ in range(3))
    parts = np.zeros((blocks, m))
    xs, dys = rows_of(x, plan.source, k), rows_of(dy, plan.source, k)
    if active.size and d and f:
        rest = gates, ups, dgates, dups, acts, parts
        given = dys, active, first, plan.source, slot_weight, d, f, limit, width
        run(_grouped.hidden_bwd, active.size * blocks, _grouped.WIDE * d, down.data, down.step, *given, *rest, largest=PIECE)
        tasks, piece = -(-d // _grouped.WIDE), 2 * active.size * _grouped.WIDE * f
        weighted = gate.data, gate.step, up.data, up.step
        given = dgates, dups, active, first, plan.source, k, d, f, width, dx
        run(_grouped.input_bwd, tasks, piece, *weighted, *given, largest=PIECE)
    dslots = np.zeros(slot_weight.size, x.dtype)
    dslots[plan.source] = parts.sum(axis=0)
    dws = []
    for (a, b), w, target in zip(((dgates, xs), (dups, xs), (dys, acts)), (gate, up, down), out, strict=True):
        dw = _pool.empty(w.shape, x.dtype) if target is None else target
        run(_grouped.outer, e * -(-w.shape[1] // _grouped.TALL), _grouped.TALL * w.shape[2], a, b, first, width, dw, largest=PIECE)
        dws.append(dw)
    return dslots.reshape(topk_weight.shape), *dws


def dense_backward(saved: Saved, dy: Array, dx: Array, out: Any = (None, None, None)) -> list[Array]:
    """Adds to dx; returns each weight's gradient, in the arrays of `out` where there are any."""
    return [g[0] for g in backward(saved, dy, dx, [None if w is None else w[None] for w in out])[1:]]
