"""Multi-token prediction: one module, which reads a hidden state and a later token and predicts the one after. Spec §5; V3 paper §2.2.

module_by is the module around any block: `mtp` takes it from arrays, generation from a checkpoint and its cache.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from .block import (
    KIMI,
    LITE,
    PLAIN,
    SIZES,
    V3,
    WEIGHTS,
    WEIGHTS_SIG,
    Weights,
    block_fwd,
    block_grads,
    block_regret,
    layer_draws,
    sequence_draws,
)
from .embedding import check_ids, embedding_bwd, embedding_fwd
from .linear import linear_bwd, linear_fwd
from .mla_parts import activation_bwd, stored_fwd
from .norm import rmsnorm_bwd, rmsnorm_fwd
from .op import Case, Op, attributes_of, declare, signature
from .xp import Array, stored, xp_of

Concat = Literal["embed_first", "hidden_first"]
Chain = Literal["post_norm", "pre_norm"]
MODULE: tuple[str, ...] = ("enorm", "hnorm", "eh_proj", *WEIGHTS, "shared_head_norm")
PLACES = "positions[b,s]:index cu_seqlens?[j]:index"


def module_by(
    h: Array, embedded: Array, w: Weights, block: Callable[[Array], tuple], concat: Concat = "embed_first", eps: float = 1e-6
) -> tuple[tuple[Array, Array], tuple]:
    """x = eh_proj [rmsnorm(embedded, enorm); rmsnorm(h, hnorm)],   y = block(x),   last = rmsnorm(y, shared_head_norm)

    Of h[b,s,d] and embedded[n,d]; returns last and y, both [b,s,d]. block(x) returns (y, saved).
    """
    xp, (b, s, d) = xp_of(h), h.shape
    e, s_enorm = stored_fwd(rmsnorm_fwd, embedded, w["enorm"], eps=eps)
    g, s_hnorm = stored_fwd(rmsnorm_fwd, xp.reshape(h, (b * s, d)), w["hnorm"], eps=eps)
    x, s_merge = stored_fwd(linear_fwd, xp.concat([e, g] if concat == "embed_first" else [g, e], axis=1), w["eh_proj"])  # [n,d]
    y, s_block = block(xp.reshape(x, h.shape))
    last, s_last = stored_fwd(rmsnorm_fwd, xp.reshape(y, (b * s, d)), w["shared_head_norm"], eps=eps)
    return (xp.reshape(last, h.shape), y), (s_enorm, s_hnorm, s_merge, s_block, s_last, concat)


def module_by_bwd(dlast: Array, dy: Array, saved: tuple, block_bwd: Callable) -> tuple[Array, Array, dict[str, Array]]:
    """dh[b,s,d], dembedded[n,d] and the gradients by name"""
    s_enorm, s_hnorm, s_merge, s_block, s_last, concat = saved
    xp, shape, grads = xp_of(dlast), dlast.shape, {}
    n, d = shape[0] * shape[1], shape[2]
    back, grads["shared_head_norm"] = activation_bwd(rmsnorm_bwd, xp.reshape(dlast, (n, d)), s_last)
    dx, own = block_bwd(stored(dy + xp.reshape(back, shape)), s_block)
    dpair, grads["eh_proj"] = activation_bwd(linear_bwd, xp.reshape(dx, (n, d)), s_merge)
    de, dg = (dpair[:, :d], dpair[:, d:]) if concat == "embed_first" else (dpair[:, d:], dpair[:, :d])
    dembedded, grads["enorm"] = activation_bwd(rmsnorm_bwd, de, s_enorm)
    dh, grads["hnorm"] = activation_bwd(rmsnorm_bwd, dg, s_hnorm)
    return xp.reshape(dh, shape), dembedded, grads | own


def module_fwd(
    h: Array,
    ids: Array,
    places: tuple[Array, Array | None],
    embed_tokens: Array,
    w: Weights,
    concat: Concat,
    chain: Chain,
    attrs: Mapping[str, Any],
    part: Callable = block_fwd,
) -> tuple[tuple[Array, Array, Any], tuple]:
    """last[b,s,d], h_next[b,s,d] and topk_idx of a module whose row i reads h[:,i] and ids[:,i]; places are positions and cu_seqlens"""
    xp, found = xp_of(h), []

    def block(x: Array) -> tuple:
        result, saved = part(x, places[0], None, None, places[1], *(w[name] for name in WEIGHTS), **attrs)
        y, idx = result
        found.append(idx)
        return y, saved

    check_merge("mtp", h, w["eh_proj"])
    embedded, s_embedding = embedding_fwd(xp.reshape(ids, (ids.shape[0] * ids.shape[1],)), embed_tokens)
    (last, y), saved = module_by(h, embedded, w, block, concat, attrs.get("rms_norm_eps", 1e-6))
    return (last, last if chain == "post_norm" else y, found[0]), (s_embedding, saved, chain)


def module_bwd(dlast: Array, dh_next: Array, saved: tuple) -> tuple[Array, Array, dict[str, Array]]:
    """dh, dembed_tokens and the gradients by name"""
    s_embedding, parts, chain = saved
    after = chain == "post_norm"
    dlast, dy = (stored(dlast + dh_next), 0 * dh_next) if after else (dlast, dh_next)
    dh, dembedded, grads = module_by_bwd(dlast, dy, parts, block_grads)
    return dh, embedding_bwd(dembedded, s_embedding), grads


def check_merge(op: str, h: Array, eh_proj: Any) -> None:
    if eh_proj.shape[-1] != 2 * h.shape[2]:
        raise ValueError(f"{op}: eh_proj has shape {tuple(eh_proj.shape)}; expected {2 * h.shape[2]} on its last axis, twice h's width")


def read_by(op: str, h: Array, ids: Array, embed_tokens: Array, depth: int) -> Array:
    """ids[b,s]: the token that each row reads"""
    if depth < 0 or ids.shape[1] != h.shape[1] + depth:
        raise ValueError(f"{op}: ids has {ids.shape[1]} tokens, depth is {depth}; expected {h.shape[1]} + depth, with depth >= 0")
    check_ids(op, "ids", ids, embed_tokens.shape[0])
    return ids[:, depth:]


@signature(
    f"h[b,s,d] ids[b,t]:index {PLACES} enorm[d] hnorm[d] eh_proj[d,dd] {WEIGHTS_SIG} shared_head_norm[d] "
    "embed_tokens[v,d] shared_head[v,d] -> logits[b,s,v] h_next[b,s,d] topk_idx[b,s,num_experts_per_tok]:index"
)
@attributes_of(block_fwd)
def mtp_fwd(
    h: Array,
    ids: Array,
    positions: Array,
    cu_seqlens: Array | None,
    *weights: Array,
    depth: int = 1,
    concat: Concat = "embed_first",
    chain: Chain = "post_norm",
    **attrs: Any,
) -> tuple[tuple[Array, Array, Array], tuple]:
    """h'[i] = eh_proj [rmsnorm(embed_tokens[ids[i+depth]]); rmsnorm(h[i])],   logits = shared_head rmsnorm(block(h'))   (V3 eq. 21-23)

    h is the main model's output after its final norm, or the module before's h_next; ids are the tokens from h's first row on, `depth` more
    than it has rows. Row i predicts token i + depth + 1. concat: the released weights have the embedding first, the paper the hidden state.
    h_next is what shared_head reads (chain="post_norm", Hugging Face and the engines), or what the block gives. positions are the rows' own
    (of token i in vLLM, of the token that is read in Hugging Face: only their differences matter). The other attributes are block's.
    """
    xp = xp_of(h)
    w, (embed_tokens, shared_head) = dict(zip(MODULE, weights[:-2], strict=True)), weights[-2:]
    read = read_by("mtp", h, ids, embed_tokens, depth)
    (last, h_next, idx), saved = module_fwd(h, read, (positions, cu_seqlens), embed_tokens, w, concat, chain, attrs)
    logits, s_head = linear_fwd(xp.reshape(last, (h.shape[0] * h.shape[1], h.shape[2])), shared_head)
    return (xp.reshape(logits, (*h.shape[:2], shared_head.shape[0])), h_next, idx), (saved, s_head)


def mtp_bwd(dlogits: Array, dh_next: Array, saved: tuple) -> tuple[Array, ...]:
    """dlast = shared_headᵀ dlogits + dh_next,   dh = hnorm'(eh_projᵀ block'(…)): embedding and head are shared with the model"""
    parts, s_head = saved
    xp = xp_of(dlogits)
    dlast, dshared_head = activation_bwd(linear_bwd, xp.reshape(dlogits, (dlogits.shape[0] * dlogits.shape[1], dlogits.shape[2])), s_head)
    dh, dembed_tokens, grads = module_bwd(xp.reshape(dlast, dh_next.shape), dh_next, parts)
    return dh, *(grads[name] for name in MODULE if name in grads), dembed_tokens, dshared_head


def mtp_regret(h: Array, ids: Array, positions: Array, cu_seqlens: Array | None, *weights: Array, topk_idx: Array, **attrs: Any) -> Array:
    """[b,s]: by how much the router's scores would have to move for topk_idx to be the choice"""
    w, own = dict(zip(MODULE, weights[:-2], strict=True)), {"topk_idx": topk_idx, **attrs}
    depth, concat, chain = own.pop("depth", 1), own.pop("concat", "embed_first"), own.pop("chain", "post_norm")

    def part(x: Array, *arrays: Array, **how: Any) -> tuple:
        return (x, block_regret(x, *arrays, **how)), ()

    return module_fwd(h, ids[:, depth:], (positions, cu_seqlens), weights[-2], w, concat, chain, own, part)[0][2]


