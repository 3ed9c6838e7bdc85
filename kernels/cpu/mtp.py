"""Multi-token prediction, one module and the loss of a chain of them, forward and backward."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...ref.block import CONSTANT, EXPERTS, WEIGHTS
from ...ref.embedding import check_ids
from ...ref.mtp import MODULE, check_merge, read_by
from ...ref.mtp_loss import BLOCK, longer, rows_of, targets_of
from ._declared import declared, split
from .block import Saved as Layer
from .block import backward as layer_backward
from .block import forward as layer_forward
from .linear import product
from .loss import cross_entropy, cross_entropy_bwd, embedding, embedding_bwd
from .norm import rmsnorm, rmsnorm_bwd

Array = NDArray[Any]
SHARED = ("embed_tokens", "shared_head")


class Saved(NamedTuple):
    """What a module's backward needs of its forward"""

    w: Mapping[str, Any]
    ids: Array  # [n]
    embedded: Array  # [n,d]
    h: Array  # [n,d]
    pair: Array  # [n,2d], what eh_proj reads
    block: Layer
    y: Array  # [n,d]
    how: Mapping[str, Any]


def module(
    h: Array, ids: Array, places: tuple, w: Mapping[str, Any], how: Mapping[str, Any], topk_idx: Array | None
) -> tuple[Array, Array, Array, Saved]:
    """last[b,s,d], which the head reads, h_next[b,s,d], topk_idx[b,s,k] and Saved, of a module whose row i reads h[:,i] and ids[:,i]"""
    (b, s, d), eps = h.shape, how["rms_norm_eps"]
    flat, tokens = np.ascontiguousarray(h).reshape(b * s, d), np.ascontiguousarray(ids).reshape(b * s)
    embedded = embedding(tokens, w["embed_tokens"])
    parts = [rmsnorm(embedded, w["enorm"], eps=eps), rmsnorm(flat, w["hnorm"], eps=eps)]
    pair = np.concatenate(parts if how["concat"] == "embed_first" else parts[::-1], axis=1)
    own = {name: w[name] for name in WEIGHTS} | {"c_kv_cache": None, "k_pe_cache": None, "cu_seqlens": places[1]}
    own |= {"x": product(pair, w["eh_proj"].T).reshape(b, s, d), "positions": np.ascontiguousarray(places[0])}
    y, idx, block = layer_forward(own, {name: how[name] for name in BLOCK if name in how}, topk_idx)
    rows = y.reshape(b * s, d)
    last = rmsnorm(rows, w["shared_head_norm"], eps=eps).reshape(b, s, d)
    return last, last if how["chain"] == "post_norm" else y, idx, Saved(w, tokens, embedded, flat, pair, block, rows, how)


def module_bwd(dlast: Array, dh_next: Array, saved: Saved) -> tuple[Array, Array, dict[str, Array]]:
    """dh[b,s,d], dembed_tokens and the gradients by name"""
    w, ids, embedded, h, pair, block, y, how = saved
    (b, s, d), eps, grads = dlast.shape, how["rms_norm_eps"], {}
    after = how["chain"] == "post_norm"
    through = (dlast + dh_next if after else dlast).reshape(b * s, d)
    dy, grads["shared_head_norm"] = rmsnorm_bwd(y, w["shared_head_norm"], through, eps=eps)
    dx, own = layer_backward(block, (dy if after else dy + dh_next.reshape(b * s, d)).reshape(b, s, d))
    flat = dx.reshape(b * s, d)
    dpair, grads["eh_proj"] = product(flat, w["eh_proj"]), product(flat.T, pair)
    halves = dpair[:, :d], dpair[:, d:]
    de, dg = halves if how["concat"] == "embed_first" else halves[::-1]
    dembedded, grads["enorm"] = rmsnorm_bwd(embedded, w["enorm"], de, eps=eps)
    dh, grads["hnorm"] = rmsnorm_bwd(h, w["hnorm"], dg, eps=eps)
    return dh.reshape(b, s, d), embedding_bwd(ids, w["embed_tokens"], dembedded), grads | own


def _mtp(arrays: dict[str, Any], attrs: dict[str, Any], topk_idx: Array | None) -> tuple[tuple[Array, Array, Array], Saved, Array]:
    """The outputs, what the module saved, and what its head read"""
    h = arrays["h"]
    read = read_by("mtp", h, arrays["ids"], arrays["embed_tokens"], attrs["depth"])
    check_merge("mtp", h, arrays["eh_proj"])
    last, h_next, idx, saved = module(h, read, (arrays["positions"], arrays["cu_seqlens"]), arrays, attrs, topk_idx)
    rows = last.reshape(h.shape[0] * h.shape[1], h.shape[2])
    logits = product(rows, arrays["shared_head"].T)
    return (logits.reshape(*h.shape[:2], logits.shape[1]), h_next, idx), saved, rows


def mtp(**given: Any) -> tuple[Array, Array, Array]:
    """logits[b,s,v], h_next[b,s,d], topk_idx[b,s,k]:  x[i] = eh_proj [rmsnorm(embed_tokens[ids[i+depth]]); rmsnorm(h[i])],
    logits = shared_head rmsnorm(block(x)).

    Arrays and attributes are those of the reference's mtp, by name; float32 or float64 alike. ValueError: as block, ids are not `depth`
    more than h has rows, one is outside the vocabulary.
    """
    arrays, attrs, _ = declared("mtp", "forward", *split("mtp", given), EXPERTS)
    return _mtp(arrays, attrs, None)[0]


