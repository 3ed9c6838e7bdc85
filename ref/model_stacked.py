"""The op `model`: the layers' weights stacked, so that the whole model is one function of a few arrays. Spec §0; DeepSeek-V3 paper §2."""

from collections.abc import Callable, Mapping
from typing import Any

from array_api_compat import device

from .block import (
    DENSE,
    EXPERTS,
    KIMI,
    LITE,
    SIZES,
    V2,
    V3,
    WEIGHTS,
    block_fwd,
    block_grads,
    block_regret,
    layer_draws,
    sequence_draws,
    stacked_sig,
)
from .embedding import check_ids
from .model import model_by, model_by_bwd
from .op import Case, Op, attributes_of, declare, signature
from .xp import Array, xp_of

OUTER: tuple[str, ...] = ("embed_tokens", "norm", "lm_head")
HEIGHTS = {**dict.fromkeys(DENSE, "p"), **dict.fromkeys(EXPERTS, "m")}  # the others: l, of all layers


def height(name: str) -> str:
    return HEIGHTS.get(name, "l")


def layer_of(stacks: Mapping[str, Array | None], i: int, dense: int) -> list[Array | None]:
    """The weights of layer i in block's order; the first `dense` layers have no experts"""
    own = []
    for name in WEIGHTS:
        stack, at = stacks[name], i - dense if height(name) == "m" else i
        absent = at < 0 or (height(name) == "p" and i >= dense)
        own.append(None if stack is None or absent else stack[at, ...])
    return own


def heights_of(op: str, stacks: Mapping[str, Array | None]) -> tuple[int, int]:
    """How many layers there are, and how many of them are dense"""
    stack = {height(name): array.shape[0] for name, array in stacks.items() if array is not None}
    layers, dense, moe = (stack.get(letter, 0) for letter in "lpm")
    if dense + moe != layers:
        raise ValueError(f"{op}: there are {dense} dense feed-forward networks and {moe} of experts; expected {layers}, one a layer")
    return layers, dense


Part = Callable[[list, dict], tuple[Array, Any]]  # block's arrays and attributes to (x, saved)


def layers_by(part: Part, stacks: Mapping[str, Array | None], places: tuple, idx: Array | None, attrs: Mapping[str, Any]) -> list[Callable]:
    """Each layer as a function of x, for model_by; places are positions and cu_seqlens"""
    (layers, dense), (positions, cu_seqlens) = heights_of("model", stacks), places

    def of(i: int) -> Callable[[Array], tuple]:
        own = {"num_experts_per_tok": 0} if i < dense else {} if idx is None else {"topk_idx": idx[i - dense, ...]}
        return lambda x: part([x, positions, None, None, cu_seqlens, *layer_of(stacks, i, dense)], {**attrs, **own})

    return [of(i) for i in range(layers)]


@signature(
    f"ids[b,s]:index positions[b,s]:index cu_seqlens?[j]:index embed_tokens[v,d] {stacked_sig(height)} norm[d] lm_head[v,d] "
    "-> logits[b,s,v] hidden[b,s,d] topk_idx[m,b,s,num_experts_per_tok]:index"
)
@attributes_of(block_fwd)
def stacked_fwd(
    ids: Array,
    positions: Array,
    cu_seqlens: Array | None,
    embed_tokens: Array,
    *weights: Array,
    topk_idx: Array | None = None,
    **attrs: Any,
) -> tuple[tuple[Array, Array, Array], tuple]:
    """x = embed_tokens[ids],   x = block(x) for each layer,   hidden = rmsnorm(x, norm),   logits = lm_head hidden

    Attention and norms are stacked over all l layers, a dense feed-forward network over the first p, experts over the m others. hidden is
    what an MTP module reads. The attributes are block's; num_experts_per_tok that of the MoE layers. A given topk_idx is kept.
    """
    check_ids("model", "ids", ids, embed_tokens.shape[0])
    stacks, chosen = dict(zip(WEIGHTS, weights[:-2], strict=True)), []

    def part(arrays: list, how: dict) -> tuple[Array, tuple]:
        (y, idx), saved = block_fwd(*arrays, **how)
        chosen.append(idx)
        return y, saved

    layers = layers_by(part, stacks, (positions, cu_seqlens), topk_idx, attrs)
    outer = dict(zip(OUTER, (embed_tokens, *weights[-2:]), strict=True))
    (logits, hidden), saved = model_by(ids, outer, layers, attrs.get("rms_norm_eps", 1e-6))
    xp, (_, dense) = xp_of(embed_tokens), heights_of("model", stacks)
    none = xp.zeros((0, *ids.shape, attrs.get("num_experts_per_tok", 8)), dtype=xp.int64, device=device(ids))
    return (logits, hidden, xp.stack(chosen[dense:], axis=0) if chosen[dense:] else none), (saved, dense)


