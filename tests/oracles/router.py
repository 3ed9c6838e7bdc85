"""The noaux_tc router and its backward pass in 50-digit arithmetic; shares nothing with `ref`.

Equation: s = score(logits); topk_idx = the k largest of the group-masked s + bias;
topk_weight = factor * s[topk_idx] / (sum of s[topk_idx] + denominator_eps), without the division if norm_topk_prob is False.
Backward: the reverse-mode derivative of L = sum(dtopk_weight * topk_weight) by `tape`, topk_idx held fixed; no closed form is used.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from .edges import carrier, choose, fill, refuse
from .tape import CTX, Scalar, Tape, exp, log1p, mpfs, sqrt, to_float64

Arrays = dict[str, np.ndarray]
Key = tuple[tuple[float, float], ...]

DEFAULTS: dict[str, Any] = {
    "k": 8,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring": "sigmoid",
    "denominator_eps": 1e-20,
    "mask_fill": "-inf",
}
ELEMENTWISE: dict[str, Callable[[Scalar], Scalar]] = {
    "sigmoid": lambda u: 1 / (1 + exp(-u)),
    "sqrtsoftplus": lambda u: sqrt(log1p(exp(u))),
}


def _attributes(inputs: Arrays, attrs: dict[str, Any]) -> dict[str, Any]:
    """The attributes, once inputs and attributes have passed the contract's ValueErrors."""
    at = fill(DEFAULTS, attrs)
    choose("scoring", at["scoring"], ("softmax", *ELEMENTWISE))
    choose("mask_fill", at["mask_fill"], ("-inf", "0"))
    carrier(inputs["logits"])
    e, k, groups, kept = inputs["logits"].shape[1], at["k"], at["n_group"], at["topk_group"]
    if e % groups:
        raise ValueError(f"n_group {groups} does not divide the {e} experts")
    if kept > groups:
        raise ValueError(f"topk_group {kept} > n_group {groups}")
    if k > kept * (e // groups):
        raise ValueError(f"k {k} > {kept * (e // groups)} experts left by the groups")
    if groups > 1 and e // groups < 2:
        raise ValueError(f"groups of {e // groups} expert have no two largest scores")
    refuse(inputs["logits"], "logits", infinite=True)
    refuse(inputs["bias"], "bias", infinite=True)
    return at


def scores(logits: list[Scalar], scoring: str) -> list[Scalar]:
    """s of one row, on mpf or on tape variables."""
    if scoring == "softmax":
        powers = [exp(u) for u in logits]
        total = sum(powers)
        return [p / total for p in powers]
    return [ELEMENTWISE[scoring](u) for u in logits]


def weights(chosen: list[Scalar], at: dict[str, Any]) -> list[Scalar]:
    """topk_weight from s at topk_idx, on mpf or on tape variables."""
    if at["norm_topk_prob"]:
        total = sum(chosen) + CTX.mpf(float(at["denominator_eps"]))
        chosen = [s / total for s in chosen]
    factor = CTX.mpf(float(at["routed_scaling_factor"]))
    return [s * factor for s in chosen]


def _ranked(values: list[Any]) -> list[int]:
    """Indices by descending value; the sort is stable, so equal values keep the lowest index first."""
    return sorted(range(len(values)), key=lambda i: -values[i])


def _group_scores(t: list[Any], size: int) -> list[Any]:
    return [sum(sorted(t[g : g + size])[-2:]) for g in range(0, len(t), size)]


def _masked(t: list[Any], at: dict[str, Any]) -> list[Any]:
    """t with the experts outside the best groups replaced by mask_fill."""
    if at["n_group"] == 1:
        return t
    size = len(t) // at["n_group"]
    kept = set(_ranked(_group_scores(t, size))[: at["topk_group"]])
    fill_value = -CTX.inf if at["mask_fill"] == "-inf" else CTX.zero
    return [v if i // size in kept else fill_value for i, v in enumerate(t)]


def forward(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """router.noaux_tc: logits, bias -> topk_idx, topk_weight. The selection is that of the real numbers: see `selection_margin`."""
    at = _attributes(inputs, attrs)
    bias, indices, result = mpfs(inputs["bias"].tolist()), [], []
    for row in inputs["logits"].tolist():
        s = scores(mpfs(row), at["scoring"])
        top = _ranked(_masked([u + b for u, b in zip(s, bias, strict=True)], at))[: at["k"]]
        indices.append(top)
        result.append([to_float64(w) for w in weights([s[i] for i in top], at)])
    shape = (len(inputs["logits"]), at["k"])
    return {"topk_idx": np.array(indices, np.int64).reshape(shape), "topk_weight": np.array(result, np.float64).reshape(shape)}


def backward(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """router_noaux_tc_bwd: logits, bias, topk_idx, dtopk_weight -> dlogits."""
    at = _attributes(inputs, attrs)
    logits, result = inputs["logits"], []
    rows = zip(logits.tolist(), inputs["topk_idx"].tolist(), inputs["dtopk_weight"].tolist(), strict=True)
    for row, top, cotangent in rows:
        tape = Tape()
        us = tape.vars(mpfs(row))
        if at["scoring"] == "softmax":
            s = scores(us, "softmax")
            chosen = [s[i] for i in top]
        else:  # the other experts are not in the graph at all
            chosen = scores([us[i] for i in top], at["scoring"])
        tape.backward(sum(w * c for w, c in zip(weights(chosen, at), mpfs(cotangent), strict=True)))
        result.append([to_float64(u.grad) for u in us])
    return {"dlogits": np.array(result, np.float64).reshape(logits.shape)}


def _gaps(values: list[Any], keys: list[Any], cuts: range) -> list[float]:
    """Distances between neighbours in rank at `cuts`; equal values from equal inputs tie in any arithmetic, so they are no risk."""
    order = _ranked(values)
    pairs = [(order[i], order[i + 1]) for i in cuts if i + 1 < len(order)]
    return [to_float64(values[a] - values[b]) for a, b in pairs if keys[a] != keys[b]]


def selection_margin(inputs: Arrays, attrs: dict[str, Any]) -> np.ndarray:
    """Per row, the least change in s + bias, or in a group's score, that could alter topk_idx (inf: none can).

    An implementation whose rounding errors exceed it may rightly choose otherwise than `forward`; compare indices only well above it.
    """
    at = _attributes(inputs, attrs)
    bias, e, groups = inputs["bias"].tolist(), inputs["logits"].shape[1], at["n_group"]
    margins = []
    for row in inputs["logits"].tolist():
        t = [s + CTX.mpf(b) for s, b in zip(scores(mpfs(row), at["scoring"]), bias, strict=True)]
        keys: list[Any] = list(zip(row, bias, strict=True))
        gaps = []
        if groups > 1:
            size = e // groups
            pairs = [sorted((t[i], keys[i]) for i in range(g, g + size))[-2:] for g in range(0, e, size)]
            group_keys = [sorted(key for _, key in pair) for pair in pairs]
            gaps += _gaps(_group_scores(t, size), group_keys, range(at["topk_group"] - 1, at["topk_group"]))
        masked = _masked(t, at)
        masked_keys = [key if v is u else None for key, u, v in zip(keys, t, masked, strict=True)]
        gaps += _gaps(masked, masked_keys, range(at["k"]))
        margins.append(min(gaps, default=float("inf")))
    return np.array(margins, np.float64)
