"""Bugs of the router, most of them met in the field (see bugs.json's threads)."""

from typing import Any

from ...ref.cast import round_to
from ...ref.formats import BF16
from ...ref.router import is_among, largest, masked_selection, router_noaux_tc_bwd, router_noaux_tc_fwd, scores_bwd, scores_of
from ...ref.xp import Array, xp_of
from . import Bug

Result = tuple[tuple[Array, Array], tuple]


def _options(attrs: dict) -> dict:
    return {"k": 8, "n_group": 8, "topk_group": 4, "scoring": "sigmoid", **attrs}


def _weights(chosen: Array, attrs: dict) -> Array:
    if attrs.get("norm_topk_prob", True):
        chosen = chosen / (xp_of(chosen).sum(chosen, axis=-1, keepdims=True) + attrs.get("denominator_eps", 1e-20))
    return chosen * attrs.get("routed_scaling_factor", 2.5)


def bias_leaks(logits: Array, bias: Array, **attrs: Any) -> Result:
    (topk_idx, _), saved = router_noaux_tc_fwd(logits, bias, **attrs)
    biased = scores_of(logits, _options(attrs)["scoring"]) + bias
    return (topk_idx, _weights(xp_of(logits).take_along_axis(biased, topk_idx, axis=-1), attrs)), saved


