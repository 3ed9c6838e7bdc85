"""Multi-head latent attention's backward, naive and absorbed: the forward again, then its chain rule from o_proj to x."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import norm, rope
from .attention_backward import CORES
from .attention_backward import eager as eager_core
from .floats import Array
from .linear import product, product_double, product_folded, product_sequential, product_split, product_steps
from .mla import ABSORBED, EAGERS, NAIVE, ROPE, How, Sizes, Weights, heads, keys_of, mask_of, one_head, present, rope_attrs, sizes_of


@dataclass(frozen=True)
class Back:
    """how: the forward that is run again. core: attention's backward. summed: gradients that meet are added in float32 and stored once;
    else each is stored, then the sum is. joined: dx comes from one product over both down-projections."""

    how: How
    core: Callable
    rms: Callable = norm.backward_apex
    matmul: Callable = product
    summed: bool = True
    joined: bool = False


Grads = dict[str, Array]


def linear_back(back: Back, dy: Array, x: Array, w: Array) -> tuple[Array, Array]:
    """dx[n,d], dw[o,d]"""
    return back.matmul(dy, w.T), back.matmul(dy.T, x.T)


def attention_back(
    back: Back, to: Callable, q: tuple, keys: tuple, w_uk: Array, w_uv: Array, seen: Array, scale: float, do: Array
) -> tuple:
    """One head: dq_nope, dq_pe, dc_kv (not yet stored), dk_pe, dW_UK, dW_UV"""
    (q_nope, q_pe), (c_kv, k_pe), none = q, keys, np.zeros(len(do), do.dtype)
    if not back.how.absorbed:
        k_nope, v = to(back.matmul(c_kv, w_uk)), to(back.matmul(c_kv, w_uv))
        full = np.concatenate([q_nope, q_pe], 1), np.concatenate([k_nope, k_pe], 1), v
        dq, dk, dv, _ = back.core(*full, seen, scale, None, do, none, to)
        dq, dk, dv = to(dq), to(dk), to(dv)
        dk_nope, n = dk[:, : q_nope.shape[1]], q_nope.shape[1]
        dc = back.matmul(dk_nope, w_uk.T) + back.matmul(dv, w_uv.T)
        return dq[:, :n], dq[:, n:], dc, dk[:, n:], back.matmul(dk_nope.T, c_kv.T), back.matmul(dv.T, c_kv.T)
    q_c, c = to(back.matmul(q_nope, w_uk.T)), c_kv.shape[1]
    full = np.concatenate([q_c, q_pe], 1), np.concatenate([c_kv, k_pe], 1), c_kv
    z = back.matmul(full[0], full[1])
    o_c = to(back.how.core(z, c_kv, seen, scale, None, to)[0])
    do_c = to(back.matmul(do, w_uv.T))
    dq, dk, dv, _ = back.core(*full, seen, scale, None, do_c, none, to)
    dq = to(dq)
    dw_uk, dw_uv = back.matmul(q_nope.T, dq[:, :c].T), back.matmul(do.T, o_c.T)
    return to(back.matmul(dq[:, :c], w_uk)), dq[:, c:], (dk[:, :c], dv), dk[:, c:], dw_uk, dw_uv


def core_back(back: Back, to: Callable, found: Grads, keys: tuple, up: Array, seen: Array, scale: float, do: Array, z: Sizes) -> tuple:
    """All sequences and heads: dq_nope[n,h,dn], dq_pe[n,h,r], dc_kv[b,t,c], dk_pe[b,t,r], dkv_b_proj; do[b,s,h,dv]"""
    b, s, h, _ = do.shape
    q_nope, q_pe = (found[name].reshape(b, s, h, -1) for name in ("q_nope", "q_pe"))
    dq_nope, dq_pe, dc, dk = np.zeros_like(q_nope), np.zeros_like(q_pe), np.zeros_like(keys[0]), np.zeros_like(keys[1])
    extra, dup = np.zeros_like(dc), np.zeros_like(up)
    for i in range(b):
        for j in range(h):
            q = q_nope[i, :, j], q_pe[i, :, j]
            a = attention_back(back, to, q, (keys[0][i], keys[1][i]), up[j, : z.dn], up[j, z.dn :], seen, scale, do[i, :, j])
            dq_nope[i, :, j], dq_pe[i, :, j] = a[0], a[1]
            if back.how.absorbed:  # one key head: its gradient gathers over heads before it is stored
                dc[i] += a[2][0]
                extra[i] += a[2][1]
                dk[i] += a[3]
            else:
                dc[i] += a[2]
                dk[i] += a[3]
            dup[j, : z.dn] += a[4]
            dup[j, z.dn :] += a[5]
    if back.how.absorbed:
        dc = to(dc) + to(extra) if back.summed else to(to(dc) + to(extra))
        return dq_nope, dq_pe, dc, to(dk), dup.reshape(-1, z.c)
    return dq_nope, dq_pe, to(dc), dk if back.summed else to(dk), dup.reshape(-1, z.c)


def backward_of(back: Back) -> Callable:
    def backward(
        *,
        x: Array,
        positions: Array,
        kv_a_proj_with_mqa: Array,
        kv_a_layernorm: Array,
        kv_b_proj: Array,
        o_proj: Array,
        dy: Array,
        dc_kv: Array,
        dk_pe: Array,
        to: Callable,
        c_kv_cache: Array | None = None,
        k_pe_cache: Array | None = None,
        cu_seqlens: Array | None = None,
        q_proj: Array | None = None,
        q_a_proj: Array | None = None,
        q_a_layernorm: Array | None = None,
        q_b_proj: Array | None = None,
        **a: Any,
    ) -> tuple[Array, ...]:
        how, (b, s, _), z, dtype = back.how, x.shape, sizes_of(a), x.dtype
        to = (lambda y: y) if how.unstored else to
        wider = np.float64 if how.unstored else dtype.type

        def flat(y: Array) -> Array:
            return y.reshape(b * s, -1).astype(wider)

        names = ("q_proj", "q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")
        given = (q_proj, q_a_proj, q_a_layernorm, q_b_proj, kv_a_proj_with_mqa, kv_a_layernorm, kv_b_proj, o_proj)
        w: Weights = {name: None if y is None else y.astype(wider) for name, y in zip(names, given, strict=True)}
        turn, eps, dim, rotation = rope_attrs(a), a.get("rms_norm_eps", 1e-6), z.dn + z.r, ROPE.get(how.turn, rope.EAGER)[1]
        tokens, places = flat(x), positions.reshape(-1)
        found = heads(how, to, tokens, places, w, a)
        keys = keys_of(found, b, tuple(None if y is None else y.astype(wider) for y in (c_kv_cache, k_pe_cache)))
        up = present(w["kv_b_proj"]).reshape(z.h, z.dn + z.dv, z.c)
        seen, scale = mask_of(s, keys[0].shape[1], cu_seqlens), rope.softmax_scale(dim, turn)
        q_nope, q_pe = (found[name].reshape(b, s, z.h, -1) for name in ("q_nope", "q_pe"))
        o = np.zeros((b, s, z.h, z.dv), wider)
        for i in range(b):
            for j in range(z.h):
                q = q_nope[i, :, j], q_pe[i, :, j]
                o[i, :, j] = to(one_head(how, to, q, (keys[0][i], keys[1][i]), up[j, : z.dn], up[j, z.dn :], seen, scale))
        grads: Grads = {}
        do, grads["o_proj"] = linear_back(back, flat(dy), flat(o), present(w["o_proj"]))
        parts = core_back(back, to, found, keys, up, seen, scale, to(do).reshape(o.shape), z)
        dq_nope, dq_pe, dc, dk, grads["kv_b_proj"] = parts
        t = dc.shape[1] - s
        if c_kv_cache is not None:
            grads["c_kv_cache"], grads["k_pe_cache"] = dc[:, :t], dk[:, :t]
        meet = (lambda y: y) if back.summed else to
        dc, dk = meet(flat(dc[:, t:]) + flat(dc_kv)), meet(flat(dk[:, t:]) + flat(dk_pe))
        # latents
        latent = np.ascontiguousarray(found["kv_a"][:, : z.c])
        dlatent, grads["kv_a_layernorm"] = back.rms(latent, present(w["kv_a_layernorm"]), dc, eps=eps)
        dkv_a = np.concatenate([to(dlatent), to(rotation(dk[:, None], places, dk[:, None], **turn))[:, 0]], axis=1)
        # queries
        flat_q = (b * s, z.h, -1)
        turned = to(rotation(dq_pe.reshape(flat_q), places, dq_pe.reshape(flat_q), **turn))
        dq = flat(np.concatenate([dq_nope.reshape(flat_q), turned], axis=-1))
        if w["q_proj"] is not None:
            first, dside = "q_proj", dq
        else:
            dc_q, grads["q_b_proj"] = linear_back(back, dq, found["c_q"], present(w["q_b_proj"]))
            dside, grads["q_a_layernorm"] = back.rms(found["down"], present(w["q_a_layernorm"]), to(dc_q), eps=eps)
            first, dside = "q_a_proj", to(dside)
        if back.joined:
            both = np.concatenate([present(w[first]), present(w["kv_a_proj_with_mqa"])])
            dx, dboth = linear_back(back, np.concatenate([dside, dkv_a], axis=1), tokens, both)
            grads[first], grads["kv_a_proj_with_mqa"] = np.split(dboth, [dside.shape[1]])
        else:
            dx_q, grads[first] = linear_back(back, dside, tokens, present(w[first]))
            dx_kv, grads["kv_a_proj_with_mqa"] = linear_back(back, dkv_a, tokens, present(w["kv_a_proj_with_mqa"]))
            dx = dx_q + dx_kv if back.summed else to(dx_q) + to(dx_kv)
        order = ("c_kv_cache", "k_pe_cache", *names)
        return dx.reshape(x.shape).astype(dtype), *(grads[name].astype(dtype) for name in order if name in grads)

    return backward


def _pair(forward: How, core: str, **more: Any) -> Back:
    return Back(forward, CORES[core], **more)


NAIVE_BACK = {
    "naive": _pair(NAIVE["naive"], "flash"),
    "joined": _pair(NAIVE["fused-down-apart"], "flash-base-2", rms=norm.backward_cubed, matmul=product_steps, joined=True),
    "autograd": _pair(NAIVE["late"], "textbook", rms=norm.backward_textbook, matmul=product_split, summed=False),
    "sequential": _pair(NAIVE["sequential"], "key-by-key", rms=norm.backward_late_weight, matmul=product_sequential),
    "epilogue": _pair(NAIVE["epilogue"], "jacobian", rms=norm.backward_newton, matmul=product_folded, joined=True),
    "double": _pair(NAIVE["double"], "double", rms=norm.backward_double, matmul=product_double),
}
ABSORBED_BACK = {
    "absorbed": _pair(ABSORBED["absorbed"], "flash"),
    "joined": _pair(ABSORBED["fused-down-apart"], "flash-base-2", rms=norm.backward_cubed, matmul=product_steps, joined=True),
    "autograd": _pair(ABSORBED["late"], "textbook", rms=norm.backward_textbook, matmul=product_split, summed=False),
    "sequential": _pair(ABSORBED["sequential"], "key-by-key", rms=norm.backward_late_weight, matmul=product_sequential),
    "epilogue": _pair(ABSORBED["epilogue"], "jacobian", rms=norm.backward_newton, matmul=product_folded, joined=True),
}
PREFILL = {name: backward_of(back) for name, back in NAIVE_BACK.items()}
PREFILL["absorbed"], PREFILL["absorbed-autograd"] = (backward_of(ABSORBED_BACK[name]) for name in ("absorbed", "autograd"))
ABSORB = {name: backward_of(back) for name, back in ABSORBED_BACK.items()}
ABSORB["double"] = PREFILL["double"]
ABSORB["naive"], ABSORB["naive-autograd"] = (backward_of(NAIVE_BACK[name]) for name in ("naive", "autograd"))
EAGER = {
    "eager": backward_of(Back(EAGERS["eager"], eager_core, rms=norm.backward_eager, summed=False)),
    "eager-absorbed": backward_of(Back(EAGERS["eager-absorbed"], eager_core, rms=norm.backward_eager, summed=False)),
}
