"""Bugs of the MoE layer: the gate, its experts, the shared experts, and what each adds to dx."""

from collections.abc import Callable
from typing import Any

from ...ref.cast import round_to
from ...ref.formats import BF16
from ...ref.linear import linear_bwd, linear_fwd
from ...ref.moe import mlp_fwd, moe_experts_bwd, moe_experts_fwd, moe_layer, moe_layer_bwd, moe_layer_fwd, no_bias, route
from ...ref.router import router_noaux_tc_bwd, scores_of
from ...ref.router_softmax import router_softmax_bwd
from ...ref.xp import Array, xp_of
from . import Bug
from .moe_experts import BUGS as OF_EXPERTS
from .moe_experts import EXPERTS, not_cut, of_previous, slope_is_sigmoid, with_activations
from .router import best, bias_leaks, choice, denominator_constant, leaks_to_unselected, score_slope_missing

Grads = tuple[Array, ...]
Saved = tuple[Any, ...]
COMMON = ("n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor", "denominator_eps", "mask_fill")
ACTIVATION = ("limit", "silu")


class Layer:
    """The layer taken apart: logits, choice and weights, experts, shared experts. The variants below each change one step."""

    def __init__(self, x: Array, gate_weight: Array, bias: Array | None, *weights: Array | None, **attrs: Any):
        self.o = o = {**moe_layer.defaults, **attrs}
        self.x, self.routed, self.own_shared = x, weights[:3], weights[3:]
        self.noaux = o["topk_method"] == "noaux_tc"
        self.logits, _ = linear_fwd(x, gate_weight)
        self.bias = no_bias(self.logits) if bias is None else bias
        self.common = {**{k: o[k] for k in COMMON}, "k": o["num_experts_per_tok"], "topk_idx": attrs.get("topk_idx")}
        self.extra = {k: o[k] for k in ("scoring", "gate_dtype")}

    def route(self, **change: Any) -> tuple[Array, Array]:
        """topk_idx and topk_weight"""
        found, _ = route(change.pop("logits", self.logits), self.bias, self.o["topk_method"], {**self.common, **change}, self.extra)
        return found

    def experts(self, idx: Array, weight: Array, fwd: Callable = moe_experts_fwd) -> Array:
        how = {k: self.o[k] for k in (*ACTIVATION, "weight_before_down")}
        return fwd(self.x, idx, weight, *self.routed, **how)[0]

    def shared(self) -> Array:
        """Of the shared experts; 0 if there are none"""
        gate, up, down = self.own_shared
        if gate is None:
            return xp_of(self.x).zeros_like(self.x)
        return mlp_fwd(self.x, gate, up, down, self.o["limit"], self.o["silu"], None)[0]


def _layer(change: Callable[[Layer], tuple[Array, Array]]) -> Callable:
    """A forward in steps: y and topk_idx"""
    return lambda *arrays, **attrs: (change(Layer(*arrays, **attrs)), ())


def right(it: Layer) -> tuple[Array, Array]:
    idx, weight = it.route()
    return it.experts(idx, weight) + it.shared(), idx


def _routed(change: Callable[[Layer], tuple[Array, Array]]) -> Callable:
    """The layer with another choice and weights"""

    def steps(it: Layer) -> tuple[Array, Array]:
        idx, weight = change(it)
        return it.experts(idx, weight) + it.shared(), idx

    return _layer(steps)


def leaking(it: Layer) -> tuple[Array, Array]:
    if not it.noaux:
        return it.route()
    given = {} if it.common["topk_idx"] is None else {"topk_idx": it.common["topk_idx"]}
    return bias_leaks(it.logits, it.bias, **{k: v for k, v in {**it.common, **it.extra}.items() if k != "topk_idx"}, **given)[0]


def unbiased(it: Layer) -> tuple[Array, Array]:
    it.bias = 0 * it.bias
    return it.route()


def _grouped(score: Callable | None) -> Callable[[Layer], tuple[Array, Array]]:
    """Another way to score groups; none for no groups. V2's groups go by their best already."""

    def change(it: Layer) -> tuple[Array, Array]:
        if it.common["topk_idx"] is not None:
            return it.route()
        t = scores_of(it.logits, it.o["scoring"]) + it.bias if it.noaux else scores_of(it.logits, "softmax")
        return it.route(topk_idx=choice(t, it.common, score))

    return change


def _summed(change: Callable[[Layer, Array, Array], Array]) -> Callable:
    """The layer with another sum of the experts' output and the shared experts'"""

    def steps(it: Layer) -> tuple[Array, Array]:
        idx, weight = it.route()
        return change(it, it.experts(idx, weight), it.shared()), idx

    return _layer(steps)


