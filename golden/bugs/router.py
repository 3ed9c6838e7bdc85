"""Bugs of V3's router, most of them met in the field (see bugs.json's threads); some are V2's too. See `router_softmax`."""

from collections.abc import Callable, Mapping
from typing import Any

from ...ref.cast import round_to
from ...ref.formats import BF16
from ...ref.op import Op
from ...ref.router import router_noaux_tc, router_noaux_tc_bwd, router_noaux_tc_fwd, scores_bwd, scores_of
from ...ref.selection import is_among, largest, masked, weigh, weigh_bwd
from ...ref.xp import Array, xp_of
from . import Bug

Result = tuple[tuple[Array, Array], tuple]
Score = Callable[[Any, Array], Array]  # of a group [n,g,e/g]: [n,g]


def _options(attrs: Mapping[str, Any]) -> dict:
    return {**router_noaux_tc.defaults, **attrs}


def choice(t: Array, o: Mapping[str, Any], score: Score | None, last: Array | None = None) -> Array:
    """The choice with another way to score groups (none: no groups), and with other numbers, `last`, in the kept ones."""
    xp, (n, e), groups = xp_of(t), t.shape, o["n_group"]
    last = t if last is None else last
    if groups > 1 and score is not None:
        keep = is_among(largest(score(xp, xp.reshape(t, (n, groups, e // groups))), o["topk_group"]), groups)
        last = masked(last, keep, o["mask_fill"])
    return largest(last, o["k"])


def best(xp: Any, group: Array) -> Array:
    return xp.max(group, axis=-1)


def two_best(xp: Any, group: Array) -> Array:
    ordered = xp.sort(group, axis=-1)
    return ordered[..., -1] + ordered[..., -2]


def bias_leaks(logits: Array, bias: Array, **attrs: Any) -> Result:
    o = _options(attrs)
    (topk_idx, _), (_, s, scoring, _) = router_noaux_tc_fwd(logits, bias, **attrs)
    weight, saved = weigh(s + bias, topk_idx, o["norm_topk_prob"], o["denominator_eps"], o["denominator_place"], o["routed_scaling_factor"])
    return (topk_idx, weight), (logits, s, scoring, saved)


def _select(score: Score | None) -> Callable:
    """noaux_tc with another way to score groups."""

    def fwd(logits: Array, bias: Array, **attrs: Any) -> Result:
        o = _options(attrs)
        given = {"topk_idx": choice(scores_of(logits, o["scoring"]) + bias, o, score), **attrs}
        return router_noaux_tc_fwd(logits, bias, **given)

    return fwd


def biased_in_bf16(logits: Array, bias: Array, **attrs: Any) -> Result:
    """Groups are chosen by s + bias in float32, experts by their sum in bfloat16."""
    o = _options(attrs)
    s = scores_of(logits, o["scoring"])
    narrow = round_to(BF16, round_to(BF16, s) + round_to(BF16, bias))
    return router_noaux_tc_fwd(logits, bias, **{"topk_idx": choice(s + bias, o, two_best, narrow), **attrs})


def highest_index_wins(logits: Array, bias: Array, **attrs: Any) -> Result:
    """Ties go to the highest index: run on mirrored experts, and mirror the choice."""
    xp = xp_of(logits)
    if "topk_idx" in attrs:
        return router_noaux_tc_fwd(logits, bias, **attrs)
    (idx, _), _ = router_noaux_tc_fwd(xp.flip(logits, axis=1), xp.flip(bias, axis=0), **attrs)
    return router_noaux_tc_fwd(logits, bias, **{**attrs, "topk_idx": logits.shape[1] - 1 - idx})


def bias_ignored(logits: Array, bias: Array, **attrs: Any) -> Result:
    return router_noaux_tc_fwd(logits, xp_of(bias).zeros_like(bias), **attrs)


def bias_bf16(logits: Array, bias: Array, **attrs: Any) -> Result:
    return router_noaux_tc_fwd(logits, round_to(BF16, bias), **attrs)


def logits_bf16(fwd: Callable) -> Callable:
    return lambda logits, *bias, **attrs: fwd(round_to(BF16, logits), *bias, **attrs)


def changed(op: Op, change: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> Callable:
    """The forward with other attributes, which depend on those that it is given."""
    return lambda *arrays, **attrs: op.fwd(*arrays, **{**attrs, **change({**op.defaults, **attrs})})


def unscaled(o: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"routed_scaling_factor": 1.0}


def normed_or_scaled(o: Mapping[str, Any]) -> Mapping[str, Any]:
    return unscaled(o) if o["norm_topk_prob"] else {}


def scaled_if_normed(o: Mapping[str, Any]) -> Mapping[str, Any]:
    return {} if o["norm_topk_prob"] else unscaled(o)


def _scoring_of(saved: tuple) -> Any:
    return saved[2] if len(saved) == 4 else "softmax"


def denominator_constant(bwd: Callable) -> Callable:
    """The normaliser is taken for a constant."""

    def change(dtopk_weight: Array, saved: tuple) -> Array:
        *rest, (*weights, _slope, factor) = saved
        return bwd(dtopk_weight, (*rest, (*weights, 0.0, factor)))

    return change


def leaks_to_unselected(bwd: Callable) -> Callable:
    """Experts that were not chosen receive the row's mean gradient."""

    def change(dtopk_weight: Array, saved: tuple) -> Array:
        logits, s, *_, weights = saved
        xp = xp_of(s)
        mean = xp.mean(dtopk_weight, axis=-1, keepdims=True) / s.shape[1]
        extra = xp.where(is_among(weights[1], s.shape[1]), xp.zeros_like(s), mean)
        return bwd(dtopk_weight, saved) + scores_bwd(extra, logits, s, _scoring_of(saved))

    return change


def score_slope_missing(dtopk_weight: Array, saved: tuple) -> Array:
    """s(1-s) is left out: the gradient to the scores is returned for that to the logits."""
    return weigh_bwd(dtopk_weight, saved[-1])


def factor_missing(bwd: Callable) -> Callable:
    return lambda dtopk_weight, saved: bwd(dtopk_weight / saved[-1][-1], saved)


def scaling(op: Op, bwd: Callable) -> list[Bug]:
    """What goes wrong with routed_scaling_factor."""
    return [
        Bug(
            "routed-scale-missing",
            (op.name,),
            "routed_scaling_factor is not applied.",
            "sgl-project/sglang#8511, #8364, #12998; vllm-project/vllm#23123",
            fwd=changed(op, unscaled),
            bwd=factor_missing(bwd),
        ),
        Bug(
            "norm-xor-scale",
            (op.name,),
            "Weights are normalised or scaled, not both.",
            "InternLM/lmdeploy#3263",
            fwd=changed(op, normed_or_scaled),
        ),
        Bug(
            "scale-only-if-renorm",
            (op.name,),
            "The scaling is nested in the normalisation.",
            "sgl-project/sglang-jax#1282; sgl-project/sglang#31449",
            fwd=changed(op, scaled_if_normed),
        ),
    ]


def narrow_logits(op: Op) -> Bug:
    return Bug(
        "router-logits-bf16",
        (op.name,),
        "Logits are rounded to bfloat16 before the scores.",
        "vllm-project/vllm#14027, #58076; sgl-project/sglang#34861, #35992; deepseek-ai/DeepSeek-V3#696",
        fwd=logits_bf16(op.fwd),
    )


def gate_gradient(op: Op, bwd: Callable) -> list[Bug]:
    """What goes wrong in the backward of the chosen weights."""
    return [
        Bug(
            "gate-grad-through-norm-dropped",
            (op.name,),
            "The normaliser is taken for a constant in the backward.",
            bwd=denominator_constant(bwd),
        ),
        Bug(
            "gate-grad-bias-or-masked-experts",
            (op.name,),
            "Experts that were not chosen receive a gradient.",
            bwd=leaks_to_unselected(bwd),
        ),
    ]


ROUTER = ("router.noaux_tc",)
SGLANG = "https://github.com/deepseek-ai/DeepSeek-V3 inference/model.py before 1398800"
UNWRITTEN = (
    (
        "padding-expert-idx0",
        "A masked lane is chosen only if fewer than k experts are finite: the routers refuse logits that are not, and k beyond those left.",
    ),
)


BUGS = [
    Bug(
        "group-mask-zero",
        (*ROUTER, "router.softmax"),
        "Masked groups are filled with 0 instead of -inf: where the kept scores are negative (or 0) a masked expert is chosen.",
        SGLANG,
        attrs={"mask_fill": "0"},
        directions=("forward",),
    ),
    Bug(
        "bias-leaks-into-weights",
        ROUTER,
        "Weights are taken from s + bias; the bias may only choose.",
        "vllm-project/vllm#12002, #11971; huggingface/transformers#41647, #42546",
        fwd=bias_leaks,
        bwd=router_noaux_tc_bwd,
    ),
    Bug(
        "group-score-max",
        ROUTER,
        "A group's score is its maximum (V2) instead of the sum of its two largest.",
        "vllm-project/vllm#13474",
        fwd=_select(best),
    ),
    Bug(
        "group-ignored",
        ROUTER,
        "The groups are ignored: a plain top-k.",
        "NVIDIA/TensorRT-Model-Connect#662, #669",
        fwd=_select(None),
    ),
    Bug("bias-ignored", ROUTER, "The selection bias is not used.", fwd=bias_ignored),
    Bug(
        "softmax-instead-of-sigmoid",
        ROUTER,
        "Scores are softmax(logits) instead of sigmoid.",
        "ggml-org/llama.cpp#18980; EricLBuehler/mistral.rs#1091",
        attrs={"scoring": "softmax"},
    ),
    Bug(
        "norm-topk-missing",
        (*ROUTER, "router.softmax"),
        "The weights are not normalised.",
        "pytorch/torchtitan#1448, #1419",
        attrs={"norm_topk_prob": False},
    ),
    *scaling(router_noaux_tc, router_noaux_tc_bwd),
    Bug(
        "norm-eps-missing",
        ROUTER,
        "The denominator lacks its eps of 1e-20.",
        "flashinfer-ai/flashinfer#3803, #3946",
        attrs={"denominator_eps": 0.0},
        benign=True,
    ),
    narrow_logits(router_noaux_tc),
    Bug(
        "correction-bias-bf16",
        ROUTER,
        "The selection bias is stored in bfloat16: values near 7 collapse.",
        "sgl-project/sglang#31213; vllm-project/vllm#23640, #47797; NVIDIA/Megatron-LM#1482",
        fwd=bias_bf16,
    ),
    Bug(
        "biased-add-low-precision",
        ROUTER,
        "Groups are chosen by s + bias in float32, the experts in them by a sum in bfloat16.",
        "vllm-project/vllm-xpu-kernels#527",
        fwd=biased_in_bf16,
    ),
    Bug(
        "topk-tie-break",
        ROUTER,
        "Exact ties go to the highest index instead of the lowest.",
        "vllm-project/vllm#55514, #54403, #52679",
        fwd=highest_index_wins,
        benign=True,
    ),
    *gate_gradient(router_noaux_tc, router_noaux_tc_bwd),
    Bug(
        "gate-grad-score-slope-missing",
        (*ROUTER, "router.softmax"),
        "The slope of the score function is left out of the backward.",
        bwd=score_slope_missing,
    ),
]
