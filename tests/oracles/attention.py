"""Softmax attention, the merge of its parts, and their backward passes in 50-digit arithmetic; shares nothing with `ref`.

Equation: z = scale * q.k over the visible keys; o = sum exp(z) v / (sum exp(z) [+ exp(sink)]), lse = ln sum exp(z).
Merge: o = sum_p exp(lse_p) o_p / sum_p exp(lse_p), lse = ln sum_p exp(lse_p), over the parts that are not empty.
No maximum is subtracted: the exponents of mpf have no bounds.
Sequences packed end to end (attention.varlen): attention of each by itself.
Backward: the reverse-mode derivative of L = sum(do * o) + sum(dlse * lse) by `tape`, of those same equations; no closed form is used.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from .edges import carrier, choose, fill
from .linear import Arrays, dot, expect, gradients, integers, log, packed, pull_back, rounded, scalars, total
from .tape import CTX, ONE, Scalar, Tape, exp

EMPTY_LSE = {"+inf": CTX.inf, "-inf": -CTX.inf}


def attend(
    query: Sequence[Scalar], keys: Sequence[Sequence[Scalar]], values: Sequence[Sequence[Scalar]], scale: Any, sink: Scalar = None
) -> tuple[list[Scalar], Scalar]:
    """(o, lse) of one query over the keys it sees, of which there is at least one; on mpf or on tape variables."""
    powers = [exp(dot(query, key) * scale) for key in keys]
    mass = total(powers)
    divisor = mass if sink is None else mass + exp(sink)
    return [dot(powers, column) / divisor for column in zip(*values, strict=True)], log(mass)


def visible(i: int, s: int, t: int, causal: bool) -> int:
    """How many keys, from the first on, query i of s sees: those j <= i + (t - s) if causal, else all t."""
    return min(max(i + t - s + 1, 0), t) if causal else t


def softmax_scale(given: float | None, width: int) -> Any:
    """The scale asked for; 0 or None stands for width^-1/2."""
    return CTX.mpf(float(given)) if given else ONE / CTX.sqrt(width)


def attend_all(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, sink: np.ndarray | None, scale: Any, causal: bool, empty_lse: Any = CTX.inf
) -> tuple[np.ndarray, np.ndarray]:
    """o[b,s,h,dv] and lse[b,h,s] of arrays of scalars; a row that sees no key holds the constants 0 and `empty_lse`."""
    (b, s, h, _), (_, t, g, dv) = q.shape, v.shape
    if not g or h % g:
        raise ValueError(f"{h} query heads cannot share {g} key heads evenly")
    o = packed([CTX.zero] * (b * s * h * dv), (b, s, h, dv))
    lse = packed([empty_lse] * (b * h * s), (b, h, s))
    for n, head, i in np.ndindex(b, h, s):
        seen = visible(i, s, t, causal)
        if seen:
            shared = head * g // h  # consecutive query heads share a key head
            keys, values = k[n, :seen, shared].tolist(), v[n, :seen, shared].tolist()
            row, lse[n, head, i] = attend(q[n, i, head].tolist(), keys, values, scale, None if sink is None else sink[head])
            for column, u in enumerate(row):
                o[n, i, head, column] = u
    return o, lse


def _attention(inputs: Arrays, attrs: dict[str, Any], tape: Tape | None = None) -> tuple[Arrays, np.ndarray, np.ndarray]:
    """(the differentiable inputs, o, lse) as scalars. `block` only says how many keys are taken at a time: it has no part here."""
    at = fill({"scale": 0.0, "causal": True, "empty_lse": "+inf", "empty_rows": "allow", "block": 512}, attrs)
    empty_lse = EMPTY_LSE[choose("empty_lse", at["empty_lse"], EMPTY_LSE)]
    names = [name for name in ("q", "k", "v", "sink") if inputs.get(name) is not None]
    for name in names:
        carrier(inputs[name])
    (b, s, h, width), (_, t, g, dv) = inputs["q"].shape, inputs["v"].shape
    expect(inputs, {"k": (b, t, g, width), "v": (b, t, g, dv), "sink": (h,)})
    causal = choose("causal", at["causal"], (True, False))
    if choose("empty_rows", at["empty_rows"], ("allow", "refuse")) == "refuse" and causal and s > t:
        raise ValueError(f"{s} queries over {t} keys: the first {s - t} see none")
    given = {name: scalars(inputs[name], tape) for name in names}
    o, lse = attend_all(given["q"], given["k"], given["v"], given.get("sink"), softmax_scale(at["scale"], width), causal, empty_lse)
    return given, o, lse


def forward(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """attention: q, k, v, and perhaps sink -> o, lse."""
    _, o, lse = _attention(inputs, attrs)
    return {"o": rounded(o), "lse": rounded(lse)}


def backward(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """attention backward: q, k, v, and perhaps sink, do, dlse -> dq, dk, dv, and dsink if there is a sink."""
    tape = Tape()
    given, o, lse = _attention(inputs, attrs, tape)
    pull_back(tape, (o, inputs["do"]), (lse, inputs["dlse"]))
    return {f"d{name}": gradients(array) for name, array in given.items()}


def segments(boundaries: np.ndarray, end: int, name: str) -> list[tuple[int, int]]:
    """(first, one past the last) of every sequence packed into `end` places."""
    cuts = integers(boundaries, name)
    if not cuts or cuts[0] != 0 or cuts[-1] != end:
        raise ValueError(f"{name} must go from 0 to {end}, got {cuts}")
    pairs = list(pairwise(cuts))
    if any(first > last for first, last in pairs):
        raise ValueError(f"{name} falls: {cuts}")
    return pairs


def _varlen(inputs: Arrays, attrs: dict[str, Any], tape: Tape | None = None) -> tuple[Arrays, np.ndarray, np.ndarray]:
    """(the differentiable inputs, o, lse) as scalars."""
    at, names = fill({"scale": 0.0, "causal": True}, attrs), ("q", "k", "v")
    for name in names:
        carrier(inputs[name])
    (n, h, width), (m, g, dv) = inputs["q"].shape, inputs["v"].shape
    expect(inputs, {"k": (m, g, width), "cu_seqlens_k": inputs["cu_seqlens_q"].shape})
    scale, causal = softmax_scale(at["scale"], width), choose("causal", at["causal"], (True, False))
    rows, columns = segments(inputs["cu_seqlens_q"], n, "cu_seqlens_q"), segments(inputs["cu_seqlens_k"], m, "cu_seqlens_k")
    given = {name: scalars(inputs[name], tape) for name in names}
    q, k, v = (given[name][None] for name in names)
    o, lse = packed([CTX.zero] * (n * h * dv), (n, h, dv)), packed([CTX.inf] * (h * n), (h, n))
    for (i, stop), (j, end) in zip(rows, columns, strict=True):
        (o[i:stop],), (lse[:, i:stop],) = attend_all(q[:, i:stop], k[:, j:end], v[:, j:end], None, scale, causal)
    return given, o, lse


def varlen(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """attention.varlen: q, k, v, cu_seqlens_q, cu_seqlens_k -> o, lse."""
    _, o, lse = _varlen(inputs, attrs)
    return {"o": rounded(o), "lse": rounded(lse)}


def varlen_backward(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """attention.varlen backward: q, k, v, cu_seqlens_q, cu_seqlens_k, do, dlse -> dq, dk, dv."""
    tape = Tape()
    given, o, lse = _varlen(inputs, attrs, tape)
    pull_back(tape, (o, inputs["do"]), (lse, inputs["dlse"]))
    return {f"d{name}": gradients(array) for name, array in given.items()}


def merge_all(o_parts: np.ndarray, lse_parts: np.ndarray, empty: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """o[b,s,h,dv] and lse[b,h,s] of arrays of scalars; the parts marked in empty[p,b,h,s] are not looked at."""
    _, b, s, h, dv = o_parts.shape
    o = packed([CTX.zero] * (b * s * h * dv), (b, s, h, dv))
    lse = packed([CTX.inf] * (b * h * s), (b, h, s))
    for n, i, head in np.ndindex(b, s, h):
        parts = [p for p in range(len(o_parts)) if not empty[p, n, head, i]]
        if parts:
            powers = [exp(lse_parts[p, n, head, i]) for p in parts]
            mass = total(powers)
            lse[n, head, i] = log(mass)
            for column in range(dv):
                o[n, i, head, column] = dot(powers, [o_parts[p, n, i, head, column] for p in parts]) / mass
    return o, lse


def _merge(inputs: Arrays, attrs: dict[str, Any], tape: Tape | None = None) -> tuple[Arrays, np.ndarray, np.ndarray]:
    fill({}, attrs)
    names = ("o_parts", "lse_parts")
    for name in names:
        carrier(inputs[name])
    (p, b, s, h, _), lse_parts = inputs["o_parts"].shape, inputs["lse_parts"]
    expect(inputs, {"lse_parts": (p, b, h, s)})
    given = {name: scalars(inputs[name], tape) for name in names}
    empty = np.array([math.isinf(v) for v in lse_parts.ravel().tolist()], bool).reshape(lse_parts.shape)
    return given, *merge_all(given["o_parts"], given["lse_parts"], empty)


def merge(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """attention.merge: o_parts, lse_parts -> o, lse."""
    _, o, lse = _merge(inputs, attrs)
    return {"o": rounded(o), "lse": rounded(lse)}


def merge_backward(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """attention.merge backward: o_parts, lse_parts, do, dlse -> do_parts, dlse_parts."""
    tape = Tape()
    given, o, lse = _merge(inputs, attrs, tape)
    pull_back(tape, (o, inputs["do"]), (lse, inputs["dlse"]))
    return {f"d{name}": gradients(array) for name, array in given.items()}