def stacked_bwd(dlogits: Array, dhidden: Array, saved: tuple) -> tuple[Array, ...]:
    """dx = dhidden + lm_headᵀ dlogits through the norm, then through the layers from the last to the first; dembed_tokens gathers by id"""
    parts, dense = saved
    outer, layers = model_by_bwd(dlogits, dhidden, parts, block_grads)
    xp, grads = xp_of(dlogits), []
    for name in WEIGHTS:
        of = {"p": layers[:dense], "m": layers[dense:]}.get(height(name), layers)
        if of and name in of[0]:
            grads.append(xp.stack([own[name] for own in of], axis=0))
    return outer["embed_tokens"], *grads, outer["norm"], outer["lm_head"]


def model_regret(
    ids: Array, positions: Array, cu_seqlens: Array | None, embed_tokens: Array, *weights: Array, topk_idx: Array, **attrs: Any
) -> Array:
    """[m,b,s]: by how much a layer's router scores would have to move for topk_idx to be the choice, that of earlier layers kept"""
    stacks, found = dict(zip(WEIGHTS, weights[:-2], strict=True)), []

    def part(arrays: list, how: dict) -> tuple[Array, None]:
        if "topk_idx" in how:
            found.append(block_regret(*arrays, **how))
        return block_fwd(*arrays, **how)[0][0], None

    layers = layers_by(part, stacks, (positions, cu_seqlens), topk_idx, attrs)
    model_by(ids, dict(zip(OUTER, (embed_tokens, *weights[-2:]), strict=True)), layers, attrs.get("rms_norm_eps", 1e-6))
    return xp_of(embed_tokens).stack(found, axis=0)


def _case(
    name: str, b: int, s: int, layers: tuple[int, int], router: str, attrs: Mapping[str, Any], note: str = "", lora: bool = True, **how: Any
) -> Case:
    dense, moe = layers
    own, draws = layer_draws(lora, router, dense=bool(dense))
    packing, places = sequence_draws(how.pop("starts", (0,)), how.pop("ends", ()))
    v = 17
    draws |= places | {"ids": ("integers", 0, v), "embed_tokens": ("normal", 1.0), "norm": ("uniform", 0.5, 1.5)}
    draws |= {"lm_head": ("normal", 0.25), "dlogits": ("normal", 1.0), "dhidden": ("normal", 1.0)}
    dims = {"b": b, "s": s, "v": v, "l": dense + moe, "p": dense, "m": moe}
    return Case(name, {**dims, **own, **packing}, draws, {**SIZES, **attrs, **how}, note)


model = declare(
    Op(
        "model",
        stacked_fwd,
        stacked_bwd,
        (
            _case("v3", 1, 4, (1, 2), "noaux_tc", V3, "one dense layer, two of experts", starts=(3,)),
            _case("v2", 2, 3, (1, 1), "softmax", V2, "softmax router", starts=(0, 9)),
            _case("v2-lite", 1, 4, (1, 1), "softmax", LITE, "no query LoRA", lora=False),
            _case("kimi-k2", 1, 4, (1, 1), "noaux_tc", KIMI, "no groups"),
            _case("packed", 1, 6, (1, 1), "noaux_tc", V3, "sequences of 1, 3 and 2 tokens in one row", ends=(0, 1, 4, 6)),
            _case("experts-only", 1, 3, (0, 2), "noaux_tc", V3, "no dense layer", starts=(7,), absorbed=True),
            _case("two-dense", 1, 3, (2, 1), "noaux_tc", V3, "two dense layers before the experts", starts=(2,)),
        ),
        "2*b*s*(l*(d*(q+cr)+q*hq+c*hkv+d*hv)+p*3*d*i+m*(d*e+3*d*(num_experts_per_tok*f+g))+v*d)+2*l*b*s*s*(hq+hv)",
        "DeepSeek-V3 paper §2; DeepSeek-V3 inference/model.py, Transformer",
        vary="",
        choice=("topk_idx", model_regret),
    )
)
