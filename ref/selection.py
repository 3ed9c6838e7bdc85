"""How experts are chosen, and by how much a choice could have been another. Shared by the routers. Spec §3.2, §3.3."""

import itertools
from typing import Any, Literal

from array_api_compat import device

from .xp import Array, clip, xp_of

MaskFill = Literal["-inf", "0"]
FILL = {"-inf": float("-inf"), "0": 0.0}


def largest(t: Array, k: int) -> Array:
    """idx[n,k]: the k largest along the last axis, in descending order; the lowest index wins a tie"""
    return xp_of(t).argsort(t, axis=-1, descending=True, stable=True)[:, :k]


def is_among(idx: Array, e: int) -> Array:
    """[n,e]: whether expert e stands in idx[n,:]"""
    xp = xp_of(idx)
    return xp.any(idx[:, :, None] == xp.arange(e, device=device(idx)), axis=1)


def group_scores(t: Array, n_group: int, best: int) -> Array:
    """[n,n_group]: the sum of the `best` largest t in each group: two in V3, the largest alone in V2"""
    xp = xp_of(t)
    n, e = t.shape
    grouped = xp.sort(xp.reshape(t, (n, n_group, e // n_group)), axis=-1)
    return grouped[:, :, -1] if best == 1 else grouped[:, :, -1] + grouped[:, :, -2]


def masked(t: Array, keep: Array, mask_fill: MaskFill) -> Array:
    """t[n,e] in the kept groups, the fill elsewhere. keep[n,n_group] is boolean."""
    xp = xp_of(t)
    inside = xp.repeat(keep, t.shape[1] // keep.shape[1], axis=1)  # [n,e]
    return xp.where(inside, t, xp.full_like(t, FILL[mask_fill]))


def choose(t: Array, k: int, n_group: int, topk_group: int, best: int, mask_fill: MaskFill) -> Array:
    """topk_idx[n,k]: the k largest t[n,e] in the topk_group best groups; what is outside is filled"""
    if n_group > 1:
        keep = is_among(largest(group_scores(t, n_group, best), topk_group), n_group)  # [n,n_group]
        t = masked(t, keep, mask_fill)
    return largest(t, k)


def weigh(s: Array, topk_idx: Array, norm_topk_prob: bool, eps: float, place: str, factor: float) -> tuple[Array, tuple]:
    """topk_weight[n,k] = factor s[n,idx] / (Σ_k s[n,idx] + eps), or factor s; place="clamp" has max(Σ, eps)"""
    xp = xp_of(s)
    chosen = xp.take_along_axis(s, topk_idx, axis=-1)  # [n,k]
    total, slope = xp.ones_like(chosen[:, :1]), 0.0
    if norm_topk_prob:
        total = xp.sum(chosen, axis=-1, keepdims=True)  # [n,1]
        slope = xp.where(total >= eps, xp.ones_like(total), xp.zeros_like(total)) if place == "clamp" else 1.0
        total = clip(total, eps) if place == "clamp" else total + eps
    return chosen / total * factor, (s, topk_idx, chosen, total, slope, factor)


def weigh_bwd(dtopk_weight: Array, saved: tuple) -> Array:
    """ds[n,idx] = factor/S (dw[n,k] - Σ_k dw s/S), S the denominator; 0 to the experts that were not chosen"""
    s, topk_idx, chosen, total, slope, factor = saved
    xp = xp_of(s)
    pull = xp.sum(dtopk_weight * (chosen / total), axis=-1, keepdims=True) * slope
    dchosen = (dtopk_weight - pull) / total * factor  # [n,k]
    ds = xp.zeros_like(s)
    experts = xp.arange(s.shape[1], device=device(topk_idx))
    for slot in range(topk_idx.shape[1]):  # each expert stands in one slot at most: a gather, no scatter
        ds = xp.where(topk_idx[:, slot : slot + 1] == experts, dchosen[:, slot : slot + 1], ds)
    return ds


def regret(t: Array, topk_idx: Array, k: int, n_group: int, topk_group: int, best: int, mask_fill: MaskFill) -> Array:
    """[n]: by how much t[n,e] would have to move for topk_idx to be the choice; inf if it could never be (repeated, out of range).

    The least, over all sets of groups that might have been kept (70 for V3), of the larger of two gaps: best group left out over worst
    group kept, and best expert left out over worst expert chosen.
    """
    xp = xp_of(t)
    n, e = t.shape
    chosen = is_among(topk_idx, e)
    valid = xp.sum(xp.astype(chosen, xp.int64), axis=-1) == k  # distinct and in range
    grouped = xp.reshape(t, (n, n_group, e // n_group))
    chosen = xp.reshape(chosen, grouped.shape)
    low = xp.full_like(grouped, float("-inf"))
    best_out = xp.max(xp.where(chosen, low, grouped), axis=-1)  # [n,g], the best expert of a group that was left out
    worst_in = xp.min(xp.where(chosen, grouped, -low), axis=-1)  # [n,g], the worst that was chosen
    low = low[:, :, 0]
    fill = low if mask_fill == "-inf" else xp.zeros_like(low)
    dropped_out = xp.where(xp.all(chosen, axis=-1), low, fill)  # the same two numbers if the group is not kept
    dropped_in = xp.where(xp.any(chosen, axis=-1), fill, -low)
    sets = itertools.combinations(range(n_group), min(topk_group, n_group))
    keep = xp.asarray([[[g in kept for g in range(n_group)]] for kept in sets], device=device(t))  # [sets,1,g]
    gap = _excess(xp.max(xp.where(keep, best_out, dropped_out), axis=-1), xp.min(xp.where(keep, worst_in, dropped_in), axis=-1))
    if topk_group < n_group:
        groups = group_scores(t, n_group, best)
        group_gap = _excess(xp.max(xp.where(keep, low, groups), axis=-1), xp.min(xp.where(keep, groups, -low), axis=-1))
        gap = xp.maximum(gap, group_gap)  # [sets,n]
    least = xp.min(gap, axis=0)
    return xp.where(valid, least, xp.full_like(least, float("inf")))


def _excess(best_out: Array, worst_in: Array) -> Array:
    """By how much the best that was left out beats the worst that was taken; inf if what was taken was masked; 0 if nothing was left."""
    xp = xp_of(best_out)
    nothing, masked = best_out == float("-inf"), worst_in == float("-inf")
    zero = xp.zeros_like(best_out)
    gap = clip(xp.where(nothing | masked, zero, best_out) - xp.where(nothing | masked, zero, worst_in), 0.0)
    return xp.where(masked, zero + float("inf"), gap)


def check_sizes(op: str, e: int, k: int, n_group: int, topk_group: int, best: int) -> None:
    if n_group < 1 or e % n_group:
        raise ValueError(f"{op}: n_group is {n_group}; expected a divisor of the {e} experts")
    if not 1 <= topk_group <= n_group:
        raise ValueError(f"{op}: topk_group is {topk_group}; expected 1 to n_group = {n_group}")
    if n_group > 1 and e // n_group < best:
        raise ValueError(f"{op}: n_group is {n_group} of {e} experts; expected two experts a group at least, whose scores are summed")
    left = e // n_group * topk_group
    if not 1 <= k <= left:
        raise ValueError(f"{op}: k is {k}; expected 1 to {left}, the experts left by {topk_group} of {n_group} groups")


def check_finite(op: str, **arrays: Array) -> None:
    for name, array in arrays.items():
        xp = xp_of(array)
        if not bool(xp.all(xp.isfinite(array))):
            where = ", ".join(str(int(v[0])) for v in xp.nonzero(~xp.isfinite(array)))
            raise ValueError(f"{op}: {name}[{where}] is not finite; expected finite numbers")


def check_chosen(op: str, topk_idx: Any, n: int, k: int, e: int, least: int = 0) -> None:
    """Integers [n,k] from `least` to e - 1, an expert at most once a row (-1, where it is allowed, as often as it likes)"""
    xp = xp_of(topk_idx)
    if not xp.isdtype(topk_idx.dtype, "integral") or tuple(topk_idx.shape) != (n, k):
        raise ValueError(f"{op}: topk_idx is {topk_idx.dtype}{tuple(topk_idx.shape)}; expected integers [{n}, {k}]")
    bad = (topk_idx < least) | (topk_idx >= e)
    if bool(xp.any(bad)):
        i, j = (int(v[0]) for v in xp.nonzero(bad))
        raise ValueError(f"{op}: topk_idx[{i}, {j}] is {int(topk_idx[i, j])}; expected {least} to {e - 1}")
    ordered = xp.sort(topk_idx, axis=-1)
    repeated = xp.any((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0), axis=-1)
    if bool(xp.any(repeated)):
        raise ValueError(f"{op}: topk_idx[{int(xp.nonzero(repeated)[0][0])}] chooses an expert twice; expected distinct experts")
