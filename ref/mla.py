"""Multi-head latent attention, naive and absorbed, from hidden states to output. Spec §2; DeepSeek-V3 paper eq. 1-11.

Both forms are made of the same parts: queries and latents (here), attention, the output projection. Each forward is followed by its mirror.
"""

import itertools
from typing import Any

from .linear import linear_bwd, linear_fwd
from .mla_parts import WEIGHTS, Gradients, activation_bwd, attend_bwd, attend_fwd, heads_bwd, heads_fwd, stored_fwd
from .op import Case, Op, declare, signature
from .rope import CosSin, Layout
from .xp import Array, named, stored, xp_of
from .yarn import YARN_KIMI, YARN_V2, YARN_V3, Gating, Yarn

INPUTS = (
    "x[b,s,d] positions[b,s]:index c_kv_cache?[b,t,c] k_pe_cache?[b,t,r] cu_seqlens?[j]:index "
    "q_proj?[hq,d] q_a_proj?[q,d] q_a_layernorm?[q] q_b_proj?[hq,q] "
    "kv_a_proj_with_mqa[cr,d] kv_a_layernorm[c] kv_b_proj[hkv,c] o_proj[d,hv]"
)


def naive_fwd(
    q_nope: Array, q_pe: Array, c_kv: Array, k_pe: Array, kv_b_proj: Array, cu: Array | None, sizes: tuple, scale: float
) -> tuple[Array, tuple]:
    """Keys and values expanded for every head: [k_nope | v] = kv_b_proj c_kv, k = [k_nope | k_pe]. o[b,s,h,dv]: eq. 2, 5, 10"""
    h, dn, r, dv = sizes
    xp = xp_of(q_nope)
    b, t, c = c_kv.shape
    flat, s_up = stored_fwd(linear_fwd, xp.reshape(c_kv, (b * t, c)), kv_b_proj)
    kv = xp.reshape(flat, (b, t, h, dn + dv))
    k = xp.concat([kv[..., :dn], xp.broadcast_to(k_pe[:, :, None, :], (b, t, h, r))], axis=-1)  # [b,t,h,dn+r]
    o, s_attention = attend_fwd(xp.concat([q_nope, q_pe], axis=-1), k, kv[..., dn:], cu, scale)
    return o, (s_up, s_attention, c_kv.shape)


def naive_bwd(do: Array, saved: tuple, dn: int) -> tuple[Array, Array, Array, Array, Array]:
    """dq_nope, dq_pe, dc_kv, dk_pe, dkv_b_proj; the shared key gathers over heads"""
    s_up, s_attention, latent_shape = saved
    xp = xp_of(do)
    dq, dk, dv = attend_bwd(do, s_attention)
    dkv = xp.concat([dk[..., :dn], dv], axis=-1)
    dc_kv, dkv_b = activation_bwd(linear_bwd, xp.reshape(dkv, (dkv.shape[0] * dkv.shape[1], dkv.shape[2] * dkv.shape[3])), s_up)
    return dq[..., :dn], dq[..., dn:], xp.reshape(dc_kv, latent_shape), xp.sum(dk[..., dn:], axis=2), dkv_b


def absorbed_fwd(
    q_nope: Array, q_pe: Array, c_kv: Array, k_pe: Array, kv_b_proj: Array, cu: Array | None, sizes: tuple, scale: float
) -> tuple[Array, tuple]:
    """W_UK folded into the query, W_UV applied to the result: one key head [c_kv | k_pe], values c_kv. o[b,s,h,dv]"""
    h, dn, _, dv = sizes
    xp = xp_of(q_nope)
    c = c_kv.shape[-1]
    up = xp.reshape(kv_b_proj, (h, dn + dv, c))
    w_uk, w_uv = up[:, :dn, :], up[:, dn:, :]  # [h,dn,c], [h,dv,c]
    q_c = named("q_c", stored(xp.matmul(q_nope[..., None, :], w_uk)[..., 0, :]))  # [b,s,h,c]
    latent = c_kv[:, :, None, :]  # [b,t,1,c]
    k = xp.concat([latent, k_pe[:, :, None, :]], axis=-1)
    o_c, s_attention = attend_fwd(xp.concat([q_c, q_pe], axis=-1), k, latent, cu, scale)
    o_c = named("o_c", stored(o_c))
    o = xp.matmul(o_c[..., None, :], xp.matrix_transpose(w_uv))[..., 0, :]  # [b,s,h,dv]
    return o, (q_nope, o_c, w_uk, w_uv, s_attention)


