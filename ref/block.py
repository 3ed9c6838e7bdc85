"""A layer of the model: attention and a feed-forward network, each behind a norm and beside a residual. Spec §2, §3.

block_by is the layer around any feed-forward network: `block` takes one from stacked weights, `model` from a checkpoint, expert by expert.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

from array_api_compat import device

from .mla import INPUTS, mla_absorb_bwd, mla_absorb_fwd, mla_prefill_bwd, mla_prefill_fwd
from .mla_parts import WEIGHTS as ATTENTION
from .mla_parts import activation_bwd, stored_fwd
from .moe import layer_by, layer_regret, mlp_bwd, mlp_fwd, moe_layer_bwd, moe_layer_fwd
from .norm import rmsnorm_bwd, rmsnorm_fwd
from .op import Case, Op, attributes_of, declare, keywords, parse, signature
from .xp import Array, stored, xp_of
from .yarn import YARN_KIMI, YARN_V2, YARN_V3

CACHES = ("c_kv_cache", "k_pe_cache")
DENSE = ("gate_proj", "up_proj", "down_proj")
EXPERTS = ("gate_weight", "e_score_correction_bias", "w_gate", "w_up", "w_down", "shared_gate", "shared_up", "shared_down")
CONSTANT = "e_score_correction_bias"
WEIGHTS: tuple[str, ...] = ("input_layernorm", *ATTENTION, "post_attention_layernorm", *DENSE, *EXPERTS)

SEQUENCE, _, ATTENTION_SIG = INPUTS.partition(" q_proj?")
WEIGHTS_SIG = (
    f"input_layernorm[d] q_proj?{ATTENTION_SIG} post_attention_layernorm[d] gate_proj?[i,d] up_proj?[i,d] down_proj?[d,i] "
    "gate_weight?[e,d] e_score_correction_bias?[e]:const w_gate?[e,f,d] w_up?[e,f,d] w_down?[e,d,f] "
    "shared_gate?[g,d] shared_up?[g,d] shared_down?[d,g]"
)
Weights = Mapping[str, Array | None]


def stacked_sig(letter: Callable[[str], str]) -> str:
    """WEIGHTS_SIG with one more dimension in front of each weight: the layers"""
    parts = (f"{t.name}{'?' * t.optional}[{letter(t.name)},{','.join(t.dims)}]:{t.kind}" for t in parse(f"{WEIGHTS_SIG} ->")[0])
    return " ".join(parts)


def attended_fwd(
    x: Array,
    positions: Array,
    w: Weights,
    caches: tuple[Array | None, Array | None],
    cu_seqlens: Array | None,
    *,
    absorbed: bool = False,
    rms_norm_eps: float = 1e-6,
    latent_norm_eps: float | None = None,
    **attention: Any,
) -> tuple[tuple[Array, Array, Array, Array], tuple]:
    """u[n,d] = x + attention(rmsnorm(x)) and rmsnorm(u)[n,d], with the new c_kv[b,s,c] and k_pe[b,s,r]"""
    xp, (b, s, d) = xp_of(x), x.shape
    form = mla_absorb_fwd if absorbed else mla_prefill_fwd
    attention["rms_norm_eps"] = rms_norm_eps if latent_norm_eps is None else latent_norm_eps
    rows = xp.reshape(x, (b * s, d))
    normed, s_in = stored_fwd(rmsnorm_fwd, rows, w["input_layernorm"], eps=rms_norm_eps)
    own = [w.get(name) for name in ATTENTION]
    (a, c_kv, k_pe), s_attention = form(xp.reshape(normed, x.shape), positions, *caches, cu_seqlens, *own, **attention)
    u = stored(rows + stored(xp.reshape(a, (b * s, d))))
    normed, s_post = stored_fwd(rmsnorm_fwd, u, w["post_attention_layernorm"], eps=rms_norm_eps)
    names = [name for name, array in zip((*CACHES, *ATTENTION), (*caches, *own), strict=True) if array is not None]
    return (u, normed, c_kv, k_pe), (s_in, s_attention, s_post, names, x.shape, c_kv, k_pe, absorbed)


def attended_bwd(du: Array, dnormed: Array, saved: tuple) -> tuple[Array, dict[str, Array]]:
    """dx[b,s,d] and the gradients by name, of du, the residual's, and dnormed"""
    s_in, s_attention, s_post, names, shape, c_kv, k_pe, absorbed = saved
    xp, grads = xp_of(du), {}
    back, grads["post_attention_layernorm"] = activation_bwd(rmsnorm_bwd, dnormed, s_post)
    du = stored(du + back)
    form = mla_absorb_bwd if absorbed else mla_prefill_bwd
    dnormed, *own = form(xp.reshape(du, shape), xp.zeros_like(c_kv), xp.zeros_like(k_pe), s_attention)
    grads |= dict(zip(names, own, strict=True))
    back, grads["input_layernorm"] = activation_bwd(rmsnorm_bwd, stored(xp.reshape(dnormed, du.shape)), s_in)
    return xp.reshape(stored(du + back), shape), grads


