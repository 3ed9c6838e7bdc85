"""The whole model over stacked weights, with its backward pass; shares nothing with `ref`.

Equation: x = embed_tokens[ids]; every layer a block, the first ones dense, the others of experts; hidden = rmsnorm(x; norm);
logits = lm_head hidden. Attention and norms are stacked over all layers, a dense FFN over the first, gate and experts over the others.
Backward: the reverse-mode derivative of L = sum(dlogits * logits) + sum(dhidden * hidden) by `tape`, topk_idx held fixed.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from . import block
from .block import Chosen, Cuts, Plan
from .edges import carrier, fill
from .linear import Arrays, expect, gradients, integers, packed, pull_back, rounded, scalars
from .loss import places
from .mtp import head
from .tape import Tape

OUTER = ("embed_tokens", "norm", "lm_head")


def layer_of(stacks: Arrays, i: int, dense: int) -> Arrays:
    """The weights of layer i: the first `dense` of the layers have no experts, the others no FFN of their own."""
    own = {name: stacks[name][i] for name in (*block.NORMS, *block.ATTENTION) if name in stacks}
    if i < dense:
        return own | {name: stacks[name][i] for name in block.DENSE}
    return own | {name: stacks[name][i - dense] for name in block.MOE if name in stacks}


@dataclass(frozen=True)
class _Asked:
    """A question about the model, its differentiable inputs as scalars."""

    given: Arrays
    ids: list[list[int]]
    positions: list[list[int]]
    plans: list[Plan]
    at: dict[str, Any]
    dense: int
    cuts: Cuts


def _dense_layers(stacks: Arrays) -> int:
    """How many layers are dense; ValueError where the stacks are not as high as that makes them."""
    layers = len(stacks["input_layernorm"])
    dense = len(stacks["gate_proj"]) if "gate_proj" in stacks else 0
    heights = {**dict.fromkeys((*block.NORMS, *block.ATTENTION), layers), **dict.fromkeys(block.DENSE, dense)}
    heights |= dict.fromkeys(block.MOE, layers - dense)
    for name, stack in stacks.items():
        if len(stack) != heights[name]:
            raise ValueError(f"{name} is stacked {len(stack)} high, expected {heights[name]} of {layers} layers")
    return dense


def _asked(inputs: Arrays, attrs: dict[str, Any], tape: Tape | None = None) -> _Asked:
    at, (b, s), (v, d) = fill(block.DEFAULTS, attrs), inputs["ids"].shape, inputs["embed_tokens"].shape
    expect(inputs, {"positions": (b, s), "norm": (d,), "lm_head": (v, d)})
    for name in OUTER:
        carrier(inputs[name])
    stacks = {name: inputs[name] for name in block.WEIGHTS if inputs.get(name) is not None}
    dense, shape = _dense_layers(stacks), np.zeros((b, s, d), inputs["embed_tokens"].dtype)
    plans = []
    for i in range(len(stacks["input_layernorm"])):
        own = layer_of(stacks, i, dense)
        plans.append(block.plan(own, shape, {**attrs, **({"num_experts_per_tok": 0} if i < dense else {})}))
    given = {name: scalars(inputs[name], tape) for name in (*OUTER, *stacks) if name != block.CONSTANT}
    ids, positions = places(inputs["ids"], "ids", v), integers(inputs["positions"], "positions")
    return _Asked(given, ids, positions, plans, at, dense, block.packing(inputs, b, s))


def embedded(ids: list[list[int]], weight: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return packed([u for row in ids for i in row for u in weight[i].tolist()], shape)


def _model(
    it: _Asked, held: list[Chosen] | None = None, margins: list[np.ndarray] | None = None
) -> tuple[np.ndarray, np.ndarray, list[Chosen]]:
    """(logits, hidden, the experts chosen by every layer that has some); each of those appends to `margins`."""
    b, s = len(it.positions), len(it.positions[0]) if it.positions else 0
    x, every = embedded(it.ids, it.given["embed_tokens"], (b, s, it.given["norm"].shape[0])), []
    for i, how in enumerate(it.plans):
        own = layer_of(it.given, i, it.dense)
        if margins is not None and i >= it.dense:
            margins.append(block.gaps(x, own, it.positions, how, it.cuts))
        x, chosen = block.run(x, own, it.positions, how, it.cuts, held[i - it.dense] if held is not None and i >= it.dense else None)
        if i >= it.dense:
            every.append(chosen)
    hidden = block.normed(x, it.given["norm"], it.at)
    return head(hidden, it.given["lm_head"]), hidden, every


def forward(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """model: ids, positions, cu_seqlens?, the weights -> logits, hidden, topk_idx. The choice is that of the real numbers: see `margin`."""
    it, shape = _asked(inputs, attrs), inputs["ids"].shape
    logits, hidden, every = _model(it)
    experts = it.plans[-1].k if every else 0
    topk_idx = np.array([block.as_index(chosen, (*shape, experts)) for chosen in every], np.int64)
    return {"logits": rounded(logits), "hidden": rounded(hidden), "topk_idx": topk_idx.reshape(len(every), *shape, experts)}


def backward(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """model backward: the inputs, topk_idx, dlogits, dhidden -> d<weight> of every weight given; none to the bias."""
    tape = Tape()
    it, (b, s) = _asked(inputs, attrs, tape), inputs["ids"].shape
    with_experts = enumerate(it.plans[it.dense :])
    held = [block.held_choice({"topk_idx": inputs["topk_idx"][i]}, how, b, s, len(how.bias)) for i, how in with_experts]
    logits, hidden, _ = _model(it, held)
    pull_back(tape, (logits, inputs["dlogits"]), (hidden, inputs["dhidden"]))
    return {f"d{name}": gradients(array) for name, array in it.given.items()}


def margin(inputs: Arrays, attrs: dict[str, Any]) -> np.ndarray:
    """The least of all layers' margins: one choice reaches every later row and layer."""
    found: list[np.ndarray] = []
    _model(_asked(inputs, attrs), margins=found)
    return np.array(min((float(m.min(initial=np.inf)) for m in found), default=np.inf))
