"""Bugs of V2's softmax router. See `router` for those that it shares with V3's."""

from collections.abc import Callable, Mapping
from typing import Any

from ...ref.router import scores_bwd, scores_of
from ...ref.router_softmax import router_softmax, router_softmax_bwd, router_softmax_fwd
from ...ref.selection import weigh, weigh_bwd
from ...ref.xp import Array, xp_of
from . import Bug
from .router import Result, Score, best, choice, gate_gradient, narrow_logits, scaling, two_best


def _options(attrs: Mapping[str, Any]) -> dict:
    return {**router_softmax.defaults, **attrs}


def _select(score: Score | None) -> Callable:
    def fwd(logits: Array, **attrs: Any) -> Result:
        given = {"topk_idx": choice(scores_of(logits, "softmax"), _options(attrs), score), **attrs}
        return router_softmax_fwd(logits, **given)

    return fwd


def highest_index_wins(logits: Array, **attrs: Any) -> Result:
    if "topk_idx" in attrs:
        return router_softmax_fwd(logits, **attrs)
    (idx, _), _ = router_softmax_fwd(xp_of(logits).flip(logits, axis=1), **attrs)
    return router_softmax_fwd(logits, **{**attrs, "topk_idx": logits.shape[1] - 1 - idx})


def sigmoid_scores(logits: Array, **attrs: Any) -> Result:
    """V2's router on sigmoid(logits)."""
    o = _options(attrs)
    s = scores_of(logits, "sigmoid")
    idx = attrs.get("topk_idx")
    idx = choice(s, o, best) if idx is None else idx
    weight, saved = weigh(s, idx, o["norm_topk_prob"], o["denominator_eps"], "add", o["routed_scaling_factor"])
    return (idx, weight), (logits, s, saved)


def sigmoid_scores_bwd(dtopk_weight: Array, saved: tuple) -> Array:
    logits, s, weights = saved
    return scores_bwd(weigh_bwd(dtopk_weight, weights), logits, s, "sigmoid")


def softmax_diagonal(dtopk_weight: Array, saved: tuple) -> Array:
    """Each logit's own score alone: dlogits = ds s (1 - s)."""
    _, s, weights = saved
    return weigh_bwd(dtopk_weight, weights) * s * (1 - s)


def one_is_constant(dtopk_weight: Array, saved: tuple) -> Array:
    """The softmax is taken over the chosen logits: over one it is the constant 1."""
    return router_softmax_bwd(dtopk_weight, saved) * float(dtopk_weight.shape[1] > 1)


V2 = ("router.softmax",)
BUGS = [
    *scaling(router_softmax, router_softmax_bwd),
    narrow_logits(router_softmax),
    *gate_gradient(router_softmax, router_softmax_bwd),
    Bug(
        "group-score-top2",
        V2,
        "A group's score is the sum of its two largest (V3) instead of its maximum.",
        fwd=_select(two_best),
    ),
    Bug("group-ignored", V2, "The groups are ignored: a plain top-k.", fwd=_select(None)),
    Bug("sigmoid-instead-of-softmax", V2, "Scores are sigmoid(logits) instead of softmax.", fwd=sigmoid_scores, bwd=sigmoid_scores_bwd),
    Bug("norm-topk-unasked", V2, "The weights are divided by their sum; V2 does not.", attrs={"norm_topk_prob": True}),
    Bug("topk-tie-break", V2, "Exact ties go to the highest index instead of the lowest.", fwd=highest_index_wins, benign=True),
    Bug("gate-grad-softmax-diagonal", V2, "The backward of the softmax is ds s(1-s): no other expert's term.", bwd=softmax_diagonal),
    Bug(
        "gate-grad-topk1-zero",
        V2,
        "The softmax is taken after the choice: with one expert a token its gradient is 0.",
        "NVIDIA/Megatron-LM#894; jingyaogong/minimind#858, #859",
        bwd=one_is_constant,
    ),
]