def _factor(it: Layer) -> float:
    return it.o["routed_scaling_factor"]


def unscaled(*arrays: Array, **attrs: Any) -> tuple[tuple[Array, Array], Saved]:
    return moe_layer_fwd(*arrays, **{**attrs, "routed_scaling_factor": 1.0})


def swapped(x: Array, gate: Array, bias: Array | None, *w: Array | None, **attrs: Any) -> tuple[tuple[Array, Array], Saved]:
    """Every gate projection for its up projection"""
    return moe_layer_fwd(x, gate, bias, w[1], w[0], w[2], w[4], w[3], w[5], **attrs)


def swapped_bwd(dy: Array, saved: Saved) -> Grads:
    dx, dgate_weight, dup, dgate, ddown, *shared = moe_layer_bwd(dy, saved)
    return dx, dgate_weight, dgate, dup, ddown, *(shared[1::-1] + shared[2:])


def _experts_bug(id: str) -> Bug:
    """The layer around a bug of the experts' forward"""
    (bug,) = (b for b in OF_EXPERTS if b.id == id and b.fwd is not None)
    assert bug.ops == EXPERTS

    def steps(it: Layer) -> tuple[Array, Array]:
        idx, weight = it.route()
        return it.experts(idx, weight, bug.fwd or moe_experts_fwd) + it.shared(), idx

    return Bug(id, LAYER, bug.what, bug.sources, fwd=_layer(steps))


def _router_bwd(change: Callable[[Callable], Callable]) -> Callable:
    """The backward with another one of the router"""

    def bwd(dy: Array, saved: Saved) -> Grads:
        s_logits, s_router, s_experts, _, method = saved
        own = router_noaux_tc_bwd if method == "noaux_tc" else router_softmax_bwd
        dweight = moe_experts_bwd(dy, s_experts)[1]
        wrong, true = (linear_bwd(f(dweight, s_router), s_logits) for f in (change(own), own))
        dx, dgate_weight, *rest = moe_layer_bwd(dy, saved)
        return dx + (wrong[0] - true[0]), dgate_weight + (wrong[1] - true[1]), *rest

    return bwd


def _saved(change: Callable[..., Saved]) -> Callable:
    """The backward from other saved arrays: change(s_logits, s_router, s_experts, s_shared, method)"""
    return lambda dy, saved: moe_layer_bwd(dy, change(*saved))


def _activations(change: Callable[[Saved], Saved]) -> Callable:
    def other(s_logits: Saved, s_router: Saved, s_experts: Saved, s_shared: Saved | None, method: str) -> Saved:
        shared = None if s_shared is None else (*s_shared[:2], change(s_shared[2]), *s_shared[3:])
        return s_logits, s_router, with_activations(s_experts, change), shared, method

    return _saved(other)


def gate_not_in_dx(s_logits: Saved, *rest: Any) -> Saved:
    return (s_logits[0], 0 * s_logits[1]), *rest


def shared_not_in_dx(s_logits: Saved, s_router: Saved, s_experts: Saved, s_shared: Saved | None, method: str) -> Saved:
    if s_shared is not None:
        s_shared = ((s_shared[0][0], 0 * s_shared[0][1]), (s_shared[1][0], 0 * s_shared[1][1]), *s_shared[2:])
    return s_logits, s_router, s_experts, s_shared, method


def experts_not_in_dx(dy: Array, saved: Saved) -> Grads:
    dx, *rest = moe_layer_bwd(dy, saved)
    return dx - moe_experts_bwd(dy, saved[2])[0], *rest


def gate_untrained(dy: Array, saved: Saved) -> Grads:
    """dtopk_weight is 0: nothing reaches the gate."""
    dx, dgate_weight, *rest = _saved(gate_not_in_dx)(dy, saved)
    return dx, 0 * dgate_weight, *rest


def empty_not_zeroed(dy: Array, saved: Saved) -> Grads:
    dx, dgate_weight, *dws = moe_layer_bwd(dy, saved)
    filled = {i for i, _, _ in saved[2][4]}
    return dx, dgate_weight, *(of_previous(dw, filled) for dw in dws[:3]), *dws[3:]


