"""DeepSeekMoE: grouped experts, and the layer of gate, routed and shared experts. Spec §3; DeepSeek-V3 paper eq. 12-16."""

from collections.abc import Callable
from typing import Any, Literal

from array_api_compat import device

from .linear import linear_bwd, linear_fwd
from .moe_permute import plan_of, rows_at, sum_slots
from .op import Case, Op, attributes_of, declare, signature
from .router import GateDtype, Scoring, router_noaux_tc_bwd, router_noaux_tc_fwd, selection_regret
from .router_softmax import router_softmax_bwd, router_softmax_fwd, softmax_regret
from .selection import MaskFill, check_chosen
from .swiglu import Silu, check_limit, swiglu_bwd, swiglu_fwd
from .xp import Array, named, stored, xp_of

TopkMethod = Literal["noaux_tc", "softmax"]


def mlp_fwd(x: Array, w_gate: Array, w_up: Array, w_down: Array, limit: float | None, silu: Silu, weight: Array | None) -> tuple:
    """y[n,d] = w_down (silu(w_gate x) ⊙ w_up x); with a weight[n,1], that times the activation, before w_down"""
    (gate, s_gate), (up, s_up) = linear_fwd(x, w_gate), linear_fwd(x, w_up)
    a, s_act = swiglu_fwd(stored(gate), stored(up), limit=limit, silu=silu)  # [n,f]
    scaled = stored(a if weight is None else a * weight)
    y, s_down = linear_fwd(scaled, w_down)
    return stored(y), (s_gate, s_up, s_act, s_down, a, weight)


def mlp_bwd(dy: Array, saved: tuple) -> tuple[Array, Array, Array, Array, Array | None]:
    """dx, dw_gate, dw_up, dw_down, and dweight[n,1] where there was one"""
    s_gate, s_up, s_act, s_down, a, weight = saved
    dscaled, dw_down = linear_bwd(dy, s_down)
    dscaled, dweight = stored(dscaled), None
    if weight is not None:
        dweight = xp_of(a).sum(dscaled * a, axis=-1, keepdims=True)
        dscaled = dscaled * weight
    dgate, dup = map(stored, swiglu_bwd(dscaled, s_act))
    (dx_gate, dw_gate), (dx_up, dw_up) = linear_bwd(dgate, s_gate), linear_bwd(dup, s_up)
    return stored(dx_gate) + stored(dx_up), dw_gate, dw_up, dw_down, dweight


Expert = Callable[[int], tuple[Array, Array, Array]]  # w_gate[f,d], w_up[f,d] and w_down[d,f] of one expert


def experts_by(
    x: Array,
    topk_idx: Array,
    topk_weight: Array,
    e: int,
    expert: Expert,
    *,
    weight_before_down: bool = False,
    limit: float | None = None,
    silu: Silu = "float32",
    keep: bool = True,
) -> tuple[Array, tuple]:
    """y[n] = Σ_k topk_weight[n,k] FFN_{topk_idx[n,k]}(x[n]): expert(i) is asked for once, and only if it has tokens

    With keep=False nothing is saved, so that no more than one expert's weights are alive at a time.
    """
    xp = xp_of(x)
    check_limit("moe.experts", limit)
    check_chosen("moe.experts", topk_idx, x.shape[0], topk_idx.shape[1], e, least=-1)
    counts, source, place = plan_of(topk_idx, e, 1)
    k = max(topk_idx.shape[1], 1)
    token = source // k
    x_sorted = rows_at(x, token)
    weight = rows_at(xp.reshape(topk_weight, (topk_idx.shape[0] * topk_idx.shape[1], 1)), source) if weight_before_down else None
    ends, y_sorted, parts = 0, [xp.zeros((0, x.shape[1]), dtype=x.dtype, device=device(x))], []
    for i in range(e):
        rows = slice(ends, ends + int(counts[i]))
        ends = rows.stop
        if rows.start < rows.stop:
            own = None if weight is None else weight[rows, :]
            y_i, part = mlp_fwd(x_sorted[rows, :], *expert(i), limit, silu, own)
            y_sorted.append(y_i)
            if keep:
                parts.append((i, rows, part))
            part = None  # else it would hold on to this expert's weights while the next one's are read
    y_sorted = xp.concat(y_sorted, axis=0)  # [m,d]
    y = sum_slots(y_sorted, place, None if weight_before_down else topk_weight)
    return y, (y_sorted, topk_weight, source, place, parts, weight_before_down)