def block_by(
    x: Array,
    positions: Array,
    w: Weights,
    ffn: Callable[[Array], tuple],
    caches: tuple[Array | None, Array | None] = (None, None),
    cu_seqlens: Array | None = None,
    keep: bool = True,
    **attrs: Any,
) -> tuple[tuple[Array, Array, Array, Array], tuple]:
    """u = x + attention(rmsnorm(x)),   y = u + ffn(rmsnorm(u)):   y[b,s,d], c_kv[b,s,c], k_pe[b,s,r], topk_idx[b,s,k]

    ffn(x[n,d]) returns ((y[n,d], topk_idx[n,k]), saved), as moe.layer does. Without keep the attention's weights are let go before it runs.
    """
    xp, (b, s, _) = xp_of(x), x.shape
    (u, normed, c_kv, k_pe), s_attended = attended_fwd(x, positions, w, caches, cu_seqlens, **attrs)
    s_attended = s_attended if keep else ()
    (f, idx), s_ffn = ffn(normed)
    y = stored(u + stored(f))
    return (xp.reshape(y, x.shape), c_kv, k_pe, xp.reshape(idx, (b, s, idx.shape[1]))), (s_attended, s_ffn)


def block_by_bwd(dy: Array, saved: tuple, ffn_bwd: Callable[[Array, tuple], tuple[Array, dict]]) -> tuple[Array, dict]:
    """dx[b,s,d] and the gradients by name; ffn_bwd(dy[n,d], saved) returns dx and its own"""
    s_attended, s_ffn = saved
    du = xp_of(dy).reshape(dy, (dy.shape[0] * dy.shape[1], dy.shape[2]))
    dnormed, own = ffn_bwd(du, s_ffn)
    dx, grads = attended_bwd(du, stored(dnormed), s_attended)
    return dx, grads | own


def dense_fwd(x: Array, w: Weights, limit: float | None = None, silu: Any = "float32") -> tuple[tuple[Array, Array], tuple]:
    """A dense layer's FFN, which chooses no experts: y[n,d] and topk_idx[n,0]"""
    xp = xp_of(x)
    y, saved = mlp_fwd(x, w["gate_proj"], w["up_proj"], w["down_proj"], limit, silu, None)
    return (y, xp.zeros((x.shape[0], 0), dtype=xp.int64, device=device(x))), saved


def dense_bwd(dy: Array, saved: tuple) -> tuple[Array, dict[str, Array]]:
    dx, *own, _ = mlp_bwd(dy, saved)
    return dx, dict(zip(DENSE, own, strict=True))


OF_EXPERTS = tuple(keywords(layer_by))


def parted(op: str, w: Weights, attrs: Mapping[str, Any]) -> tuple[dict, dict]:
    """A block's attributes for its attention and for its experts; neither or both kinds of feed-forward network are refused"""
    dense, experts = ([name for name in names if w.get(name) is not None] for names in (DENSE, EXPERTS))
    needed = EXPERTS[:1] + EXPERTS[2:5]
    if (len(dense) == 3) == set(needed).issubset(experts) or (dense and experts):
        expected = f"{', '.join(DENSE)}, or {', '.join(needed)}"
        raise ValueError(f"{op}: the feed-forward network has {', '.join([*dense, *experts]) or 'no weights'}; expected {expected}")
    if dense and attrs.get("num_experts_per_tok", 8):
        raise ValueError(f"{op}: num_experts_per_tok is {attrs.get('num_experts_per_tok', 8)} in a dense layer; expected 0")
    moe = {name: value for name, value in attrs.items() if name in OF_EXPERTS}
    return {name: value for name, value in attrs.items() if name not in OF_EXPERTS}, moe