LAYER = ("moe.layer",)
BUGS = [
    Bug("bias-leaks-into-weights", LAYER, "Weights are taken from s + bias; the bias may only choose.", fwd=_routed(leaking)),
    Bug("bias-ignored", LAYER, "The selection bias is not used.", fwd=_routed(unbiased)),
    Bug(
        "group-score-max",
        LAYER,
        "A group's score is its maximum (V2) instead of the sum of its two largest.",
        "vllm-project/vllm#13474",
        fwd=_routed(_grouped(best)),
    ),
    Bug("group-ignored", LAYER, "The groups are ignored: a plain top-k.", fwd=_routed(_grouped(None))),
    Bug("softmax-instead-of-sigmoid", LAYER, "Scores are softmax(logits) instead of sigmoid.", attrs={"scoring": "softmax"}),
    Bug("norm-topk-missing", LAYER, "The weights are not normalised.", attrs={"norm_topk_prob": False}),
    Bug(
        "router-logits-bf16",
        LAYER,
        "Logits are rounded to bfloat16 before the scores.",
        "vllm-project/vllm#14027, #58076; sgl-project/sglang#34861, #35992; deepseek-ai/DeepSeek-V3#696",
        fwd=_routed(lambda it: it.route(logits=round_to(BF16, it.logits))),
    ),
    Bug(
        "routed-scale-missing",
        LAYER,
        "routed_scaling_factor is not applied.",
        "sgl-project/sglang#8511, #8364, #12998; vllm-project/vllm#23123",
        fwd=unscaled,
        bwd=moe_layer_bwd,
    ),
    Bug(
        "routed-scale-twice",
        LAYER,
        "routed_scaling_factor is in the weights, and multiplies the experts' sum again.",
        "sgl-project/sglang#35152; kvcache-ai/sglang#86",
        fwd=_summed(lambda it, y, shared: y * _factor(it) + shared),
    ),
    Bug(
        "shared-expert-inv-scaled",
        LAYER,
        "The shared experts are divided by routed_scaling_factor, for a multiplication that never comes.",
        "sgl-project/sglang#28237, #29059, #35163",
        fwd=_summed(lambda it, y, shared: y + shared / _factor(it)),
    ),
    Bug(
        "shared-expert-scaled-too",
        LAYER,
        "The shared experts are multiplied by routed_scaling_factor, as the routed ones are.",
        "vllm-project/vllm#29687",
        fwd=_summed(lambda it, y, shared: y + shared * _factor(it)),
    ),
    Bug("shared-expert-missing", LAYER, "The shared experts are left out.", fwd=_summed(lambda it, y, shared: y)),
    Bug("residual-inside", LAYER, "x is added to y; the residual is the block's.", fwd=_summed(lambda it, y, shared: y + shared + it.x)),
    Bug(
        "swiglu-gate-up-swapped",
        LAYER,
        "Gate and up projections are swapped, in routed and shared experts.",
        "ml-explore/mlx-lm#767; flashinfer-ai/flashinfer#4130",
        fwd=swapped,
        bwd=swapped_bwd,
    ),
    Bug("swiglu-clamp-ignored", LAYER, "The limit is not applied.", attrs={"limit": None}),
    _experts_bug("weight-before-activation"),
    _experts_bug("combine-weight-missing"),
    _experts_bug("combine-weight-twice"),
    _experts_bug("combine-first-slot-repeated"),
    _experts_bug("combine-slots-backwards"),
    Bug("gate-grad-not-in-dx", LAYER, "dx lacks what comes back through the gate.", bwd=_saved(gate_not_in_dx)),
    Bug("shared-grad-not-in-dx", LAYER, "dx lacks what comes back through the shared experts.", bwd=_saved(shared_not_in_dx)),
    Bug("routed-grad-not-in-dx", LAYER, "dx lacks what comes back through the routed experts.", bwd=experts_not_in_dx),
    Bug("combine-dweight-missing", LAYER, "The slots' weights get no gradient: the gate does not learn.", bwd=gate_untrained),
    Bug(
        "gate-grad-through-norm-dropped",
        LAYER,
        "The normaliser is taken for a constant in the backward.",
        bwd=_router_bwd(denominator_constant),
    ),
    Bug(
        "gate-grad-bias-or-masked-experts",
        LAYER,
        "Experts that were not chosen receive a gradient.",
        bwd=_router_bwd(leaks_to_unselected),
    ),
    Bug(
        "gate-grad-score-slope-missing",
        LAYER,
        "The slope of the score function is left out of the backward.",
        bwd=_router_bwd(lambda own: score_slope_missing),
    ),
    Bug(
        "silu-slope-partial",
        LAYER,
        "The slope of silu is taken for σ: its term g σ(1-σ) is missing.",
        bwd=_activations(slope_is_sigmoid),
    ),
    Bug(
        "swiglu-clamp-grad-uncut",
        LAYER,
        "The backward passes through the clamp: nothing is 0 beyond the limit.",
        bwd=_activations(not_cut),
    ),
    Bug(
        "expert-zero-token-grad-garbage",
        LAYER,
        "The gradients of an expert without tokens are not written: what stood in the buffer is returned.",
        "meta-pytorch/MSLK#158; tgale96/grouped_gemm#36; huggingface/transformers#48205",
        bwd=empty_not_zeroed,
    ),
]
