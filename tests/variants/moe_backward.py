"""The experts' backward: the weight before or after a product, rows in every order, gradients of weights token by token or at once."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .floats import Array, to_bf16
from .linear import product, product_double, product_outer, product_split, product_steps
from .moe import ROWS, in_bf16, in_float64, in_one_product, in_pairs, in_slots
from .router import divided, scores_plain
from .router_backward import by_weights, eager, one_hot, scattered, slots, wide
from .router_softmax import SOFTMAX_BACK, SOFTMAX_BACK_EAGER, softmax, softmax_eager
from .swiglu import BACK, by_tanh, clamped, in_double, quotient, swiglu_back_eager, swiglu_eager, times_sigmoid

# moe.permute and moe.unpermute


def by_adding(d_sorted: Array, place: Array, source: Array) -> Array:
    """Row after row onto its token"""
    k = place.shape[1]
    dx = np.zeros((len(place), d_sorted.shape[1]), d_sorted.dtype)
    used = source >= 0
    np.add.at(dx, source[used] // k, d_sorted[used])
    return dx


def by_table(d_sorted: Array, place: Array, source: Array) -> Array:
    """A product with a table of zeros and ones"""
    table = (source // place.shape[1] == np.arange(len(place))[:, None]) & (source >= 0)
    return table.astype(d_sorted.dtype) @ d_sorted


def by_gathering(d_sorted: Array, place: Array, source: Array) -> Array:
    padded = np.concatenate([d_sorted, np.zeros_like(d_sorted[:1])])
    return in_pairs(padded[place], np.ones(place.shape, d_sorted.dtype))


def eagerly(d_sorted: Array, place: Array, source: Array) -> Array:
    """The sum accumulates in float32, and is rounded."""
    return to_bf16(by_table(d_sorted, place, source))


def _permute(rows: Callable, total: Callable) -> Callable:
    def backward(x: Array, topk_idx: Array, dx_sorted: Array, *, n_routed_experts: int = 256, alignment: int = 1) -> Array:
        _, source, place = rows(topk_idx, n_routed_experts, alignment)
        return total(dx_sorted, place, source)

    return backward


def dots(a: Array, b: Array) -> Array:
    return (a * b).sum(-1)


def dots_double(a: Array, b: Array) -> Array:
    return (a.astype(np.float64) * b).sum(-1).astype(a.dtype)


def dots_product(a: Array, b: Array) -> Array:
    return (a[:, None, :] @ b[:, :, None])[:, 0, 0]


def dots_running(a: Array, b: Array) -> Array:
    return np.cumsum(a * b, axis=-1)[:, -1]


def dots_eager(a: Array, b: Array) -> Array:
    return to_bf16(to_bf16(a * b).sum(-1))


def _unpermute(rows: Callable, dot: Callable, inside: Callable = lambda x: x) -> Callable:
    def backward(
        y_sorted: Array, topk_idx: Array, topk_weight: Array, dy: Array, *, n_routed_experts: int = 256, alignment: int = 1
    ) -> tuple[Array, Array]:
        _, _, place = rows(topk_idx, n_routed_experts, alignment)
        dy_sorted, dweight = np.zeros_like(y_sorted), np.zeros_like(topk_weight)
        for j in range(place.shape[1]):
            token = np.flatnonzero(place[:, j] >= 0)
            row = place[token, j]
            dy_sorted[row] = inside(dy[token] * topk_weight[token, j, None])
            dweight[token, j] = dot(dy[token], y_sorted[row])
        return dy_sorted, dweight

    return backward


PERMUTE = {
    name: _permute(rows, total)
    for (name, total), rows in zip({"adding": by_adding, "table": by_table, "gathering": by_gathering}.items(), ROWS.values(), strict=True)
}
PERMUTE_EAGER = _permute(ROWS["lists"], eagerly)
UNPERMUTE = {
    name: _unpermute(rows, dot)
    for (name, dot), rows in zip(
        {"sums": dots, "double": dots_double, "products": dots_product, "running": dots_running}.items(),
        (*ROWS.values(), ROWS["lists"]),
        strict=True,
    )
}
UNPERMUTE_EAGER = _unpermute(ROWS["sorting"], dots_eager, to_bf16)

# experts


@dataclass(frozen=True)
class How:
    """What an implementation is made of. walk: the order of the work. late: the weight multiplies dy w_down, not dy, and its own gradient
    is that product's with the activation. fused: gate and up as one matrix. every: all operations round to bfloat16."""

    walk: str = "sorted"
    matmul: Callable = product
    silu: Callable = quotient
    back: Callable = BACK["product"]
    dot: Callable = dots
    total: Callable = in_slots
    late: bool = False
    fused: bool = False
    unstored: bool = False
    every: bool = False

    def store(self, to: Callable) -> Callable:
        return (lambda x: x) if self.unstored else to

    def inside(self, x: Array) -> Array:
        return to_bf16(x) if self.every else x


