"""The whole model of stacked layers: embedding, layers, norm and head, forward and backward."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...ref.block import EXPERTS, WEIGHTS
from ...ref.embedding import check_ids
from ...ref.model_stacked import height, heights_of, layer_of
from . import _pool
from ._declared import declared, split
from .block import Saved as Layer
from .block import backward as layer_backward
from .block import forward as layer_forward
from .linear import product
from .loss import embedding, embedding_bwd
from .norm import rmsnorm, rmsnorm_bwd

Array = NDArray[Any]


class Saved(NamedTuple):
    """What the backward needs of the forward"""

    arrays: dict[str, Any]
    eps: float
    dense: int
    layers: list[Layer]
    x: Array  # [n,d], before the last norm
    hidden: Array  # [n,d]


def forward(arrays: dict[str, Any], attrs: dict[str, Any], topk_idx: Array | None = None) -> tuple[tuple[Array, Array, Array], Saved]:
    """logits, hidden, topk_idx and Saved, for checked arguments; a topk_idx that is given is kept"""
    check_ids("model", "ids", arrays["ids"], arrays["embed_tokens"].shape[0])
    stacks = {name: arrays[name] for name in WEIGHTS}
    count, dense = heights_of("model", stacks)
    b, s = arrays["ids"].shape
    x = embedding(arrays["ids"].reshape(b * s), arrays["embed_tokens"]).reshape(b, s, arrays["embed_tokens"].shape[1])
    layers, chosen = [], []
    for i in range(count):
        own = dict(zip(WEIGHTS, layer_of(stacks, i, dense), strict=True))
        own |= {"x": x, "c_kv_cache": None, "k_pe_cache": None, **{name: arrays[name] for name in ("positions", "cu_seqlens")}}
        kept = None if topk_idx is None or i < dense else topk_idx[i - dense]
        x, idx, saved = layer_forward(own, attrs if i >= dense else {**attrs, "num_experts_per_tok": 0}, kept)
        layers.append(saved)
        chosen.append(idx)
    rows = x.reshape(b * s, x.shape[2])
    hidden = rmsnorm(rows, arrays["norm"], eps=attrs["rms_norm_eps"])
    logits = product(hidden, arrays["lm_head"].T)
    idx = np.stack(chosen[dense:]) if chosen[dense:] else np.zeros((0, b, s, attrs["num_experts_per_tok"]), np.int64)
    out = logits.reshape(b, s, logits.shape[1]), hidden.reshape(x.shape), idx
    return out, Saved(arrays, attrs["rms_norm_eps"], dense, layers, rows, hidden)


def backward(saved: Saved, dlogits: Array, dhidden: Array) -> tuple[dict[str, Array], list[dict[str, Array]]]:
    """The gradients of embed_tokens, norm and lm_head, and those of the layers, the first one first"""
    arrays, shape = saved.arrays, dhidden.shape
    n, layers, grads = shape[0] * shape[1], [], {}
    flat = dlogits.reshape(n, dlogits.shape[2])
    grads["lm_head"] = product(flat.T, saved.hidden)
    dhidden = product(flat, arrays["lm_head"]) + dhidden.reshape(n, shape[2])
    dx, grads["norm"] = rmsnorm_bwd(saved.x, arrays["norm"], dhidden, eps=saved.eps)
    dx = dx.reshape(shape)
    for layer in reversed(saved.layers):
        dx, own = layer_backward(layer, dx)
        layers.append(own)
    ids = arrays["ids"].reshape(n)
    grads["embed_tokens"] = embedding_bwd(ids, arrays["embed_tokens"], dx.reshape(n, shape[2]))
    return grads, layers[::-1]


def model(**given: Any) -> tuple[Array, Array, Array]:
    """logits[b,s,v], hidden[b,s,d] and the experts that were chosen, topk_idx[m,b,s,k]: x = embed_tokens[ids], x = block(x) for each layer,
    hidden = rmsnorm(x, norm), logits = lm_head hidden.

    Arrays and attributes are those of the reference's model, by name, the layers' weights stacked; float32 or float64 alike.
    ValueError: as block, an id is outside the vocabulary, the stacks have different numbers of layers.
    """
    arrays, attrs, _ = declared("model", "forward", *split("model", given), EXPERTS)
    return forward(arrays, attrs)[0]


def model_saving(**given: Any) -> tuple[tuple[Array, Array, Array], Saved]:
    """model's outputs, and what `backward` takes: a training step computes the forward once."""
    arrays, attrs, _ = declared("model", "forward", *split("model", given), EXPERTS)
    return forward(arrays, attrs)


def model_bwd(topk_idx: Array, dlogits: Array, dhidden: Array, **given: Any) -> tuple[Array, ...]:
    """The gradient of each weight that is given, in order, for those of logits and hidden; the choice is held. Errors as model."""
    arrays, attrs = split("model", given)
    arrays |= {"topk_idx": topk_idx, "dlogits": dlogits, "dhidden": dhidden}
    arrays, attrs, _ = declared("model", "backward", arrays, attrs, EXPERTS)
    _, saved = forward(arrays, attrs, arrays["topk_idx"])
    outer, layers = backward(saved, arrays["dlogits"], arrays["dhidden"])
    stacked = []
    for name in WEIGHTS:
        own = [g[name] for g in {"p": layers[: saved.dense], "m": layers[saved.dense :]}.get(height(name), layers) if name in g]
        if own:
            stacked.append(np.stack(own, out=_pool.empty((len(own), *own[0].shape), own[0].dtype)))
    return outer["embed_tokens"], *stacked, outer["norm"], outer["lm_head"]
