"""The noaux_tc and softmax routers and their backward passes in 50-digit arithmetic; shares nothing with `ref`.

Equation: s = score(logits); topk_idx = the k largest of the group-masked s + bias; topk_weight = factor * s[topk_idx] / (sum of
s[topk_idx] + denominator_eps), or over max(that sum, denominator_eps), without the division if norm_topk_prob is False. noaux_tc ranks
groups by the sum of their two largest s + bias; router.softmax has no bias, and ranks them by their largest s.
Backward: the reverse-mode derivative of L = sum(dtopk_weight * topk_weight) by `tape`, topk_idx held fixed; no closed form is used, except
the slope that gate_dtype="bfloat16" prescribes, which is no derivative.
"""

from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np

from .balance import slots
from .edges import carrier, choose, fill, refuse
from .floats import CAST_FORMATS, code_fraction, round_code
from .tape import CTX, Scalar, Tape, Var, exp, log1p, mpfs, sqrt, to_float64, to_format, value_of

Arrays = dict[str, np.ndarray]
BF16 = CAST_FORMATS["bf16"]

DEFAULTS: dict[str, Any] = {
    "k": 8,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring": "sigmoid",
    "denominator_eps": 1e-20,
    "denominator_place": "add",
    "mask_fill": "-inf",
    "gate_dtype": "float32",
}
SOFTMAX: dict[str, Any] = {
    "k": 6,
    "n_group": 8,
    "topk_group": 3,
    "norm_topk_prob": False,
    "routed_scaling_factor": 16.0,
    "denominator_eps": 1e-20,
    "mask_fill": "-inf",
}
NOAUX_ONLY = {"best": 2}  # how many of a group's largest make its score
SOFTMAX_ONLY = {"best": 1, "scoring": "softmax", "denominator_place": "add", "gate_dtype": "float32"}
ELEMENTWISE: dict[str, Callable[[Scalar], Scalar]] = {
    "sigmoid": lambda u: 1 / (1 + exp(-u)),
    "sqrtsoftplus": lambda u: sqrt(log1p(exp(u))),
}


# Attributes and their ValueErrors