def experts_by_bwd(dy: Array, saved: tuple) -> tuple[Array, Array, dict[int, tuple[Array, Array, Array]]]:
    """dx[n] = Σ_k dx_sorted,   dtopk_weight[n,k] = Σ_d dy y_sorted,   and the weights' gradients of every expert that has tokens"""
    y_sorted, topk_weight, source, place, parts, weight_before_down = saved
    xp, (n, k) = xp_of(dy), place.shape
    dy_sorted = rows_at(dy, source // max(k, 1))  # [m,d]
    if weight_before_down:
        dtopk_weight = None
    else:
        slots = [xp.sum(dy * rows_at(y_sorted, place[:, j]), axis=-1) for j in range(k)]
        dtopk_weight = xp.stack(slots, axis=1) if slots else 0 * topk_weight
        dy_sorted = stored(dy_sorted * rows_at(xp.reshape(topk_weight, (n * k, 1)), source))
    dx_sorted, dweights, dw = [0 * dy_sorted[:0, :]], [0 * topk_weight[:0, :1]], {}
    for i, rows, part in parts:
        dx_i, dw_gate, dw_up, dw_down, dweight = mlp_bwd(dy_sorted[rows, :], part)
        dw[i] = dw_gate, dw_up, dw_down
        dx_sorted.append(dx_i)
        if dweight is not None:
            dweights.append(dweight)
    if dtopk_weight is None:
        flat = rows_at(xp.concat(dweights, axis=0), xp.reshape(place, (n * k,)))
        dtopk_weight = xp.reshape(flat, (n, k))
    return sum_slots(xp.concat(dx_sorted, axis=0), place, None), dtopk_weight, dw


@signature("x[n,d] topk_idx[n,k]:index topk_weight[n,k] w_gate[e,f,d] w_up[e,f,d] w_down[e,d,f] -> y[n,d]")
@attributes_of(experts_by)
def moe_experts_fwd(
    x: Array, topk_idx: Array, topk_weight: Array, w_gate: Array, w_up: Array, w_down: Array, **attrs: Any
) -> tuple[Array, tuple]:
    """y[n] = Σ_k topk_weight[n,k] FFN_{topk_idx[n,k]}(x[n]),   FFN_e(x) = w_down[e] (silu(w_gate[e] x) ⊙ w_up[e] x)   (V3 eq. 12)

    weight_before_down=True multiplies the activation by the weight, before w_down (V4, TileKernels): the same in exact arithmetic. Tokens
    are sorted by expert, so each expert is one product over all its tokens; slots are added in their order. -1 is a slot that goes nowhere.
    limit and silu as in swiglu.
    """
    weights = w_gate, w_up, w_down
    y, saved = experts_by(x, topk_idx, topk_weight, w_gate.shape[0], stacked(*weights), **attrs)
    return y, (*saved[:5], weights, saved[5])


def moe_experts_bwd(dy: Array, saved: tuple) -> tuple[Array, ...]:
    """dx[n] = Σ_k dx_sorted,   dtopk_weight[n,k] = Σ_d dy y_sorted,   dw[e] from expert e's own rows: exactly 0 without tokens"""
    *parts, weights, weight_before_down = saved
    dx, dtopk_weight, filled = experts_by_bwd(dy, (*parts, weight_before_down))
    e = weights[0].shape[0]
    return dx, dtopk_weight, *(stack_of([filled[i][j] if i in filled else None for i in range(e)], w) for j, w in enumerate(weights))


def stacked(w_gate: Array, w_up: Array, w_down: Array) -> Expert:
    return lambda i: (w_gate[i, ...], w_up[i, ...], w_down[i, ...])


def stack_of(gradients: list[Array | None], like: Array) -> Array:
    """The gradients one after the other, zeros for those that are missing"""
    if not gradients:
        return 0 * like
    xp = xp_of(like)
    zero = xp.zeros_like(like[0, ...])
    return xp.stack([zero if g is None else g for g in gradients], axis=0)


LAYER = (
    "x[n,d] gate_weight[e,d] e_score_correction_bias?[e]:const w_gate[e,f,d] w_up[e,f,d] w_down[e,d,f] "
    "shared_gate?[g,d] shared_up?[g,d] shared_down?[d,g] -> y[n,d] topk_idx[n,num_experts_per_tok]:index"
)


def no_bias(logits: Array) -> Array:
    return xp_of(logits).zeros((logits.shape[1],), dtype=logits.dtype, device=device(logits))


def route(logits: Array, bias: Array | None, method: TopkMethod, common: dict[str, Any], noaux: dict[str, Any]) -> tuple:
    if method == "noaux_tc":
        return router_noaux_tc_fwd(logits, no_bias(logits) if bias is None else bias, **common, **noaux)
    return router_softmax_fwd(logits, **common)


def layer_by(
    x: Array,
    gate_weight: Array,
    e_score_correction_bias: Array | None,
    shared: list[Array],
    expert: Expert,
    *,
    num_experts_per_tok: int = 8,
    n_group: int = 8,
    topk_group: int = 4,
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 2.5,
    topk_method: TopkMethod = "noaux_tc",
    scoring: Scoring = "sigmoid",
    denominator_eps: float = 1e-20,
    mask_fill: MaskFill = "-inf",
    gate_dtype: GateDtype = "float32",
    weight_before_down: bool = False,
    limit: float | None = None,
    silu: Silu = "float32",
    topk_idx: Array | None = None,
    keep: bool = True,
) -> tuple[tuple[Array, Array], tuple]:
    """The layer with the routed experts one by one, as experts_by; shared is empty, or the three weights of the shared experts."""
    common = {
        "k": num_experts_per_tok,
        "n_group": n_group,
        "topk_group": topk_group,
        "norm_topk_prob": norm_topk_prob,
        "routed_scaling_factor": routed_scaling_factor,
        "denominator_eps": denominator_eps,
        "mask_fill": mask_fill,
        "topk_idx": topk_idx,
    }
    logits, s_logits = linear_fwd(x, gate_weight)  # [n,e]
    noaux = {"scoring": scoring, "gate_dtype": gate_dtype}
    (idx, weight), s_router = route(named("logits", logits), e_score_correction_bias, topk_method, common, noaux)
    how = {"weight_before_down": weight_before_down, "limit": limit, "silu": silu, "keep": keep}
    y, s_experts = experts_by(x, idx, named("topk_weight", weight), gate_weight.shape[0], expert, **how)
    s_shared = None
    if shared:
        y_shared, s_shared = mlp_fwd(x, shared[0], shared[1], shared[2], limit, silu, None)
        y = stored(named("routed", y)) + named("shared", y_shared)
    return (y, idx), (s_logits, s_router, s_experts, s_shared, topk_method)


def layer_by_bwd(dy: Array, saved: tuple, experts_bwd: Callable = experts_by_bwd) -> tuple:
    """dx, dgate_weight, the routed experts' gradients as experts_bwd has them, those of the shared experts"""
    s_logits, s_router, s_experts, s_shared, method = saved
    dx, dtopk_weight, *dw = experts_bwd(dy, s_experts)
    dlogits = (router_noaux_tc_bwd if method == "noaux_tc" else router_softmax_bwd)(dtopk_weight, s_router)
    dx_gate, dgate_weight = linear_bwd(dlogits, s_logits)
    dx = stored(dx) + stored(dx_gate)
    if s_shared is None:
        return dx, dgate_weight, *dw
    dx_shared, *dshared, _ = mlp_bwd(dy, s_shared)
    return dx + dx_shared, dgate_weight, *dw, *dshared


@signature(LAYER)
@attributes_of(layer_by)
def moe_layer_fwd(
    x: Array,
    gate_weight: Array,
    e_score_correction_bias: Array | None,
    w_gate: Array,
    w_up: Array,
    w_down: Array,
    shared_gate: Array | None,
    shared_up: Array | None,
    shared_down: Array | None,
    **attrs: Any,
) -> tuple[tuple[Array, Array], tuple]:
    """y[n] = FFN_shared(x[n]) + Σ_k topk_weight[n,k] FFN_{topk_idx[n,k]}(x[n]),   topk of the router of gate_weight x   (V3 eq. 12-16)

    Without the residual. The shared experts are one FFN of their joint width, unweighted. topk_method="noaux_tc" is router.noaux_tc (no
    bias: zeros), "softmax" router.softmax. The gate's product is float32 even where activations have 16 bits. limit and silu as in swiglu,
    weight_before_down as in moe.experts, the rest as in the routers. A given topk_idx is kept as the choice.
    """
    shared = [w for w in (shared_gate, shared_up, shared_down) if w is not None]
    if len(shared) not in (0, 3):
        raise ValueError(f"moe.layer: {len(shared)} of shared_gate, shared_up and shared_down are given; expected all or none")
    weights = w_gate, w_up, w_down
    out, (s_logits, s_router, s_experts, *rest) = layer_by(x, gate_weight, e_score_correction_bias, shared, stacked(*weights), **attrs)
    return out, (s_logits, s_router, (*s_experts[:5], weights, s_experts[5]), *rest)


def moe_layer_bwd(dy: Array, saved: tuple) -> tuple[Array, ...]:
    """dx = Σ over the gate, the routed and the shared experts; gradients of every weight, none to the bias, none through the choice"""
    return layer_by_bwd(dy, saved, moe_experts_bwd)


def layer_regret(
    x: Array,
    gate_weight: Array,
    e_score_correction_bias: Array | None,
    *_: Array,
    topk_idx: Array,
    num_experts_per_tok: int = 8,
    **attrs: Any,
) -> Array:
    """[n]: by how much the router's scores would have to move for topk_idx to be the choice"""
    logits, _saved = linear_fwd(x, gate_weight)
    common = {"topk_idx": topk_idx, "k": num_experts_per_tok, **{k: attrs[k] for k in ("n_group", "topk_group", "mask_fill") if k in attrs}}
    if attrs.get("topk_method", "noaux_tc") == "softmax":
        return softmax_regret(logits, **{"n_group": 8, "topk_group": 4, **common})
    bias = no_bias(logits) if e_score_correction_bias is None else e_score_correction_bias
    return selection_regret(logits, bias, **common, **{k: attrs[k] for k in ("scoring", "gate_dtype") if k in attrs})


def _experts(name: str, n: int, k: int, e: int, idx: tuple | None = None, note: str = "", f: int = 7, **attrs: Any) -> Case:
    d = 10
    draws: dict[str, tuple] = {"x": ("normal", 1.0), "topk_idx": idx or ("experts", e), "topk_weight": ("uniform", 0.1, 1.0)}
    draws |= {"w_gate": ("normal", d**-0.5), "w_up": ("normal", d**-0.5), "w_down": ("normal", f**-0.5), "dy": ("normal", 1.0)}
    return Case(name, {"n": n, "k": k, "e": e, "d": d, "f": f}, draws, attrs, note)


def _layer(
    name: str, n: int, e: int, k: int, bias: bool = True, shared: bool = True, note: str = "", f: int = 7, spread: float = 1.0, **attrs: Any
) -> Case:
    d, g = 12, 9
    draws: dict[str, tuple] = {"x": ("normal", 1.0), "gate_weight": ("normal", spread * d**-0.5), "dy": ("normal", 1.0)}
    draws |= {"w_gate": ("normal", d**-0.5), "w_up": ("normal", d**-0.5), "w_down": ("normal", f**-0.5)}
    draws |= {"e_score_correction_bias": ("normal", 0.1)} if bias else {}
    if shared:
        draws |= {"shared_gate": ("normal", d**-0.5), "shared_up": ("normal", d**-0.5), "shared_down": ("normal", g**-0.5)}
    return Case(name, {"n": n, "e": e, "d": d, "f": f, "g": g}, draws, {"num_experts_per_tok": k, **attrs}, note)


moe_experts = declare(
    Op(
        "moe.experts",
        moe_experts_fwd,
        moe_experts_bwd,
        (
            _experts("v3", 6, 3, 8),
            _experts("one", 1, 1, 2),
            _experts("empty-experts", 5, 1, 6, ("positions", 3, 3, 0, 3, 0), "four experts without tokens: exact zeros"),
            _experts("unrouted", 4, 2, 3, ("positions", -1, 0, 2, -1, -1, -1, 0, 2), "slots that go nowhere"),
            _experts("square", 5, 2, 4, None, "w_down's widths are equal: read transposed it fits", f=10),
            _experts("before-down", 6, 3, 8, None, "V4: the weight before w_down", weight_before_down=True),
            _experts("clamped", 6, 3, 8, None, "V4's clamp, at a size that cuts", limit=1.0, weight_before_down=True),
        ),
        "6*n*k*d*f",
        "DeepSeek-V3 paper eq. 12; spec §3.1, §3.5",
        vary="",
    )
)

moe_layer = declare(
    Op(
        "moe.layer",
        moe_layer_fwd,
        moe_layer_bwd,
        (
            _layer("v3", 6, 16, 4, n_group=4, topk_group=2),
            _layer("one", 1, 4, 1, n_group=1, topk_group=1),
            _layer(
                "v2",
                5,
                16,
                3,
                bias=False,
                note="softmax, no renormalisation, factor 16",
                topk_method="softmax",
                n_group=4,
                topk_group=2,
                norm_topk_prob=False,
                routed_scaling_factor=16.0,
            ),
            _layer(
                "v2-lite",
                5,
                8,
                3,
                bias=False,
                note="greedy",
                topk_method="softmax",
                n_group=1,
                topk_group=1,
                norm_topk_prob=False,
                routed_scaling_factor=1.0,
            ),
            _layer("kimi-k2", 5, 12, 4, n_group=1, topk_group=1, routed_scaling_factor=2.827),
            _layer("glm", 5, 8, 4, n_group=1, topk_group=1, routed_scaling_factor=1.8, shared=True),
            _layer(
                "v4",
                5,
                8,
                3,
                note="√softplus, weight before w_down, clamp",
                n_group=1,
                topk_group=1,
                routed_scaling_factor=1.5,
                scoring="sqrtsoftplus",
                weight_before_down=True,
                limit=2.0,
            ),
            _layer("no-shared", 4, 8, 2, n_group=1, topk_group=1, shared=False),
            _layer(
                "near", 48, 32, 4, False, False, "choices so near that bfloat16 logits turn some", f=1, spread=3.0, n_group=1, topk_group=1
            ),
        ),
        "2*n*e*d+6*n*(num_experts_per_tok*f+g)*d",
        "DeepSeek-V3 paper eq. 12-16; DeepSeek-V2 paper §2.2; DeepSeek-V3 inference/model.py, MoE",
        vary="",
        choice=("topk_idx", layer_regret),
    )
)