@signature(f"{SEQUENCE} {WEIGHTS_SIG} -> y[b,s,d] topk_idx[b,s,num_experts_per_tok]:index")
@attributes_of(mla_prefill_fwd, layer_by, attended_fwd)
def block_fwd(
    x: Array,
    positions: Array,
    c_kv_cache: Array | None,
    k_pe_cache: Array | None,
    cu_seqlens: Array | None,
    *weights: Array | None,
    **attrs: Any,
) -> tuple[tuple[Array, Array], tuple]:
    """u = x + attention(rmsnorm(x, input_layernorm)),   y = u + ffn(rmsnorm(u, post_attention_layernorm))

    The attention is mla.prefill's, or mla.absorb's with absorbed=True: the same function. A dense layer has gate_proj, up_proj and
    down_proj and chooses nothing (num_experts_per_tok=0), any other moe.layer's weights. latent_norm_eps is the epsilon of q_a_layernorm
    and kv_a_layernorm where it is not rms_norm_eps: DeepSeek's and Hugging Face's code leave it at 1e-6 whatever the config says. A given
    topk_idx is kept as the choice.
    """
    w = dict(zip(WEIGHTS, weights, strict=True))
    attention, moe = parted("block", w, attrs)
    dense = w["gate_proj"] is not None

    def ffn(normed: Array) -> tuple:
        return dense_fwd(normed, w, moe.get("limit"), moe.get("silu", "float32")) if dense else experts_fwd(normed, w, moe)

    (y, _, _, idx), saved = block_by(x, positions, w, ffn, (c_kv_cache, k_pe_cache), cu_seqlens, **attention)
    return (y, idx), (saved, dense, [name for name in EXPERTS if w[name] is not None and name != CONSTANT])


def experts_fwd(x: Array, w: Weights, moe: Mapping[str, Any]) -> tuple:
    """moe.layer, its choice [b,s,k] flattened"""
    idx = moe.get("topk_idx")
    flat = None if idx is None else xp_of(idx).reshape(idx, (idx.shape[0] * idx.shape[1], idx.shape[2]))
    return moe_layer_fwd(x, *(w[name] for name in EXPERTS), **{**moe, "topk_idx": flat})


def block_grads(dy: Array, saved: tuple) -> tuple[Array, dict[str, Array]]:
    """dx and the gradients of all that was given, by name"""
    parts, dense, names = saved

    def experts_bwd(df: Array, s_experts: tuple) -> tuple[Array, dict[str, Array]]:
        dx, *own = moe_layer_bwd(df, s_experts)
        return dx, dict(zip(names, own, strict=True))

    return block_by_bwd(dy, parts, dense_bwd if dense else experts_bwd)


def block_bwd(dy: Array, saved: tuple) -> tuple[Array, ...]:
    """du = dy + drmsnorm(ffn'(dy)),   dx = du + drmsnorm(attention'(du)): each residual adds its gradient to that of its branch"""
    dx, grads = block_grads(dy, saved)
    return dx, *(grads[name] for name in (*CACHES, *WEIGHTS) if name in grads)


def block_regret(
    x: Array, positions: Array, c_kv: Array | None, k_pe: Array | None, cu: Array | None, *weights: Array, topk_idx: Array, **attrs: Any
) -> Array:
    """[b,s]: by how much the router's scores would have to move for topk_idx to be the choice"""
    w, xp = dict(zip(WEIGHTS, weights, strict=True)), xp_of(x)
    attention, moe = parted("block", w, attrs)
    (_, normed, _, _), _saved = attended_fwd(x, positions, w, (c_kv, k_pe), cu, **attention)
    if w["gate_proj"] is not None:
        return xp.zeros_like(x[..., 0])
    flat = xp.reshape(topk_idx, (normed.shape[0], topk_idx.shape[2]))
    return xp.reshape(layer_regret(normed, *(w[name] for name in EXPERTS), **{**moe, "topk_idx": flat}), x.shape[:2])


