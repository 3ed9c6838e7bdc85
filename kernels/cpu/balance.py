"""What keeps experts balanced: the losses of V2 and V3, V2's token dropping, V3's bias."""

from decimal import Decimal
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...ref.balance import check_loss
from ...ref.selection import check_chosen
from ._common import need
from ._declared import declared

Array = NDArray[Any]


def _load(topk_idx: Array, e: int, level: str, devices: int, topk_devices: int) -> Array:
    """f[b,e] in float64: each expert's share of the slots, or its device's, 1 where all have the same"""
    b, s, k = topk_idx.shape
    slots = topk_idx.reshape(b, s * k).astype(np.int64)
    if level == "communication":
        owner = np.where(topk_idx < 0, devices, topk_idx.astype(np.int64) // (e // devices))
        reached = np.zeros((b, s, devices + 1), bool)
        np.put_along_axis(reached, owner, True, axis=2)
        return np.repeat(reached[:, :, :devices].sum(axis=1) * (devices / (topk_devices * s)), e // devices, axis=1)
    counts = np.stack([np.bincount(row[row >= 0], minlength=e) for row in slots])
    f = counts * (e / (k * s))
    return np.repeat(f.reshape(b, devices, -1).mean(axis=2), e // devices, axis=1) if level == "device" else f


def _loss_arguments(direction: str, arrays: dict[str, Any], attrs: dict[str, Any]) -> tuple[dict[str, Any], Array, Array, float, bool]:
    """The arrays, f[b,e], the sum of scores that s' has below it [b,s,1], alpha, normalise"""
    arrays, a, letters = declared("router.balance_loss", direction, arrays, attrs)
    scores, topk_idx, devices, most = arrays["scores"], arrays["topk_idx"], a["devices"], a["topk_devices"]
    check_loss(scores, topk_idx, devices, most, a["level"])
    f = _load(topk_idx, letters["e"], a["level"], devices, most)
    total = scores.sum(axis=2, keepdims=True, dtype=np.float64) if a["normalise"] else np.ones((*scores.shape[:2], 1))
    return arrays, f, total, float(a["alpha"]), a["normalise"]


def balance_loss(scores: Array, topk_idx: Array, **attrs: Any) -> Array:
    """loss = alpha mean_b sum_i f[b,i] P[b,i],   f = e/(k s) times the slots that chose i,   P[b,i] = mean_t s[b,t,i] / sum_j s[b,t,j].

    scores[b,s,e], topk_idx[b,s,k] (-1: none). Attributes and the other levels are those of the reference's router.balance_loss, with its
    defaults. Sums in float64. ValueError: no token or slot; an index out of range or twice in a row; devices that do not divide e.
    """
    arrays, f, total, alpha, _ = _loss_arguments("forward", {"scores": scores, "topk_idx": topk_idx}, attrs)
    scores = arrays["scores"]
    b, s, _ = scores.shape
    p = np.stack([(1 / t[:, 0]) @ row for t, row in zip(total, scores.astype(np.float64), strict=True)])  # [b,e]
    return np.asarray(alpha * np.sum(f * p) / (b * s), scores.dtype)


def balance_loss_bwd(scores: Array, topk_idx: Array, dloss: Array, **attrs: Any) -> Array:
    """dscores[b,t,i] = dloss alpha/(b s) (f_i - sum_j f_j s'_j) / sum_j s_j;   without normalise dloss alpha/(b s) f_i. Errors as there."""
    arrays, f, total, alpha, normalise = _loss_arguments("backward", {"scores": scores, "topk_idx": topk_idx, "dloss": dloss}, attrs)
    scores = arrays["scores"]
    b, s, _ = scores.shape
    factor = float(arrays["dloss"]) * (alpha / (b * s)) / total  # [b,s,1]
    mean = np.matmul(scores, f[:, :, None]) / total if normalise else 0.0
    return ((f[:, None, :] - mean) * factor).astype(scores.dtype)


def _kept(direction: str, arrays: dict[str, Any], attrs: dict[str, Any]) -> tuple[dict[str, Any], Array]:
    """The arrays; keep[n,k]"""
    arrays, a, _ = declared("router.drop_tokens", direction, arrays, attrs)
    op, topk_idx, weight, exempt = "router.drop_tokens", arrays["topk_idx"], arrays["topk_weight"], arrays["exempt"]
    (n, k), e, devices, share = topk_idx.shape, a["n_routed_experts"], a["devices"], a["capacity_factor"]
    need(devices >= 1 and e % devices == 0, op, "devices", devices, f"a divisor of the {e} experts")
    capacity = int(Decimal(repr(float(share))) * n * k // devices)
    need(share > 0 and (n == 0 or capacity >= 1), op, "capacity_factor", share, f"one slot a device at least, not {capacity}")
    check_chosen(op, topk_idx, n, k, e)
    owner = topk_idx.reshape(n * k).astype(np.int64) // (e // devices)
    free = np.zeros(n * k, bool) if exempt is None else np.repeat(exempt != 0, k)
    order = n * k - 1 - np.argsort(weight.reshape(n * k)[::-1], kind="stable")[::-1]  # descending, the earlier first
    order = order[np.lexsort((~free[order], owner[order]))]  # device after device, the exempt first
    sizes = np.bincount(owner, minlength=devices)
    rank = np.arange(n * k) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    keep = np.empty(n * k, np.int64)
    keep[order] = (rank < capacity) | free[order]
    return arrays, keep.reshape(n, k)


def drop_tokens(topk_idx: Array, topk_weight: Array, exempt: Array | None = None, **attrs: Any) -> tuple[Array, Array]:
    """keep[n,k] int64: 1 for the ⌊capacity_factor n k/devices⌋ slots of a device with largest topk_weight;   weight = topk_weight keep.

    The earlier slot wins a tie. Tokens with exempt[n] != 0 are always kept, and use up capacity first. Attributes are those of the
    reference's router.drop_tokens. ValueError: dtypes, shapes, devices that do not divide the experts, no capacity, wrong experts.
    """
    arrays, keep = _kept("forward", {"topk_idx": topk_idx, "topk_weight": topk_weight, "exempt": exempt}, attrs)
    return keep, arrays["topk_weight"] * keep.astype(arrays["topk_weight"].dtype)


def drop_tokens_bwd(topk_idx: Array, topk_weight: Array, dweight: Array, exempt: Array | None = None, **attrs: Any) -> Array:
    """dtopk_weight[n,k] = dweight[n,k] keep[n,k]. Errors as drop_tokens."""
    given = {"topk_idx": topk_idx, "topk_weight": topk_weight, "exempt": exempt, "dweight": dweight}
    arrays, keep = _kept("backward", given, attrs)
    return arrays["dweight"] * keep.astype(arrays["dweight"].dtype)


def bias_update(bias: Array, counts: Array, *, gamma: float = 1e-3, centred: bool = False) -> Array:
    """bias_out[e] = bias[e] + gamma sign(mean(counts) - counts[e]);   centred: gamma times the sign less the mean sign.

    The sign is taken in integers, of sum(counts) - e counts. ValueError: dtypes or shapes; a count or gamma below 0.
    """
    arrays, a, letters = declared("router.bias_update", "forward", {"bias": bias, "counts": counts}, {"gamma": gamma, "centred": centred})
    bias, counts, op = arrays["bias"], arrays["counts"].astype(np.int64), "router.bias_update"
    if np.any(counts < 0):
        i = int(np.argmax(counts < 0))
        need(False, op, f"counts[{i}]", counts[i], "counts >= 0")
    need(a["gamma"] >= 0, op, "gamma", gamma, "gamma >= 0")
    sign = np.sign(counts.sum() - letters["e"] * counts)
    step = sign - sign.sum() / max(letters["e"], 1) if centred else sign
    return (bias + np.float64(gamma) * step).astype(bias.dtype)
