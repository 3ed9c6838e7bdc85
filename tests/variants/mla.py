"""Multi-head latent attention's forward: naive, absorbed, fused; products, softmax, rotation and norm each of several kinds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import norm, rope
from .attention import Core, blocks, causal_mask, eager, key_by_key, packed_mask, split, whole, whole_late, wide
from .floats import Array
from .linear import product, product_double, product_folded, product_sequential, product_split, product_steps

ROPE: dict[str, tuple[Callable, Callable]] = dict(
    zip(("complex", "rotate-half", "exp-log", "exp2-fused", "matrix", "double", "table"), rope.ROPES, strict=True)
)
Weights = dict[str, Array | None]


@dataclass(frozen=True)
class How:
    """What an implementation is made of. fused: the two down-projections in one product. epilogue: norm and rope follow their product
    before anything is stored. apart: the rope's scores are a product of their own. folded: the softmax scale is multiplied to q's weights
    beforehand, which rounds a weight once more: not at 16 bits. unstored: nothing is stored on the way, and all is in float64."""

    absorbed: bool = False
    matmul: Callable = product
    core: Core = whole
    turn: str = "complex"
    rms: Callable = norm.forward_pairwise
    fused: bool = False
    epilogue: bool = False
    apart: bool = False
    folded: bool = False
    unstored: bool = False


@dataclass(frozen=True)
class Sizes:
    h: int
    dn: int
    r: int
    dv: int
    c: int


def sizes_of(a: dict[str, Any]) -> Sizes:
    names = ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")
    return Sizes(*(a.get(name, default) for name, default in zip(names, (128, 128, 64, 128, 512), strict=True)))


def rope_attrs(a: dict[str, Any]) -> dict[str, Any]:
    layouts = {"layout_in": a.get("rope_layout_in", "interleaved"), "layout_out": a.get("rope_layout_out", "interleaved")}
    return {**layouts, **{name: a.get(name, value) for name, value in rope.DEFAULTS.items()}}


def present(w: Array | None) -> Array:
    assert w is not None
    return w


def down(how: How, to: Callable, x: Array, w: Weights) -> tuple[Array, Array]:
    """What the first products give: q's side [n,·] and [latent | k_pe]"""
    keep = (lambda y: y) if how.epilogue else to
    first = w["q_proj"] if w["q_a_proj"] is None else w["q_a_proj"]
    first, kv_a = present(first), present(w["kv_a_proj_with_mqa"])
    if how.fused:
        both = how.matmul(x, np.concatenate([first, kv_a]))
        return keep(both[:, : len(first)]), keep(both[:, len(first) :])
    return keep(how.matmul(x, first)), keep(how.matmul(x, kv_a))


def heads(how: How, to: Callable, x: Array, positions: Array, w: Weights, a: dict[str, Any]) -> dict[str, Array]:
    """Everything up to the scores, by name; x[n,d]"""
    z, eps, turn = sizes_of(a), a.get("rms_norm_eps", 1e-6), rope_attrs(a)
    forward, _ = ROPE.get(how.turn, rope.EAGER)
    side, kv_a = down(how, to, x, w)
    found = {"kv_a": kv_a, "down": side}
    q = side
    if w["q_a_proj"] is not None:
        found["c_q"] = to(how.rms(side, present(w["q_a_layernorm"]), eps=eps))
        up = present(w["q_b_proj"])
        if how.folded:
            up = to(up * x.dtype.type(rope.softmax_scale(z.dn + z.r, turn)))
        q = how.matmul(found["c_q"], up)
        q = q if how.epilogue else to(q)
    elif how.folded:
        q = q * x.dtype.type(rope.softmax_scale(z.dn + z.r, turn))
    q = q.reshape(len(x), z.h, z.dn + z.r)
    found["q_nope"], found["q_pe"] = to(q[..., : z.dn]), to(forward(q[..., z.dn :], positions, **turn))
    found["c_kv"] = to(how.rms(np.ascontiguousarray(kv_a[:, : z.c]), present(w["kv_a_layernorm"]), eps=eps))
    found["k_pe"] = to(forward(kv_a[:, None, z.c :], positions, **turn))[:, 0]
    return found


def keys_of(found: dict[str, Array], b: int, caches: tuple) -> tuple[Array, Array]:
    """c_kv[b,t,c] and k_pe[b,t,r], what is cached first"""
    c_kv, k_pe = (found[name].reshape(b, -1, found[name].shape[-1]) for name in ("c_kv", "k_pe"))
    if caches[0] is None:
        return c_kv, k_pe
    return np.concatenate([caches[0], c_kv], axis=1), np.concatenate([caches[1], k_pe], axis=1)


def mask_of(s: int, t: int, cu_seqlens: Array | None) -> Array:
    return causal_mask(s, t, True) if cu_seqlens is None else packed_mask(cu_seqlens, cu_seqlens, True)


def one_head(how: How, to: Callable, q: tuple, keys: tuple, w_uk: Array, w_uv: Array, seen: Array, scale: float) -> Array:
    """o[s,dv] of q_nope[s,dn], q_pe[s,r] over c_kv[t,c], k_pe[t,r]"""
    (q_nope, q_pe), (c_kv, k_pe) = q, keys
    if how.absorbed:
        left, right = to(how.matmul(q_nope, w_uk.T)), c_kv
    else:
        left, right = q_nope, to(how.matmul(c_kv, w_uk))
    if how.apart:
        z = how.matmul(left, right) + how.matmul(q_pe, k_pe)
    else:
        z = how.matmul(np.concatenate([left, q_pe], 1), np.concatenate([right, k_pe], 1))
    if how.absorbed:
        return how.matmul(to(how.core(z, c_kv, seen, scale, None, to)[0]), w_uv)
    return how.core(z, to(how.matmul(c_kv, w_uv)), seen, scale, None, to)[0]


