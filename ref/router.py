"""The auxiliary-loss-free router of V3 (noaux_tc). Spec §3.3."""

from typing import Any, Literal

from .cast import round_to
from .formats import BF16
from .op import Case, Op, declare, signature
from .selection import MaskFill, check_chosen, check_finite, check_sizes, choose, regret, weigh, weigh_bwd
from .xp import Array, named, xp_of

Scoring = Literal["sigmoid", "softmax", "sqrtsoftplus"]
GateDtype = Literal["float32", "bfloat16"]


def scores_of(logits: Array, scoring: Scoring) -> Array:
    """s[n,e]: sigmoid, softmax over e, or the square root of softplus (V4), none of which overflows"""
    xp = xp_of(logits)
    small = xp.exp(-xp.where(logits >= 0, logits, -logits))  # in (0,1]; abs has no derivative at 0, and autodiff may come through here
    if scoring == "sigmoid":
        return xp.where(logits >= 0, xp.ones_like(small), small) / (1 + small)
    if scoring == "softmax":
        p = xp.exp(logits - xp.max(logits, axis=-1, keepdims=True))
        return p / xp.sum(p, axis=-1, keepdims=True)
    return xp.sqrt(xp.log1p(small) + xp.clip(logits, 0.0, None))


def scores_bwd(ds: Array, logits: Array, s: Array, scoring: Scoring) -> Array:
    """dlogits[n,e] from ds[n,e]"""
    xp = xp_of(ds)
    if scoring == "sigmoid":
        return ds * s * (1 - s)
    if scoring == "softmax":
        return s * (ds - xp.sum(ds * s, axis=-1, keepdims=True))
    floor = xp.where(s > 0, s, xp.ones_like(s))  # softplus underflows to 0 only where its slope does too
    return ds * scores_of(logits, "sigmoid") / (2 * floor)


def gate_scores(logits: Array, scoring: Scoring, gate_dtype: GateDtype) -> Array:
    """s[n,e], with logits and s rounded to bfloat16 where the gate computes in it"""
    if gate_dtype == "float32":
        return scores_of(logits, scoring)
    return round_to(BF16, scores_of(round_to(BF16, logits), scoring))


@signature("logits[n,e] bias[e]:const -> topk_idx[n,k]:index topk_weight[n,k]")
def router_noaux_tc_fwd(
    logits: Array,
    bias: Array,
    *,
    k: int = 8,
    n_group: int = 8,
    topk_group: int = 4,
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 2.5,
    scoring: Scoring = "sigmoid",
    denominator_eps: float = 1e-20,
    denominator_place: Literal["add", "clamp"] = "add",
    mask_fill: MaskFill = "-inf",
    gate_dtype: GateDtype = "float32",
    topk_idx: Array | None = None,
) -> tuple[tuple[Array, Array], tuple]:
    """topk_idx[n,k] = Topk(s + bias in the best groups),   topk_weight[n,k] = factor s[n,idx] / Σ_k s[n,idx]   (V3 eq. 12-16)

    s = sigmoid(logits). The bias (e_score_correction_bias) chooses and never weighs. A group's score is the sum of its two largest
    s + bias; experts outside the topk_group best groups are filled with -inf (0 in older code, where a negative s + bias loses to it).
    The lowest index wins a tie, among groups and among experts. Without norm_topk_prob the weight is factor·s. denominator_eps is added
    to Σ_k s, or is its least value (denominator_place="clamp", TileKernels). gate_dtype="bfloat16" rounds logits and s to bfloat16, as
    V3's native code has them (gradients pass straight through). A given topk_idx is kept as the choice (routing replay), and only the
    weights are computed.
    """
    check_sizes("router.noaux_tc", logits.shape[1], k, n_group, topk_group, best=2)
    check_finite("router.noaux_tc", logits=logits, bias=bias)
    s = named("scores", gate_scores(logits, scoring, gate_dtype))  # [n,e]
    if topk_idx is None:
        topk_idx = choose(s + bias, k, n_group, topk_group, 2, mask_fill)
    else:
        check_chosen("router.noaux_tc", topk_idx, logits.shape[0], k, logits.shape[1])
    topk_weight, saved = weigh(s, topk_idx, norm_topk_prob, denominator_eps, denominator_place, routed_scaling_factor)
    return (topk_idx, topk_weight), (logits, s, scoring, saved)


