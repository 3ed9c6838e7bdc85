"""The decoder block, dense or of experts, with its backward pass; shares nothing with `ref`.

Equation: u = x + attention(rmsnorm(x; input_layernorm)), y = u + ffn(rmsnorm(u; post_attention_layernorm)), with the attention of `mla`,
and as ffn either one FFN, or the experts that the router chooses and the shared one, as in `moe`.
Whether attention is absorbed has no part in exact arithmetic. The norms inside attention may have an epsilon of their own. With limit L
the FFN of a dense block is cut like an expert's.
Backward: the reverse-mode derivative of L = sum(dy * y) by `tape`, topk_idx held fixed; no closed form is used.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from . import mla, moe
from .attention import segments
from .balance import slots
from .edges import carrier, fill
from .linear import Arrays, expect, gradients, integers, matvec, packed, pull_back, rounded, scalars, total
from .norm import rmsnorm_row
from .router import rounding_margin, row_margin, select, weights_at
from .tape import CTX, Scalar, Tape, to_float64, value_of

DEFAULTS: dict[str, Any] = {**mla.DEFAULTS, **moe.LAYER, "absorbed": False, "latent_norm_eps": None}
NORMS, DENSE = ("input_layernorm", "post_attention_layernorm"), ("gate_proj", "up_proj", "down_proj")
ATTENTION = (*mla.Q_WHOLE, *mla.Q_LORA, *mla.KV_AND_O)
MOE = ("gate_weight", "e_score_correction_bias", *moe.FFN, *moe.SHARED)
WEIGHTS = (*NORMS[:1], *ATTENTION, *NORMS[1:], *DENSE, *MOE)
CONSTANT = "e_score_correction_bias"
Cuts = list[tuple[int, int]] | None
Chosen = list[list[list[int]]]  # by sequence and token


@dataclass(frozen=True)
class Plan:
    """What a block's attributes and shapes say: the attributes completed, its router's (None: dense), its selection bias."""

    at: dict[str, Any]
    routing: dict[str, Any] | None
    bias: list[Any]

    @property
    def k(self) -> int:
        return self.routing["k"] if self.routing else 0


def plan(weights: Arrays, x: np.ndarray, attrs: dict[str, Any]) -> Plan:
    """ValueError where shapes contradict each other or the attributes; x[b,s,d] only lends its shape and dtype."""
    at = fill(DEFAULTS, attrs)
    mla.attributes({name: at[name] for name in mla.DEFAULTS})
    (b, s, d), options = x.shape, {name: at[name] for name in moe.LAYER}
    expect(weights, dict.fromkeys(NORMS, (d,)))
    mla.check_shapes({**weights, "x": x}, at)
    dense = {name for name in DENSE if weights.get(name) is not None}
    experts = {name for name in MOE if weights.get(name) is not None}
    if not (dense == set(DENSE) and not experts) and not ({"gate_weight", *moe.FFN} <= experts and not dense):
        raise ValueError(f"a block has either {DENSE} or experts, got {sorted(dense | experts)}")
    for name in (*NORMS, *sorted((dense | experts) - {CONSTANT})):
        carrier(weights[name])
    if dense:
        f = len(weights["gate_proj"])
        expect(weights, {"gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)})
        moe._check_swiglu(at)
        if at["num_experts_per_tok"]:
            raise ValueError(f"num_experts_per_tok {at['num_experts_per_tok']} in a dense block")
        return Plan(at, None, [])
    tokens = {**{name: weights.get(name) for name in MOE}, "x": x.reshape(b * s, d)}
    filled, routing, _ = moe._layer_attributes(tokens, options)
    return Plan(at, routing, [CTX.mpf(v) for v in moe._bias(weights, filled)])


def normed(rows: np.ndarray, weight: np.ndarray, at: dict[str, Any]) -> np.ndarray:
    """rmsnorm over the last of [b,s,d], on mpf or on tape variables."""
    eps, w = CTX.mpf(float(at["rms_norm_eps"])), weight.tolist()
    return packed([u for row in rows.reshape(-1, rows.shape[-1]).tolist() for u in rmsnorm_row(row, w, eps)], rows.shape)


def added(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return packed([total(pair) for pair in zip(x.ravel().tolist(), y.ravel().tolist(), strict=True)], x.shape)


def gate(x: list[Scalar], given: Arrays, bias: list[Any]) -> list[Scalar]:
    """The router's logits of one token."""
    logits = matvec(given["gate_weight"], x)
    if not all(CTX.isfinite(v) for v in [*map(value_of, logits), *bias]):
        raise ValueError("a token's logits, or the bias, are not finite")
    return logits


def feed_forward(x: list[Scalar], given: Arrays, how: Plan, held: list[int] | None) -> tuple[list[Scalar], list[int]]:
    """(ffn(x), the experts chosen) of one token."""
    limit = how.at["limit"]
    if how.routing is None:
        return moe.ffn(x, [given[name].tolist() for name in DENSE], limit), []
    logits = gate(x, given, how.bias)
    top = select([value_of(u) for u in logits], how.bias, how.routing) if held is None else held
    y = moe.mixture(x, top, weights_at(logits, top, how.routing), given, limit)
    if "shared_gate" in given:
        y = [total(pair) for pair in zip(y, moe.ffn(x, [given[name].tolist() for name in moe.SHARED], limit), strict=True)]
    return y, top


