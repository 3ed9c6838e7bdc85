"""The auxiliary-loss-free router of V3 (noaux_tc). Spec §3.3."""

import itertools
from typing import Any, Literal

from array_api_compat import device

from .op import Case, Op, declare, signature
from .xp import Array, xp_of

Scoring = Literal["sigmoid", "softmax", "sqrtsoftplus"]
MaskFill = Literal["-inf", "0"]


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


def masked_selection(s: Array, bias: Array, keep: Array, n_group: int, mask_fill: MaskFill) -> Array:
    """t[n,e] = s + bias in the kept groups, the fill elsewhere. keep[n,n_group] is boolean."""
    xp = xp_of(s)
    inside = xp.repeat(keep, s.shape[1] // n_group, axis=1)  # [n,e]
    t = s + bias
    return xp.where(inside, t, xp.full_like(t, float("-inf") if mask_fill == "-inf" else 0.0))


def group_scores(t: Array, n_group: int) -> Array:
    """[n,n_group]: the sum of the two largest t in each group (V3 keeps topk/topk_group = 2 experts a group)"""
    xp = xp_of(t)
    n, e = t.shape
    grouped = xp.sort(xp.reshape(t, (n, n_group, e // n_group)), axis=-1)
    return grouped[:, :, -1] + grouped[:, :, -2]


def largest(t: Array, k: int) -> Array:
    """idx[n,k]: the k largest along the last axis, in descending order; the lowest index wins a tie"""
    return xp_of(t).argsort(t, axis=-1, descending=True, stable=True)[:, :k]


def is_among(idx: Array, e: int) -> Array:
    """[n,e]: whether expert e stands in idx[n,:]"""
    xp = xp_of(idx)
    return xp.any(idx[:, :, None] == xp.arange(e, device=device(idx)), axis=1)


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
    mask_fill: MaskFill = "-inf",
    topk_idx: Array | None = None,
) -> tuple[tuple[Array, Array], tuple]:
    """topk_idx[n,k] = Topk(s + bias in the best groups),   topk_weight[n,k] = factor s[n,idx] / Σ_k s[n,idx]   (V3 eq. 12-16)

    s = sigmoid(logits). The bias (e_score_correction_bias) chooses and never weighs. A group's score is the sum of its two largest
    s + bias; experts outside the topk_group best groups are filled with -inf (0 in older code, where a negative s + bias loses to it).
    The lowest index wins a tie, among groups and among experts. Without norm_topk_prob the weight is factor·s. A given topk_idx is
    kept as the choice (routing replay), and only the weights are computed.
    """
    xp = xp_of(logits)
    _check(logits, bias, k, n_group, topk_group)
    s = scores_of(logits, scoring)  # [n,e]
    if topk_idx is not None:
        _check_given(topk_idx, n=logits.shape[0], k=k, e=logits.shape[1])
    else:
        t = s + bias
        if n_group > 1:
            keep = is_among(largest(group_scores(t, n_group), topk_group), n_group)  # [n,n_group]
            t = masked_selection(s, bias, keep, n_group, mask_fill)
        topk_idx = largest(t, k)
    chosen = xp.take_along_axis(s, topk_idx, axis=-1)  # [n,k]
    total = xp.sum(chosen, axis=-1, keepdims=True) + denominator_eps if norm_topk_prob else xp.ones_like(chosen[:, :1])  # [n,1]
    topk_weight = chosen / total * routed_scaling_factor
    return (topk_idx, topk_weight), (logits, s, topk_idx, chosen, total, norm_topk_prob, routed_scaling_factor, scoring)


def router_noaux_tc_bwd(dtopk_weight: Array, saved: tuple) -> Array:
    """ds[n,idx] = factor/S (dw[n,k] - Σ_k dw s/S),  S = Σ_k s;   dlogits = ds s (1 - s).   None to the bias, none through the choice."""
    logits, s, topk_idx, chosen, total, norm_topk_prob, routed_scaling_factor, scoring = saved
    xp = xp_of(logits)
    dchosen = dtopk_weight
    if norm_topk_prob:
        dchosen = dchosen - xp.sum(dtopk_weight * (chosen / total), axis=-1, keepdims=True)
    dchosen = dchosen / total * routed_scaling_factor  # [n,k]
    ds = xp.zeros_like(s)
    experts = xp.arange(s.shape[1], device=device(topk_idx))
    for slot in range(topk_idx.shape[1]):  # each expert stands in one slot at most: a gather, no scatter
        ds = xp.where(topk_idx[:, slot : slot + 1] == experts, dchosen[:, slot : slot + 1], ds)
    return scores_bwd(ds, logits, s, scoring)


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
    **_: Any,
) -> Array:
    """[n]: by how much scores would have to move for topk_idx to be the choice; inf if it could never be (repeated, out of range).

    The least, over all sets of groups that might have been kept (70 for V3), of the larger of two gaps: best group left out over worst
    group kept, and best expert left out over worst expert chosen.
    """
    xp = xp_of(logits)
    n, e = logits.shape
    s = scores_of(logits, scoring)
    t = xp.reshape(s + bias, (n, n_group, e // n_group))
    chosen = is_among(topk_idx, e)
    valid = xp.sum(xp.astype(chosen, xp.int64), axis=-1) == k  # distinct and in range
    chosen = xp.reshape(chosen, t.shape)
    low = xp.full_like(t, float("-inf"))
    best_out = xp.max(xp.where(chosen, low, t), axis=-1)  # [n,g], the best expert of a group that was left out
    worst_in = xp.min(xp.where(chosen, t, -low), axis=-1)  # [n,g], the worst that was chosen
    low = low[:, :, 0]
    fill = low if mask_fill == "-inf" else xp.zeros_like(low)
    dropped_out = xp.where(xp.all(chosen, axis=-1), low, fill)  # the same two numbers if the group is not kept
    dropped_in = xp.where(xp.any(chosen, axis=-1), fill, -low)
    sets = itertools.combinations(range(n_group), min(topk_group, n_group))
    keep = xp.asarray([[[g in kept for g in range(n_group)]] for kept in sets], device=device(logits))  # [sets,1,g]
    gap = _excess(xp.max(xp.where(keep, best_out, dropped_out), axis=-1), xp.min(xp.where(keep, worst_in, dropped_in), axis=-1))
    if topk_group < n_group:
        groups = group_scores(s + bias, n_group)
        group_gap = _excess(xp.max(xp.where(keep, low, groups), axis=-1), xp.min(xp.where(keep, groups, -low), axis=-1))
        gap = xp.maximum(gap, group_gap)  # [sets,n]
    least = xp.min(gap, axis=0)
    return xp.where(valid, least, xp.full_like(least, float("inf")))


def _excess(best_out: Array, worst_in: Array) -> Array:
    """By how much the best that was left out beats the worst that was taken; inf if what was taken was masked; 0 if nothing was left."""
    xp = xp_of(best_out)
    nothing, masked = best_out == float("-inf"), worst_in == float("-inf")
    zero = xp.zeros_like(best_out)
    gap = xp.clip(xp.where(nothing | masked, zero, best_out) - xp.where(nothing | masked, zero, worst_in), 0.0, None)
    return xp.where(masked, zero + float("inf"), gap)


def _check(logits: Array, bias: Array, k: int, n_group: int, topk_group: int) -> None:
    xp, op = xp_of(logits), "router.noaux_tc"
    e = logits.shape[1]
    if n_group < 1 or e % n_group:
        raise ValueError(f"{op}: n_group is {n_group}; expected a divisor of the {e} experts")
    if not 1 <= topk_group <= n_group:
        raise ValueError(f"{op}: topk_group is {topk_group}; expected 1 to n_group = {n_group}")
    if n_group > 1 and e // n_group < 2:
        raise ValueError(f"{op}: n_group is {n_group} of {e} experts; expected two experts a group at least, whose scores are summed")
    left = e // n_group * topk_group
    if not 1 <= k <= left:
        raise ValueError(f"{op}: k is {k}; expected 1 to {left}, the experts left by {topk_group} of {n_group} groups")
    for name, array in (("logits", logits), ("bias", bias)):
        if not bool(xp.all(xp.isfinite(array))):
            where = ", ".join(str(int(v[0])) for v in xp.nonzero(~xp.isfinite(array)))
            raise ValueError(f"{op}: {name}[{where}] is not finite; expected finite numbers")


def _check_given(topk_idx: Array, n: int, k: int, e: int) -> None:
    xp, op = xp_of(topk_idx), "router.noaux_tc"
    if not xp.isdtype(topk_idx.dtype, "integral") or tuple(topk_idx.shape) != (n, k):
        raise ValueError(f"{op}: topk_idx is {topk_idx.dtype}{tuple(topk_idx.shape)}; expected integers [{n}, {k}]")
    bad = (topk_idx < 0) | (topk_idx >= e)
    if bool(xp.any(bad)):
        i, j = (int(v[0]) for v in xp.nonzero(bad))
        raise ValueError(f"{op}: topk_idx[{i}, {j}] is {int(topk_idx[i, j])}; expected 0 to {e - 1}")
    ordered = xp.sort(topk_idx, axis=-1)
    repeated = xp.any(ordered[:, 1:] == ordered[:, :-1], axis=-1)
    if bool(xp.any(repeated)):
        raise ValueError(f"{op}: topk_idx[{int(xp.nonzero(repeated)[0][0])}] chooses an expert twice; expected distinct experts")


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