def mtp_bwd(topk_idx: Array, dlogits: Array, dh_next: Array, **given: Any) -> tuple[Array, ...]:
    """dh and the gradient of each weight that is given, in order, for those of logits and h_next; the choice is held. Errors as mtp."""
    arrays, attrs = split("mtp", given)
    arrays |= {"topk_idx": topk_idx, "dlogits": dlogits, "dh_next": dh_next}
    arrays, attrs, _ = declared("mtp", "backward", arrays, attrs, EXPERTS)
    _, saved, rows = _mtp(arrays, attrs, arrays["topk_idx"])
    flat = arrays["dlogits"].reshape(rows.shape[0], arrays["shared_head"].shape[0])
    dlast, dhead = product(flat, arrays["shared_head"]), product(flat.T, rows)
    dh, dembed, grads = module_bwd(dlast.reshape(arrays["h"].shape), arrays["dh_next"], saved)
    return dh, *(grads[name] for name in MODULE if name in grads), dembed, dhead


def _chain(arrays: dict[str, Any], attrs: dict[str, Any], topk_idx: Array | None) -> tuple[float, Array, list[tuple]]:
    """The loss, topk_idx[p,b,s,k], and of each module what the backward needs: (Saved, rows, targets, share, options of the loss)"""
    h, ids, cu = arrays["h"], arrays["ids"], arrays["cu_seqlens"]
    (b, s, d), p = h.shape, arrays["enorm"].shape[0]
    labels, places = ids if arrays["labels"] is None else arrays["labels"], (arrays["positions"], cu)
    check_merge("mtp.loss", h, arrays["eh_proj"])
    check_ids("mtp.loss", "ids", ids, arrays["embed_tokens"].shape[0])
    if arrays["labels"] is not None:
        check_ids("mtp.loss", "labels", np.where(labels == attrs["ignore_index"], 0, labels), arrays["embed_tokens"].shape[0])
    total = attrs["denominator"] == "total"
    options = {"ignore_index": attrs["ignore_index"], "denominator": "rows" if total else "counted", "empty": "zero"}
    loss, x, chosen, saved = 0.0, h, [], []
    for k in range(1, p + 1):
        n = max(s - k, 0)
        w = {name: None if arrays[name] is None else arrays[name][k - 1] for name in MODULE} | {name: arrays[name] for name in SHARED}
        kept = None if topk_idx is None else topk_idx[k - 1, :, :n]
        last, x, idx, own = module(x[:, :n], ids[:, k : k + n], rows_of(places, n), w, attrs, kept)
        rows, target = last.reshape(b * n, d), targets_of(labels, cu, k, attrs["ignore_index"]).reshape(b * n)
        share = attrs["weight"] / p * (n / max(s, 1) if total else 1.0)
        loss += share * float(cross_entropy(product(rows, arrays["shared_head"].T), target, **options))
        chosen.append(longer(idx, s - n, -1))
        saved.append((own, rows, target, share, options))
    none = np.zeros((0, b, s, attrs["num_experts_per_tok"]), np.int64)
    return loss, np.stack(chosen) if chosen else none, saved


def mtp_loss(**given: Any) -> tuple[Array, Array]:
    """loss = weight/p sum_k L_k of p chained modules, each the cross entropy of its logits and the labels k + 1 later; topk_idx[p,b,s,k].

    Arrays and attributes are those of the reference's mtp.loss, by name, the modules' weights stacked; float32 or float64 alike.
    ValueError: as mtp, a label is outside the vocabulary.
    """
    arrays, attrs, _ = declared("mtp.loss", "forward", *split("mtp.loss", given), EXPERTS)
    loss, idx, _ = _chain(arrays, attrs, None)
    return np.asarray(loss, arrays["h"].dtype), idx


def mtp_loss_bwd(topk_idx: Array, dloss: Array, **given: Any) -> tuple[Array, ...]:
    """dh and the gradient of each weight that is given, in order, for that of the loss; the choice is held. Errors as mtp_loss."""
    arrays, attrs = split("mtp.loss", given)
    arrays, attrs, _ = declared("mtp.loss", "backward", {**arrays, "topk_idx": topk_idx, "dloss": dloss}, attrs, EXPERTS)
    h, embed, head = arrays["h"], arrays["embed_tokens"], arrays["shared_head"]
    _, _, saved = _chain(arrays, attrs, arrays["topk_idx"])
    (b, s, d), dx, grads = h.shape, h[:, :0], []
    dembed_tokens, dshared_head = np.zeros(embed.shape, h.dtype), np.zeros(head.shape, h.dtype)
    for own, rows, target, share, options in reversed(saved):
        scaled = np.asarray(arrays["dloss"] * share, h.dtype)
        dlogits = cross_entropy_bwd(product(rows, head.T), target, scaled, **options)
        dlast = product(dlogits, head).reshape(b, rows.shape[0] // max(b, 1), d)
        dx, dembed, found = module_bwd(dlast, longer(dx, dlast.shape[1] - dx.shape[1]), own)
        grads.insert(0, found)
        if not attrs["detach_head"]:
            dembed_tokens += dembed
            dshared_head += product(dlogits.T, rows)
    names = [name for name in MODULE if arrays[name] is not None and name != CONSTANT]
    stacked = (np.stack([own[n] for own in grads]) if grads else np.zeros_like(arrays[n]) for n in names)
    return longer(dx, s - dx.shape[1]), *stacked, dembed_tokens, dshared_head
