"""The softmax router of V2: greedy, or limited to the groups with the largest score. Spec §3.2."""

from typing import Any

from .op import Case, Op, declare, signature
from .router import scores_bwd, scores_of
from .selection import MaskFill, check_chosen, check_finite, check_sizes, choose, regret, weigh, weigh_bwd
from .xp import Array, named


@signature("logits[n,e] -> topk_idx[n,k]:index topk_weight[n,k]")
def router_softmax_fwd(
    logits: Array,
    *,
    k: int = 6,
    n_group: int = 8,
    topk_group: int = 3,
    norm_topk_prob: bool = False,
    routed_scaling_factor: float = 16.0,
    denominator_eps: float = 1e-20,
    mask_fill: MaskFill = "-inf",
    topk_idx: Array | None = None,
) -> tuple[tuple[Array, Array], tuple]:
    """topk_idx[n,k] = Topk(s in the best groups),   topk_weight[n,k] = factor s[n,idx],   s = softmax(logits)   (V2 §2.2)

    A group's score is its largest s; topk_group groups are kept (n_group=1: greedy, V2-Lite), the others filled with -inf (native) or 0
    (Hugging Face; s that underflow to 0 then tie with it). V2 does not renormalise; with norm_topk_prob the weights are divided by
    Σ_k s[n,idx] + denominator_eps, and multiplied by the factor all the same. The lowest index wins a tie. A given topk_idx is kept.
    """
    check_sizes("router.softmax", logits.shape[1], k, n_group, topk_group, best=1)
    check_finite("router.softmax", logits=logits)
    s = named("scores", scores_of(logits, "softmax"))  # [n,e]
    if topk_idx is None:
        topk_idx = choose(s, k, n_group, topk_group, 1, mask_fill)
    else:
        check_chosen("router.softmax", topk_idx, logits.shape[0], k, logits.shape[1])
    topk_weight, saved = weigh(s, topk_idx, norm_topk_prob, denominator_eps, "add", routed_scaling_factor)
    return (topk_idx, topk_weight), (logits, s, saved)


def router_softmax_bwd(dtopk_weight: Array, saved: tuple) -> Array:
    """ds[n,idx] = factor dw[n,k],   dlogits = s (ds - Σ_e ds s): every expert's logit, since softmax couples them"""
    logits, s, weights = saved
    return scores_bwd(weigh_bwd(dtopk_weight, weights), logits, s, "softmax")


def softmax_regret(
    logits: Array,
    *,
    topk_idx: Array,
    k: int = 6,
    n_group: int = 8,
    topk_group: int = 3,
    mask_fill: MaskFill = "-inf",
    **_: Any,
) -> Array:
    """[n]: by how much s would have to move for topk_idx to be the choice"""
    return regret(scores_of(logits, "softmax"), topk_idx, k, n_group, topk_group, 1, mask_fill)


V2 = {"k": 6, "n_group": 8, "topk_group": 3, "routed_scaling_factor": 16.0}
V2_LITE = {"k": 6, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}


def _case(name: str, n: int, e: int, logits: tuple, attrs: dict, note: str = "") -> Case:
    return Case(name, {"n": n, "e": e, "k": attrs["k"]}, {"logits": logits, "dtopk_weight": ("normal", 1.0)}, attrs, note)


router_softmax = declare(
    Op(
        "router.softmax",
        router_softmax_fwd,
        router_softmax_bwd,
        (
            _case("v2", 9, 160, ("normal", 1.0), V2),
            _case("v2-one", 1, 160, ("normal", 1.0), V2),
            _case("v2-steep", 7, 160, ("normal", 6.0), V2, "nearly all weight on one expert"),
            _case("v2-ties", 7, 160, ("steps", 3, 0.5), V2, "exact ties of experts and of groups"),
            _case("v2-lite", 7, 64, ("normal", 1.0), V2_LITE, "greedy"),
            _case("normalised", 5, 64, ("normal", 1.0), {**V2_LITE, "norm_topk_prob": True, "routed_scaling_factor": 2.5}, "and scaled"),
            _case("small-groups", 5, 16, ("normal", 1.0), {"k": 3, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.0}),
            _case("top1", 5, 16, ("normal", 1.0), {"k": 1, "n_group": 4, "topk_group": 2}, "the one weight has a gradient"),
            _case(
                "underflow",
                3,
                16,
                ("values", *[-2000.0] * 9, 1.0, *[-2000.0] * 3, 0.5, *[-2000.0] * 2),
                {"k": 4, "n_group": 4, "topk_group": 2},
                "a score of 0 in a kept group beats whatever is masked",
            ),
            _case("whole-groups", 5, 16, ("normal", 1.0), {"k": 8, "n_group": 4, "topk_group": 2}, "every expert of the kept groups"),
        ),
        "8*n*e",
        "DeepSeek-V2 paper §2.2; spec §3.2; DeepSeek-V3 inference/model.py, Gate (score_func softmax)",
        choice=("topk_idx", softmax_regret),
    )
)