SIZES = {"num_attention_heads": 2, "qk_nope_head_dim": 7, "qk_rope_head_dim": 4, "v_head_dim": 5, "kv_lora_rank": 9}
V3 = {**YARN_V3, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2}
V2 = {**YARN_V2, "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2, "topk_method": "softmax", "norm_topk_prob": False}
LITE = {**V2, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}
KIMI = {**YARN_KIMI, "num_experts_per_tok": 3, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827}
PLAIN = {**YARN_V3, "num_experts_per_tok": 0}


def layer_draws(
    lora: bool, router: str | None, dense: bool = False, e: int = 8, shared: bool = True
) -> tuple[dict[str, int], dict[str, tuple]]:
    """Sizes and draws of a layer's weights, no two sizes alike: a dense one's, those of experts behind a router, or a model's, both"""
    h, dn, r, dv, c = SIZES.values()
    d, q, i, f, g = 11, 6, 8, 3, 5
    experts = router is not None
    dims = {"d": d, "q": q * lora, "c": c, "cr": c + r, "r": r, "hq": h * (dn + r), "hkv": h * (dn + dv), "hv": h * dv}
    dims |= {"i": i * dense, "e": e * experts, "f": f * experts, "g": g * (experts and shared)}  # 0: the layer has none
    fans: dict[str, int] = {"q_a_proj": d, "q_b_proj": q} if lora else {"q_proj": d}
    fans |= {"kv_a_proj_with_mqa": d, "kv_b_proj": c, "o_proj": h * dv}
    fans |= {"gate_proj": d, "up_proj": d, "down_proj": i} if dense else {}
    fans |= {"gate_weight": d, "w_gate": d, "w_up": d, "w_down": f} if experts else {}
    fans |= {"shared_gate": d, "shared_up": d, "shared_down": g} if experts and shared else {}
    norms = ["input_layernorm", "post_attention_layernorm", "kv_a_layernorm", *(["q_a_layernorm"] if lora else [])]
    draws: dict[str, tuple] = {name: ("normal", fan**-0.5) for name, fan in fans.items()} | dict.fromkeys(norms, ("uniform", 0.5, 1.5))
    return dims, draws | ({CONSTANT: ("normal", 0.1)} if router == "noaux_tc" else {})


def sequence_draws(starts: tuple[int, ...] = (0,), ends: tuple[int, ...] = ()) -> tuple[dict[str, int], dict[str, tuple]]:
    """Positions that count up from their starts, or from 0 in each of the packed sequences that `ends` bound"""
    if not ends:
        return {}, {"positions": ("ascending", *starts)}
    within = (i for a, z in itertools.pairwise(ends) for i in range(z - a))
    return {"j": len(ends)}, {"positions": ("positions", *within), "cu_seqlens": ("positions", *ends)}


def _case(
    name: str, b: int, s: int, router: str | None, attrs: Mapping[str, Any], note: str = "", lora: bool = True, cached: int = 0, **how: Any
) -> Case:
    layer, draws = layer_draws(lora, router, router is None, how.pop("e", 8), how.pop("shared", True))
    packing, places = sequence_draws(how.pop("starts", (0,)), how.pop("ends", ()))
    draws |= places | {"x": ("normal", 1.0), "dy": ("normal", 1.0)} | (dict.fromkeys(CACHES, ("normal", 1.0)) if cached else {})
    return Case(name, {"b": b, "s": s, "t": cached, **layer, **packing}, draws, {**SIZES, **attrs, **how}, note)


block = declare(
    Op(
        "block",
        block_fwd,
        block_bwd,
        (
            _case("v3", 2, 4, "noaux_tc", V3, "a MoE layer", starts=(0, 5000)),
            _case("v3-dense", 1, 4, None, PLAIN, "one of the first layers", starts=(9,)),
            _case("v2", 1, 4, "softmax", V2, "softmax router, no bias, factor 16", starts=(3,), routed_scaling_factor=16.0),
            _case("v2-lite", 1, 5, "softmax", LITE, "greedy, no query LoRA", lora=False),
            _case("kimi-k2", 1, 4, "noaux_tc", KIMI, "no groups", starts=(100,), e=12),
            _case("absorbed", 1, 4, "noaux_tc", V3, "the same function, W_UK and W_UV folded", starts=(40,), absorbed=True),
            _case("chunk", 2, 3, "noaux_tc", V3, "three tokens after four cached ones", starts=(4, 4), cached=4),
            _case("decode", 2, 1, "noaux_tc", V3, "one token on the latent cache", starts=(5, 5), cached=5, absorbed=True),
            _case("packed", 1, 6, "noaux_tc", V3, "sequences of 1, 3 and 2 tokens in one row", ends=(0, 1, 4, 6)),
            _case("epsilon", 1, 3, None, PLAIN, "the latents' norms have another", rms_norm_eps=0.1, latent_norm_eps=1e-3),
            _case("unshared", 1, 3, "noaux_tc", V3, "no shared experts", shared=False),
        ),
        "2*b*s*(d*(q+cr)+q*hq+c*hkv+d*hv+d*e+3*d*(i+num_experts_per_tok*f+g))+2*b*s*s*(hq+hv)",
        "DeepSeek-V3 paper §2.1; DeepSeek-V3 inference/model.py, Block",
        vary="",
        choice=("topk_idx", block_regret),
    )
)
