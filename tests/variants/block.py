"""A layer, forward and backward: a residual beside an attention, and beside a feed-forward network, of the parts of other variants.

The backward keeps what a layer was given and runs it again, with the router's choice that it is handed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import moe, moe_backward
from .floats import Array
from .mla import Weights, present
from .parts import EAGERS, PARTS, WIDE, Parts
from .router import divided, scores_plain
from .router_softmax import softmax, softmax_eager

NORMS = ("input_layernorm", "post_attention_layernorm")
QUERIES = ("q_proj", "q_a_proj", "q_a_layernorm", "q_b_proj")
ATTENTION = (*QUERIES, "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")
DENSE = ("gate_proj", "up_proj", "down_proj")
EXPERTS = ("gate_weight", "w_gate", "w_up", "w_down")
SHARED = ("shared_gate", "shared_up", "shared_down")
BIAS = "e_score_correction_bias"
CACHES = ("c_kv_cache", "k_pe_cache")
TRAINED = (NORMS[0], *ATTENTION, NORMS[1], *DENSE, *EXPERTS, *SHARED)
WEIGHTS = (*TRAINED, BIAS)
Grads = dict[str, Array]


@dataclass(frozen=True)
class Given:
    """Of one layer: where its tokens stand, its caches, its attributes."""

    positions: Array
    a: dict[str, Any]
    cu_seqlens: Array | None = None
    caches: tuple[Array | None, Array | None] = (None, None)

    @property
    def eps(self) -> float:
        return self.a.get("rms_norm_eps", 1e-6)

    def attended(self, w: Weights) -> dict[str, Any]:
        """What mla takes"""
        latent = self.a.get("latent_norm_eps")
        arrays = {**dict(zip(CACHES, self.caches, strict=True)), **{name: w[name] for name in ATTENTION}}
        attrs = {**self.a, "rms_norm_eps": self.eps if latent is None else latent}
        return {"positions": self.positions, "cu_seqlens": self.cu_seqlens, **arrays, **attrs}


def split(keywords: dict[str, Any], names: tuple[str, ...] = WEIGHTS) -> tuple[Weights, dict[str, Any]]:
    """Weights and attributes"""
    w = {name: keywords.get(name) for name in names}
    return w, {name: value for name, value in keywords.items() if name not in names and not isinstance(value, np.ndarray)}


def given(keywords: dict[str, Any], a: dict[str, Any]) -> Given:
    return Given(keywords["positions"], a, keywords.get("cu_seqlens"), (keywords.get(CACHES[0]), keywords.get(CACHES[1])))


def attended(p: Parts, to: Callable, x: Array, w: Weights, g: Given) -> tuple[Array, Array, Array]:
    """The first norm's output, the sum u after attention and the second norm's output, all [n,d]"""
    rows = x.reshape(-1, x.shape[-1])
    first = to(p.rms[0](rows, present(w[NORMS[0]]), eps=g.eps))
    y = p.form(g.a)[0](x=first.reshape(x.shape), to=to, **g.attended(w))[0]
    total = rows + to(y.reshape(rows.shape))
    u = to(total)
    return first, u, to(p.rms[0](total if p.unrounded else u, present(w[NORMS[1]]), eps=g.eps))


def weighed(p: Parts, logits: Array, idx: Array, a: dict[str, Any]) -> Array:
    """The weights of a choice that was made before"""
    if a.get("topk_method", "noaux_tc") == "softmax":
        s = softmax_eager(logits) if p.every else softmax(logits)
    else:
        s = p.inside(scores_plain(logits, a.get("scoring", "sigmoid")))
    norm_topk, factor = a.get("norm_topk_prob", True), a.get("routed_scaling_factor", 2.5)
    return p.inside(divided(np.take_along_axis(s, idx, 1), norm_topk, factor, a.get("denominator_eps", 1e-20)))


def fed(p: Parts, to: Callable, x: Array, w: Weights, a: dict[str, Any], idx: Array | None) -> tuple[Array, Array]:
    """The feed-forward network's y[n,d], and the choice [n,k]"""
    how, limit = p.experts[0], a.get("limit")
    if w[DENSE[0]] is not None:
        return moe.ffn(how, to, x, tuple(present(w[name]) for name in DENSE), limit, None), np.zeros((len(x), 0), np.int64)
    logits = how.inside(how.matmul(x, present(w["gate_weight"])))
    if idx is None:
        idx, weight = moe.routed(p.route, p.softmax, logits, w[BIAS], a)
    else:
        weight = weighed(p, logits, idx, a)
    experts = tuple(present(w[name]) for name in EXPERTS[1:])
    y = moe.experts_of(how, to, x, idx, weight, experts, a.get("weight_before_down", False), limit)
    if w[SHARED[0]] is not None:
        y = y + moe.ffn(how, to, x, tuple(present(w[name]) for name in SHARED), limit, None)
    return y, idx