def module_draws(lora: bool = True, router: str | None = "noaux_tc") -> tuple[dict[str, int], dict[str, tuple]]:
    """Sizes and draws of a module's weights and of the embedding and head that it shares"""
    dims, draws = layer_draws(lora, router, router is None)
    d, v = dims["d"], 17
    draws |= dict.fromkeys(("enorm", "hnorm", "shared_head_norm"), ("uniform", 0.5, 1.5))
    draws |= {"eh_proj": ("normal", (2 * d) ** -0.5), "embed_tokens": ("normal", 1.0), "shared_head": ("normal", d**-0.5)}
    return {**dims, "dd": 2 * d, "v": v}, draws | {"h": ("normal", 1.0), "ids": ("integers", 0, v)}


def _case(
    name: str, b: int, s: int, attrs: Mapping[str, Any], note: str = "", lora: bool = True, router: str | None = "noaux_tc", **how: Any
) -> Case:
    dims, draws = module_draws(lora, router)
    packing, places = sequence_draws(how.pop("starts", (0,)), how.pop("ends", ()))
    draws |= places | {"dlogits": ("normal", 1.0), "dh_next": ("normal", 1.0)}
    return Case(name, {"b": b, "s": s, "t": s + how.get("depth", 1), **dims, **packing}, draws, {**SIZES, **attrs, **how}, note)