def absorbed_bwd(do: Array, saved: tuple, dn: int) -> tuple[Array, Array, Array, Array, Array]:
    """dc_kv gathers from keys and values, over heads; dW_UK[h] = Σ q_nope dq_c, dW_UV[h] = Σ do o_c"""
    q_nope, o_c, w_uk, w_uv, s_attention = saved
    xp = xp_of(do)
    c = w_uk.shape[-1]
    do_c = stored(xp.matmul(do[..., None, :], w_uv)[..., 0, :])
    dq, dk, dv = attend_bwd(do_c, s_attention)
    dq_c, dq_pe = dq[..., :c], dq[..., c:]
    dq_nope = stored(xp.matmul(dq_c[..., None, :], xp.matrix_transpose(w_uk))[..., 0, :])
    dw_uk = xp.matmul(tokens_last(q_nope), tokens_first(dq_c))  # [h,dn,c]
    dw_uv = xp.matmul(tokens_last(do), tokens_first(o_c))  # [h,dv,c]
    dkv_b = xp.reshape(xp.concat([dw_uk, dw_uv], axis=1), (-1, c))
    return dq_nope, dq_pe, dk[:, :, 0, :c] + dv[:, :, 0, :], dk[:, :, 0, c:], dkv_b


def tokens_first(x: Array) -> Array:
    """[b,s,h,d] to [h,b·s,d]"""
    xp = xp_of(x)
    return xp.reshape(xp.permute_dims(x, (2, 0, 1, 3)), (x.shape[2], x.shape[0] * x.shape[1], x.shape[3]))


def tokens_last(x: Array) -> Array:
    """[b,s,h,d] to [h,d,b·s]"""
    return xp_of(x).matrix_transpose(tokens_first(x))


