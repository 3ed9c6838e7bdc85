"""Known bugs of the routers, their balance, SwiGLU, the experts and the layer: each makes some declared case FAIL, and is named."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from buggy import Made, check_reference, check_registry, check_told, known, named, question_of, vector
from leadline.golden.band import truth_of
from leadline.golden.bugs import Bug, balance, bugs_of, moe, moe_experts, moe_layer
from leadline.golden.draw import draw_case
from leadline.golden.judge import FAIL, Returned, as_returned, judge
from leadline.golden.precision import PRECISIONS
from leadline.golden.vectors import Vector
from leadline.golden.verify import verify
from leadline.ref.op import OPS

Array = np.ndarray
AREA = ("router", "swiglu", "moe")

# The registry of known bugs of this area: reports from the field, and mutants of them.
REGISTRY = (
    "bias-leaks-into-weights",
    "group-mask-zero",
    "group-score-max",
    "group-ignored",
    "softmax-instead-of-sigmoid",
    "router-logits-bf16",
    "correction-bias-bf16",
    "biased-add-low-precision",
    "norm-eps-missing",
    "norm-topk-missing",
    "norm-xor-scale",
    "scale-only-if-renorm",
    "routed-scale-missing",
    "routed-scale-twice",
    "shared-expert-inv-scaled",
    "shared-expert-scaled-too",
    "topk-tie-break",
    "padding-expert-idx0",
    "permute-twice",
    "permute-clamp-unaligned-M",
    "weight-before-activation",
    "swiglu-gate-up-swapped",
    "fp8-dispatch-scale-dropped",
    "ue8m0-mode-mismatch",
    "expert-gemm-large-hidden",
    "gate-grad-topk1-zero",
    "gate-grad-through-norm-dropped",
    "gate-grad-bias-or-masked-experts",
    "gate-grad-ep-sentinel",
    "expert-zero-token-grad-garbage",
    "seq-aux-softmax",
    "aux-topk-not-normalised",
    "aux-score-unnormalised-k1",
    "aux-grad-dead-or-xN",
    "aux-grad-accum-overweight",
    "aux-counts-padding",
    "bias-update-count-bf16",
    "bias-update-sign",
    "bias-update-no-allreduce",
    "bias-update-per-microbatch",
    "bias-count-recompute-double",
    "bias-count-eval-leak",
    "bias-recentred",
)

# What bfloat16 cannot show, and why.
HIDDEN_IN_BF16 = {
    ("router.noaux_tc", "router-logits-bf16"): "the logits that it is handed are bfloat16 already",
    ("router.softmax", "router-logits-bf16"): "the logits that it is handed are bfloat16 already",
    ("router.bias_update", "bias-out-bf16"): "what is judged is bfloat16 itself",
}


def test_no_bug_of_the_registry_is_dropped() -> None:
    """Every id is a variant, or is listed with the reason why it is none; never both."""
    check_registry(REGISTRY)


# ---- every bug is caught


def fails(v: Vector, bug: Bug) -> bool:
    """Whether the case fails a subject that has this bug"""
    question = question_of(v)
    inputs = v.inputs if v.op.exact else {k: x.astype(np.float64) if x.dtype.kind == "f" else x for k, x in v.inputs.items()}
    with np.errstate(all="ignore"):
        outputs = bug.variant(v.op).run(v.direction, inputs, {**v.case.attrs, **bug.attrs})
    return judge(question, as_returned(question, {k: np.asarray(y) for k, y in outputs.items()}), v.band).verdict == FAIL


@pytest.mark.parametrize(("op", "way", "bug"), [pytest.param(*k, id="-".join(k)) for k in known(AREA)])
def test_some_case_fails_the_bug(op: str, way: str, bug: str) -> None:
    """At float32, and at bfloat16 unless that hides it. A convention fails likewise where the case has another."""
    variants = [b for b in bugs_of(OPS[op], way) if b.id == bug]
    for precision in ("fp32", "bf16"):
        names = [case.name for case in OPS[op].cases]
        found = any(fails(vector(op, name, way, precision), b) for name in names for b in variants)
        hidden = precision == "bf16" and (op, bug) in HIDDEN_IN_BF16
        assert found is not hidden, f"{precision} cases of {op} {way}: {'some' if found else 'none'} fails {bug}"


def test_the_reference_passes_as_itself() -> None:
    """What the variants are compared with: the reference's own outputs, rounded once, pass."""
    check_reference(AREA, cases=2)


