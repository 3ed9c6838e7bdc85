"""What both forms of multi-head latent attention share: queries, latents, and attention over one batch or packed sequences. Spec §2."""

from typing import Any

from .attention import attention_bwd, attention_fwd
from .attention_parts import attention_varlen_bwd, attention_varlen_fwd
from .linear import linear_bwd, linear_fwd
from .norm import rmsnorm_bwd, rmsnorm_fwd
from .rope import rope_bwd, rope_fwd
from .xp import Array, named, stored, xp_of

WEIGHTS = ("q_proj", "q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")
Gradients = dict[str, Array | None]


def stored_fwd(part: Any, *arrays: Array, **attrs: Any) -> tuple[Array, tuple]:
    """A part whose output is an activation: 16-bit implementations store it as one"""
    y, saved = part(*arrays, **attrs)
    return stored(y), saved


def queries_fwd(x: Array, w: dict[str, Array | None], eps: float) -> tuple[Array, tuple]:
    """q[n,h(dn+r)] = q_proj x, or q_b_proj rmsnorm(q_a_proj x): eq. 6, 7"""
    if w["q_proj"] is not None:
        q, direct = stored_fwd(linear_fwd, x, w["q_proj"])
        return named("q", q), (direct,)
    down, s_down = stored_fwd(linear_fwd, x, w["q_a_proj"])
    c_q, s_norm = stored_fwd(rmsnorm_fwd, down, w["q_a_layernorm"], eps=eps)  # [n,q]
    q, s_up = stored_fwd(linear_fwd, named("c_q", c_q), w["q_b_proj"])
    return named("q", q), (s_down, s_norm, s_up)


def queries_bwd(dq: Array, saved: tuple, grads: Gradients) -> Array:
    """dx[n,d]; the weights' gradients go into grads"""
    if len(saved) == 1:
        dx, grads["q_proj"] = activation_bwd(linear_bwd, dq, saved[0])
        return dx
    s_down, s_norm, s_up = saved
    dc_q, grads["q_b_proj"] = activation_bwd(linear_bwd, dq, s_up)
    ddown, grads["q_a_layernorm"] = activation_bwd(rmsnorm_bwd, dc_q, s_norm)
    dx, grads["q_a_proj"] = activation_bwd(linear_bwd, ddown, s_down)
    return dx


def activation_bwd(part: Any, dy: Array, saved: tuple) -> tuple[Array, Array]:
    """A part's gradients, the one to its input stored as an activation"""
    dx, dweight = part(dy, saved)
    return stored(dx), dweight


def latents_fwd(x: Array, positions: Array, w: dict[str, Array | None], eps: float, rope: dict[str, Any]) -> tuple[Array, Array, tuple]:
    """c_kv[n,c] = rmsnorm(latent), k_pe[n,r] = rope(k), [latent | k] = kv_a_proj_with_mqa x: eq. 1, 3. k_pe is not normalised."""
    c = w["kv_a_layernorm"].shape[0]  # type: ignore[union-attr]
    kv_a, s_down = stored_fwd(linear_fwd, x, w["kv_a_proj_with_mqa"])  # [n,c+r]
    c_kv, s_norm = stored_fwd(rmsnorm_fwd, kv_a[:, :c], w["kv_a_layernorm"], eps=eps)
    k_pe, s_rope = stored_fwd(rope_fwd, kv_a[:, None, c:], positions, **rope)  # [n,1,r]
    return named("c_kv", c_kv), named("k_pe", k_pe[:, 0, :]), (s_down, s_norm, s_rope)


def latents_bwd(dc_kv: Array, dk_pe: Array, saved: tuple, grads: Gradients) -> Array:
    s_down, s_norm, s_rope = saved
    dlatent, grads["kv_a_layernorm"] = activation_bwd(rmsnorm_bwd, dc_kv, s_norm)
    dk = stored(rope_bwd(dk_pe[:, None, :], s_rope)[:, 0, :])
    dx, grads["kv_a_proj_with_mqa"] = activation_bwd(linear_bwd, xp_of(dk).concat([dlatent, dk], axis=1), s_down)
    return dx


def heads_fwd(
    x: Array, positions: Array, w: dict[str, Array | None], sizes: tuple, eps: float, rope: dict
) -> tuple[Array, Array, Array, Array, tuple]:
    """q_nope[n,h,dn], q_pe[n,h,r], c_kv[n,c], k_pe[n,r] of flattened tokens"""
    h, dn, r, _ = sizes
    q, s_q = queries_fwd(x, w, eps)
    q = xp_of(q).reshape(q, (x.shape[0], h, dn + r))
    q_pe, s_rope = stored_fwd(rope_fwd, q[:, :, dn:], positions, **rope)
    named("q_pe", q_pe)
    c_kv, k_pe, s_kv = latents_fwd(x, positions, w, eps, rope)
    return q[:, :, :dn], q_pe, c_kv, k_pe, (s_q, s_rope, s_kv)


def heads_bwd(dq_nope: Array, dq_pe: Array, dc_kv: Array, dk_pe: Array, saved: tuple, grads: Gradients) -> Array:
    s_q, s_rope, s_kv = saved
    xp = xp_of(dq_nope)
    dq = xp.concat([dq_nope, stored(rope_bwd(dq_pe, s_rope))], axis=-1)
    return queries_bwd(xp.reshape(dq, (dq.shape[0], dq.shape[1] * dq.shape[2])), s_q, grads) + latents_bwd(dc_kv, dk_pe, s_kv, grads)


def attend_fwd(q: Array, k: Array, v: Array, cu_seqlens: Array | None, scale: float) -> tuple[Array, tuple]:
    """o[b,s,h,v]: causal attention of a batch, or of the sequences that are packed into its only row"""
    if cu_seqlens is None:
        (o, _), saved = attention_fwd(q, k, v, scale=scale)
        return o, (False, saved)
    (o, _), saved = attention_varlen_fwd(q[0, ...], k[0, ...], v[0, ...], cu_seqlens, cu_seqlens, scale=scale)
    return o[None, ...], (True, saved)


def attend_bwd(do: Array, saved: tuple) -> list[Array]:
    """dq, dk, dv; nothing comes through lse"""
    packed, part = saved
    xp = xp_of(do)
    if not packed:
        grads = attention_bwd(do, 0 * xp.permute_dims(do[..., 0], (0, 2, 1)), part)
    else:
        pieces = attention_varlen_bwd(do[0, ...], 0 * xp.permute_dims(do[0, ..., 0], (1, 0)), part)
        grads = tuple(g[None, ...] for g in pieces)
    return [stored(g) for g in grads]