def _form(name: str, core_fwd: Any, core_bwd: Any, doc: str) -> tuple[Any, Any]:
    """The forward and backward of one form: the same queries, latents and output around another core."""

    def fwd(
        x: Array,
        positions: Array,
        c_kv_cache: Array | None,
        k_pe_cache: Array | None,
        cu_seqlens: Array | None,
        q_proj: Array | None,
        q_a_proj: Array | None,
        q_a_layernorm: Array | None,
        q_b_proj: Array | None,
        kv_a_proj_with_mqa: Array,
        kv_a_layernorm: Array,
        kv_b_proj: Array,
        o_proj: Array,
        *,
        num_attention_heads: int = 128,
        qk_nope_head_dim: int = 128,
        qk_rope_head_dim: int = 64,
        v_head_dim: int = 128,
        kv_lora_rank: int = 512,
        rms_norm_eps: float = 1e-6,
        rope_layout_in: Layout = "interleaved",
        rope_layout_out: Layout = "interleaved",
        cos_sin: CosSin = "float32",
        theta: float = 10000.0,
        factor: float = 1.0,
        original_max_position_embeddings: int = 4096,
        beta_fast: float = 32.0,
        beta_slow: float = 1.0,
        mscale: float = 1.0,
        mscale_all_dim: float = 1.0,
        yarn_gating: Gating = "always",
        max_position: int = 163840,
    ) -> tuple[tuple[Array, Array, Array], tuple]:
        xp = xp_of(x)
        weights: dict[str, Array | None] = dict(
            zip(WEIGHTS, (q_proj, q_a_proj, q_a_layernorm, q_b_proj, kv_a_proj_with_mqa, kv_a_layernorm, kv_b_proj, o_proj), strict=True)
        )
        sizes = num_attention_heads, qk_nope_head_dim, qk_rope_head_dim, v_head_dim
        check_shapes(name, weights, sizes, kv_lora_rank)
        check_sequences(name, x, c_kv_cache, k_pe_cache, cu_seqlens)
        yarn = Yarn(
            theta, factor, original_max_position_embeddings, beta_fast, beta_slow, mscale, mscale_all_dim, yarn_gating, max_position
        )
        rope = {"layout_in": rope_layout_in, "layout_out": rope_layout_out, "cos_sin": cos_sin, **yarn._asdict()}
        b, s, d = x.shape
        flat = xp.reshape(x, (b * s, d))
        q_nope, q_pe, c_kv, k_pe, s_heads = heads_fwd(flat, xp.reshape(positions, (b * s,)), weights, sizes, rms_norm_eps, rope)
        scale = yarn.softmax_scale(qk_nope_head_dim + qk_rope_head_dim)
        split = [xp.reshape(a, (b, s, *a.shape[1:])) for a in (q_nope, q_pe, c_kv, k_pe)]
        keys, t = split[2:], 0 if c_kv_cache is None else c_kv_cache.shape[1]
        if c_kv_cache is not None:
            keys = [xp.concat([c_kv_cache, split[2]], axis=1), xp.concat([k_pe_cache, split[3]], axis=1)]  # [b,t+s,c], [b,t+s,r]
        o, s_core = core_fwd(*split[:2], *keys, kv_b_proj, cu_seqlens, sizes, scale)  # [b,s,h,dv]
        y, s_out = linear_fwd(xp.reshape(stored(named("o", o)), (b * s, num_attention_heads * v_head_dim)), o_proj)
        return (xp.reshape(y, (b, s, d)), split[2], split[3]), (s_heads, s_core, s_out, sizes, x.shape, c_kv_cache is not None, t)

    def bwd(dy: Array, dc_kv: Array, dk_pe: Array, saved: tuple) -> tuple[Array, ...]:
        s_heads, s_core, s_out, (h, dn, _, dv), (b, s, d), cached, t = saved
        xp = xp_of(dy)
        grads: Gradients = {}
        do, grads["o_proj"] = activation_bwd(linear_bwd, xp.reshape(dy, (b * s, d)), s_out)
        dq_nope, dq_pe, dc, dk, grads["kv_b_proj"] = core_bwd(xp.reshape(do, (b, s, h, dv)), s_core, dn)
        if cached:
            grads["c_kv_cache"], grads["k_pe_cache"] = dc[:, :t, :], dk[:, :t, :]
        dc, dk = dc[:, t:, :] + dc_kv, dk[:, t:, :] + dk_pe
        dq_nope, dq_pe, dc, dk = (xp.reshape(a, (b * s, *a.shape[2:])) for a in (dq_nope, dq_pe, dc, dk))
        dx = heads_bwd(dq_nope, dq_pe, dc, dk, s_heads, grads)
        return xp.reshape(dx, (b, s, d)), *(grads[name] for name in ("c_kv_cache", "k_pe_cache", *WEIGHTS) if name in grads)

    fwd.__name__, fwd.__doc__ = f"{name.replace('.', '_')}_fwd", doc
    bwd.__doc__ = "The mirror of the forward, part by part: dx = Σ over queries and latents; the latent key's gradient gathers over heads"
    return signature(f"{INPUTS} -> y[b,s,d] c_kv[b,s,c] k_pe[b,s,r]")(fwd), bwd