def same(op: str, way: str, fwd: Callable | None = None, bwd: Callable | None = None) -> None:
    """The op with these is the reference on every case, to float64's rounding."""
    for case in OPS[op].cases:
        inputs = draw_case(OPS[op], case, way, PRECISIONS["fp32"])
        inputs = {k: x.astype(np.float64) if x.dtype.kind == "f" else x for k, x in inputs.items()}
        truth = truth_of(OPS[op], way, inputs, case.attrs)
        for name, y in Bug("frame", (op,), "", fwd=fwd, bwd=bwd).variant(OPS[op]).run(way, inputs, case.attrs).items():
            size = np.abs(truth[name]).max(initial=1e-3)
            np.testing.assert_allclose(np.asarray(y), truth[name], rtol=0, atol=1e-12 * size, err_msg=f"{case.name} {name}")


def test_frames_without_a_mistake_are_the_reference() -> None:
    """What variants are built on computes the right thing when nothing is changed, so that a variant differs by its mistake alone."""
    nothing = {
        "_with": balance._with(lambda scores, topk_idx, attrs: (scores, topk_idx, attrs)),
        "_times": balance._times(lambda sizes, options: 1.0),
        "_other_f": balance._other_f(lambda f, *_: f),
    }
    for frame in nothing.values():
        same("router.balance_loss", "forward", frame["fwd"])
        same("router.balance_loss", "backward", frame["fwd"], frame["bwd"])
    same("moe.permute", "forward", moe._of_token(lambda xp, source, n, k: moe._token(xp, source, k)))
    same("moe.permute", "backward", bwd=moe._placed_bwd(lambda xp, place, source: place))
    same("moe.unpermute", "forward", moe.at_place(lambda xp, place, source: place))
    same("moe.experts", "forward", moe_experts._slots(moe_experts.right))
    same("moe.experts", "forward", moe_experts._placed(lambda xp, place, source: place))
    same("moe.experts", "backward", bwd=lambda dy, saved: moe_experts.moe_experts_bwd(dy, moe_experts.weighed_by(saved, saved[1])))
    same("moe.layer", "forward", moe_layer._layer(moe_layer.right))
    same("moe.layer", "backward", bwd=moe_layer._router_bwd(lambda own: own))
    same("moe.layer", "backward", bwd=moe_layer._activations(lambda saved: saved))


# ---- wrong subjects, which share nothing with golden/bugs nor with the reference


def sigmoid(x: Array) -> Array:
    return np.exp(-np.logaddexp(0, -x.astype(np.float64)))


def f32(*arrays: Any) -> Any:
    out = [np.asarray(a, dtype=np.float32) for a in arrays]
    return tuple(out) if len(out) > 1 else out[0]


def v2_of_two(logits: Array, *, k: int, n_group: int, topk_group: int, norm_topk_prob: bool, routed_scaling_factor: float) -> Any:
    """V2's router with V3's group score."""
    p = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    t = p.reshape(len(p), n_group, -1).copy()
    if n_group > 1:
        for row in t:
            order = sorted(range(n_group), key=lambda g: (-np.sort(row[g])[-2:].sum(), g))
            row[order[topk_group:]] = -np.inf
    idx = np.argsort(-t.reshape(p.shape), axis=1, kind="stable")[:, :k]
    w = np.take_along_axis(p, idx, 1)
    return idx, f32((w / w.sum(1, keepdims=True) if norm_topk_prob else w) * routed_scaling_factor)


def up_first(gate: Array, up: Array, *, limit: float | None) -> Array:
    top = np.inf if limit is None else limit
    g, u = np.minimum(up.astype(np.float64), top), np.clip(gate.astype(np.float64), -top, top)
    return f32(g * sigmoid(g) * u)


def sigmoid_slope(gate: Array, up: Array, dy: Array, *, limit: float | None) -> Any:
    top = np.inf if limit is None else limit
    g, u = np.minimum(gate.astype(np.float64), top), np.clip(up.astype(np.float64), -top, top)
    return f32(np.where(gate > top, 0, dy * u * sigmoid(g)), np.where(np.abs(up) > top, 0, dy * g * sigmoid(g)))


def rows_by_expert(topk_idx: Array, e: int, alignment: int) -> list[int]:
    """Slot numbers in the order of rows; -1 where an expert is filled up"""
    rows: list[int] = []
    for expert in range(e):
        own = [int(s) for s in np.flatnonzero(topk_idx.ravel() == expert)]
        rows += own + [-1] * (-len(own) % alignment)
    return rows


def tiled(x: Array, topk_idx: Array, *, n_routed_experts: int, alignment: int) -> Any:
    """Slot s is token s mod n's."""
    rows = rows_by_expert(topk_idx, n_routed_experts, alignment)
    y = np.stack([x[s % len(x)] if s >= 0 else np.zeros_like(x[0]) for s in rows]) if rows else x[:0]
    return y, np.array([(topk_idx == i).sum() for i in range(n_routed_experts)]), np.array(rows)


