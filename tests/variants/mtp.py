"""A prediction module and the loss of a chain of them, forward and backward: rows cut off where tokens end, or all rows and a mask."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .block import BIAS, TRAINED, WEIGHTS, Given, Grads, given, layer, layer_back, split, widened
from .floats import Array
from .mla import Weights, present
from .parts import EAGERS, PARTS, WIDE, Parts

OWN = ("enorm", "hnorm", "eh_proj")
LAST = "shared_head_norm"
ENDS = ("embed_tokens", "shared_head")
ORDER = (*OWN, *TRAINED, LAST)
ALL = (*OWN, *WEIGHTS, LAST, *ENDS)


@dataclass(frozen=True)
class Read:
    """What a module reads: hidden states, the tokens beside them, the choice if it was made before"""

    h: Array
    ids: Array
    idx: Array | None = None


def merged(p: Parts, to: Callable, r: Read, w: Weights, g: Given) -> tuple[Array, Array, Array, Array]:
    """The embeddings [n,d], both normed inputs, and the layer's input x[b,s,d]"""
    embedded = p.embedding[0](r.ids.reshape(-1), present(w["embed_tokens"]))
    e = to(p.rms[0](embedded, present(w["enorm"]), eps=g.eps))
    n = to(p.rms[0](r.h.reshape(embedded.shape), present(w["hnorm"]), eps=g.eps))
    first, second = (e, n) if g.a.get("concat", "embed_first") == "embed_first" else (n, e)
    proj, d = present(w["eh_proj"]), e.shape[1]
    if p.apart:
        x = p.matmul(first, proj[:, :d]) + p.matmul(second, proj[:, d:])
    else:
        x = p.matmul(np.concatenate([first, second], axis=1), proj)
    return embedded, first, second, to(x).reshape(r.h.shape)


def module(p: Parts, to: Callable, r: Read, w: Weights, g: Given) -> tuple[Array, Array, Array]:
    """The layer's output y and its norm, [b,s,d], and topk_idx"""
    y, idx = layer(p, to, merged(p, to, r, w, g)[3], w, g, r.idx)
    rows = (y if p.unrounded else to(y)).reshape(-1, y.shape[2])
    return to(y), to(p.rms[0](rows, present(w[LAST]), eps=g.eps)).reshape(y.shape), idx


def module_back(p: Parts, to: Callable, r: Read, w: Weights, g: Given, dlast: Array, dy: Array) -> tuple[Array, Grads]:
    """dh and the gradients by name, of dlast, the norm's, and dy, the layer's own; r has the choice"""
    assert r.idx is not None
    embedded, first, second, x = merged(p, to, r, w, g)
    y = to(layer(p, to, x, w, g, r.idx)[0])
    more, dnorm = p.rms[1](y.reshape(embedded.shape), present(w[LAST]), dlast.reshape(embedded.shape), eps=g.eps)
    dx, grads = layer_back(p, to, x, w, g, r.idx, p.met(to, dy, more.reshape(dy.shape)))
    rows, proj, d = dx.reshape(embedded.shape), present(w["eh_proj"]), embedded.shape[1]
    if p.apart:
        dfirst, dsecond = (to(p.matmul(rows, part.T)) for part in (proj[:, :d], proj[:, d:]))
        dproj = np.concatenate([p.matmul(rows.T, first.T), p.matmul(rows.T, second.T)], axis=1)
    else:
        dfirst, dsecond = np.split(to(p.matmul(rows, proj.T)), 2, axis=1)
        dproj = p.matmul(rows.T, np.concatenate([first, second], axis=1).T)
    de, dn = (dfirst, dsecond) if g.a.get("concat", "embed_first") == "embed_first" else (dsecond, dfirst)
    dembedded, denorm = p.rms[1](embedded, present(w["enorm"]), de, eps=g.eps)
    dh, dhnorm = p.rms[1](r.h.reshape(embedded.shape), present(w["hnorm"]), dn, eps=g.eps)
    dtable = p.embedding[1](r.ids.reshape(-1), present(w["embed_tokens"]), to(dembedded))
    grads |= {"enorm": denorm, "hnorm": dhnorm, "eh_proj": dproj, LAST: dnorm, "embed_tokens": dtable}
    return to(dh).reshape(r.h.shape), grads


