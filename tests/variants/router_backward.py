"""The router's backward for a given choice, in other algebra and other ways to scatter. What only the selection needs is left alone."""

from typing import Any

import numpy as np

from .floats import Array, to_bf16
from .router import exp_split, gated, guarded, scores_plain, scores_split, scores_tanh, scores_wide, sigmoid, sigmoid_tanh, softplus


def moves(total: Array, eps: float, place: str) -> Array:
    """1 where the denominator follows the scores, 0 where it is its least value"""
    return ((place != "clamp") | (total >= eps)).astype(total.dtype)


def to_chosen(chosen: Array, dw: Array, norm: bool, factor: float, eps: float, place: str = "add") -> Array:
    """The gradient to the chosen scores: factor/S (dw - Σ dw s/S)"""
    real = chosen.dtype.type
    if not norm:
        return dw * real(factor)
    plain = chosen.sum(-1, keepdims=True)
    total = guarded(plain, eps, place)
    return real(factor) / total * (dw - moves(plain, eps, place) * (dw * (chosen / total)).sum(-1, keepdims=True))


def through_scores(ds: Array, logits: Array, s: Array, scoring: str) -> Array:
    if scoring == "softmax":
        return s * (ds - (ds * s).sum(-1, keepdims=True))
    if scoring == "sigmoid":
        return ds * s * (1 - s)
    return np.where(ds == 0, logits.dtype.type(0), ds * sigmoid(logits) / (2 * np.where(s > 0, s, 1)))


def scattered(
    logits: Array,
    bias: Array,
    topk_idx: Array,
    dtopk_weight: Array,
    *,
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 2.5,
    scoring: str = "sigmoid",
    denominator_eps: float = 1e-20,
    denominator_place: str = "add",
    gate_dtype: str = "float32",
    **_selection: Any,
) -> Array:
    """Scores for all experts, a scatter, then the slope."""
    s = gated(scores_plain, logits, scoring, gate_dtype)
    chosen = np.take_along_axis(s, topk_idx, 1)
    ds = np.zeros_like(s)
    dchosen = to_chosen(chosen, dtopk_weight, norm_topk_prob, routed_scaling_factor, denominator_eps, denominator_place)
    np.put_along_axis(ds, topk_idx, dchosen, 1)
    return through_scores(ds, logits, s, scoring)


def one_hot(
    logits: Array,
    bias: Array,
    topk_idx: Array,
    dtopk_weight: Array,
    *,
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 2.5,
    scoring: str = "sigmoid",
    denominator_eps: float = 1e-20,
    denominator_place: str = "add",
    gate_dtype: str = "float32",
    **_selection: Any,
) -> Array:
    """A product with one-hot rows gathers and scatters; the factor comes first."""
    s = gated(scores_tanh, logits, scoring, gate_dtype)
    hot = (topk_idx[:, :, None] == np.arange(logits.shape[1])).astype(s.dtype)  # [n,k,e]
    chosen = np.einsum("nke,ne->nk", hot, s)
    dw = dtopk_weight * s.dtype.type(routed_scaling_factor)
    if norm_topk_prob:
        total = chosen.sum(-1, keepdims=True)
        inverse = 1 / guarded(total, denominator_eps, denominator_place)
        dw = (dw - (dw * chosen).sum(-1, keepdims=True) * inverse * moves(total, denominator_eps, denominator_place)) * inverse
    return through_scores(np.einsum("nk,nke->ne", dw, hot), logits, s, scoring)


def by_weights(
    logits: Array,
    bias: Array,
    topk_idx: Array,
    dtopk_weight: Array,
    *,
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 2.5,
    scoring: str = "sigmoid",
    denominator_eps: float = 1e-20,
    denominator_place: str = "add",
    gate_dtype: str = "float32",
    **_selection: Any,
) -> Array:
    """In terms of the weights w = s/S, on the chosen experts alone: factor w (dw - Σ dw w) (1 - s), with 1 - s as sigmoid(-x)"""
    x = np.take_along_axis(logits, topk_idx, 1)
    s = np.take_along_axis(gated(scores_split, logits, scoring, gate_dtype), topk_idx, 1)
    plain = s.sum(-1, keepdims=True)
    w = s / guarded(plain, denominator_eps, denominator_place) if norm_topk_prob else s
    mean = (dtopk_weight * w).sum(-1, keepdims=True) * moves(plain, denominator_eps, denominator_place)
    centred = dtopk_weight - mean if norm_topk_prob else dtopk_weight
    flow = centred * s.dtype.type(routed_scaling_factor)
    out = np.zeros_like(logits)
    if scoring == "softmax":
        share = (flow * w).sum(-1, keepdims=True)
        out = -scores_split(logits, scoring) * share
        np.put_along_axis(out, topk_idx, np.take_along_axis(out, topk_idx, 1) + w * flow, 1)
        return out
    if scoring == "sigmoid":
        rest = 1 - s if gate_dtype == "bfloat16" else sigmoid(-x, exp_split)
        np.put_along_axis(out, topk_idx, w * rest * flow, 1)
    else:  # d/dx √softplus = sigmoid/(2 √softplus) = w's share of sigmoid/(2 softplus)
        np.put_along_axis(out, topk_idx, w * flow * sigmoid(x, exp_split) / (2 * softplus(x)), 1)
    return out