def squared_weights(y_sorted: Array, topk_idx: Array, topk_weight: Array, *, n_routed_experts: int, alignment: int) -> Array:
    y = np.zeros((len(topk_idx), y_sorted.shape[1]))
    for row, slot in zip(y_sorted.astype(np.float64), rows_by_expert(topk_idx, n_routed_experts, alignment), strict=True):
        if slot >= 0:
            y[slot // topk_idx.shape[1]] += topk_weight.ravel()[slot].astype(np.float64) ** 2 * row
    return f32(y)


def ffn(x: Array, gate: Array, up: Array, down: Array, limit: float | None) -> Array:
    top = np.inf if limit is None else limit
    g, u = np.minimum(gate.astype(np.float64) @ x, top), np.clip(up.astype(np.float64) @ x, -top, top)
    return down.astype(np.float64) @ (g * sigmoid(g) * u)


def llama4(x: Array, topk_idx: Array, topk_weight: Array, w_gate: Array, w_up: Array, w_down: Array, *, limit: float | None) -> Array:
    """The weight multiplies what goes into the expert."""
    y = np.zeros(x.shape)
    for n, (experts, weights) in enumerate(zip(topk_idx, topk_weight.astype(np.float64), strict=True)):
        for i, w in zip(experts, weights, strict=True):
            y[n] += ffn(w * x[n], w_gate[i], w_up[i], w_down[i], limit) if i >= 0 else 0
    return f32(y)


def stale_dw(
    x: Array, topk_idx: Array, topk_weight: Array, w_gate: Array, w_up: Array, w_down: Array, dy: Array, *, limit: float | None
) -> Any:
    """The buffer of an expert without tokens still holds the gradient of the expert before it."""
    if limit is not None:
        raise NotImplementedError("no clamp")
    x, weight, w_gate, w_up, w_down, dy = (a.astype(np.float64) for a in (x, topk_weight, w_gate, w_up, w_down, dy))
    dx, dweight, dws = np.zeros_like(x), np.zeros_like(weight), [np.ones_like(w) for w in (w_gate, w_up, w_down)]
    for i in range(len(w_gate)):
        tokens, slots = np.nonzero(topk_idx == i)
        if len(tokens) == 0:
            for dw in dws:
                dw[i] = dw[i - 1] if i else 1.0
            continue
        g, u, own, w = x[tokens] @ w_gate[i].T, x[tokens] @ w_up[i].T, dy[tokens], weight[tokens, slots][:, None]
        s = sigmoid(g)
        a = g * s * u
        dweight[tokens, slots] = ((a @ w_down[i].T) * own).sum(1)
        da = (w * own) @ w_down[i]
        dg, du = da * u * (s + g * s * (1 - s)), da * g * s
        np.add.at(dx, tokens, dg @ w_gate[i] + du @ w_up[i])
        for dw, value in zip(dws, (dg.T @ x[tokens], du.T @ x[tokens], (w * own).T @ a), strict=True):
            dw[i] = value
    return f32(dx, dweight, *dws)


def layer(routed: Callable[[float], float], shared: Callable[[float], float]) -> Callable:
    """V3's layer without groups; the factors of routed and of shared experts, as functions of routed_scaling_factor"""

    def subject(
        x: Array,
        gate_weight: Array,
        e_score_correction_bias: Any = None,
        w_gate: Any = None,
        w_up: Any = None,
        w_down: Any = None,
        shared_gate: Any = None,
        shared_up: Any = None,
        shared_down: Any = None,
        **a: Any,
    ) -> Any:
        v3 = a["topk_method"] == "noaux_tc" and a["scoring"] == "sigmoid" and e_score_correction_bias is not None
        if not v3 or a["n_group"] > 1 or shared_gate is None or a["limit"] is not None:
            raise NotImplementedError("V3 without groups")
        s = sigmoid(x.astype(np.float64) @ gate_weight.astype(np.float64).T)
        idx = np.argsort(-(s + e_score_correction_bias), axis=1, kind="stable")[:, : a["num_experts_per_tok"]]
        weight, factor = np.take_along_axis(s, idx, 1), a["routed_scaling_factor"]
        weight = weight / weight.sum(1, keepdims=True) * routed(factor)
        y = np.stack([shared(factor) * ffn(row, shared_gate, shared_up, shared_down, None) for row in x])
        for n, (experts, weights) in enumerate(zip(idx, weight, strict=True)):
            for i, w in zip(experts, weights, strict=True):
                y[n] += w * ffn(x[n], w_gate[i], w_up[i], w_down[i], None)
        return f32(y), idx

    return subject


def busy_busier(bias: Array, counts: Array, *, gamma: float, centred: bool) -> Array:
    sign = np.array([np.sign(int(c) * len(counts) - int(counts.sum())) for c in counts])
    return f32(bias + np.float64(gamma) * (sign - sign.mean() * centred))


def in_bfloat16(bias: Array, counts: Array, *, gamma: float, centred: bool) -> Array:
    """Counts, and their mean, cut to eight bits (to nearest, ties to even)."""

    def low(v: Array) -> Array:
        u = v.astype(np.float32).view(np.uint32)
        return ((u + 0x7FFF + (u >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)

    held = low(counts.astype(np.float32))
    sign = np.sign(low(held.mean(dtype=np.float64, keepdims=True)) - held)
    return f32(bias + np.float64(gamma) * (sign - sign.mean() * centred))


def k_too_large(scores: Array, topk_idx: Array, *, alpha: float, level: str, normalise: bool) -> Array:
    """V3's loss without 1/k."""
    if level not in ("sequence", "expert"):
        raise NotImplementedError("experts only")
    p, e, loss = scores.astype(np.float64), scores.shape[2], 0.0
    p = p / p.sum(-1, keepdims=True) if normalise else p
    for one, idx in zip(p, topk_idx, strict=True):
        loss += alpha * sum(e / len(one) * (idx == i).sum() * one[:, i].mean() for i in range(e)) / len(p)
    return f32(loss)


def first_come(topk_idx: Array, topk_weight: Array, exempt: Array | None = None, *, n_routed_experts: int, devices: int, **a: Any) -> Any:
    """A device takes the first slots that come."""
    (n, k), room = topk_idx.shape, {d: int(a["capacity_factor"] * topk_idx.size / devices) for d in range(devices)}
    keep = np.zeros((n, k), dtype=np.int64)
    free = np.zeros(n, dtype=bool) if exempt is None else exempt != 0
    for t in sorted(range(n), key=lambda t: not free[t]):
        for j, i in enumerate(topk_idx[t]):
            d = int(i) // (n_routed_experts // devices)
            keep[t, j] = room[d] > 0 or free[t]
            room[d] -= 1
    return keep, topk_weight * keep.astype(np.float32)


WRONG = [
    ("group-score-top2", "router.softmax", "forward", v2_of_two),
    ("swiglu-gate-up-swapped", "swiglu", "forward", up_first),
    ("silu-slope-partial", "swiglu", "backward", sigmoid_slope),
    ("permute-slot-as-token", "moe.permute", "forward", tiled),
    ("combine-weight-twice", "moe.unpermute", "forward", squared_weights),
    ("weight-before-activation", "moe.experts", "forward", llama4),
    ("expert-zero-token-grad-garbage", "moe.experts", "backward", stale_dw),
    ("bias-update-sign", "router.bias_update", "forward", busy_busier),
    ("bias-update-count-bf16", "router.bias_update", "forward", in_bfloat16),
    ("aux-topk-not-normalised", "router.balance_loss", "forward", k_too_large),
    ("drop-first-come", "router.drop_tokens", "forward", first_come),
]


@pytest.mark.parametrize(("bug", "op", "way", "subject"), [pytest.param(*w, id=w[0]) for w in WRONG])
def test_a_wrong_subject_fails_and_is_told_why(bug: str, op: str, way: str, subject: Callable) -> None:
    """A subject with the bug fails, and its own bug is the first that is named."""
    check_told(bug, op, way, subject)


LAYERS = {
    "shared-expert-scaled-too": layer(lambda f: f, lambda f: f),
    "routed-scale-twice": layer(lambda f: f * f, lambda f: 1.0),
    "shared-expert-inv-scaled": layer(lambda f: f, lambda f: 1 / f),
}


@pytest.mark.parametrize("bug", LAYERS)
def test_a_wrong_layer_fails_and_is_told_why(bug: str) -> None:
    """Its own bug is the first that is named. Asked of one token: each explanation of a decision costs many runs of the whole layer."""
    v = vector("moe.layer", "one", "forward", "fp32")
    y, idx = LAYERS[bug](**v.inputs, **{**v.op.defaults, **v.case.attrs})
    assert named(v, {"y": Returned(y, "float32"), "topk_idx": Returned(idx, "int64")})[:1] == [bug]


def test_the_layer_of_these_subjects_is_right_without_its_mistake() -> None:
    """The same code with the factors where they belong passes every case that it takes."""
    report = verify(layer(lambda f: f, lambda f: 1.0), op="moe.layer", direction="forward", precision="fp32", store=Made())
    assert report.count("PASS") >= 3, str(report)
    assert report.count("FAIL") == 0, str(report)
