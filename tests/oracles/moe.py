"""Mixture of experts: SwiGLU, permutation, experts and the whole layer, with their backward passes; shares nothing with `ref`.

Equation: y = sum_j topk_weight[j] FFN_i(x), i = topk_idx[j], plus the shared FFN(x); FFN(x) = w_down (silu(w_gate x) * (w_up x)),
silu(u) = u / (1 + exp(-u)); with a limit L, min(w_gate x, L) and w_up x cut to -L..L take their places. Routing as in `router`.
In exact arithmetic weight_before_down and silu (where another rounds) have no part in it.
Backward: the reverse-mode derivative of L = sum(dy * y) by `tape`, topk_idx held fixed; no closed form is used.
"""

from typing import Any

import numpy as np

from .balance import slots
from .edges import carrier, choose, fill
from .linear import Arrays, dot, expect, gradients, matvec, packed, pull_back, rounded, scalars, total
from .router import DEFAULTS, SOFTMAX, noaux_attributes, rounding_margin, row_margin, select, softmax_attributes, weights_at
from .tape import CTX, ONE, Scalar, Tape, exp, to_float64, value_of

SWIGLU: dict[str, Any] = {"limit": None, "silu": "float32"}
PERMUTE: dict[str, Any] = {"n_routed_experts": 256, "alignment": 1}
EXPERTS: dict[str, Any] = {"weight_before_down": False, **SWIGLU}
ROUTER = {
    name: DEFAULTS[name] for name in ("n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor", "scoring", "denominator_eps")
}
ROUTER |= {name: DEFAULTS[name] for name in ("mask_fill", "gate_dtype")}
LAYER: dict[str, Any] = {"num_experts_per_tok": 8, "topk_method": "noaux_tc", **ROUTER, **EXPERTS}
FFN, SHARED = ("w_gate", "w_up", "w_down"), ("shared_gate", "shared_up", "shared_down")


def _check_swiglu(at: dict[str, Any]) -> None:
    choose("silu", at["silu"], ("float32", "stored"))
    if at["limit"] is not None and not at["limit"] > 0:
        raise ValueError(f"limit {at['limit']} <= 0")


def silu(u: Scalar) -> Scalar:
    return u / (1 + exp(-u))


def gated(gate: list[Scalar], up: list[Scalar], limit: float | None) -> list[Scalar]:
    """silu(gate) * up, on mpf or on tape variables; what lies strictly beyond the limit is replaced by a constant."""
    if limit is not None:
        top = CTX.mpf(float(limit))
        gate = [top if value_of(u) > top else u for u in gate]
        up = [top if value_of(u) > top else -top if value_of(u) < -top else u for u in up]
    return [silu(g) * u for g, u in zip(gate, up, strict=True)]


def _swiglu(inputs: Arrays, attrs: dict[str, Any], tape: Tape | None = None) -> tuple[Arrays, np.ndarray]:
    at = fill(SWIGLU, attrs)
    _check_swiglu(at)
    carrier(inputs["gate"])
    expect(inputs, {"up": inputs["gate"].shape})
    given = {name: scalars(inputs[name], tape) for name in ("gate", "up")}
    y = gated(given["gate"].ravel().tolist(), given["up"].ravel().tolist(), at["limit"])
    return given, packed(y, inputs["gate"].shape)


