"""The experts' forward, and their tokens' way there and back: every order of experts, slots and channels that kernels have.

`to` rounds what is stored on the way: gate and up, the activation, and what each expert gives.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .floats import Array, to_bf16
from .linear import product, product_double, product_outer, product_sequential, product_split, product_steps
from .router import FORWARD as ROUTERS
from .router import forward_eager
from .router_softmax import SOFTMAX, SOFTMAX_EAGER
from .swiglu import by_exp2, by_tanh, clamped, in_double, quotient, swiglu_eager, times_sigmoid

# tokens to rows and back


def rows_by_sorting(topk_idx: Array, e: int, alignment: int) -> tuple[Array, Array, Array]:
    """counts, source (the slot in each row) and place (the row of each slot), by one stable sort and cumulative sums"""
    flat = topk_idx.reshape(-1).astype(np.int64)
    counts = np.bincount(flat[flat >= 0], minlength=e)
    filled = -(-counts // alignment) * alignment
    order = np.argsort(flat, kind="stable")
    order = order[flat[order] >= 0]
    first = np.cumsum(filled) - filled
    within = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    rows = np.repeat(first, counts) + within
    source, place = np.full(filled.sum(), -1), np.full(len(flat), -1)
    source[rows], place[order] = order, rows
    return counts, source, place.reshape(topk_idx.shape)


def rows_by_lists(topk_idx: Array, e: int, alignment: int) -> tuple[Array, Array, Array]:
    """A list for each expert"""
    lists: list[list[int]] = [[] for _ in range(e)]
    for slot, i in enumerate(topk_idx.ravel().tolist()):
        if i >= 0:
            lists[i].append(slot)
    source: list[int] = []
    for slots in lists:
        source += slots + [-1] * (-len(slots) % alignment)
    place = np.full(topk_idx.size, -1, np.int32)
    for row, slot in enumerate(source):
        if slot >= 0:
            place[slot] = row
    return np.array([len(s) for s in lists], np.int32), np.array(source, np.int32).reshape(-1), place.reshape(topk_idx.shape)


def rows_by_cursors(topk_idx: Array, e: int, alignment: int) -> tuple[Array, Array, Array]:
    """A histogram, then a cursor for each expert that goes back from the end of its rows"""
    counts = np.array([(topk_idx == i).sum() for i in range(e)], np.int64)
    ends = np.cumsum((counts + alignment - 1) // alignment * alignment)
    source, place = np.full(ends[-1], -1), np.full(topk_idx.size, -1)
    cursor = np.r_[0, ends[:-1]] + counts
    for slot in reversed(range(topk_idx.size)):
        i = topk_idx.flat[slot]
        if i >= 0:
            cursor[i] -= 1
            source[cursor[i]], place[slot] = slot, cursor[i]
    return counts, source, place.reshape(topk_idx.shape)


ROWS = {"sorting": rows_by_sorting, "lists": rows_by_lists, "cursors": rows_by_cursors}


def _permute(rows: Callable) -> Callable:
    def forward(x: Array, topk_idx: Array, *, n_routed_experts: int = 256, alignment: int = 1) -> tuple[Array, Array, Array]:
        counts, source, _ = rows(topk_idx, n_routed_experts, alignment)
        padded = np.concatenate([x, np.zeros_like(x[:1])])
        return padded[np.where(source < 0, len(x), source // topk_idx.shape[1])], counts, source

    return forward


def in_slots(y: Array, weight: Array) -> Array:
    """y[n,k,d], the last slot first"""
    total = np.zeros_like(y[:, 0])
    for j in reversed(range(y.shape[1])):
        total = total + weight[:, j, None] * y[:, j]
    return total


def in_pairs(y: Array, weight: Array) -> Array:
    """Halves, then their halves"""
    parts = [y[:, j] * weight[:, j, None] for j in range(y.shape[1])]
    while len(parts) > 1:
        parts = [parts[i] + parts[i + 1] if i + 1 < len(parts) else parts[i] for i in range(0, len(parts), 2)]
    return parts[0]


def in_one_product(y: Array, weight: Array) -> Array:
    return (weight[:, None, :] @ y)[:, 0]


def in_float64(y: Array, weight: Array) -> Array:
    return (y.astype(np.float64) * weight[:, :, None]).sum(1).astype(y.dtype)


def in_bf16(y: Array, weight: Array) -> Array:
    """Every product and every sum is rounded, as index_add_ on bfloat16 has it."""
    total = np.zeros_like(y[:, 0])
    for j in range(y.shape[1]):
        total = to_bf16(total + to_bf16(weight[:, j, None] * y[:, j]))
    return total


SUMS = {"slots": in_slots, "pairs": in_pairs, "product": in_one_product, "float64": in_float64}


def _unpermute(rows: Callable, total: Callable) -> Callable:
    def forward(y_sorted: Array, topk_idx: Array, topk_weight: Array, *, n_routed_experts: int = 256, alignment: int = 1) -> Array:
        place = rows(topk_idx, n_routed_experts, alignment)[2]
        padded = np.concatenate([y_sorted, np.zeros_like(y_sorted[:1])])
        return total(padded[place], topk_weight)

    return forward


PERMUTE = {name: _permute(rows) for name, rows in ROWS.items()}
UNPERMUTE = {name: _unpermute(rows, total) for (name, total), rows in zip(SUMS.items(), (*ROWS.values(), rows_by_lists), strict=True)}
UNPERMUTE_EAGER = _unpermute(rows_by_lists, in_bf16)

# experts


@dataclass(frozen=True)
class How:
    """What an implementation is made of. walk: the order of the work. fused: gate and up in one product. unstored: all stays inside.
    early: the weights before w_down whatever is asked, which 16 bits can tell. every: all operations round to bfloat16."""

    walk: str = "sorted"
    matmul: Callable = product
    silu: Callable = quotient
    total: Callable = in_slots
    fused: bool = False
    unstored: bool = False
    early: bool = False
    every: bool = False

    def store(self, to: Callable) -> Callable:
        return (lambda x: x) if self.unstored else to

    def inside(self, x: Array) -> Array:
        return to_bf16(x) if self.every else x


def ffn(how: How, to: Callable, x: Array, w: tuple, limit: float | None, weight: Array | None) -> Array:
    """What an expert gives for x[m,d]; weight[m] goes before w_down"""
    w_gate, w_up, w_down = w
    if how.fused:
        both = how.matmul(x, np.concatenate([w_gate, w_up]))
        gate, up = both[:, : len(w_gate)], both[:, len(w_gate) :]
    else:
        gate, up = how.matmul(x, w_gate), how.matmul(x, w_up)
    g, u = clamped(to(gate), to(up), limit)
    a = how.inside(swiglu_eager(g, u) if how.every else how.silu(g) * u)
    a = a if weight is None else a * weight[:, None]
    return to(how.matmul(to(a.astype(x.dtype)), w_down))


def experts_of(how: How, to: Callable, x: Array, topk_idx: Array, topk_weight: Array, w: tuple, before: bool, limit: float | None) -> Array:
    to, e, before = how.store(to), len(w[0]), before or how.early
    late = np.ones_like(topk_weight) if before else topk_weight
    y = np.zeros((*topk_idx.shape, x.shape[1]), x.dtype)
    if how.walk == "tokens":
        for n, k in np.argwhere(topk_idx >= 0):
            own = tuple(part[topk_idx[n, k]] for part in w)
            y[n, k] = ffn(how, to, x[n : n + 1], own, limit, topk_weight[n, k : k + 1] if before else None)[0]
        return how.total(y, late)
    if how.walk == "dense":
        dense = np.zeros((len(x), e), x.dtype)  # a weight for every expert
        for slot in range(topk_idx.shape[1]):
            chose = topk_idx[:, slot] >= 0
            dense[chose, topk_idx[chose, slot]] = topk_weight[chose, slot]
        y = np.stack([ffn(how, to, x, tuple(part[i] for part in w), limit, dense[:, i] if before else None) for i in range(e)], axis=1)
        return how.total(y, (dense != 0).astype(x.dtype) if before else dense)
    running = np.zeros_like(x)
    for i in range(e) if how.walk == "sorted" else reversed(range(e)):
        token, slot = np.nonzero(topk_idx == i)
        out = ffn(how, to, x[token], tuple(part[i] for part in w), limit, topk_weight[token, slot] if before else None)
        y[token, slot] = out
        if how.walk == "running":  # a sum for each token, which is stored after each expert
            running[token] = to(running[token] + to(how.inside(out * late[token, slot, None])))
    return running if how.walk == "running" else how.total(y, late)


HOWS = {
    "tokens": How("tokens", product_sequential, by_exp2, in_pairs),
    "experts-backwards": How("backwards", product_steps, quotient, in_slots),
    "running-sum": How("running", product, times_sigmoid),
    "dense": How("dense", product_split, by_tanh, in_one_product),
    "fused-exp2": How("sorted", product_outer, by_exp2, in_one_product, fused=True),
    "unstored": How("sorted", product, times_sigmoid, in_pairs, unstored=True),
    "double": How("backwards", product_double, in_double, in_float64, fused=True, unstored=True),
    "weights-early": How("sorted", product, quotient, in_slots, early=True),
}
EAGER_HOW = How("running", product, quotient, in_bf16, every=True)


def _experts(how: How) -> Callable:
    def forward(
        x: Array,
        topk_idx: Array,
        topk_weight: Array,
        w_gate: Array,
        w_up: Array,
        w_down: Array,
        *,
        to: Callable,
        weight_before_down: bool = False,
        limit: float | None = None,
    ) -> Array:
        return experts_of(how, to, x, topk_idx, topk_weight, (w_gate, w_up, w_down), weight_before_down, limit)

    return forward


NOAUX = {f.__name__: f for f in ROUTERS}
ROUTES = dict(zip(HOWS, [*NOAUX.values(), *NOAUX.values()], strict=False))
SELECTS = ("n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor", "denominator_eps", "mask_fill")


def routed(route: Callable, softmax: Callable, logits: Array, bias: Array | None, a: dict[str, Any]) -> tuple[Array, Array]:
    given = {"k": a["num_experts_per_tok"], **{name: a[name] for name in SELECTS if name in a}}
    if a.get("topk_method", "noaux_tc") == "softmax":
        return softmax(logits, **{"n_group": 8, "topk_group": 4, "norm_topk_prob": True, "routed_scaling_factor": 2.5, **given})
    bias = np.zeros(logits.shape[1], logits.dtype) if bias is None else bias
    return route(logits, bias, scoring=a.get("scoring", "sigmoid"), **given)


def _layer(how: How, route: Callable, softmax: Callable) -> Callable:
    def forward(
        x: Array,
        gate_weight: Array,
        w_gate: Array,
        w_up: Array,
        w_down: Array,
        *,
        to: Callable,
        e_score_correction_bias: Array | None = None,
        shared_gate: Array | None = None,
        shared_up: Array | None = None,
        shared_down: Array | None = None,
        **a: Any,
    ) -> tuple[Array, Array]:
        logits, limit = how.inside(how.matmul(x, gate_weight)), a.get("limit")
        idx, weight = routed(route, softmax, logits, e_score_correction_bias, a)
        y = experts_of(how, to, x, idx, weight, (w_gate, w_up, w_down), a.get("weight_before_down", False), limit)
        if shared_gate is not None:
            y = y + ffn(how, how.store(to), x, (shared_gate, shared_up, shared_down), limit, None)
        return y, idx

    return forward


EXPERTS = {name: _experts(how) for name, how in HOWS.items()}
EXPERTS_EAGER = _experts(EAGER_HOW)
LAYER = {
    name: _layer(how, route, softmax)
    for (name, how), route, softmax in zip(HOWS.items(), ROUTES.values(), [*SOFTMAX.values(), *SOFTMAX.values()], strict=False)
}
LAYER_EAGER = _layer(EAGER_HOW, forward_eager, SOFTMAX_EAGER)
SINGLE = ("tokens", "fused-exp2")
LAYER_SINGLE = (*SINGLE, "experts-backwards", "running-sum", "dense", "unstored")
