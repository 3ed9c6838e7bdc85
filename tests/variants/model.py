"""The whole model, forward and backward: embedding, layers whose weights are stacked, norm, head."""

from collections.abc import Callable
from typing import Any

import numpy as np

from .block import DENSE, EXPERTS, SHARED, TRAINED, WEIGHTS, Given, given, layer, layer_back, split, widened
from .floats import Array
from .mla import Weights, present
from .parts import EAGERS, PARTS, WIDE, Parts

OUTER = ("embed_tokens", "norm", "lm_head")
OF_EXPERTS = (*EXPERTS, *SHARED, "e_score_correction_bias")
Layer = tuple[Weights, Array | None]  # its weights, and its choice if that was made before


def layers_of(w: Weights, idx: Array | None) -> list[Layer]:
    """The dense ones come first."""
    count = len(present(w["input_layernorm"]))
    dense = 0 if w[DENSE[0]] is None else len(present(w[DENSE[0]]))
    found: list[Layer] = []
    for i in range(count):
        absent, first = (OF_EXPERTS, 0) if i < dense else (DENSE, dense)
        own = {n: None if w[n] is None or n in absent else present(w[n])[i - first if n in OF_EXPERTS else i] for n in WEIGHTS}
        choice = np.zeros((1, 0), np.int64) if i < dense else None if idx is None else idx[i - dense]
        found.append((own, choice))
    return found


def walked(p: Parts, to: Callable, ids: Array, w: Weights, layers: list[Layer], g: Given) -> tuple[list[Array], Array, list[Array]]:
    """What each layer reads, what the last one gives, unrounded, and the choices"""
    x = p.embedding[0](ids.reshape(-1), present(w["embed_tokens"])).reshape(*ids.shape, -1)
    read, chosen = [], []
    for own, choice in layers:
        read.append(x if not read else to(x))
        x, idx = layer(p, to, read[-1], own, g, choice)
        chosen.append(idx)
    return read, x, chosen


def forward_of(p: Parts) -> Callable:
    def forward(*, ids: Array, to: Callable, **keywords: Any) -> tuple[Array, Array, Array]:
        w, a = split(keywords, (*WEIGHTS, *OUTER))
        g, layers = given(keywords, a), layers_of(w, None)
        _, x, chosen = walked(p, to, ids, w, layers, g)
        rows = (x if p.unrounded else to(x)).reshape(ids.size, -1)
        hidden = to(p.rms[0](rows, present(w["norm"]), eps=g.eps))
        logits = p.matmul(hidden, present(w["lm_head"]))
        idx = np.stack([idx for idx, (own, _) in zip(chosen, layers, strict=True) if own["gate_weight"] is not None])
        return logits.reshape(*ids.shape, -1), hidden.reshape(x.shape), idx

    return forward


def backward_of(p: Parts) -> Callable:
    def backward(*, ids: Array, topk_idx: Array, dlogits: Array, dhidden: Array, to: Callable, **keywords: Any) -> tuple[Array, ...]:
        w, a = split(keywords, (*WEIGHTS, *OUTER))
        g, layers = given(keywords, a), layers_of(w, topk_idx)
        read, x, _ = walked(p, to, ids, w, layers, g)
        rows, d = to(x).reshape(ids.size, -1), dlogits.reshape(ids.size, -1)
        hidden = to(p.rms[0](rows, present(w["norm"]), eps=g.eps))
        dlm_head = p.matmul(d.T, hidden.T)
        dhead = p.met(to, dhidden.reshape(rows.shape), p.matmul(d, present(w["lm_head"]).T))
        dx, dnorm = p.rms[1](rows, present(w["norm"]), dhead, eps=g.eps)
        dx, found = to(dx).reshape(x.shape), []
        for inputs, (own, choice) in reversed(list(zip(read, layers, strict=True))):
            assert choice is not None
            dx, grads = layer_back(p, to, inputs, own, g, choice, dx)
            found.insert(0, grads)
        dtable = p.embedding[1](ids.reshape(-1), present(w["embed_tokens"]), dx.reshape(rows.shape))
        stacked = [np.stack([grads[name] for grads in found if name in grads]) for name in TRAINED if w[name] is not None]
        return dtable, *stacked, dnorm, dlm_head

    return backward


FORWARD = {name: forward_of(p) for name, p in PARTS.items()} | {"double": widened(forward_of(WIDE))}
BACKWARD = {name: backward_of(p) for name, p in PARTS.items()} | {"double": widened(backward_of(WIDE))}
EAGER = {name: (forward_of(p), backward_of(p)) for name, p in EAGERS.items()}