def ffn_back(how: How, to: Callable, x: Array, w: tuple, weight: Array | None, before: bool, limit: float | None, dy: Array) -> tuple:
    """dx[m,d], dweight[m], dw_gate, dw_up, dw_down of one expert; weight[m] (none: 1) multiplies what dy[m,d] is the gradient of"""
    (w_gate, w_up, w_down), mm, inside = w, how.matmul, how.inside
    gate, up = to(mm(x, w_gate)), to(mm(x, w_up))
    g, u = clamped(gate, up, limit)
    a = swiglu_eager(g, u) if how.every else (how.silu(g) * u).astype(x.dtype)
    one = np.ones(len(x), x.dtype) if weight is None else weight
    if before or how.late:
        da = to(mm(dy, w_down.T))
        dweight = how.dot(da, to(a) if not before else a)
        dw_down = mm(dy.T, to(inside(a * one[:, None])).T)
        da = inside(da * one[:, None])
    else:
        dweight = how.dot(dy, to(mm(to(a), w_down)))
        dy = dy if weight is None else to(dy * one[:, None])
        dw_down = mm(dy.T, to(a).T)
        da = to(mm(dy, w_down.T))
    dgate, dup = (swiglu_back_eager if how.every else how.back)(gate, up, da, limit=limit)
    dgate, dup = to(dgate), to(dup)
    if how.fused:
        both = np.concatenate([dgate, dup], axis=1)
        dx, dw = to(mm(both, np.concatenate([w_gate, w_up]).T)), mm(both.T, x.T)
        return dx, dweight, dw[: len(w_gate)], dw[len(w_gate) :], dw_down
    dx = inside(to(mm(dgate, w_gate.T)) + to(mm(dup, w_up.T)))
    return dx, dweight, mm(dgate.T, x.T), mm(dup.T, x.T), dw_down


def experts_back(
    how: How, to: Callable, x: Array, topk_idx: Array, topk_weight: Array, w: tuple, dy: Array, before: bool, limit: float | None
) -> tuple:
    """dx, dtopk_weight, dw_gate, dw_up, dw_down"""
    to, e = how.store(to), len(w[0])
    dx, dweight, dw = np.zeros((*topk_idx.shape, x.shape[1]), x.dtype), np.zeros_like(topk_weight), tuple(np.zeros_like(part) for part in w)

    def add(i: int, token: Array, slot: Array, weight: Array) -> None:
        own = tuple(part[i] for part in w)
        dx_i, dweight_i, *dw_i = ffn_back(how, to, x[token], own, weight, before, limit, dy[token])
        at = slot >= 0
        dx[token[at], slot[at]], dweight[token[at], slot[at]] = dx_i[at], dweight_i[at]
        for part, more in zip(dw, dw_i, strict=True):
            part[i] += more

    if how.walk == "tokens":  # each slot adds its outer products
        for n, k in np.argwhere(topk_idx >= 0)[::-1]:
            add(int(topk_idx[n, k]), np.array([n]), np.array([k]), topk_weight[n, k : k + 1])
    for i in range(e) if how.walk != "tokens" else ():
        token, slot = np.nonzero(topk_idx == i)
        if how.walk == "backwards":
            token, slot = token[::-1], slot[::-1]
        weight = topk_weight[token, slot]
        if how.walk == "dense":  # every token, most with a weight of 0
            rest = np.setdiff1d(np.arange(len(x)), token)
            token = np.concatenate([token, rest])
            slot, weight = np.r_[slot, np.full(len(rest), -1)], np.r_[weight, np.zeros(len(rest), weight.dtype)]
        if len(token):
            add(i, token, slot, weight)
    return how.total(dx, np.ones_like(topk_weight)), dweight, *dw