def layer(p: Parts, to: Callable, x: Array, w: Weights, g: Given, idx: Array | None = None) -> tuple[Array, Array]:
    """y[b,s,d], not yet stored, and topk_idx[b,s,k]"""
    _, u, normed = attended(p, to, x, w, g)
    y, chosen = fed(p, to, normed, w, g.a, None if idx is None else idx.reshape(len(u), -1))
    return (u + to(y)).reshape(x.shape), chosen.reshape(*x.shape[:2], -1)


def fed_back(p: Parts, to: Callable, x: Array, w: Weights, a: dict[str, Any], idx: Array, dy: Array) -> tuple[Array, Grads]:
    own = {name: w[name] for name in (*EXPERTS, *SHARED, BIAS) if w[name] is not None}
    if own:
        dx, *found = p.layer_back(x=x, topk_idx=idx, dy=dy, to=to, **own, **a)
        return dx, dict(zip((name for name in own if name != BIAS), found, strict=True))
    weights = tuple(present(w[name]) for name in DENSE)
    dx, _, *found = moe_backward.ffn_back(p.experts[1], to, x, weights, None, False, a.get("limit"), dy)
    return dx, dict(zip(DENSE, found, strict=True))


def layer_back(p: Parts, to: Callable, x: Array, w: Weights, g: Given, idx: Array, dy: Array) -> tuple[Array, Grads]:
    """dx[b,s,d], stored, and the gradients by name"""
    first, u, normed = attended(p, to, x, w, g)
    d = dy.reshape(u.shape)
    dnormed, grads = fed_back(p, to, normed, w, g.a, idx.reshape(len(u), -1), d)
    more, grads[NORMS[1]] = p.rms[1](u, present(w[NORMS[1]]), to(dnormed), eps=g.eps)
    d = p.met(to, d, more)
    zeros = (np.zeros((*x.shape[:2], g.a.get(name, size)), x.dtype) for name, size in (("kv_lora_rank", 512), ("qk_rope_head_dim", 64)))
    dc_kv, dk_pe = zeros
    dfirst, *found = p.form(g.a)[1](x=first.reshape(x.shape), dy=d.reshape(x.shape), dc_kv=dc_kv, dk_pe=dk_pe, to=to, **g.attended(w))
    names = [n for n, array in zip((*CACHES, *ATTENTION), (*g.caches, *(w[n] for n in ATTENTION)), strict=True) if array is not None]
    grads |= dict(zip(names, found, strict=True))
    more, grads[NORMS[0]] = p.rms[1](x.reshape(u.shape), present(w[NORMS[0]]), to(dfirst.reshape(u.shape)), eps=g.eps)
    return p.met(to, d, more).reshape(x.shape), grads


def forward_of(p: Parts) -> Callable:
    def forward(*, x: Array, to: Callable, **keywords: Any) -> tuple[Array, Array]:
        w, a = split(keywords)
        return layer(p, to, x, w, given(keywords, a))

    return forward


def backward_of(p: Parts) -> Callable:
    def backward(*, x: Array, topk_idx: Array, dy: Array, to: Callable, **keywords: Any) -> tuple[Array, ...]:
        w, a = split(keywords)
        dx, grads = layer_back(p, to, x, w, given(keywords, a), topk_idx, dy)
        return dx, *(grads[name] for name in (*CACHES, *TRAINED) if name in grads)

    return backward


def widened(fn: Callable) -> Callable:
    """In float64 from end to end, rounded once."""

    def wide(*, to: Callable, **keywords: Any) -> tuple[Array, ...]:
        real = {name: x for name, x in keywords.items() if isinstance(x, np.ndarray) and x.dtype.kind == "f"}
        dtype = next(iter(real.values())).dtype
        found = fn(to=lambda y: y, **{**keywords, **{name: x.astype(np.float64) for name, x in real.items()}})
        return tuple(y.astype(dtype) if y.dtype.kind == "f" else y for y in found)

    return wide


FORWARD = {name: forward_of(p) for name, p in PARTS.items()} | {"double": widened(forward_of(WIDE))}
BACKWARD = {name: backward_of(p) for name, p in PARTS.items()} | {"double": widened(backward_of(WIDE))}
EAGER = {name: (forward_of(p), backward_of(p)) for name, p in EAGERS.items()}