mtp = declare(
    Op(
        "mtp",
        mtp_fwd,
        mtp_bwd,
        (
            _case("v3", 2, 3, V3, "the first module", starts=(0, 7000)),
            _case("second", 1, 4, V3, "row i reads token i + 2", starts=(5,), depth=2),
            _case("paper", 1, 3, V3, "[hidden; embedding]", concat="hidden_first"),
            _case("pre-norm", 1, 4, V3, "the chain goes on before the norm", chain="pre_norm"),
            _case("packed", 1, 6, V3, "sequences of 1, 3 and 2 tokens in one row", ends=(0, 1, 4, 6)),
            _case("kimi-k2", 1, 3, KIMI, "no groups"),
            _case("v2-lite", 1, 3, LITE, "no query LoRA, softmax router", False, "softmax"),
            _case("dense", 1, 3, PLAIN, "a block without experts", router=None),
            _case("itself", 1, 3, V3, "depth 0: row i reads token i", depth=0),
        ),
        "2*b*s*(2*d*d+d*(q+cr)+q*hq+c*hkv+d*hv+d*e+3*d*(i+num_experts_per_tok*f+g)+v*d)+2*b*s*s*(hq+hv)",
        "DeepSeek-V3 paper eq. 21-23; Hugging Face modeling_layers.py, MtpLayer",
        vary="",
        choice=("topk_idx", mtp_regret),
    )
)
