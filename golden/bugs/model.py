"""Bugs of the block, and of the model around its blocks."""

from collections.abc import Callable
from typing import Any

from ...ref.block import CACHES, WEIGHTS, attended_bwd, block, block_bwd, block_fwd, block_grads, dense_fwd, experts_fwd, parted
from ...ref.linear import linear_fwd
from ...ref.mla import mla_absorb_fwd, mla_prefill_fwd
from ...ref.mla_parts import WEIGHTS as ATTENTION
from ...ref.model import model_by
from ...ref.model_stacked import OUTER, heights_of, layers_by, model, stacked_bwd, stacked_fwd
from ...ref.norm import rmsnorm_fwd
from ...ref.op import Op
from ...ref.xp import Array, xp_of
from . import Bug

Result = tuple[Any, Any]
Given = dict[str, Any]


def with_arguments(op: Op, change: Callable[[Given, Given], tuple[Given, Given]]) -> Callable:
    """The op's forward with other arrays or attributes: change(arrays by name, attributes)."""
    names = [t.name for t in op.inputs]

    def fwd(*arrays: Array, **attrs: Any) -> Result:
        given, own = change(dict(zip(names, arrays, strict=True)), {**op.defaults, **attrs})
        return op.fwd(*(given[name] for name in names), **own)

    return fwd


class Layer:
    """The block taken apart: norms, attention, feed-forward network. The variants below each put them together in another way."""

    def __init__(self, x: Array, positions: Array, c_kv: Array | None, k_pe: Array | None, cu: Array | None, *weights: Any, **attrs: Any):
        self.x, self.w, self.eps = x, dict(zip(WEIGHTS, weights, strict=True)), attrs.get("rms_norm_eps", 1e-6)
        self.places = positions, c_kv, k_pe, cu
        self.of_attention, self.of_experts = parted("block", self.w, attrs)
        self.idx: Array = x

    def norm(self, x: Array, name: str) -> Array:
        xp = xp_of(x)
        return xp.reshape(rmsnorm_fwd(xp.reshape(x, (-1, x.shape[2])), self.w[name], eps=self.eps)[0], x.shape)

    def attention(self, x: Array) -> Array:
        own = dict(self.of_attention)
        inner = own.pop("latent_norm_eps", None)
        own["rms_norm_eps"] = self.eps if inner is None else inner
        form = mla_absorb_fwd if own.pop("absorbed", False) else mla_prefill_fwd
        return form(x, *self.places, *(self.w[name] for name in ATTENTION), **own)[0][0]

    def ffn(self, x: Array) -> Array:
        xp, rows = xp_of(x), xp_of(x).reshape(x, (-1, x.shape[2]))
        dense = self.w["gate_proj"] is not None
        how = (self.of_experts.get("limit"), self.of_experts.get("silu", "float32"))
        (y, idx), _ = dense_fwd(rows, self.w, *how) if dense else experts_fwd(rows, self.w, self.of_experts)
        self.idx = xp.reshape(idx, (*x.shape[:2], idx.shape[1]))
        return xp.reshape(y, x.shape)


def block_of(steps: Callable[[Layer], Array]) -> Callable:
    def fwd(*arrays: Any, **attrs: Any) -> Result:
        it = Layer(*arrays, **attrs)
        y = steps(it)
        return (y, it.idx), ()

    return fwd


def right(it: Layer) -> Array:
    u = it.x + it.attention(it.norm(it.x, "input_layernorm"))
    return u + it.ffn(it.norm(u, "post_attention_layernorm"))


def residual_normed(it: Layer) -> Array:
    normed = it.norm(it.x, "input_layernorm")
    u = normed + it.attention(normed)
    return u + it.ffn(it.norm(u, "post_attention_layernorm"))


def parallel(it: Layer) -> Array:
    u = it.x + it.attention(it.norm(it.x, "input_layernorm"))
    return u + it.ffn(it.norm(it.x, "post_attention_layernorm"))


def attention_skipped(it: Layer) -> Array:
    u = it.x + it.attention(it.norm(it.x, "input_layernorm"))
    return it.x + it.ffn(it.norm(u, "post_attention_layernorm"))


def norms_swapped(given: Given, attrs: Given) -> tuple[Given, Given]:
    names = ("input_layernorm", "post_attention_layernorm")
    return {**given, names[0]: given[names[1]], names[1]: given[names[0]]}, attrs


def without_packing(given: Given, attrs: Given) -> tuple[Given, Given]:
    return {**given, "cu_seqlens": None}, attrs


def attention_residual_missing(dy: Array, saved: tuple) -> tuple[Array, ...]:
    """dx lacks du: with an input norm of weight 0 du is all there is."""
    (s_attended, s_ffn), *rest = saved
    x, weight, *norm = s_attended[0]
    du, _ = block_grads(dy, ((((x, 0 * weight, *norm), *s_attended[1:]), s_ffn), *rest))
    dx, *grads = block_bwd(dy, saved)
    return dx - du, *grads


def ffn_residual_missing(dy: Array, saved: tuple) -> tuple[Array, ...]:
    """du lacks dy: all gradients lack what dy alone sends through the attention."""
    flat = xp_of(dy).reshape(dy, (-1, dy.shape[2]))
    lost, of_dy = attended_bwd(flat, 0 * flat, saved[0][0])
    dx, grads = block_grads(dy, saved)
    left = {name: g - of_dy[name] if name in of_dy else g for name, g in grads.items()}
    return dx - lost, *(left[name] for name in (*CACHES, *WEIGHTS) if name in left)


