"""A decode step of latent attention, absorbed: for a few tokens each weight and each cached token is read once, and that is the time."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ._latent import Sizes
from .matvec import FEW, head_matvec, head_vecmat, matvec
from .mla_decode import decode_halves
from .norm import rmsnorm
from .rotary import rotate

Array = NDArray[Any]


class Setting(NamedTuple):
    """What an MLA layer's attributes and positions say."""

    sizes: Sizes
    c: int
    eps: float
    layouts: tuple[str, str]
    turns: tuple[Array, Array]  # cos, sin
    scale: float


def is_step(arrays: Mapping[str, Any]) -> bool:
    """Whether reading the weights is what takes the time."""
    b, s, _ = arrays["x"].shape
    return 0 < b * s <= FEW and arrays["cu_seqlens"] is None


def step(op: str, w: Mapping[str, Any], setting: Setting) -> tuple[Array, Array, Array]:
    """y[b,s,d] and the new tokens' c_kv, k_pe of mla_absorb, for checked arguments."""
    x, (h, dn, r, dv), c = w["x"], setting.sizes, setting.c
    b, s, d = x.shape
    n = b * s

    def turned(v: Array) -> Array:
        """rope of v[n,h,r]"""
        v = np.ascontiguousarray(v)
        return rotate(v, *setting.turns, *setting.layouts, np.empty_like(v))

    c_q, to_heads = x.reshape(n, d), w["q_proj"]
    kv_a = matvec(w["kv_a_proj_with_mqa"], c_q)
    if to_heads is None:
        c_q, to_heads = rmsnorm(matvec(w["q_a_proj"], c_q), w["q_a_layernorm"], eps=setting.eps), w["q_b_proj"]
    heads = matvec(to_heads, c_q).reshape(n, h, dn + r)
    c_kv = rmsnorm(np.ascontiguousarray(kv_a[:, :c]), w["kv_a_layernorm"], eps=setting.eps).reshape(b, s, c)
    k_pe = turned(kv_a[:, None, c:]).reshape(b, s, r)
    q = np.empty((n, h, c + r), x.dtype)
    q[..., :c] = head_vecmat(w["kv_b_proj"], np.ascontiguousarray(heads[..., :dn].swapaxes(0, 1)), 0).swapaxes(0, 1)
    q[..., c:] = turned(heads[..., dn:])
    cached = (c_kv[:, :0], k_pe[:, :0]) if w["c_kv_cache"] is None else (w["c_kv_cache"], w["k_pe_cache"])
    o_c = decode_halves(op, q.reshape(b, s, h, c + r), cached, (c_kv, k_pe), setting.scale)
    o = head_matvec(w["kv_b_proj"], np.ascontiguousarray(o_c.reshape(n, h, c).swapaxes(0, 1)), dv, dn)
    y = matvec(w["o_proj"], np.ascontiguousarray(o.swapaxes(0, 1)).reshape(n, h * dv))
    return y.reshape(b, s, d), c_kv, k_pe