HOWS = {
    "tokens": How("tokens", product, quotient, BACK["sum"], dots_running, in_pairs),
    "experts-backwards": How("backwards", product_steps, by_tanh, BACK["silu"], dots_product, in_slots),
    "dense": How("dense", product_split, times_sigmoid, BACK["product"], dots, in_one_product),
    "fused-late": How("sorted", product_outer, quotient, BACK["sum"], dots, in_pairs, late=True, fused=True),
    "double": How("backwards", product_double, in_double, BACK["double"], dots_double, in_float64, fused=True, unstored=True),
    "late-unstored": How("sorted", product, times_sigmoid, BACK["product"], dots, in_slots, late=True, unstored=True),
}
EAGER_HOW = How("sorted", product, dot=dots_eager, total=in_bf16, every=True)


def _experts(how: How) -> Callable:
    def backward(
        x: Array,
        topk_idx: Array,
        topk_weight: Array,
        w_gate: Array,
        w_up: Array,
        w_down: Array,
        dy: Array,
        *,
        to: Callable,
        weight_before_down: bool = False,
        limit: float | None = None,
    ) -> tuple:
        return experts_back(how, to, x, topk_idx, topk_weight, (w_gate, w_up, w_down), dy, weight_before_down, limit)

    return backward


ROUTES = dict(zip(HOWS, (scattered, one_hot, by_weights, slots, wide, scattered), strict=True))


def _layer(how: How, noaux: Callable, softmax_back: Callable, eagerly: bool = False) -> Callable:
    def backward(
        x: Array,
        gate_weight: Array,
        w_gate: Array,
        w_up: Array,
        w_down: Array,
        topk_idx: Array,
        dy: Array,
        *,
        to: Callable,
        e_score_correction_bias: Array | None = None,
        shared_gate: Array | None = None,
        shared_up: Array | None = None,
        shared_down: Array | None = None,
        **a: Any,
    ) -> tuple:
        mm, inside, limit = how.matmul, how.inside, a.get("limit")
        norm, factor, eps = a.get("norm_topk_prob", True), a.get("routed_scaling_factor", 2.5), a.get("denominator_eps", 1e-20)
        greedy = a.get("topk_method", "noaux_tc") == "softmax"
        logits = inside(mm(x, gate_weight))
        s = (softmax_eager if eagerly else softmax)(logits) if greedy else inside(scores_plain(logits, a.get("scoring", "sigmoid")))
        weight = inside(divided(np.take_along_axis(s, topk_idx, 1), norm, factor, eps))
        experts = (w_gate, w_up, w_down)
        dx, dweight, *dw = experts_back(how, to, x, topk_idx, weight, experts, dy, a.get("weight_before_down", False), limit)
        given = {"norm_topk_prob": norm, "routed_scaling_factor": factor, "denominator_eps": eps}
        if greedy:
            dlogits = softmax_back(logits, topk_idx, dweight, **given)
        else:
            dlogits = noaux(logits, np.zeros_like(logits[0]), topk_idx, dweight, scoring=a.get("scoring", "sigmoid"), **given)
        dx = inside(dx + how.store(to)(mm(dlogits, gate_weight.T)))
        dgate_weight = mm(dlogits.T, x.T)
        if shared_gate is None:
            return dx, dgate_weight, *dw
        dx_shared, _, *dshared = ffn_back(how, how.store(to), x, (shared_gate, shared_up, shared_down), None, False, limit, dy)
        return inside(dx + dx_shared), dgate_weight, *dw, *dshared

    return backward


EXPERTS = {name: _experts(how) for name, how in HOWS.items()}
EXPERTS_EAGER = _experts(EAGER_HOW)
LAYER = {
    name: _layer(how, noaux, back)
    for (name, how), noaux, back in zip(
        HOWS.items(),
        ROUTES.values(),
        [SOFTMAX_BACK[kind] for kind in ("scattered", "chosen", "jacobian", "fast-exp", "double", "chosen")],
        strict=True,
    )
}
LAYER_EAGER = _layer(EAGER_HOW, eager, SOFTMAX_BACK_EAGER, eagerly=True)
LAYER_SINGLE = ("fused-late", "tokens", "dense")