def check_shapes(op: str, w: dict[str, Array | None], sizes: tuple[int, int, int, int], c: int) -> None:
    h, dn, r, dv = sizes
    lora = [n for n in WEIGHTS[1:4] if w[n] is not None]
    if (w["q_proj"] is None) == (not lora) or len(lora) not in (0, 3):
        given = [n for n in WEIGHTS[:4] if w[n] is not None]
        raise ValueError(
            f"{op}: queries come from {', '.join(given) or 'nothing'}; expected q_proj, or q_a_proj, q_a_layernorm and q_b_proj"
        )
    for name, axis, expected, what in (
        ("q_proj", 0, h * (dn + r), "heads × (qk_nope + qk_rope)"),
        ("q_b_proj", 0, h * (dn + r), "heads × (qk_nope + qk_rope)"),
        ("kv_a_layernorm", 0, c, "kv_lora_rank"),
        ("kv_a_proj_with_mqa", 0, c + r, "kv_lora_rank + qk_rope"),
        ("kv_b_proj", 0, h * (dn + dv), "heads × (qk_nope + v_head_dim)"),
        ("o_proj", 1, h * dv, "heads × v_head_dim"),
    ):
        weight = w[name]
        if weight is not None and weight.shape[axis] != expected:
            raise ValueError(f"{op}: {name} has shape {tuple(weight.shape)}; expected {expected} = {what} on axis {axis}")


def check_sequences(op: str, x: Array, c_kv_cache: Array | None, k_pe_cache: Array | None, cu_seqlens: Array | None) -> None:
    if (c_kv_cache is None) != (k_pe_cache is None):
        raise ValueError(f"{op}: {'k_pe_cache' if k_pe_cache is None else 'c_kv_cache'} is missing; expected both caches or neither")
    if cu_seqlens is not None and (x.shape[0] != 1 or c_kv_cache is not None):
        what = "with caches" if c_kv_cache is not None else f"with b = {x.shape[0]}"
        raise ValueError(f"{op}: cu_seqlens is given {what}; expected one row of packed sequences, b = 1, and no caches")


mla_prefill_fwd, mla_prefill_bwd = _form(
    "mla.prefill",
    naive_fwd,
    naive_bwd,
    """y = o_proj attention([q_nope | rope q_pe], [k_nope | rope k_pe], v),   [k_nope | v] = kv_b_proj c_kv   (V3 eq. 1-11)

    c_kv[b,s,c] = rmsnorm of the latent and k_pe[b,s,r], rotated and shared by all heads, are what a cache keeps. Keys and values are
    expanded for every head. The softmax scale is (qk_nope + qk_rope)^(-1/2), times m(mscale_all_dim)² under YaRN.

    c_kv_cache[b,t,c] and k_pe_cache[b,t,r] are earlier tokens' outputs (chunked prefill): the s tokens of x see them and, causally, each
    other. cu_seqlens[j] packs sequences of any length into one row (b = 1): from cu_seqlens[i] to cu_seqlens[i+1]. positions are each
    token's own.
    """,
)
mla_absorb_fwd, mla_absorb_bwd = _form(
    "mla.absorb",
    absorbed_fwd,
    absorbed_bwd,
    """y = o_proj W_UV attention([W_UKᵀ q_nope | rope q_pe], [c_kv | rope k_pe], c_kv)   (V3 eq. 1-11, W_UK and W_UV folded)

    The same function as mla.prefill: one key head of width c+r and values of width c, so a cache of c_kv and k_pe is all that is read.
    Caches, cu_seqlens and the softmax scale as there.
    """,
)


