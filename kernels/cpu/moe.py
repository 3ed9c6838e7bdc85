"""DeepSeekMoE: grouped experts, and the layer of gate, routed and shared experts, forward and backward."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...ref.selection import check_chosen
from . import _experts, router
from ._common import array_of, need
from ._declared import INTEGERS, declared, split
from .swiglu import limit_of

Array = NDArray[Any]
EXPERTS = ("w_gate", "w_up", "w_down")
SHARED = ("shared_gate", "shared_up", "shared_down")
COMMON = ("n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor", "denominator_eps", "mask_fill")


def _checked_experts(direction: str, arrays: dict[str, Any], attrs: dict[str, Any]) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """The arrays, and what _experts.forward takes"""
    op = "moe.experts"
    arrays, a, letters = declared(op, direction, arrays, attrs, EXPERTS)
    check_chosen(op, arrays["topk_idx"], letters["n"], letters["k"], letters["e"], least=-1)
    limit_of(op, a["limit"], arrays["x"].dtype)
    return arrays, (arrays["x"], arrays["topk_idx"], arrays["topk_weight"], [arrays[name] for name in EXPERTS], a["limit"])


def moe_experts(x: Array, topk_idx: Array, topk_weight: Array, w_gate: Array, w_up: Array, w_down: Array, **attrs: Any) -> Array:
    """y[n,d] = sum_k topk_weight[n,k] w_down[i] (silu(w_gate[i] x[n]) * (w_up[i] x[n])),   i = topk_idx[n,k], -1 adding nothing.

    x[n,d], topk_weight[n,k], w_gate[e,f,d], w_up[e,f,d] and w_down[e,d,f] are float32 or float64 alike; a weight each of whose experts lies
    in one piece is not copied. Attributes are those of the reference's moe.experts, with its defaults; weight_before_down and silu change
    nothing here. Each expert is one product with all its tokens; sums in the inputs' dtype, expert after expert.

    ValueError: dtypes or shapes do not fit, an index is out of range or an expert twice in a row, limit <= 0.
    """
    arrays, given = _checked_experts("forward", _given(locals()), attrs)
    y = np.zeros_like(arrays["x"])
    _experts.forward(*given, y=y, keep=False)
    return y


def moe_experts_bwd(
    x: Array, topk_idx: Array, topk_weight: Array, w_gate: Array, w_up: Array, w_down: Array, dy: Array, **attrs: Any
) -> tuple[Array, ...]:
    """dx, dtopk_weight, dw_gate, dw_up, dw_down for the gradient dy[n,d] of moe_experts' y; exactly 0 for an expert without tokens.

    With da = w_downᵀ dy: dtopk_weight = sum_f da * activation, the rest from topk_weight da. Errors as moe_experts.
    """
    arrays, given = _checked_experts("backward", _given(locals()), attrs)
    dx = np.zeros_like(arrays["x"])
    saved = _experts.forward(*given, y=np.zeros_like(dx), keep=True)
    assert saved is not None
    return dx, *_experts.backward(saved, arrays["dy"], dx)


def _given(local: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in local.items() if name != "attrs"}


class Saved(NamedTuple):
    """What the layer's backward needs of its forward"""

    arrays: dict[str, Any]
    routed: dict[str, Any]  # the router's arguments
    topk_idx: Array
    experts: _experts.Saved | None
    shared: _experts.Saved | None


def _layer(
    direction: str, arrays: dict[str, Any], attrs: dict[str, Any], keep: bool, topk_idx: Array | None = None
) -> tuple[Array, Array, Saved]:
    """y, topk_idx; all checks come first. A topk_idx that is given is kept."""
    op = "moe.layer"
    present = [name for name in SHARED if arrays[name] is not None]
    need(len(present) in (0, 3), op, " and ".join(present), "given", "all of shared_gate, shared_up and shared_down, or none")
    arrays, a, letters = declared(op, direction, arrays, attrs, (*EXPERTS, *SHARED))
    limit_of(op, a["limit"], arrays["x"].dtype)
    x, k = arrays["x"], a["num_experts_per_tok"]
    topk_idx = arrays.get("topk_idx") if topk_idx is None else topk_idx
    if topk_idx is not None:
        check_chosen(op, topk_idx, letters["n"], k, letters["e"])
    routed: dict[str, Any] = {"logits": np.matmul(x, arrays["gate_weight"].T), "k": k, **{name: a[name] for name in COMMON}}
    if a["topk_method"] == "noaux_tc":
        bias = arrays["e_score_correction_bias"]
        routed["bias"] = np.zeros(letters["e"], x.dtype) if bias is None else bias
        routed |= {name: a[name] for name in ("scoring", "gate_dtype")}
    if topk_idx is None:
        idx, weight = (router.noaux_tc if "bias" in routed else router.softmax)(**routed)
    else:
        idx = np.ascontiguousarray(topk_idx, np.int64)
        weight = router.weights_of("bias" in routed, idx, **routed)
    y, shared = np.zeros_like(x), None
    if present:
        shared = _experts.dense_forward(x, [arrays[name] for name in SHARED], a["limit"], y, keep)
    experts = _experts.forward(x, idx, weight, [arrays[name] for name in EXPERTS], a["limit"], y, keep)
    return y, idx, Saved(arrays, routed, idx, experts, shared)


