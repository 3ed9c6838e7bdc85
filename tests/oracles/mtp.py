"""Multi-token prediction: one module, and the loss of a chain of them, with their backward passes; shares nothing with `ref`.

Equation: h'_i = eh_proj [rmsnorm(embed(ids[i + depth]); enorm), rmsnorm(h_i; hnorm)], or those two the other way round; h'' = block(h');
logits = shared_head rmsnorm(h''; shared_head_norm); the next module reads that norm's output, or h'' itself.
Loss: weight / p sum_k L_k; L_k = -sum_i ln P_k,i[target i + k + 1] over b s, or over how many rows count. Module k = 1..p has the rows
i < s - k, and those count whose target is there, not ignored, and in the same packed document as i. Without modules it is 0.
Backward: the reverse-mode derivative of L by `tape`, topk_idx held fixed; no closed form is used.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from . import block
from .block import Chosen, Cuts, Plan
from .edges import carrier, choose, fill
from .linear import Arrays, expect, gradients, integers, matvec, packed, pull_back, rounded, scalars, total
from .loss import nll, places
from .norm import rmsnorm_row
from .tape import CTX, Scalar, Tape

CHAIN: dict[str, Any] = {"concat": "embed_first", "chain": "post_norm"}
MODULE: dict[str, Any] = {"depth": 1, **CHAIN, **block.DEFAULTS}
LOSS: dict[str, Any] = {"weight": 0.3, "detach_head": False, "denominator": "total", "ignore_index": -100, **CHAIN, **block.DEFAULTS}
OWN = ("enorm", "hnorm", "eh_proj", *block.WEIGHTS, "shared_head_norm")
SHARED = ("embed_tokens", "shared_head")
Places = list[list[int]]


def _check(weights: Arrays, h: np.ndarray, at: dict[str, Any]) -> Plan:
    """The block's plan; ValueErrors of the module's own weights and attributes."""
    choose("concat", at["concat"], ("embed_first", "hidden_first"))
    choose("chain", at["chain"], ("post_norm", "pre_norm"))
    d = h.shape[2]
    expect(weights, {"enorm": (d,), "hnorm": (d,), "eh_proj": (d, 2 * d), "shared_head_norm": (d,)})
    for name in ("enorm", "hnorm", "eh_proj", "shared_head_norm"):
        carrier(weights[name])
    return block.plan(weights, h, {name: at[name] for name in block.DEFAULTS})


def _check_shared(inputs: Arrays) -> int:
    """The size of the vocabulary."""
    v, d = inputs["embed_tokens"].shape
    expect(inputs, {"embed_tokens": (v, inputs["h"].shape[2]), "shared_head": (v, d)})
    for name in ("h", *SHARED):
        carrier(inputs[name])
    return v


def merged(h: np.ndarray, read: Places, given: Arrays, how: Plan, concat: str) -> np.ndarray:
    """h'[b,s,d]: row i is made of h_i and of the token that it reads."""
    eps, flat = CTX.mpf(float(how.at["rms_norm_eps"])), []
    enorm, hnorm = given["enorm"].tolist(), given["hnorm"].tolist()
    for rows, tokens in zip(h.tolist(), read, strict=True):
        for row, token in zip(rows, tokens, strict=True):
            embedded, hidden = rmsnorm_row(given["embed_tokens"][token].tolist(), enorm, eps), rmsnorm_row(row, hnorm, eps)
            flat += matvec(given["eh_proj"], embedded + hidden if concat == "embed_first" else hidden + embedded)
    return packed(flat, h.shape)


def module(
    h: np.ndarray, read: Places, positions: Places, given: Arrays, how: Plan, at: dict[str, Any], cuts: Cuts, held: Chosen | None
) -> tuple[np.ndarray, np.ndarray, Chosen]:
    """(what the head reads, what the next module reads, the experts chosen)."""
    y, chosen = block.run(merged(h, read, given, how, at["concat"]), given, positions, how, cuts, held)
    last = block.normed(y, given["shared_head_norm"], how.at)
    return last, last if at["chain"] == "post_norm" else y, chosen