def router_noaux_tc_bwd(dtopk_weight: Array, saved: tuple) -> Array:
    """ds[n,idx] = factor/S (dw[n,k] - Σ_k dw s/S),  S = Σ_k s;   dlogits = ds s (1 - s).   None to the bias, none through the choice."""
    logits, s, scoring, weights = saved
    return scores_bwd(weigh_bwd(dtopk_weight, weights), logits, s, scoring)


def selection_regret(
    logits: Array,
    bias: Array,
    *,
    topk_idx: Array,
    k: int = 8,
    n_group: int = 8,
    topk_group: int = 4,
    scoring: Scoring = "sigmoid",
    mask_fill: MaskFill = "-inf",
    gate_dtype: GateDtype = "float32",
    **_: Any,
) -> Array:
    """[n]: by how much s + bias would have to move for topk_idx to be the choice"""
    return regret(gate_scores(logits, scoring, gate_dtype) + bias, topk_idx, k, n_group, topk_group, 2, mask_fill)


V3 = {"k": 8, "n_group": 8, "topk_group": 4}
KIMI = {"k": 8, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827}
MOONLIGHT = {"k": 6, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.446}
V4 = {"k": 6, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.5, "scoring": "sqrtsoftplus"}


def _case(name: str, n: int, e: int, logits: tuple, bias: tuple, attrs: dict, note: str = "", quick: bool = True) -> Case:
    return Case(
        name, {"n": n, "e": e, "k": attrs["k"]}, {"logits": logits, "bias": bias, "dtopk_weight": ("normal", 1.0)}, attrs, note, quick
    )


router_noaux_tc = declare(
    Op(
        "router.noaux_tc",
        router_noaux_tc_fwd,
        router_noaux_tc_bwd,
        (
            _case("v3", 16, 256, ("normal", 1.0), ("normal", 0.1), V3),
            _case("v3-one", 1, 256, ("normal", 1.0), ("normal", 0.1), V3),
            _case("v3-negative-bias", 9, 256, ("normal", 1.0), ("uniform", -1.5, -0.7), V3, "every s + bias is below 0: a fill of 0 wins"),
            _case(
                "v3-large-bias", 7, 256, ("normal", 1.0), ("uniform", 6.5, 7.5), V3, "as in R1's checkpoint; it must not reach the weights"
            ),
            _case("v3-steep", 7, 256, ("normal", 8.0), ("normal", 0.1), V3, "saturated scores"),
            _case("v3-low", 7, 256, ("uniform", -60.0, -40.0), ("normal", 0.1), V3, "scores near the denominator's eps"),
            _case("v3-ties", 9, 256, ("steps", 4, 0.5), ("const", 0.0), V3, "exact ties of experts and of groups"),
            _case("v3-plain", 5, 256, ("normal", 1.0), ("normal", 0.1), {**V3, "norm_topk_prob": False}, "weights are factor times score"),
            _case(
                "small-groups",
                5,
                16,
                ("normal", 1.0),
                ("normal", 0.3),
                {"k": 4, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.0},
            ),
            _case(
                "v3-clamp", 5, 256, ("uniform", -60.0, -40.0), ("normal", 0.1), {**V3, "denominator_place": "clamp"}, "Σ no less than eps"
            ),
            _case("v3-bf16-gate", 5, 256, ("normal", 1.0), ("normal", 0.1), {**V3, "gate_dtype": "bfloat16"}, "V3's native code"),
            _case("glm", 5, 64, ("normal", 1.0), ("normal", 0.1), {**MOONLIGHT, "k": 4, "routed_scaling_factor": 1.8}, "GLM4-MoE-Lite"),
            _case("kimi-k2", 5, 384, ("normal", 1.0), ("normal", 0.1), KIMI),
            _case("moonlight", 5, 64, ("normal", 1.0), ("normal", 0.1), MOONLIGHT),
            _case("v4", 5, 256, ("normal", 2.0), ("normal", 0.1), V4),
            _case("softmax", 5, 64, ("normal", 1.0), ("normal", 0.01), {**MOONLIGHT, "scoring": "softmax"}),
        ),
        "8*n*e",
        "DeepSeek-V3 paper eq. 12-16; spec §3.3; DeepSeek-V3 inference/model.py, Gate",
        choice=("topk_idx", selection_regret),
    )
)