def _select(score_groups: Any) -> Any:
    """The router with another way to score groups."""

    def fwd(logits: Array, bias: Array, **attrs: Any) -> Result:
        o = _options(attrs)
        xp = xp_of(logits)
        n, e = logits.shape
        s = scores_of(logits, o["scoring"])
        t = s + bias
        if o["n_group"] > 1 and score_groups is not None:
            grouped = xp.reshape(t, (n, o["n_group"], e // o["n_group"]))
            keep = is_among(largest(score_groups(xp, grouped), o["topk_group"]), o["n_group"])
            t = masked_selection(s, bias, keep, o["n_group"], attrs.get("mask_fill", "-inf"))
        given = {"topk_idx": largest(t, o["k"]), **attrs}
        return router_noaux_tc_fwd(logits, bias, **given)

    return fwd


def highest_index_wins(logits: Array, bias: Array, **attrs: Any) -> Result:
    """Ties go to the highest index: run on mirrored experts, and mirror the choice."""
    xp = xp_of(logits)
    if "topk_idx" in attrs:
        return router_noaux_tc_fwd(logits, bias, **attrs)
    (idx, _), _ = router_noaux_tc_fwd(xp.flip(logits, axis=1), xp.flip(bias, axis=0), **attrs)
    return router_noaux_tc_fwd(logits, bias, **{**attrs, "topk_idx": logits.shape[1] - 1 - idx})


def bias_ignored(logits: Array, bias: Array, **attrs: Any) -> Result:
    return router_noaux_tc_fwd(logits, xp_of(bias).zeros_like(bias), **attrs)


def logits_bf16(logits: Array, bias: Array, **attrs: Any) -> Result:
    return router_noaux_tc_fwd(round_to(BF16, logits), bias, **attrs)


def bias_bf16(logits: Array, bias: Array, **attrs: Any) -> Result:
    return router_noaux_tc_fwd(logits, round_to(BF16, bias), **attrs)


def scale_missing(logits: Array, bias: Array, **attrs: Any) -> Result:
    return router_noaux_tc_fwd(logits, bias, **{**attrs, "routed_scaling_factor": 1.0})


def norm_then_no_scale(logits: Array, bias: Array, **attrs: Any) -> Result:
    """Normalise or scale, not both."""
    change = {"routed_scaling_factor": 1.0} if attrs.get("norm_topk_prob", True) else {}
    return router_noaux_tc_fwd(logits, bias, **{**attrs, **change})


def scale_only_if_renormalised(logits: Array, bias: Array, **attrs: Any) -> Result:
    change = {} if attrs.get("norm_topk_prob", True) else {"routed_scaling_factor": 1.0}
    return router_noaux_tc_fwd(logits, bias, **{**attrs, **change})


def denominator_constant(dtopk_weight: Array, saved: tuple) -> Array:
    """The normaliser is taken for a constant."""
    logits, s, topk_idx, chosen, total, _, factor, scoring = saved
    return router_noaux_tc_bwd(dtopk_weight / total, (logits, s, topk_idx, chosen, total / total, False, factor, scoring))


def leaks_to_unselected(dtopk_weight: Array, saved: tuple) -> Array:
    """Experts that were not chosen receive the row's mean gradient."""
    logits, s, topk_idx, *_, scoring = saved
    xp = xp_of(s)
    extra = xp.where(is_among(topk_idx, s.shape[1]), xp.zeros_like(s), xp.mean(dtopk_weight, axis=-1, keepdims=True) / s.shape[1])
    return router_noaux_tc_bwd(dtopk_weight, saved) + scores_bwd(extra, logits, s, scoring)


def score_slope_missing(dtopk_weight: Array, saved: tuple) -> Array:
    """s(1-s) is left out: the gradient to the scores is returned for that to the logits."""
    logits, s, *rest = saved
    xp = xp_of(s)
    flat = xp.zeros_like(logits)
    total = router_noaux_tc_bwd(dtopk_weight, saved)
    slope = scores_bwd(xp.ones_like(s), flat if rest[-1] == "softmax" else logits, s, rest[-1])
    return total / xp.where(slope == 0, xp.ones_like(slope), slope)


def factor_missing(dtopk_weight: Array, saved: tuple) -> Array:
    return router_noaux_tc_bwd(dtopk_weight / saved[-2], saved)


ROUTER = ("router.noaux_tc",)
SGLANG = "https://github.com/deepseek-ai/DeepSeek-V3 inference/model.py before 1398800"
BUGS = [
    Bug(
        "group-mask-zero",
        ROUTER,
        "Masked groups are filled with 0 instead of -inf: where every s + bias is negative, a masked expert is chosen.",
        SGLANG,
        attrs={"mask_fill": "0"},
        directions=("forward",),
    ),
    Bug("bias-leaks-into-weights", ROUTER, "Weights are taken from s + bias; the bias may only choose.", fwd=bias_leaks),
    Bug(
        "group-score-max",
        ROUTER,
        "A group's score is its maximum (V2) instead of the sum of its two largest.",
        fwd=_select(lambda xp, g: xp.max(g, axis=-1)),
    ),
    Bug("group-ignored", ROUTER, "The groups are ignored: a plain top-k.", fwd=_select(None)),
    Bug("bias-ignored", ROUTER, "The selection bias is not used.", fwd=bias_ignored),
    Bug("softmax-instead-of-sigmoid", ROUTER, "Scores are softmax(logits) instead of sigmoid.", attrs={"scoring": "softmax"}),
    Bug("norm-topk-missing", ROUTER, "The weights are not normalised.", attrs={"norm_topk_prob": False}),
    Bug("routed-scale-missing", ROUTER, "routed_scaling_factor is not applied.", fwd=scale_missing, bwd=factor_missing),
    Bug("norm-xor-scale", ROUTER, "Weights are normalised or scaled, not both.", fwd=norm_then_no_scale),
    Bug("scale-only-if-renorm", ROUTER, "The scaling is nested in the normalisation.", fwd=scale_only_if_renormalised),
    Bug("norm-eps-missing", ROUTER, "The denominator lacks its eps of 1e-20.", attrs={"denominator_eps": 0.0}, benign=True),
    Bug("router-logits-bf16", ROUTER, "Logits are rounded to bfloat16 before the scores.", fwd=logits_bf16),
    Bug("correction-bias-bf16", ROUTER, "The selection bias is stored in bfloat16: values near 7 collapse.", fwd=bias_bf16),
    Bug("topk-tie-break", ROUTER, "Exact ties go to the highest index instead of the lowest.", fwd=highest_index_wins, benign=True),
    Bug("gate-grad-through-norm-dropped", ROUTER, "The normaliser is taken for a constant in the backward.", bwd=denominator_constant),
    Bug("gate-grad-bias-or-masked-experts", ROUTER, "Experts that were not chosen receive a gradient.", bwd=leaks_to_unselected),
    Bug("gate-grad-score-slope-missing", ROUTER, "The slope of the score function is left out of the backward.", bwd=score_slope_missing),
]