def after(a: dict[str, Any]) -> bool:
    return a.get("chain", "post_norm") == "post_norm"


def forward_of(p: Parts) -> Callable:
    def forward(*, h: Array, ids: Array, to: Callable, **keywords: Any) -> tuple[Array, Array, Array]:
        w, a = split(keywords, ALL)
        y, last, idx = module(p, to, Read(h, ids[:, a.get("depth", 1) :]), w, given(keywords, a))
        logits = p.matmul(last.reshape(-1, h.shape[2]), present(w["shared_head"]))
        return logits.reshape(*h.shape[:2], -1), last if after(a) else y, idx

    return forward


def backward_of(p: Parts) -> Callable:
    def backward(
        *, h: Array, ids: Array, topk_idx: Array, dlogits: Array, dh_next: Array, to: Callable, **keywords: Any
    ) -> tuple[Array, ...]:
        w, a = split(keywords, ALL)
        r, g, flat = Read(h, ids[:, a.get("depth", 1) :], topk_idx), given(keywords, a), dlogits.reshape(-1, dlogits.shape[2])
        _, last, _ = module(p, to, r, w, g)
        dlast = to(p.matmul(flat, present(w["shared_head"]).T)).reshape(h.shape)
        dhead = p.matmul(flat.T, last.reshape(-1, h.shape[2]).T)
        dlast, dy = (to(dlast + dh_next), np.zeros_like(h)) if after(a) else (dlast, dh_next)
        dh, grads = module_back(p, to, r, w, g, dlast, dy)
        return dh, *(grads[name] for name in ORDER if name in grads), grads["embed_tokens"], dhead

    return backward


@dataclass(frozen=True)
class Link:
    """One module of the chain: what it reads and where, its weights, each row's target, and its part of the loss"""

    r: Read
    g: Given
    w: Weights
    target: Array
    share: float


def targets_of(labels: Array, ends: Array | None, k: int, ignore: int) -> Array:
    """[b,s]: of row i label i + k + 1, `ignore` where there is none or another sequence begins before it"""
    found = np.full_like(labels, ignore)
    for i in range(labels.shape[1] - k - 1):
        if ends is None or not np.any((ends > i) & (ends <= i + k + 1)):
            found[:, i] = labels[:, i + k + 1]
    return found


def links(p: Parts, h: Array, ids: Array, w: Weights, g: Given, labels: Array | None, idx: Array | None) -> Iterator[Link]:
    """One for each module with a row to read; of all but the first r.h is still to be filled in"""
    s, count = h.shape[1], len(present(w["enorm"]))
    ignore, weight = g.a.get("ignore_index", -100), g.a.get("weight", 0.3)
    for k in range(1, min(count, s - 1) + 1):
        n = s if p.rolled else s - k
        read = np.concatenate([ids[:, k:], np.zeros_like(ids[:, :k])], axis=1)[:, :n]
        own = {name: w[name] if name in ENDS or w[name] is None else present(w[name])[k - 1] for name in ALL}
        target = targets_of(ids if labels is None else labels, g.cu_seqlens, k, ignore)[:, :n]
        ends = None if g.cu_seqlens is None else np.minimum(g.cu_seqlens, n)
        chosen = None if idx is None else np.maximum(idx[k - 1, :, :n], 0)  # -1 in rows without a token
        share = weight / count * (n / s if g.a.get("denominator", "total") == "total" else 1)
        yield Link(Read(h[:, :n], read, chosen), Given(g.positions[:, :n], g.a, ends), own, target.reshape(-1), share)


def how_counted(a: dict[str, Any]) -> dict[str, Any]:
    denominator = "rows" if a.get("denominator", "total") == "total" else "counted"
    return {"ignore_index": a.get("ignore_index", -100), "denominator": denominator, "empty": "zero"}