def _check(at: dict[str, Any], e: int) -> None:
    """The ValueErrors that both routers have."""
    choose("mask_fill", at["mask_fill"], ("-inf", "0"))
    k, groups, kept = at["k"], at["n_group"], at["topk_group"]
    if groups < 1 or e % groups:
        raise ValueError(f"n_group {groups} does not divide the {e} experts")
    if not 1 <= kept <= groups:
        raise ValueError(f"topk_group {kept} outside 1..n_group {groups}")
    if not 1 <= k <= kept * (e // groups):
        raise ValueError(f"k {k} outside 1..{kept * (e // groups)}, the experts left by the groups")


def noaux_attributes(attrs: dict[str, Any], e: int) -> dict[str, Any]:
    """noaux_tc's attributes for e experts, checked."""
    at = {**fill(DEFAULTS, attrs), **NOAUX_ONLY}
    choose("scoring", at["scoring"], ("softmax", *ELEMENTWISE))
    choose("denominator_place", at["denominator_place"], ("add", "clamp"))
    choose("gate_dtype", at["gate_dtype"], ("float32", "bfloat16"))
    _check(at, e)
    if at["n_group"] > 1 and e // at["n_group"] < 2:
        raise ValueError(f"groups of {e // at['n_group']} expert have no two largest scores")
    return at


def softmax_attributes(attrs: dict[str, Any], e: int) -> dict[str, Any]:
    """router.softmax's attributes for e experts, checked."""
    at = {**fill(SOFTMAX, attrs), **SOFTMAX_ONLY}
    _check(at, e)
    return at


def _noaux(inputs: Arrays, attrs: dict[str, Any]) -> dict[str, Any]:
    carrier(inputs["logits"])
    at = noaux_attributes(attrs, inputs["logits"].shape[1])
    refuse(inputs["logits"], "logits", infinite=True)
    refuse(inputs["bias"], "bias", infinite=True)
    return at


def _softmax(inputs: Arrays, attrs: dict[str, Any]) -> dict[str, Any]:
    carrier(inputs["logits"])
    at = softmax_attributes(attrs, inputs["logits"].shape[1])
    refuse(inputs["logits"], "logits", infinite=True)
    return at


# One row


def scores(logits: list[Scalar], scoring: str) -> list[Scalar]:
    """s of one row, on mpf or on tape variables."""
    if scoring == "softmax":
        powers = [exp(u) for u in logits]
        total = sum(powers)
        return [p / total for p in powers]
    return [ELEMENTWISE[scoring](u) for u in logits]


def _slopes(z: Any, s: Any, scoring: str) -> Any:
    """score'(z) as the contract has it for a rounded s: sigmoid's in s alone."""
    if scoring == "sigmoid":
        return s * (1 - s)
    return ELEMENTWISE["sigmoid"](z) / (2 * s) if s else CTX.inf


def gate(logits: list[Scalar], at: dict[str, Any]) -> list[Scalar]:
    """s of one row, through both roundings of a bfloat16 gate; those pass gradients straight on, with s rounded in the slope."""
    scoring = at["scoring"]
    if at["gate_dtype"] == "float32":
        return scores(logits, scoring)
    exact = [value_of(u) for u in logits]
    rounded = mpfs([to_format(v, BF16) for v in scores(mpfs([to_format(z, BF16) for z in exact]), scoring)])
    if not logits or not isinstance(logits[0], Var):
        return rounded
    tape = logits[0].tape
    if scoring == "softmax":
        return [
            Var(tape, s, *((u, s * ((u is own) - r)) for u, r in zip(logits, rounded, strict=True)))
            for own, s in zip(logits, rounded, strict=True)
        ]
    return [Var(tape, s, (u, _slopes(z, s, scoring))) for u, z, s in zip(logits, exact, rounded, strict=True)]


def weights(chosen: list[Scalar], at: dict[str, Any]) -> list[Scalar]:
    """topk_weight from s at topk_idx, on mpf or on tape variables."""
    if at["norm_topk_prob"]:
        total, eps = sum(chosen), CTX.mpf(float(at["denominator_eps"]))
        if at["denominator_place"] == "add":
            total = total + eps
        elif value_of(total) < eps:
            total = eps  # a constant: nothing flows through it
        chosen = [s / total for s in chosen]
    factor = CTX.mpf(float(at["routed_scaling_factor"]))
    return [s * factor for s in chosen]


def weights_at(logits: list[Scalar], top: list[int], at: dict[str, Any]) -> list[Scalar]:
    """topk_weight of one row with its topk_idx given."""
    if at["scoring"] == "softmax":
        s = gate(logits, at)
        return weights([s[i] for i in top], at)
    return weights(gate([logits[i] for i in top], at), at)  # the other experts are not in the graph at all


def _ranked(values: list[Any]) -> list[int]:
    """Indices by descending value; the sort is stable, so equal values keep the lowest index first."""
    return sorted(range(len(values)), key=lambda i: -values[i])


def _group_scores(t: list[Any], size: int, best: int) -> list[Any]:
    return [sum(sorted(t[g : g + size])[-best:]) for g in range(0, len(t), size)]


def _masked(t: list[Any], at: dict[str, Any]) -> list[Any]:
    """t with the experts outside the best groups replaced by mask_fill."""
    if at["n_group"] == 1:
        return t
    size = len(t) // at["n_group"]
    kept = set(_ranked(_group_scores(t, size, at["best"]))[: at["topk_group"]])
    fill_value = -CTX.inf if at["mask_fill"] == "-inf" else CTX.zero
    return [v if i // size in kept else fill_value for i, v in enumerate(t)]


def select(logits: list[Any], bias: list[Any], at: dict[str, Any]) -> list[int]:
    """topk_idx of one row of mpf."""
    return _ranked(_masked([s + b for s, b in zip(gate(logits, at), bias, strict=True)], at))[: at["k"]]


# The ops


def _forward(inputs: Arrays, bias: list[Any], at: dict[str, Any]) -> Arrays:
    indices, result = [], []
    for row in inputs["logits"].tolist():
        logits = mpfs(row)
        top = select(logits, bias, at)
        indices.append(top)
        result.append([to_float64(w) for w in weights_at(logits, top, at)])
    shape = (len(inputs["logits"]), at["k"])
    return {"topk_idx": np.array(indices, np.int64).reshape(shape), "topk_weight": np.array(result, np.float64).reshape(shape)}


def _backward(inputs: Arrays, at: dict[str, Any]) -> Arrays:
    logits, result = inputs["logits"], []
    chosen = slots(inputs["topk_idx"], logits.shape[1], lowest=0)
    for row, top, cotangent in zip(logits.tolist(), chosen, inputs["dtopk_weight"].tolist(), strict=True):
        tape = Tape()
        us = tape.vars(mpfs(row))
        tape.backward(sum(w * c for w, c in zip(weights_at(us, top, at), mpfs(cotangent), strict=True)))
        result.append([to_float64(u.grad) for u in us])
    return {"dlogits": np.array(result, np.float64).reshape(logits.shape)}


def forward(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """router.noaux_tc: logits, bias -> topk_idx, topk_weight. The selection is that of the real numbers: see `selection_margin`."""
    return _forward(inputs, mpfs(inputs["bias"].tolist()), _noaux(inputs, attrs))


def backward(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """router.noaux_tc backward: logits, bias, topk_idx, dtopk_weight -> dlogits."""
    return _backward(inputs, _noaux(inputs, attrs))


def softmax(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """router.softmax: logits -> topk_idx, topk_weight. In real numbers no s is 0, so mask_fill has no effect on it."""
    return _forward(inputs, [CTX.zero] * inputs["logits"].shape[1], _softmax(inputs, attrs))


def softmax_backward(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """router.softmax backward: logits, topk_idx, dtopk_weight -> dlogits."""
    return _backward(inputs, _softmax(inputs, attrs))


# How far a selection is from another one


def _gaps(values: list[Any], keys: list[Any], cuts: range) -> list[float]:
    """Distances between neighbours in rank at `cuts`; equal values from equal inputs tie in any arithmetic, so they are no risk."""
    order = _ranked(values)
    pairs = [(order[i], order[i + 1]) for i in cuts if i + 1 < len(order)]
    return [to_float64(values[a] - values[b]) for a, b in pairs if keys[a] != keys[b]]


def rounding_margin(number: Any) -> Any:
    """The distance of an mpf to the nearest midpoint between neighbours in bfloat16, where its rounding turns over."""
    number = abs(number)
    mantissa, exponent = number.man_exp
    if abs(exponent + mantissa.bit_length()) > 200:  # far above the largest value or below the smallest
        return abs(number - CTX.ldexp(1, -134))
    exact = Fraction(int(mantissa)) * Fraction(2) ** exponent
    code = round_code(exact.numerator, exact.denominator, BF16)
    values = [code_fraction(c, BF16) for c in (max(code - 1, 0), code, code + 1)]
    midpoints = [(a + b) / 2 for a, b in pairwise(values) if a != b]
    nearest = min(abs(exact - m) for m in midpoints)
    return CTX.mpf(nearest.numerator) / nearest.denominator


def row_margin(logits: list[Any], bias: list[float], keys: list[Any], at: dict[str, Any]) -> float:
    """`selection_margin` of one row of mpf; experts with equal `keys` have equal logits and bias in any arithmetic."""
    s, gaps = gate(logits, at), []
    if at["gate_dtype"] == "bfloat16":
        keys = list(zip(s, bias, strict=True))  # once rounded, equal scores are equal whatever the logits
        exact = scores(mpfs([to_format(z, BF16) for z in logits]), at["scoring"])
        gaps += [to_float64(rounding_margin(u) / u) for u in exact]
    t = [u + CTX.mpf(b) for u, b in zip(s, bias, strict=True)]
    if at["n_group"] > 1:
        size, best = len(t) // at["n_group"], at["best"]
        largest = [sorted((t[i], keys[i]) for i in range(g, g + size))[-best:] for g in range(0, len(t), size)]
        group_keys = [sorted(key for _, key in pair) for pair in largest]
        gaps += _gaps(_group_scores(t, size, best), group_keys, range(at["topk_group"] - 1, at["topk_group"]))
    masked = _masked(t, at)
    masked_keys = [key if v is u else None for key, u, v in zip(keys, t, masked, strict=True)]
    gaps += _gaps(masked, masked_keys, range(at["k"]))
    if at["best"] == 1 and at["mask_fill"] == "0" and None in masked_keys:  # a softmax that underflows ties with the fill
        gaps += [to_float64(masked[i]) for i in _ranked(masked)[: at["k"]]]
    return min(gaps, default=float("inf"))


def _margins(inputs: Arrays, bias: list[float], at: dict[str, Any]) -> np.ndarray:
    rows = inputs["logits"].tolist()
    return np.array([row_margin(mpfs(row), bias, list(zip(row, bias, strict=True)), at) for row in rows], np.float64)


def selection_margin(inputs: Arrays, attrs: dict[str, Any]) -> np.ndarray:
    """Per row, the least change in s + bias, or in a group's score, that could alter topk_idx (inf: none can).

    An implementation whose rounding errors exceed it may rightly choose otherwise than `forward`; compare indices only well above it.
    With gate_dtype="bfloat16" it is also no more than the relative change in any s that would round it to another value.
    """
    return _margins(inputs, inputs["bias"].tolist(), _noaux(inputs, attrs))


def softmax_selection_margin(inputs: Arrays, attrs: dict[str, Any]) -> np.ndarray:
    """The same for router.softmax: the least change in s that could alter topk_idx."""
    return _margins(inputs, [0.0] * inputs["logits"].shape[1], _softmax(inputs, attrs))