def _case(
    name: str,
    b: int,
    s: int,
    lora: bool,
    note: str = "",
    starts: tuple[int, ...] = (0,),
    cached: int = 0,
    ends: tuple[int, ...] = (),
    dn: int = 8,
    **attrs: Any,
) -> Case:
    """Small sizes, no two alike, so that no transposition passes: h=3 heads, dn=8, r=4, dv=6, c=12, q=10, d=16"""
    h, r, dv, c, q, d = 3, 4, 6, 12, 10, 16
    dims = {"b": b, "s": s, "d": d, "q": q, "c": c, "cr": c + r, "r": r, "hq": h * (dn + r), "hkv": h * (dn + dv), "hv": h * dv}
    draws: dict[str, tuple] = {"x": ("normal", 1.0), "positions": ("ascending", *starts), "dy": ("normal", 1.0)}
    draws |= {"dc_kv": ("normal", 1.0), "dk_pe": ("normal", 1.0)}
    queries = {"q_a_proj": d, "q_b_proj": q} if lora else {"q_proj": d}
    for weight, fan_in in {**queries, "kv_a_proj_with_mqa": d, "kv_b_proj": c, "o_proj": h * dv}.items():
        draws[weight] = ("normal", fan_in**-0.5)
    draws |= {"kv_a_layernorm": ("uniform", 0.5, 1.5)} | ({"q_a_layernorm": ("uniform", 0.5, 1.5)} if lora else {})
    if cached:
        dims["t"] = cached
        draws |= {"c_kv_cache": ("normal", 1.0), "k_pe_cache": ("normal", 1.0)}
    if ends:
        dims["j"] = len(ends)
        draws["cu_seqlens"] = ("positions", *ends)
        draws["positions"] = ("positions", *(i for a, z in itertools.pairwise(ends) for i in range(z - a)))
    sizes = {"num_attention_heads": h, "qk_nope_head_dim": dn, "qk_rope_head_dim": r, "v_head_dim": dv, "kv_lora_rank": c}
    return Case(name, dims, draws, {**sizes, **attrs}, note)


def _op(name: str, fwd: Any, bwd: Any) -> Op:
    cases = (
        _case("v3", 2, 5, True, "YaRN, query LoRA", (0, 7000), **YARN_V3),
        _case("v2", 1, 5, True, "YaRN with mscale 0.707", (3,), **YARN_V2),
        _case("v2-lite", 1, 6, False, "no query LoRA", (0,), **YARN_V2),
        _case("square", 1, 4, False, "qk_nope is kv_lora_rank: W_UK may be read as its transpose", (50,), dn=12, **YARN_V3),
        _case("kimi-k2", 1, 5, True, "", (100,), **YARN_KIMI),
        _case("moonlight", 1, 5, False, "no YaRN", (0,), theta=50000.0),
        _case("half", 1, 5, True, "rotated halves, as Hugging Face caches k_pe", (160000,), rope_layout_out="half", **YARN_V3),
        _case("mscales", 1, 4, True, "mscale and mscale_all_dim differ: the amplitude is not 1", (9,), factor=40.0, mscale_all_dim=0.707),
        _case(
            "gated",
            1,
            4,
            True,
            "native: no YaRN within the original length",
            (3000,),
            yarn_gating="beyond_original",
            max_position=4096,
            **YARN_V3,
        ),
        _case("one", 1, 1, True, "a single token attends to itself", (0,)),
        _case("chunk", 2, 3, True, "three tokens after four cached ones", (4, 4), cached=4, **YARN_V3),
        _case("packed", 1, 6, True, "sequences of 1, 3 and 2 tokens in one row", (0,), ends=(0, 1, 4, 6), **YARN_V3),
    )
    flops = "2*b*s*(d*(q+cr)+q*hq+c*hkv+d*hv)+2*b*s*s*(hq+hv)"
    source = "DeepSeek-V3 paper eq. 1-11; DeepSeek-V2 paper §2.1; DeepSeek-V3 inference/model.py, MLA"
    return Op(name, fwd, bwd, cases, flops, source, vary="")


mla_prefill = declare(_op("mla.prefill", mla_prefill_fwd, mla_prefill_bwd))
mla_absorb = declare(_op("mla.absorb", mla_absorb_fwd, mla_absorb_bwd))