def forward_of(how: How) -> Callable:
    def forward(
        *,
        x: Array,
        positions: Array,
        kv_a_proj_with_mqa: Array,
        kv_a_layernorm: Array,
        kv_b_proj: Array,
        o_proj: Array,
        to: Callable,
        c_kv_cache: Array | None = None,
        k_pe_cache: Array | None = None,
        cu_seqlens: Array | None = None,
        q_proj: Array | None = None,
        q_a_proj: Array | None = None,
        q_a_layernorm: Array | None = None,
        q_b_proj: Array | None = None,
        **a: Any,
    ) -> tuple[Array, Array, Array]:
        to = (lambda y: y) if how.unstored else to
        wider = np.float64 if how.unstored else x.dtype.type
        weights: Weights = {
            "q_proj": q_proj,
            "q_a_proj": q_a_proj,
            "q_a_layernorm": q_a_layernorm,
            "q_b_proj": q_b_proj,
            "kv_a_proj_with_mqa": kv_a_proj_with_mqa,
            "kv_a_layernorm": kv_a_layernorm,
        }
        weights = {name: None if w is None else w.astype(wider) for name, w in weights.items()}
        z, (b, s, d) = sizes_of(a), x.shape
        found = heads(how, to, x.reshape(b * s, d).astype(wider), positions.reshape(-1), weights, a)
        c_kv, k_pe = keys_of(found, b, tuple(None if y is None else y.astype(wider) for y in (c_kv_cache, k_pe_cache)))
        up = kv_b_proj.reshape(z.h, z.dn + z.dv, z.c).astype(wider)
        seen = mask_of(s, c_kv.shape[1], cu_seqlens)
        scale = 1.0 if how.folded else rope.softmax_scale(z.dn + z.r, rope_attrs(a))
        q_nope, q_pe = (found[name].reshape(b, s, z.h, -1) for name in ("q_nope", "q_pe"))
        o = np.zeros((b, s, z.h, z.dv), wider)
        for i in range(b):
            for j in range(z.h):
                q = q_nope[i, :, j], q_pe[i, :, j]
                o[i, :, j] = to(one_head(how, to, q, (c_kv[i], k_pe[i]), up[j, : z.dn], up[j, z.dn :], seen, scale))
        y = how.matmul(o.reshape(b * s, -1), o_proj.astype(wider)).reshape(x.shape)
        parts = (found[name].reshape(b, s, -1) for name in ("c_kv", "k_pe"))
        return tuple(part.astype(x.dtype) for part in (y, *parts))  # type: ignore[return-value]

    return forward


def as_hugging_face(z: Array, v: Array, seen: Array, scale: float, sink: Any, to: Callable) -> tuple[Array, Array]:
    """Scores rounded before and after the scale, the softmax in float32, its result rounded."""
    return whole(to(to(z) * np.float32(scale)), v, seen, 1.0, sink, to)


NAIVE = {
    "naive": How(),
    "fused-down-apart": How(
        fused=True, apart=True, matmul=product_steps, core=blocks(64, base2=True), turn="rotate-half", rms=norm.forward_warp
    ),
    "epilogue": How(epilogue=True, core=blocks(3), turn="exp-log", rms=norm.forward_newton, matmul=product_split),
    "sequential": How(matmul=product_sequential, core=key_by_key, turn="matrix", rms=norm.forward_sequential),
    "split-kv": How(apart=True, matmul=product_folded, core=split(2, blocks(1, backwards=True)), turn="table", rms=norm.forward_divided),
    "late": How(fused=True, core=whole_late, turn="exp2-fused", rms=norm.forward_dot),
    "folded-scale": How(folded=True, core=blocks(2), turn="double"),
    "double": How(unstored=True, matmul=product_double, core=wide, turn="double", rms=norm.forward_double),
}
ABSORBED = {
    "absorbed": How(absorbed=True),
    "fused-down-apart": How(
        absorbed=True, fused=True, apart=True, matmul=product_steps, core=blocks(64, base2=True), turn="rotate-half", rms=norm.forward_warp
    ),
    "epilogue": How(absorbed=True, epilogue=True, core=blocks(3), turn="exp-log", rms=norm.forward_newton, matmul=product_split),
    "sequential": How(absorbed=True, matmul=product_sequential, core=key_by_key, turn="matrix", rms=norm.forward_sequential),
    "split-kv": How(absorbed=True, matmul=product_folded, core=split(2, blocks(1, backwards=True)), turn="table", rms=norm.forward_divided),
    "late": How(absorbed=True, apart=True, core=whole_late, turn="exp2-fused", rms=norm.forward_dot),
}
SINGLE = ("epilogue", "absorbed-epilogue", "naive-epilogue")  # Newton's root
PREFILL = {name: forward_of(how) for name, how in {**NAIVE, **{f"absorbed-{n}": h for n, h in list(ABSORBED.items())[:3]}}.items()}
ABSORB = {name: forward_of(how) for name, how in {**ABSORBED, **{f"naive-{n}": h for n, h in list(NAIVE.items())[:3]}}.items()}
ABSORB["double"] = PREFILL["double"]
EAGERS = {
    "eager": How(core=eager, turn="eager", rms=norm.forward_eager),
    "eager-hugging-face": How(core=as_hugging_face, turn="eager", rms=norm.forward_cast_first),
    "eager-absorbed": How(absorbed=True, core=eager, turn="eager", rms=norm.forward_eager_rsqrt),
}
EAGER = {name: forward_of(how) for name, how in EAGERS.items()}