def backward(saved: Saved, dy: Array, out: Any = None) -> tuple[Array, ...]:
    """moe_layer_bwd's outputs. A weight's gradient goes into out[its name], if there is one."""
    arrays, routed, out = saved.arrays, saved.routed, out or {}
    assert saved.experts is not None
    x, dx = arrays["x"], np.zeros_like(arrays["x"])
    dtopk_weight, *dw = _experts.backward(saved.experts, dy, dx, [out.get(name) for name in EXPERTS])
    route_bwd = router.noaux_tc_bwd if "bias" in routed else router.softmax_bwd
    dlogits = route_bwd(**routed, topk_idx=saved.topk_idx, dtopk_weight=dtopk_weight)
    dx += np.matmul(dlogits, arrays["gate_weight"])
    dgate_weight = np.matmul(dlogits.T, x, out=out.get("gate_weight"))
    if saved.shared is not None:
        dw += _experts.dense_backward(saved.shared, dy, dx, [out.get(name) for name in SHARED])
    return dx, dgate_weight, *dw


def layer_saving(topk_idx: Array | None = None, **given: Any) -> tuple[tuple[Array, Array], Saved]:
    """moe_layer's outputs, and what `backward` takes: a training step computes the forward once. A topk_idx that is given is kept."""
    y, idx, saved = _layer("forward", *split("moe.layer", given), True, topk_idx)
    return (y, idx), saved


def moe_layer(
    x: Array,
    gate_weight: Array,
    w_gate: Array,
    w_up: Array,
    w_down: Array,
    e_score_correction_bias: Array | None = None,
    shared_gate: Array | None = None,
    shared_up: Array | None = None,
    shared_down: Array | None = None,
    **attrs: Any,
) -> tuple[Array, NDArray[np.int64]]:
    """y[n,d] = FFN_shared(x[n]) + sum_k topk_weight[n,k] FFN_{topk_idx[n,k]}(x[n]),   topk_idx[n,num_experts_per_tok] of the router.

    logits = x gate_weightᵀ go to router.noaux_tc (no bias: zeros) or router.softmax, by topk_method. Weights as in moe_experts, the shared
    experts' are shared_gate[g,d], shared_up[g,d], shared_down[d,g], given all or not at all. No residual. Attributes are those of the
    reference's moe.layer, with its defaults. ValueError: as the router and moe_experts.
    """
    y, idx, _ = _layer("forward", _given(locals()), attrs, False)
    return y, idx


def moe_layer_bwd(
    x: Array,
    gate_weight: Array,
    w_gate: Array,
    w_up: Array,
    w_down: Array,
    topk_idx: NDArray[np.int64],
    dy: Array,
    e_score_correction_bias: Array | None = None,
    shared_gate: Array | None = None,
    shared_up: Array | None = None,
    shared_down: Array | None = None,
    **attrs: Any,
) -> tuple[Array, ...]:
    """dx, dgate_weight, dw_gate, dw_up, dw_down and, if given, dshared_gate, dshared_up, dshared_down, for the gradient dy[n,d] of y.

    The choice topk_idx is held: gradients reach the gate through the weights alone, and never the bias. Errors as moe_layer.
    """
    topk_idx = array_of("moe.layer_bwd", "topk_idx", topk_idx, INTEGERS, 2)
    _, _, saved = _layer("backward", {**_given(locals()), "topk_idx": topk_idx}, attrs, True)
    return backward(saved, saved.arrays["dy"])