def layers_of(before: Callable[[int, int, Array, Given], Array]) -> Callable:
    """The model with another x before layer i: before(i, how many layers are dense, x, attributes)."""

    def fwd(
        ids: Array, positions: Array, cu_seqlens: Array | None, embed_tokens: Array, *weights: Any, topk_idx: Any = None, **attrs: Any
    ) -> Result:
        own, stacks, chosen = {**model.defaults, **attrs}, dict(zip(WEIGHTS, weights[:-2], strict=True)), []
        _, dense = heights_of("model", stacks)

        def part(arrays: list, how: Given) -> Result:
            (y, idx), _ = block_fwd(before(len(chosen), dense, arrays[0], own), *arrays[1:], **how)
            chosen.append(idx)
            return y, ()

        layers = layers_by(part, stacks, (positions, cu_seqlens), topk_idx, attrs)
        outer = dict(zip(OUTER, (embed_tokens, *weights[-2:]), strict=True))
        (logits, hidden), _ = model_by(ids, outer, layers, own["rms_norm_eps"], False)
        xp = xp_of(ids)
        none = xp.zeros((0, *ids.shape, own["num_experts_per_tok"]), dtype=xp.int64)
        return (logits, hidden, xp.stack(chosen[dense:], axis=0) if chosen[dense:] else none), ()

    return fwd


def before_norm(*arrays: Any, **attrs: Any) -> tuple[Array, Array, Array, Array]:
    """logits, hidden, topk_idx, and what the final norm reads"""
    (logits, hidden, idx), (parts, _) = stacked_fwd(*arrays, **attrs)
    return logits, hidden, idx, xp_of(hidden).reshape(parts[2][0], hidden.shape)


def hidden_unnormed(*arrays: Any, **attrs: Any) -> Result:
    logits, _, idx, x = before_norm(*arrays, **attrs)
    return (logits, x, idx), ()


def logits_unnormed(*arrays: Any, **attrs: Any) -> Result:
    logits, hidden, idx, x = before_norm(*arrays, **attrs)
    rows, _ = linear_fwd(xp_of(x).reshape(x, (-1, x.shape[2])), arrays[-1])
    return (xp_of(x).reshape(rows, logits.shape), hidden, idx), ()


BLOCK, MODEL = ("block",), ("model",)
BUGS = [
    Bug("block-residual-normed", BLOCK, "The first residual is the norm's output instead of its input.", fwd=block_of(residual_normed)),
    Bug(
        "block-parallel", BLOCK, "The feed-forward network reads the norm of x, not of the attention's sum with it.", fwd=block_of(parallel)
    ),
    Bug("block-attention-residual-lost", BLOCK, "The second residual is x: what attention adds is lost.", fwd=block_of(attention_skipped)),
    Bug("block-norms-swapped", BLOCK, "The weights of the two norms are swapped.", fwd=with_arguments(block, norms_swapped)),
    Bug(
        "block-latent-eps",
        BLOCK,
        "The norms inside attention take rms_norm_eps; released code leaves them at 1e-6.",
        attrs={"latent_norm_eps": None},
        benign=True,
    ),
    Bug(
        "block-bwd-attention-residual-missing",
        BLOCK,
        "dx lacks what comes through the first residual.",
        bwd=attention_residual_missing,
    ),
    Bug("block-bwd-ffn-residual-missing", BLOCK, "The gradients lack what comes through the second residual.", bwd=ffn_residual_missing),
    Bug(
        "mla-packed-sequences-mixed",
        BLOCK,
        "Packed sequences see those before them in the row.",
        fwd=with_arguments(block, without_packing),
        bwd=block_bwd,
    ),
    Bug(
        "fp16-residual-rescale-repeated",
        MODEL,
        "The residual is divided by routed_scaling_factor in every dense layer instead of once: too often by one less than there are.",
        "vllm-project/vllm#14809",
        fwd=layers_of(lambda i, dense, x, own: x / own["routed_scaling_factor"] if 0 < i < dense else x),
    ),
    Bug(
        "mtp-hidden-norm-stage",
        MODEL,
        "The hidden state that MTP reads is taken before the final norm instead of after it.",
        "ROCm/ATOM#1764; ml-explore/mlx-lm#1469",
        fwd=hidden_unnormed,
    ),
    Bug("model-final-norm-missing", MODEL, "The head reads the last layer's output, not its norm.", fwd=logits_unnormed),
    Bug(
        "model-head-tied",
        MODEL,
        "The embedding serves as head too; DeepSeek's are two.",
        fwd=with_arguments(model, lambda given, attrs: ({**given, "lm_head": given["embed_tokens"]}, attrs)),
    ),
    Bug(
        "mla-packed-sequences-mixed",
        MODEL,
        "Packed sequences see those before them in the row.",
        fwd=with_arguments(model, without_packing),
        bwd=stacked_bwd,
    ),
    Bug(
        "model-bwd-hidden-dropped",
        MODEL,
        "What MTP sends back through the hidden state does not reach the model.",
        bwd=lambda dlogits, dhidden, saved: stacked_bwd(dlogits, 0 * dhidden, saved),
    ),
]