def swiglu(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """swiglu: gate, up -> y."""
    return {"y": rounded(_swiglu(inputs, attrs)[1])}


def swiglu_backward(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """swiglu backward: gate, up, dy -> dgate, dup."""
    tape = Tape()
    given, y = _swiglu(inputs, attrs, tape)
    pull_back(tape, (y, inputs["dy"]))
    return {f"d{name}": gradients(array) for name, array in given.items()}


# Permutation


def layout(topk_idx: np.ndarray, attrs: dict[str, Any]) -> tuple[list[int], list[int]]:
    """(source, counts): the slot number that every sorted row comes from, -1 in filling rows; slots of every expert."""
    at, k = fill(PERMUTE, attrs), topk_idx.shape[1]
    choose("alignment", at["alignment"], (1, 128))
    e = at["n_routed_experts"]
    rows, source, counts = slots(topk_idx, e), [], []
    for expert in range(e):
        own = [i * k + j for i, row in enumerate(rows) for j, chosen in enumerate(row) if chosen == expert]
        source += own + [-1] * (-len(own) % at["alignment"])
        counts.append(len(own))
    return source, counts


def _permute(inputs: Arrays, attrs: dict[str, Any], tape: Tape | None = None) -> tuple[np.ndarray, np.ndarray, list[int], list[int]]:
    """(x, x_sorted, source, counts), the arrays as scalars."""
    (n, d), k = inputs["x"].shape, inputs["topk_idx"].shape[1]
    carrier(inputs["x"])
    expect(inputs, {"topk_idx": (n, k)})
    (source, counts), x = layout(inputs["topk_idx"], attrs), scalars(inputs["x"], tape)
    tokens = x.tolist()
    flat = [u for slot in source for u in (tokens[slot // k] if slot >= 0 else [CTX.zero] * d)]
    return x, packed(flat, (len(source), d)), source, counts


def permute(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """moe.permute: x, topk_idx -> x_sorted, counts, source."""
    _, x_sorted, source, counts = _permute(inputs, attrs)
    return {"x_sorted": rounded(x_sorted), "counts": np.array(counts, np.int64), "source": np.array(source, np.int64)}


def permute_backward(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """moe.permute backward: x, topk_idx, dx_sorted -> dx."""
    tape = Tape()
    x, x_sorted, _, _ = _permute(inputs, attrs, tape)
    pull_back(tape, (x_sorted, inputs["dx_sorted"]))
    return {"dx": gradients(x)}


def _weighted(weights: list[Scalar], rows: list[list[Scalar]], d: int) -> list[Scalar]:
    """sum_j weights_j rows_j, a zero of d elements where there are none."""
    return [dot(weights, column) for column in zip(*rows, strict=True)] if rows else [CTX.zero] * d


def _unpermute(inputs: Arrays, attrs: dict[str, Any], tape: Tape | None = None) -> tuple[Arrays, np.ndarray]:
    (n, k), (m, d) = inputs["topk_idx"].shape, inputs["y_sorted"].shape
    carrier(inputs["y_sorted"])
    expect(inputs, {"topk_weight": (n, k)})
    source, _ = layout(inputs["topk_idx"], attrs)
    if m != len(source):
        raise ValueError(f"y_sorted has {m} rows, moe.permute makes {len(source)}")
    given = {name: scalars(inputs[name], tape) for name in ("y_sorted", "topk_weight")}
    rows, weights = given["y_sorted"].tolist(), given["topk_weight"].ravel().tolist()
    y: list[Scalar] = []
    for i in range(n):
        mine = [(slot, row) for row, slot in enumerate(source) if slot // k == i]  # -1 // k is no token
        y += _weighted([weights[slot] for slot, _ in mine], [rows[row] for _, row in mine], d)
    return given, packed(y, (n, d))


def unpermute(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """moe.unpermute: y_sorted, topk_idx, topk_weight -> y."""
    return {"y": rounded(_unpermute(inputs, attrs)[1])}


def unpermute_backward(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """moe.unpermute backward: y_sorted, topk_idx, topk_weight, dy -> dy_sorted, dtopk_weight."""
    tape = Tape()
    given, y = _unpermute(inputs, attrs, tape)
    pull_back(tape, (y, inputs["dy"]))
    return {f"d{name}": gradients(array) for name, array in given.items()}


# Experts


def ffn(x: list[Scalar], weights: list[Any], limit: float | None) -> list[Scalar]:
    """w_down (silu(w_gate x) * (w_up x)) of one token."""
    gate, up, down = weights
    return matvec(down, gated(matvec(gate, x), matvec(up, x), limit))


def mixture(x: list[Scalar], chosen: list[int], weights: list[Scalar], given: Arrays, limit: float | None) -> list[Scalar]:
    """One token through the experts it has chosen; -1 adds nothing."""
    mine = [(w, ffn(x, [given[name][i].tolist() for name in FFN], limit)) for i, w in zip(chosen, weights, strict=True) if i >= 0]
    return _weighted([w for w, _ in mine], [y for _, y in mine], len(x))


def _expert_shapes(inputs: Arrays) -> None:
    d, (e, f) = inputs["x"].shape[1], inputs["w_gate"].shape[:2]
    expect(inputs, {"w_gate": (e, f, d), "w_up": (e, f, d), "w_down": (e, d, f)})


def _experts(inputs: Arrays, attrs: dict[str, Any], tape: Tape | None = None) -> tuple[Arrays, np.ndarray]:
    at, shape, topk_idx = fill(EXPERTS, attrs), inputs["x"].shape, inputs["topk_idx"]
    _check_swiglu(at)
    _expert_shapes(inputs)
    expect(inputs, {"topk_idx": (shape[0], topk_idx.shape[1]), "topk_weight": topk_idx.shape})
    chosen = slots(topk_idx, len(inputs["w_gate"]))
    for name in ("x", "topk_weight", *FFN):
        carrier(inputs[name])
    given = {name: scalars(inputs[name], tape) for name in ("x", "topk_weight", *FFN)}
    tokens = zip(given["x"].tolist(), chosen, given["topk_weight"].tolist(), strict=True)
    return given, packed([u for x, top, w in tokens for u in mixture(x, top, w, given, at["limit"])], shape)


def experts(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """moe.experts: x, topk_idx, topk_weight, w_gate, w_up, w_down -> y."""
    return {"y": rounded(_experts(inputs, attrs)[1])}


def experts_backward(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """moe.experts backward: the inputs, dy -> dx, dtopk_weight, dw_gate, dw_up, dw_down."""
    tape = Tape()
    given, y = _experts(inputs, attrs, tape)
    pull_back(tape, (y, inputs["dy"]))
    return {f"d{name}": gradients(array) for name, array in given.items()}


# The layer


def _layer_attributes(inputs: Arrays, attrs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]:
    """(the layer's attributes, its router's, the names of its differentiable inputs), shapes and attributes checked."""
    at, d, e = fill(LAYER, attrs), inputs["x"].shape[1], len(inputs["gate_weight"])
    choose("topk_method", at["topk_method"], ("noaux_tc", "softmax"))
    choose("scoring", at["scoring"], ("sigmoid", "softmax", "sqrtsoftplus"))  # the softmax router knows neither of these two
    choose("gate_dtype", at["gate_dtype"], ("float32", "bfloat16"))
    _check_swiglu(at)
    shared = tuple(name for name in SHARED if inputs.get(name) is not None)
    if shared not in ((), SHARED):
        raise ValueError(f"{shared} needs the others of {SHARED}")
    names = ("x", "gate_weight", *FFN, *shared)
    for name in names:
        carrier(inputs[name])
    _expert_shapes(inputs)
    expect(inputs, {"gate_weight": (len(inputs["w_gate"]), d), "e_score_correction_bias": (e,)})
    if shared:
        g = len(inputs["shared_gate"])
        expect(inputs, {"shared_gate": (g, d), "shared_up": (g, d), "shared_down": (d, g)})
    soft = at["topk_method"] == "softmax"
    known = {"k": at["num_experts_per_tok"], **{name: at[name] for name in ROUTER if name in (SOFTMAX if soft else DEFAULTS)}}
    return at, (softmax_attributes if soft else noaux_attributes)(known, e), names


def _bias(inputs: Arrays, at: dict[str, Any]) -> list[float]:
    """The bias that the choice is made with: none for the softmax router."""
    given = inputs.get("e_score_correction_bias")
    return [0.0] * len(inputs["gate_weight"]) if given is None or at["topk_method"] == "softmax" else given.tolist()


def _layer(
    inputs: Arrays, attrs: dict[str, Any], held: np.ndarray | None = None, tape: Tape | None = None
) -> tuple[Arrays, np.ndarray, list[list[int]]]:
    """(the differentiable inputs, y, topk_idx); the choice is made here, unless it is held."""
    at, routing, names = _layer_attributes(inputs, attrs)
    given, limit, (n, d), k = {name: scalars(inputs[name], tape) for name in names}, at["limit"], inputs["x"].shape, routing["k"]
    bias, gate_weight = [CTX.mpf(b) for b in _bias(inputs, at)], given["gate_weight"].tolist()
    expect(inputs, {"topk_idx": (n, k)})
    decided = None if held is None else slots(held, len(gate_weight), lowest=0)
    y: list[Scalar] = []
    chosen = []
    for i, x in enumerate(given["x"].tolist()):
        logits = matvec(gate_weight, x)
        if not all(CTX.isfinite(v) for v in [*map(value_of, logits), *bias]):
            raise ValueError(f"the logits of token {i}, or the bias, are not finite")
        top = decided[i] if decided is not None else select([value_of(u) for u in logits], bias, routing)
        routed = mixture(x, top, weights_at(logits, top, routing), given, limit)
        if "shared_gate" in given:
            routed = [total(pair) for pair in zip(routed, ffn(x, [given[name].tolist() for name in SHARED], limit), strict=True)]
        y += routed
        chosen.append(top)
    return given, packed(y, (n, d)), chosen


def layer(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """moe.layer: x, gate_weight, e_score_correction_bias?, the experts' and perhaps the shared expert's weights -> y, topk_idx."""
    _, y, chosen = _layer(inputs, attrs)
    k = fill(LAYER, attrs)["num_experts_per_tok"]
    return {"y": rounded(y), "topk_idx": np.array(chosen, np.int64).reshape(len(y), k)}


def layer_backward(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """moe.layer backward: the inputs, topk_idx, dy -> dx, dgate_weight, d<weight> of every expert's weight given."""
    tape = Tape()
    given, y, _ = _layer(inputs, attrs, inputs["topk_idx"], tape)
    pull_back(tape, (y, inputs["dy"]))
    return {f"d{name}": gradients(array) for name, array in given.items()}


def selection_margin(inputs: Arrays, attrs: dict[str, Any]) -> np.ndarray:
    """Per token, the least change in s + bias, or in a group's score, that could alter topk_idx, as `router.selection_margin`.

    A logit's error reaches s and log s at slopes of 2 at most. Equal logits are no risk where they are sums of at most one product that is
    not zero: longer sums may be taken in different orders. With gate_dtype="bfloat16" it is also no more than the change in any logit, or
    the relative change in any s, that would round it to another value.
    """
    at, routing, _ = _layer_attributes(inputs, attrs)
    given, bias = {name: scalars(inputs[name]) for name in ("x", "gate_weight")}, _bias(inputs, at)
    margins = []
    for x in given["x"].tolist():
        products = [[u * w for u, w in zip(x, row, strict=True) if u * w] for row in given["gate_weight"].tolist()]
        logits = [dot(terms, [ONE] * len(terms)) for terms in products]
        keys = [(z, b, i if len(terms) > 1 else -1) for i, (z, b, terms) in enumerate(zip(logits, bias, products, strict=True))]
        gaps = [row_margin(logits, bias, keys, routing)]
        if routing["gate_dtype"] == "bfloat16":
            gaps += [to_float64(rounding_margin(z)) for z, terms in zip(logits, products, strict=True) if terms]
        margins.append(min(gaps))
    return np.array(margins, np.float64)
