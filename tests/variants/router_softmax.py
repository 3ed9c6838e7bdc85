"""The softmax router, forward and backward. Everything is in the logits' dtype."""

from collections.abc import Callable
from typing import Any

import numpy as np

from .floats import Array, to_bf16
from .router import (
    by_argmax,
    by_heap,
    by_keys,
    by_partition,
    by_sorting,
    divided,
    exp_fast,
    exp_split,
    reciprocal,
    select,
    softmax,
    softmax_online,
)
from .router_backward import to_chosen

Two = tuple[Array, Array]


def softmax_wide(x: Array) -> Array:
    return softmax(x.astype(np.float64)).astype(x.dtype)


def softmax_split(x: Array) -> Array:
    return softmax(x, exp_split)


def softmax_fast(x: Array) -> Array:
    return softmax(x, exp_fast)


def softmax_log(x: Array) -> Array:
    """exp(x - lse)"""
    m = x.max(-1, keepdims=True)
    return np.exp(x - (m + np.log(np.exp(x - m).sum(-1, keepdims=True))))


def softmax_eager(x: Array) -> Array:
    e = to_bf16(np.exp(to_bf16(x - x.max(-1, keepdims=True))))
    return to_bf16(e / to_bf16(e.sum(-1, keepdims=True)))


def best_of_group(t: Array, groups: int) -> Array:
    return t.reshape(len(t), groups, -1).max(-1)


def best_running(t: Array, groups: int) -> Array:
    """Column after column."""
    t = t.reshape(len(t), groups, -1)
    best = t[..., 0]
    for i in range(1, t.shape[-1]):
        best = np.where(t[..., i] > best, t[..., i], best)
    return best


def _router(scores: Callable, largest: Callable, best: Callable, weigh: Callable) -> Callable:
    def forward(
        logits: Array,
        *,
        k: int = 6,
        n_group: int = 8,
        topk_group: int = 3,
        norm_topk_prob: bool = False,
        routed_scaling_factor: float = 16.0,
        denominator_eps: float = 1e-20,
        mask_fill: str = "-inf",
    ) -> Two:
        s = scores(logits)
        idx = select(s, s.dtype.type(0), largest, best, k, n_group, topk_group, mask_fill)
        return idx, weigh(np.take_along_axis(s, idx, 1), norm_topk_prob, routed_scaling_factor, denominator_eps)

    return forward


def weigh_eager(chosen: Array, norm: bool, factor: float, eps: float) -> Array:
    r = to_bf16
    if norm:
        chosen = r(chosen / r(r(chosen.sum(-1, keepdims=True)) + np.float32(eps)))
    return r(chosen * r(np.float32(factor)))


SOFTMAX = {
    "sorting": _router(softmax, by_sorting, best_of_group, divided),
    "heap-online": _router(softmax_online, by_heap, best_running, reciprocal),
    "argmax-double": _router(softmax_wide, by_argmax, best_of_group, divided),
    "keys-split-exp": _router(softmax_split, by_keys, best_running, reciprocal),
    "partition-fast-exp": _router(softmax_fast, by_partition, best_of_group, reciprocal),
}
SOFTMAX_EAGER = _router(softmax_eager, by_sorting, best_of_group, weigh_eager)
SINGLE = ("keys-split-exp", "partition-fast-exp")


def _router_backward(scores: Callable, through: Callable) -> Callable:
    def backward(
        logits: Array,
        topk_idx: Array,
        dtopk_weight: Array,
        *,
        norm_topk_prob: bool = False,
        routed_scaling_factor: float = 16.0,
        denominator_eps: float = 1e-20,
        **_selection: Any,
    ) -> Array:
        s = scores(logits)
        chosen = np.take_along_axis(s, topk_idx, 1)
        return through(s, topk_idx, chosen, to_chosen(chosen, dtopk_weight, norm_topk_prob, routed_scaling_factor, denominator_eps))

    return backward


def through_all(s: Array, idx: Array, chosen: Array, dchosen: Array) -> Array:
    ds = np.zeros_like(s)
    np.put_along_axis(ds, idx, dchosen, 1)
    return s * (ds - (ds * s).sum(-1, keepdims=True))


def through_chosen(s: Array, idx: Array, chosen: Array, dchosen: Array) -> Array:
    """-s_e Σ_k s ds everywhere, and s ds where it was chosen"""
    pull = np.zeros_like(s[:, 0])
    for slot in range(idx.shape[1]):
        pull = pull + chosen[:, slot] * dchosen[:, slot]
    out = -s * pull[:, None]
    np.put_along_axis(out, idx, np.take_along_axis(out, idx, 1) + chosen * dchosen, 1)
    return out


def through_jacobian(s: Array, idx: Array, chosen: Array, dchosen: Array) -> Array:
    """Σ_k ds_k s_k ([e = idx_k] - s_e), slot after slot"""
    out, experts = np.zeros_like(s), np.arange(s.shape[1])
    for slot in reversed(range(idx.shape[1])):
        hit = (idx[:, slot, None] == experts).astype(s.dtype)
        out = out + (dchosen[:, slot] * chosen[:, slot])[:, None] * (hit - s)
    return out


def through_wide(s: Array, idx: Array, chosen: Array, dchosen: Array) -> Array:
    return through_all(s.astype(np.float64), idx, chosen, dchosen.astype(np.float64)).astype(s.dtype)


def through_eager(s: Array, idx: Array, chosen: Array, dchosen: Array) -> Array:
    r, ds = to_bf16, np.zeros_like(s)
    np.put_along_axis(ds, idx, r(dchosen), 1)
    return r(s * r(ds - r(r(ds * s).sum(-1, keepdims=True))))


SOFTMAX_BACK = {
    "scattered": _router_backward(softmax, through_all),
    "chosen": _router_backward(softmax_online, through_chosen),
    "jacobian": _router_backward(softmax_log, through_jacobian),
    "double": _router_backward(softmax_wide, through_wide),
    "fast-exp": _router_backward(softmax_fast, through_chosen),
}
SOFTMAX_BACK_EAGER = _router_backward(softmax_eager, through_eager)
BACK_SINGLE = ("fast-exp",)