def walked(p: Parts, to: Callable, chain: Iterator[Link]) -> Iterator[tuple[Link, Array, Array]]:
    """Each module with what it reads filled in, its normed output, and its choice"""
    x: Array | None = None
    for link in chain:
        r = link.r if x is None else replace(link.r, h=x[:, : link.r.ids.shape[1]])
        y, last, idx = module(p, to, r, link.w, link.g)
        x = last if after(link.g.a) else y
        yield replace(link, r=r), last, idx


def loss_of(p: Parts) -> Callable:
    def forward(*, h: Array, ids: Array, to: Callable, labels: Array | None = None, **keywords: Any) -> tuple[Array, Array]:
        w, a = split(keywords, ALL)
        total, (b, s, d) = np.zeros((), h.dtype), h.shape
        chosen = np.full((len(present(w["enorm"])), b, s, a["num_experts_per_tok"]), -1)
        for k, (link, last, idx) in enumerate(walked(p, to, links(p, h, ids, w, given(keywords, a), labels, None)), 1):
            logits = p.of_loss(to, p.matmul(last.reshape(-1, d), present(w["shared_head"])))
            mean = p.inside(p.entropy[0](logits, link.target, **how_counted(a)))
            total = p.inside(total + p.inside(mean * h.dtype.type(link.share)))
            chosen[k - 1, :, : s - k] = idx[:, : s - k]
        return np.asarray(total, h.dtype), chosen

    return forward


def loss_back_of(p: Parts) -> Callable:
    def backward(
        *, h: Array, ids: Array, topk_idx: Array, dloss: Array, to: Callable, labels: Array | None = None, **keywords: Any
    ) -> tuple[Array, ...]:
        w, a = split(keywords, ALL)
        real, head, width = h.dtype.type, present(w["shared_head"]), h.shape[2]
        names = [n for n in ORDER if w[n] is not None and n != BIAS]
        grads, dtable, dhead = {n: np.zeros_like(w[n]) for n in names}, np.zeros_like(w["embed_tokens"]), np.zeros_like(head)
        dx = np.zeros_like(h[:, :0])
        chain = list(walked(p, to, links(p, h, ids, w, given(keywords, a), labels, topk_idx)))
        for k, (link, last, _) in reversed(list(enumerate(chain))):
            logits = p.of_loss(to, p.matmul(last.reshape(-1, width), head))
            dlogits = p.of_loss(to, p.entropy[1](logits, link.target, p.inside(dloss * real(link.share)), **how_counted(a)))
            more = p.matmul(dlogits.T, last.reshape(-1, width).T)
            dlast, dnext = to(p.matmul(dlogits, head.T)).reshape(last.shape), np.zeros_like(last)
            dnext[:, : dx.shape[1]] = dx
            dlast, dy = (to(dlast + dnext), np.zeros_like(last)) if after(a) else (dlast, dnext)
            dx, own = module_back(p, to, link.r, link.w, link.g, dlast, dy)
            if not a.get("detach_head", False):
                dtable, dhead = p.inside(dtable + p.inside(own["embed_tokens"])), p.inside(dhead + p.inside(more))
            for name in names:
                grads[name][k] = own[name]
        dh = np.zeros_like(h)
        dh[:, : dx.shape[1]] = dx
        return dh, *grads.values(), dtable, dhead

    return backward


FORWARD = {name: forward_of(p) for name, p in PARTS.items()} | {"double": widened(forward_of(WIDE))}
BACKWARD = {name: backward_of(p) for name, p in PARTS.items()} | {"double": widened(backward_of(WIDE))}
EAGER = {name: (forward_of(p), backward_of(p)) for name, p in EAGERS.items()}
LOSS = {name: loss_of(p) for name, p in PARTS.items()} | {"double": widened(loss_of(WIDE))}
LOSS_BACK = {name: loss_back_of(p) for name, p in PARTS.items()} | {"double": widened(loss_back_of(WIDE))}
LOSS_EAGER = {name: (loss_of(p), loss_back_of(p)) for name, p in EAGERS.items()}