def middle(x: np.ndarray, given: Arrays, positions: list[list[int]], how: Plan, cuts: Cuts) -> tuple[np.ndarray, np.ndarray]:
    """(u, rmsnorm(u)) of x[b,s,d]; `given` may hold caches."""
    inner = how.at if how.at["latent_norm_eps"] is None else {**how.at, "rms_norm_eps": how.at["latent_norm_eps"]}
    attended, _, _ = mla.layer({**given, "x": normed(x, given["input_layernorm"], how.at)}, positions, inner, cuts)
    u = added(x, attended)
    return u, normed(u, given["post_attention_layernorm"], how.at)


def run(
    x: np.ndarray, given: Arrays, positions: list[list[int]], how: Plan, cuts: Cuts = None, held: Chosen | None = None
) -> tuple[np.ndarray, Chosen]:
    """(y[b,s,d], the experts chosen) of arrays of scalars; the choice is made here, unless it is held."""
    u, inner = middle(x, given, positions, how, cuts)
    flat: list[Scalar] = []
    chosen: Chosen = []
    for n, sequence in enumerate(inner.tolist()):
        chosen.append([])
        for i, token in enumerate(sequence):
            y, top = feed_forward(token, given, how, None if held is None else held[n][i])
            flat += y
            chosen[-1].append(top)
    return added(u, packed(flat, x.shape)), chosen


def gaps(x: np.ndarray, given: Arrays, positions: list[list[int]], how: Plan, cuts: Cuts = None) -> np.ndarray:
    """[b,s]: the least change in a token's s + bias, or a group's score, that could alter its choice; inf in a dense block.

    No two experts count as equal: their logits are sums over all of d, taken in any order. With gate_dtype="bfloat16" also the change in
    any logit that would round it to another value.
    """
    margins = np.full(x.shape[:2], np.inf)
    if how.routing is None:
        return margins
    _, inner = middle(x, given, positions, how, cuts)
    bias = [to_float64(b) for b in how.bias]
    for n, i in np.ndindex(*margins.shape):
        logits = gate(inner[n, i].tolist(), given, how.bias)
        found = [row_margin(logits, bias, list(range(len(logits))), how.routing)]
        if how.routing["gate_dtype"] == "bfloat16":
            found += [to_float64(rounding_margin(z)) for z in logits]
        margins[n, i] = min(found)
    return margins


def held_choice(inputs: Arrays, how: Plan, b: int, s: int, e: int, lowest: int = 0) -> Chosen:
    """topk_idx[b,s,k] as lists, checked."""
    topk_idx = inputs["topk_idx"]
    expect({"topk_idx": topk_idx}, {"topk_idx": (b, s, how.k)})
    rows = slots(topk_idx, e, lowest)
    return [rows[n * s : (n + 1) * s] for n in range(b)]


def as_index(chosen: Chosen, shape: tuple[int, ...]) -> np.ndarray:
    return np.array([i for sequence in chosen for top in sequence for i in top], np.int64).reshape(shape)


def packing(inputs: Arrays, b: int, s: int) -> Cuts:
    """The sequences that the only row is made of; None where nothing is packed."""
    cu_seqlens = inputs.get("cu_seqlens")
    if cu_seqlens is not None and b != 1:
        raise ValueError(f"cu_seqlens with b = {b}: packed sequences are one row")
    return None if cu_seqlens is None else segments(cu_seqlens, s, "cu_seqlens")


@dataclass(frozen=True)
class _Asked:
    """A question about one block, its differentiable inputs as scalars."""

    given: Arrays
    positions: list[list[int]]
    how: Plan
    cuts: Cuts


def _asked(inputs: Arrays, attrs: dict[str, Any], tape: Tape | None = None) -> _Asked:
    how, x = plan(inputs, inputs["x"], attrs), inputs["x"]
    names = (*mla._names(inputs), *(n for n in WEIGHTS if n not in (*ATTENTION, CONSTANT) and inputs.get(n) is not None))
    given = {name: scalars(inputs[name], tape) for name in names}
    return _Asked(given, integers(inputs["positions"], "positions"), how, packing(inputs, *x.shape[:2]))


def _ordered(grads: Arrays) -> Arrays:
    """By the order of the signature."""
    return {f"d{name}": grads[name] for name in ("x", *mla.CACHES, *WEIGHTS) if name in grads}


def forward(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """block: x, positions, caches or cu_seqlens, the weights -> y, topk_idx. The choice is that of the real numbers: see `margin`."""
    asked = _asked(inputs, attrs)
    y, chosen = run(asked.given["x"], asked.given, asked.positions, asked.how, asked.cuts)
    return {"y": rounded(y), "topk_idx": as_index(chosen, (*y.shape[:2], asked.how.k))}


def backward(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """block backward: the inputs, topk_idx, dy -> dx, both caches' if given, d<weight> of every weight given; none to the bias."""
    tape = Tape()
    asked, (b, s, _) = _asked(inputs, attrs, tape), inputs["x"].shape
    held = held_choice(inputs, asked.how, b, s, len(asked.how.bias))
    y, _ = run(asked.given["x"], asked.given, asked.positions, asked.how, asked.cuts, held)
    pull_back(tape, (y, inputs["dy"]))
    return _ordered({name: gradients(array) for name, array in asked.given.items()})


def margin(inputs: Arrays, attrs: dict[str, Any]) -> np.ndarray:
    """[b,s]: how far every token's choice is from another one, as `gaps`."""
    asked = _asked(inputs, attrs)
    return gaps(asked.given["x"], asked.given, asked.positions, asked.how, asked.cuts)