def head(rows: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """logits[b,s,v] of rows[b,s,d]."""
    b, s, d = rows.shape
    return packed([u for row in rows.reshape(b * s, d).tolist() for u in matvec(weight, row)], (b, s, len(weight)))


def _names(inputs: Arrays) -> tuple[str, ...]:
    """The inputs that have gradients, in the signature's order."""
    return tuple(n for n in ("h", *OWN, *SHARED) if n != block.CONSTANT and inputs.get(n) is not None)


# One module


@dataclass(frozen=True)
class _Asked:
    """A question about one module, its differentiable inputs as scalars."""

    given: Arrays
    read: Places
    positions: Places
    how: Plan
    at: dict[str, Any]
    cuts: Cuts


def _asked(inputs: Arrays, attrs: dict[str, Any], tape: Tape | None = None) -> _Asked:
    at, (b, s, _) = fill(MODULE, attrs), inputs["h"].shape
    if at["depth"] < 0 or inputs["ids"].shape != (b, s + at["depth"]):
        raise ValueError(f"ids has shape {inputs['ids'].shape}; h has {s} rows, depth is {at['depth']}")
    how, tokens = _check(inputs, inputs["h"], at), places(inputs["ids"], "ids", _check_shared(inputs))
    expect(inputs, {"positions": (b, s)})
    given = {name: scalars(inputs[name], tape) for name in _names(inputs)}
    read = [row[at["depth"] :] for row in tokens]
    return _Asked(given, read, integers(inputs["positions"], "positions"), how, at, block.packing(inputs, b, s))


def _mtp(asked: _Asked, held: Chosen | None = None) -> tuple[np.ndarray, np.ndarray, Chosen]:
    """(logits, h_next, the experts chosen)."""
    given = asked.given
    last, h_next, chosen = module(given["h"], asked.read, asked.positions, given, asked.how, asked.at, asked.cuts, held)
    return head(last, given["shared_head"]), h_next, chosen


def forward(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """mtp: h, ids, positions, cu_seqlens?, the module's weights, embed_tokens, shared_head -> logits, h_next, topk_idx."""
    asked = _asked(inputs, attrs)
    logits, h_next, chosen = _mtp(asked)
    topk_idx = block.as_index(chosen, (*h_next.shape[:2], asked.how.k))
    return {"logits": rounded(logits), "h_next": rounded(h_next), "topk_idx": topk_idx}


def backward(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """mtp backward: the inputs, topk_idx, dlogits, dh_next -> dh, d<weight> of every weight given, embedding and head among them."""
    tape = Tape()
    asked, (b, s, _) = _asked(inputs, attrs, tape), inputs["h"].shape
    logits, h_next, _ = _mtp(asked, block.held_choice(inputs, asked.how, b, s, len(asked.how.bias)))
    pull_back(tape, (logits, inputs["dlogits"]), (h_next, inputs["dh_next"]))
    return {f"d{name}": gradients(array) for name, array in asked.given.items()}


def margin(inputs: Arrays, attrs: dict[str, Any]) -> np.ndarray:
    """[b,s]: how far every row's choice is from another one, as `block.gaps`."""
    it = _asked(inputs, attrs)
    x = merged(it.given["h"], it.read, it.given, it.how, it.at["concat"])
    return block.gaps(x, it.given, it.positions, it.how, it.cuts)


# The loss of a chain


def shortened(cuts: Cuts, rows: int) -> Cuts:
    """The sequences without the places from `rows` on."""
    return None if cuts is None else [(min(first, rows), min(end, rows)) for first, end in cuts]


def together(cuts: Cuts, s: int, i: int, j: int) -> bool:
    """Whether places i and j >= i are there, and in one packed sequence."""
    return j < s and (cuts is None or any(first <= i and j < end for first, end in cuts))


@dataclass(frozen=True)
class _Chain:
    """A question about the loss: `given` are its differentiable inputs, `read` those that embedding and head are taken from."""

    given: Arrays
    read: Arrays
    ids: Places
    labels: Places
    positions: Places
    plans: list[Plan]
    at: dict[str, Any]
    cuts: Cuts

    def weights(self, k: int) -> Arrays:
        """Of the module of that number, from 0 on."""
        return {**{name: self.given[name][k] for name in OWN if name in self.given}, **self.read}


def _chain(inputs: Arrays, attrs: dict[str, Any], tape: Tape | None = None) -> _Chain:
    at, (b, s, _) = fill(LOSS, attrs), inputs["h"].shape
    choose("denominator", at["denominator"], ("total", "counted"))
    choose("detach_head", at["detach_head"], (True, False))
    v, p = _check_shared(inputs), len(inputs["eh_proj"])
    expect(inputs, {"ids": (b, s), "labels": (b, s), "positions": (b, s)})
    own = [name for name in OWN if inputs.get(name) is not None]
    if any(len(inputs[name]) != p for name in own):
        raise ValueError(f"the modules' weights are not all stacked {p} high")
    plans = [_check({name: inputs[name][k] for name in own}, inputs["h"], at) for k in range(p)]
    ids = places(inputs["ids"], "ids", v)
    labels = ids if inputs.get("labels") is None else places(inputs["labels"], "labels", v, at["ignore_index"])
    given = {name: scalars(inputs[name], tape) for name in _names(inputs)}
    read = {name: scalars(inputs[name]) if at["detach_head"] else given[name] for name in SHARED}
    positions = integers(inputs["positions"], "positions")
    return _Chain(given, read, ids, labels, positions, plans, at, block.packing(inputs, b, s))


def _entering(it: _Chain, h: np.ndarray, k: int) -> tuple[np.ndarray, Places, Places, Cuts]:
    """(h, what every row reads, positions, cuts) of module k, from 1 on, cut to the rows that read a token."""
    rows = max(h.shape[1] - 1, 0)
    return h[:, :rows], [row[k : k + rows] for row in it.ids], [row[:rows] for row in it.positions], shortened(it.cuts, rows)


def _losses(it: _Chain, held: np.ndarray | None = None, margins: list[np.ndarray] | None = None) -> tuple[Scalar, np.ndarray]:
    """(loss, topk_idx[p,b,s,k] with -1 where there is no row); every module appends to `margins`."""
    h, (b, s, _) = it.given["h"], it.given["h"].shape
    p, experts = len(it.plans), it.plans[0].k if it.plans else it.at["num_experts_per_tok"]
    topk_idx, terms = np.full((p, b, s, experts), -1, np.int64), []
    for k, how in enumerate(it.plans, 1):
        h, read, positions, cuts = _entering(it, h, k)
        rows, weights = h.shape[1], it.weights(k - 1)
        choice = None if held is None else block.held_choice({"topk_idx": held[k - 1, :, :rows]}, how, b, rows, len(how.bias))
        if margins is not None:
            margins.append(block.gaps(merged(h, read, weights, how, it.at["concat"]), weights, positions, how, cuts))
        last, h, chosen = module(h, read, positions, weights, how, it.at, cuts, choice)
        topk_idx[k - 1, :, :rows] = block.as_index(chosen, (b, rows, how.k))
        targets = [(n, i, it.labels[n][i + k + 1]) for n in range(b) for i in range(rows) if together(it.cuts, s, i, i + k + 1)]
        counted = [(n, i, label) for n, i, label in targets if label != it.at["ignore_index"]]
        found = [nll(matvec(weights["shared_head"], last[n, i].tolist()), label) for n, i, label in counted]
        if found:
            terms.append(total(found) / (b * s if it.at["denominator"] == "total" else len(found)))
    return total(terms) * (CTX.mpf(float(it.at["weight"])) / max(p, 1)), topk_idx


def loss(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """mtp.loss: h, ids, labels?, positions, cu_seqlens?, the modules' weights, embed_tokens, shared_head -> loss, topk_idx."""
    value, topk_idx = _losses(_chain(inputs, attrs))
    return {"loss": rounded(packed([value], ())), "topk_idx": topk_idx}


def loss_backward(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """mtp.loss backward: the inputs, topk_idx, dloss -> dh, d<weight> of every weight given."""
    tape = Tape()
    it = _chain(inputs, attrs, tape)
    value, _ = _losses(it, inputs["topk_idx"])
    pull_back(tape, (packed([value], ()), inputs["dloss"]))
    return {f"d{name}": gradients(array) for name, array in it.given.items()}


def loss_margin(inputs: Arrays, attrs: dict[str, Any]) -> np.ndarray:
    """The least of all modules' margins: one choice reaches every later row."""
    found: list[np.ndarray] = []
    _losses(_chain(inputs, attrs), margins=found)
    return np.array(min((float(m.min(initial=np.inf)) for m in found), default=np.inf))