def wide(
    logits: Array,
    bias: Array,
    topk_idx: Array,
    dtopk_weight: Array,
    *,
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 2.5,
    scoring: str = "sigmoid",
    denominator_eps: float = 1e-20,
    denominator_place: str = "add",
    gate_dtype: str = "float32",
    **_selection: Any,
) -> Array:
    """In float64, row after row, rounded at the end."""
    out = np.zeros(logits.shape)
    for i, idx in enumerate(topk_idx):
        x = logits[i : i + 1].astype(np.float64)
        s = gated(scores_wide, x, scoring, gate_dtype)
        dw = dtopk_weight[i : i + 1].astype(np.float64)
        ds = np.zeros_like(s)
        ds[:, idx] = to_chosen(s[:, idx], dw, norm_topk_prob, routed_scaling_factor, denominator_eps, denominator_place)
        out[i] = through_scores(ds, x, s, scoring)
    return out.astype(logits.dtype)


def slots(
    logits: Array,
    bias: Array,
    topk_idx: Array,
    dtopk_weight: Array,
    *,
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 2.5,
    scoring: str = "sigmoid",
    denominator_eps: float = 1e-20,
    denominator_place: str = "add",
    gate_dtype: str = "float32",
    **_selection: Any,
) -> Array:
    """Slot after slot with running sums, the weighted mean as ΣΣ over pairs: Σ_j s_j (dw_i - dw_j) / S², so that nothing cancels twice."""
    s = gated(scores_plain, logits, scoring, gate_dtype)
    chosen = np.take_along_axis(s, topk_idx, 1)
    real, ds = s.dtype.type, np.zeros_like(s)
    rows = np.arange(len(s))
    plain = np.zeros(len(s), s.dtype)
    for slot in range(topk_idx.shape[1]):
        plain = plain + chosen[:, slot]
    total, follows = guarded(plain, denominator_eps, denominator_place), moves(plain, denominator_eps, denominator_place)
    own_share = np.where(follows == 0, total, real(0 if denominator_place == "clamp" else denominator_eps))
    for slot in range(topk_idx.shape[1]):
        own = dtopk_weight[:, slot]
        if norm_topk_prob:
            pairs = own * own_share
            for other in range(topk_idx.shape[1]):
                pairs = pairs + follows * chosen[:, other] * (own - dtopk_weight[:, other])
            own = pairs / total / total
        ds[rows, topk_idx[:, slot]] += own * real(routed_scaling_factor)
    if scoring == "sigmoid" and gate_dtype == "float32":
        return ds * (s * sigmoid_tanh(-logits))
    return through_scores(ds, logits, s, scoring)


def eager(
    logits: Array,
    bias: Array,
    topk_idx: Array,
    dtopk_weight: Array,
    *,
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 2.5,
    scoring: str = "sigmoid",
    denominator_eps: float = 1e-20,
    denominator_place: str = "add",
    gate_dtype: str = "float32",
    **_selection: Any,
) -> Array:
    """Every operation rounds to bfloat16; sums accumulate in float32."""
    r = to_bf16
    small = r(np.exp(-np.abs(logits)))
    sigma = r(np.where(logits >= 0, np.float32(1), small) / r(1 + small))
    if scoring == "softmax":
        e = r(np.exp(r(logits - logits.max(-1, keepdims=True))))
        s = r(e / r(e.sum(-1, keepdims=True)))
    else:
        s = sigma if scoring == "sigmoid" else r(np.sqrt(r(r(np.log1p(small)) + np.maximum(logits, 0))))
    chosen, d = np.take_along_axis(s, topk_idx, 1), dtopk_weight
    if norm_topk_prob:
        plain = r(chosen.sum(-1, keepdims=True))
        total = r(guarded(plain, denominator_eps, denominator_place))
        d = r(d - moves(plain, denominator_eps, denominator_place) * r(r(d * r(chosen / total)).sum(-1, keepdims=True)))
        d = r(d / total)
    ds = np.zeros_like(s)
    np.put_along_axis(ds, topk_idx, r(d * r(np.float32(routed_scaling_factor))), 1)
    if scoring == "softmax":
        return r(s * r(ds - r(r(ds * s).sum(-1, keepdims=True))))
    if scoring == "sigmoid":
        return r(r(ds * s) * r(1 - s))
    return r(r(ds * sigma) / r(2 * np.where(s > 0, s, np.float32(1))))


BACKWARD = (scattered, one_hot, by_weights, wide, slots)
WIDE = {"scattered", "wide", "slots"}
