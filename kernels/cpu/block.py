"""A layer of the model: attention and a feed-forward network, each behind a norm and beside a residual, forward and backward."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...ref.block import ATTENTION, CACHES, CONSTANT, DENSE, EXPERTS, WEIGHTS, parted
from . import _experts, mla, moe
from ._declared import declared, split
from .norm import rmsnorm, rmsnorm_bwd
from .swiglu import limit_of

Array = NDArray[Any]
Arrays = Mapping[str, Any]
PLACES = ("positions", *CACHES, "cu_seqlens")


class Saved(NamedTuple):
    """What the backward needs of the forward: the inputs of the norms, and what the two parts saved"""

    arrays: Arrays
    eps: float
    x: Array  # [n,d]
    u: Array  # [n,d]
    attention: mla.Saved
    ffn: Any


def forward(arrays: Arrays, attrs: dict[str, Any], topk_idx: Array | None = None) -> tuple[Array, Array, Saved]:
    """y[b,s,d], topk_idx[b,s,k] and Saved, for checked arguments; a topk_idx that is given is kept"""
    attention, own = parted("block", arrays, attrs)
    absorbed, eps, latent = (attention.pop(name) for name in ("absorbed", "rms_norm_eps", "latent_norm_eps"))
    (b, s, d), dense = arrays["x"].shape, arrays["gate_proj"] is not None
    x = arrays["x"].reshape(b * s, d)
    normed = rmsnorm(x, arrays["input_layernorm"], eps=eps).reshape(b, s, d)
    given = {name: arrays[name] for name in (*PLACES, *ATTENTION)}
    (a, _, _), s_attention = mla.prefill_saving(absorbed, x=normed, **given, **attention, rms_norm_eps=eps if latent is None else latent)
    u = x + a.reshape(b * s, d)
    normed = rmsnorm(u, arrays["post_attention_layernorm"], eps=eps)
    if dense:
        y, idx = u.copy(), np.zeros((b * s, 0), np.int64)
        limit = limit_of("block", own.get("limit"), x.dtype)
        s_ffn = _experts.dense_forward(normed, [arrays[name] for name in DENSE], limit, y, True)
    else:
        kept = None if topk_idx is None else topk_idx.reshape(b * s, topk_idx.shape[2])
        (f, idx), s_ffn = moe.layer_saving(kept, x=normed, **{name: arrays[name] for name in EXPERTS}, **own)
        y = u + f
    return y.reshape(b, s, d), idx.reshape(b, s, idx.shape[1]), Saved(arrays, eps, x, u, s_attention, s_ffn)


def backward(saved: Saved, dy: Array) -> tuple[Array, dict[str, Array]]:
    """dx[b,s,d], and the gradients of the caches and weights that there are by name"""
    arrays, eps, x, u, s_attention, s_ffn = saved
    b, s, d = dy.shape
    du = dy.reshape(b * s, d)
    grads: dict[str, Array]
    if arrays["gate_proj"] is not None:
        dnormed = np.zeros_like(du)
        grads = dict(zip(DENSE, _experts.dense_backward(s_ffn, du, dnormed), strict=True))
    else:
        dnormed, *own = moe.backward(s_ffn, du)
        grads = dict(zip((n for n in EXPERTS if arrays[n] is not None and n != CONSTANT), own, strict=True))
    back, grads["post_attention_layernorm"] = rmsnorm_bwd(u, arrays["post_attention_layernorm"], dnormed, eps=eps)
    du = du + back
    c = arrays["kv_a_layernorm"].shape[0]
    dc_kv, dk_pe = (np.zeros((b, s, width), x.dtype) for width in (c, arrays["kv_a_proj_with_mqa"].shape[0] - c))
    dnormed, *own = mla.backward(s_attention, du.reshape(b, s, d), dc_kv, dk_pe)
    grads |= dict(zip((name for name in (*CACHES, *ATTENTION) if arrays[name] is not None), own, strict=True))
    back, grads["input_layernorm"] = rmsnorm_bwd(x, arrays["input_layernorm"], dnormed.reshape(b * s, d), eps=eps)
    return (du + back).reshape(b, s, d), grads


def block(**given: Any) -> tuple[Array, Array]:
    """u = x + attention(rmsnorm(x)),   y[b,s,d] = u + ffn(rmsnorm(u)),   and the experts that were chosen, topk_idx[b,s,k].

    Arrays and attributes are those of the reference's block, by name; float32 or float64 alike. mla_prefill, or mla_absorb with
    absorbed=True; a dense feed-forward network or moe_layer. ValueError: as these, or both kinds of network, or neither.
    """
    arrays, attrs, _ = declared("block", "forward", *split("block", given), EXPERTS)
    y, idx, _ = forward(arrays, attrs)
    return y, idx


def block_bwd(topk_idx: Array, dy: Array, **given: Any) -> tuple[Array, ...]:
    """dx, then d<name> of each cache and weight that is given, for the gradient dy[b,s,d]; the choice is held. Errors as block."""
    arrays, attrs = split("block", given)
    arrays, attrs, _ = declared("block", "backward", {**arrays, "topk_idx": topk_idx, "dy": dy}, attrs, EXPERTS)
    _, _, saved = forward(arrays, attrs, arrays["topk_idx"])
    dx, grads = backward(saved, arrays["dy"])
    return dx, *(grads[name] for name in (*CACHES, *WEIGHTS) if name in grads)
