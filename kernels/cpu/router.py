"""Routers: V3's auxiliary-loss-free one (noaux_tc) and V2's softmax; what balances their load stands beside them."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _gate
from ._common import array_of, choice, floats, integer, need, run
from .balance import balance_loss, balance_loss_bwd, bias_update, drop_tokens, drop_tokens_bwd
from .cast import FORMATS, rounding

__all__ = [
    "balance_loss",
    "balance_loss_bwd",
    "bias_update",
    "drop_tokens",
    "drop_tokens_bwd",
    "noaux_tc",
    "noaux_tc_bwd",
    "softmax",
    "softmax_bwd",
]

Array = NDArray[Any]
SCORINGS = ("sigmoid", "softmax", "sqrtsoftplus")
MASK_FILLS = ("-inf", "0")
PLACES = ("add", "clamp")
GATES = ("float32", "bfloat16")
COST = 8  # elements of a copy that one logit's work is worth, for `run`


def _checked(op: str, logits: Any, bias: Any, k: Any, n_group: Any, topk_group: Any, mask_fill: Any, factor: Any, eps: Any) -> tuple:
    """logits, bias, k, n_group, topk_group after every check that needs no look at the logits themselves; no bias: the softmax router."""
    choice(op, "mask_fill", mask_fill, MASK_FILLS)
    for name, value in ("routed_scaling_factor", factor), ("denominator_eps", eps):
        need(isinstance(value, (int, float, np.integer, np.floating)) and math.isfinite(value), op, name, repr(value), "a finite number")
    logits = floats(op, "logits", logits, 2)
    e, least = logits.shape[1], 1 if bias is None else 2
    if bias is not None:
        bias = floats(op, "bias", bias, 1)
        ok = bias.shape == (e,) and bias.dtype == logits.dtype
        need(ok, op, "bias", f"{bias.dtype}{list(bias.shape)}", f"{logits.dtype}[{e}] for logits of shape {logits.shape}")
    k, n_group, topk_group = integer(op, "k", k), integer(op, "n_group", n_group), integer(op, "topk_group", topk_group)
    need(e % n_group == 0, op, "n_group", n_group, f"a divisor of the {e} experts")
    need(topk_group <= n_group, op, "topk_group", topk_group, f"at most n_group={n_group}")
    need(n_group == 1 or e // n_group >= least, op, "n_group", n_group, f"groups of at least {least} of the {e} experts")
    left = topk_group * (e // n_group)
    need(k <= left, op, "k", k, f"at most {left}, the experts in topk_group={topk_group} of n_group={n_group} groups")
    if bias is None:
        return logits, np.zeros(e, logits.dtype), k, n_group, topk_group
    _finite(op, "bias", bias)
    return logits, bias, k, n_group, topk_group


def _finite(op: str, name: str, x: Array) -> None:
    bad = np.argwhere(~np.isfinite(x))
    if len(bad):
        index = tuple(map(int, bad[0]))
        need(False, op, f"{name}[{', '.join(map(str, index))}]", x[index], "a finite number")


def _named(op: str, scoring: Any, place: Any, gate_dtype: Any, dtype: np.dtype[Any]) -> tuple[tuple[int, bool, Any], bool]:
    """(scoring, whether the gate rounds, how) as the kernels take them; whether the denominator is clamped"""
    for name, value, allowed in ("scoring", scoring, SCORINGS), ("denominator_place", place, PLACES), ("gate_dtype", gate_dtype, GATES):
        choice(op, name, value, allowed)
    return (SCORINGS.index(scoring), gate_dtype == "bfloat16", rounding(FORMATS["bf16"], dtype, "nan")), place == "clamp"


def _route(op: str, checked: tuple, gate: tuple, pair: int, mask_fill: str, weighing: tuple) -> tuple[NDArray[np.int64], Array]:
    logits, bias, k, n_group, topk_group = checked
    (n, e), F = logits.shape, logits.dtype.type
    topk_idx, topk_weight = np.empty((n, k), np.int64), np.empty((n, k), F)
    normalise, clamp, factor, eps = weighing
    rest = pair, n_group, topk_group, mask_fill == "0", bool(normalise), clamp, F(factor), F(eps)
    if not all(run(_gate.forward, n, e * COST, logits, bias, *gate, *rest, topk_idx, topk_weight)):
        _finite(op, "logits", logits)
    return topk_idx, topk_weight


def _route_bwd(op: str, checked: tuple, topk_idx: Any, dtopk_weight: Any, gate: tuple, weighing: tuple) -> Array:
    logits, _, k, _, _ = checked
    (n, e), F = logits.shape, logits.dtype.type
    topk_idx = array_of(op, "topk_idx", topk_idx, (np.int64,), 2)
    dtopk_weight = array_of(op, "dtopk_weight", dtopk_weight, (F,), 2)
    for name, x in ("topk_idx", topk_idx), ("dtopk_weight", dtopk_weight):
        need(x.shape == (n, k), op, name, f"of shape {x.shape}", f"shape {(n, k)} for logits of shape {logits.shape} and k={k}")
    fault = _gate.fault(topk_idx, 0, e)
    if fault >= 0:
        name = f"topk_idx[{fault // k}, {fault % k}]"
        value = topk_idx[fault // k, fault % k]
        need(0 <= value < e, op, name, value, f"an expert from 0 to {e - 1}")
        need(False, op, name, value, "an expert that the row has not chosen already")
    dlogits = np.empty_like(logits)
    normalise, clamp, factor, eps = weighing
    rest = bool(normalise), clamp, F(factor), F(eps)
    if not all(run(_gate.backward, n, e, logits, topk_idx, dtopk_weight, *gate, *rest, dlogits)):
        _finite(op, "logits", logits)
    return dlogits


def weights_of(noaux: bool, topk_idx: Array, logits: Array, bias: Array | None = None, **attrs: Any) -> Array:
    """topk_weight[n,k] of a choice that is kept, for arguments that noaux_tc or softmax has checked."""
    a = {"norm_topk_prob": noaux, "routed_scaling_factor": 2.5 if noaux else 16.0, "denominator_eps": 1e-20, **attrs}
    names = (
        attrs.get("scoring", "sigmoid" if noaux else "softmax"),
        attrs.get("denominator_place", "add"),
        attrs.get("gate_dtype", "float32"),
    )
    gate, clamp = _named("router", *names, logits.dtype)
    F, out = logits.dtype.type, np.empty(topk_idx.shape, logits.dtype)
    rest = bool(a["norm_topk_prob"]), clamp, F(a["routed_scaling_factor"]), F(a["denominator_eps"])
    run(_gate.weights, logits.shape[0], logits.shape[1] * COST, logits, topk_idx, *gate, *rest, out)
    return out


def noaux_tc(
    logits: Array,
    bias: Array,
    *,
    k: int = 8,
    n_group: int = 8,
    topk_group: int = 4,
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 2.5,
    scoring: str = "sigmoid",
    denominator_eps: float = 1e-20,
    denominator_place: str = "add",
    mask_fill: str = "-inf",
    gate_dtype: str = "float32",
) -> tuple[NDArray[np.int64], Array]:
    """topk_idx[n,k] int64, topk_weight[n,k] of logits[n,e], bias[e].

        s[n,e] = sigmoid(logits) | softmax_e(logits) | sqrt(softplus(logits)),   t = s + bias
        group score = sum of its two largest t; the topk_group best of n_group groups of consecutive experts stay, t := mask_fill elsewhere
        topk_idx = the k largest t, descending;   w[n,k] = s[n, topk_idx]
        topk_weight = routed_scaling_factor * (w / D if norm_topk_prob else w),   D = sum_k w + denominator_eps | max(sum_k w, eps)

    Ties go to the lowest index, of groups and of experts. One group: nothing is masked. gate_dtype="bfloat16" rounds logits and s to
    bfloat16. Arithmetic in logits' dtype, sums in float64.

    ValueError: dtypes or shapes do not fit; n_group does not divide e or leaves groups of one; topk_group > n_group; k > experts left by
    the groups; a logit or bias is NaN or infinite (the first is named); an attribute has no such value.
    """
    op = "router.noaux_tc"
    checked = _checked(op, logits, bias, k, n_group, topk_group, mask_fill, routed_scaling_factor, denominator_eps)
    gate, clamp = _named(op, scoring, denominator_place, gate_dtype, checked[0].dtype)
    return _route(op, checked, gate, 2, mask_fill, (norm_topk_prob, clamp, routed_scaling_factor, denominator_eps))


def noaux_tc_bwd(
    logits: Array,
    bias: Array,
    topk_idx: NDArray[np.int64],
    dtopk_weight: Array,
    *,
    k: int = 8,
    n_group: int = 8,
    topk_group: int = 4,
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 2.5,
    scoring: str = "sigmoid",
    denominator_eps: float = 1e-20,
    denominator_place: str = "add",
    mask_fill: str = "-inf",
    gate_dtype: str = "float32",
) -> Array:
    """dlogits[n,e] for the gradient dtopk_weight[n,k] of noaux_tc's topk_weight, at the experts topk_idx[n,k] that it chose.

        ds = routed_scaling_factor * (dw - sum_k(dw s) / D) / D   (without norm_topk_prob: factor dw; D clamped: factor dw / D)
        dlogits = ds * s'(logits);  softmax: s * (ds - sum_e s ds)

    No gradient reaches bias or goes through the selection: experts not selected get exactly 0, except under softmax. Roundings to bfloat16
    are passed straight through. Errors as noaux_tc; topk_idx must be int64 in [0, e), distinct in a row, and both [n,k].
    """
    op = "router.noaux_tc_bwd"
    checked = _checked(op, logits, bias, k, n_group, topk_group, mask_fill, routed_scaling_factor, denominator_eps)
    gate, clamp = _named(op, scoring, denominator_place, gate_dtype, checked[0].dtype)
    return _route_bwd(op, checked, topk_idx, dtopk_weight, gate, (norm_topk_prob, clamp, routed_scaling_factor, denominator_eps))


def softmax(
    logits: Array,
    *,
    k: int = 6,
    n_group: int = 8,
    topk_group: int = 3,
    norm_topk_prob: bool = False,
    routed_scaling_factor: float = 16.0,
    denominator_eps: float = 1e-20,
    mask_fill: str = "-inf",
) -> tuple[NDArray[np.int64], Array]:
    """topk_idx[n,k] int64, topk_weight[n,k] = routed_scaling_factor * s[n, topk_idx] of s = softmax_e(logits[n,e]).

    A group's score is its largest s; the rest as noaux_tc without a bias, errors too.
    """
    op = "router.softmax"
    checked = _checked(op, logits, None, k, n_group, topk_group, mask_fill, routed_scaling_factor, denominator_eps)
    gate, clamp = _named(op, "softmax", "add", "float32", checked[0].dtype)
    return _route(op, checked, gate, 1, mask_fill, (norm_topk_prob, clamp, routed_scaling_factor, denominator_eps))


def softmax_bwd(
    logits: Array,
    topk_idx: NDArray[np.int64],
    dtopk_weight: Array,
    *,
    k: int = 6,
    n_group: int = 8,
    topk_group: int = 3,
    norm_topk_prob: bool = False,
    routed_scaling_factor: float = 16.0,
    denominator_eps: float = 1e-20,
    mask_fill: str = "-inf",
) -> Array:
    """dlogits[n,e] = s (ds - sum_e s ds),   ds = routed_scaling_factor * dtopk_weight at the experts topk_idx[n,k], 0 elsewhere.

    With norm_topk_prob ds as in noaux_tc_bwd, as are the errors.
    """
    op = "router.softmax_bwd"
    checked = _checked(op, logits, None, k, n_group, topk_group, mask_fill, routed_scaling_factor, denominator_eps)
    gate, clamp = _named(op, "softmax", "add", "float32", checked[0].dtype)
    return _route_bwd(op, checked, topk_idx, dtopk_weight, gate, (norm_topk_prob, clamp, routed_scaling_factor, denominator_eps))
