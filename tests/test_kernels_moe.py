"""The mixture of experts' CPU kernels beyond what every op is held to: threads, sizes of real layers, memory, messages."""

import tracemalloc
from typing import Any

import numpy as np
import pytest
from leadline.kernels import cpu
from leadline.kernels.cpu import _common, moe
from leadline.ref import OPS

RNG = np.random.Generator(np.random.Philox(key=11))


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def chosen(n: int, k: int, e: int) -> np.ndarray:
    return np.argsort(RNG.random((n, e)), axis=1)[:, :k]


def layer(n: int, e: int, d: int, f: int, g: int) -> dict[str, Any]:
    shapes = {"gate_weight": (e, d), "w_gate": (e, f, d), "w_up": (e, f, d), "w_down": (e, d, f)}
    shapes |= {"shared_gate": (g, d), "shared_up": (g, d), "shared_down": (d, g)}
    return {"x": normal(n, d), **{name: normal(*shape) / np.float32(shape[-1] ** 0.5) for name, shape in shapes.items()}}


ATTRS: dict[str, Any] = {"num_experts_per_tok": 4, "n_group": 4, "topk_group": 2}


def test_results_do_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread and two give the same bits, at sizes that make several pieces of every product."""
    arrays, dy = layer(150, 8, 600, 300, 130), normal(150, 600)
    arrays["topk_idx"] = chosen(150, 4, 8)
    logits, bias = normal(40000, 64), normal(64)

    def everything() -> list[np.ndarray]:
        y, idx = cpu.moe_layer(**{k: v for k, v in arrays.items() if k != "topk_idx"}, **ATTRS)
        routed = cpu.router.noaux_tc(logits=logits, bias=bias)
        return [y, idx, *routed, *cpu.moe_layer_bwd(**arrays, dy=dy, **ATTRS)]

    monkeypatch.setattr(_common, "THREADS", 2)
    two = everything()
    monkeypatch.setattr(_common, "THREADS", 1)
    for a, b in zip(everything(), two, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("n", "d", "f"), [(3, 17, 5), (70, 513, 130), (300, 600, 257), (9, 1100, 64)])
def test_experts_at_sizes_that_blocks_do_not_divide(n: int, d: int, f: int, dtype: type) -> None:
    """Against the reference in float64: rows, columns and depths beyond one block, with remainders; expert 2 without a token."""
    e, k = 5, 2
    idx = chosen(n, k, e - 1)
    idx[idx >= 2] += 1
    drawn = {"x": normal(n, d), "topk_weight": normal(n, k), "w_gate": normal(e, f, d), "w_up": normal(e, f, d), "w_down": normal(e, d, f)}
    arrays = {name: (a / a.shape[-1] ** 0.5).astype(dtype) for name, a in drawn.items()}
    dy = normal(n, d).astype(dtype)
    exact = {name: a.astype(np.float64) for name, a in arrays.items()} | {"topk_idx": idx}
    op = OPS["moe.experts"]
    expected = [*op.run("forward", exact, {}).values(), *op.run("backward", {**exact, "dy": dy.astype(np.float64)}, {}).values()]
    given: dict[str, Any] = {**arrays, "topk_idx": idx}
    returned = [cpu.moe_experts(**given), *cpu.moe_experts_bwd(**given, dy=dy)]
    unit = np.finfo(dtype).eps
    for a, b in zip(returned, expected, strict=True):
        assert a.dtype == dtype
        # a sum of random signs over at most 1100 terms strays by the root of their number: 64 units of the largest is twice that
        assert np.max(np.abs(a - b)) <= 64 * unit * np.max(np.abs(b))
    for dw in returned[3:]:
        assert not dw[2].any()


def test_a_weight_within_a_larger_array_is_used_where_it_lies() -> None:
    """Gate and up of one fused array, expert by expert, without a copy of it, and to the same bits as apart."""
    n, e, d, f = 6, 4, 512, 256
    fused, down, x = normal(e, 2 * f, d), normal(e, d, f), normal(n, d)
    given: dict[str, Any] = {"x": x, "topk_idx": chosen(n, 2, e), "topk_weight": normal(n, 2), "w_down": down}
    apart = cpu.moe_experts(**given, w_gate=fused[:, :f].copy(), w_up=fused[:, f:].copy())
    tracemalloc.start()
    try:
        within = cpu.moe_experts(**given, w_gate=fused[:, :f], w_up=fused[:, f:])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < fused.nbytes / 4
    np.testing.assert_array_equal(within, apart)


def test_the_backward_holds_little_beside_weights_and_gradients() -> None:
    """Weights and gradients, and half as much again at most (V3's widths, an eighth of each): no second copy of any expert's gradient."""
    arrays = layer(32, 16, 896, 256, 256)
    (_, _), saved = moe.layer_saving(**arrays, **ATTRS)
    dy, weights = normal(32, 896), sum(a.nbytes for name, a in arrays.items() if name != "x")
    moe.backward(saved, dy)  # compiles
    tracemalloc.start()
    try:
        moe.layer_saving(**arrays, **ATTRS)
        gradients = moe.backward(saved, dy)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(g.nbytes for g in gradients) >= weights
    assert weights + peak < 1.5 * 2 * weights


def test_gradients_go_into_the_arrays_that_are_handed_over() -> None:
    """out= is filled and returned, to the same bits."""
    arrays, dy = layer(9, 8, 40, 24, 16), normal(9, 40)
    (_, _), saved = moe.layer_saving(**arrays, **ATTRS)
    plain = moe.backward(saved, dy)
    names = ("gate_weight", "w_gate", "w_up", "w_down", "shared_gate", "shared_up", "shared_down")
    out = {name: np.full_like(arrays[name], 7) for name in names}
    for name, a, b in zip(names, moe.backward(saved, dy, out)[1:], plain[1:], strict=True):
        assert np.shares_memory(a, out[name])
        np.testing.assert_array_equal(a, b)


def test_the_router_selects_as_a_stable_sort_does() -> None:
    """Many ties, k up to twice the groups kept and beyond: the same experts in the same order as a stable descending sort."""
    n, e = 400, 64
    logits, bias = RNG.integers(-3, 3, (n, e)).astype(np.float32), RNG.integers(-1, 2, e).astype(np.float32)
    s = np.float32(1) / (np.float32(1) + np.exp(-logits, dtype=np.float32))
    levels = {v: np.float32(i) for i, v in enumerate(np.unique(s))}
    for k, n_group, topk_group in ((8, 8, 4), (9, 8, 4), (3, 8, 2), (8, 1, 1), (16, 4, 1), (6, 16, 3)):
        assert len(levels) == 6
        t = cpu.router.noaux_tc(logits=logits, bias=np.zeros(e, np.float32), k=e, n_group=1, topk_group=1, norm_topk_prob=False)
        scores = np.empty((n, e), np.float32)
        np.put_along_axis(scores, t[0], t[1] / np.float32(2.5), axis=1)
        scores = np.round(scores, 4) + bias  # equal logits have equal scores, whatever the sigmoid's last place
        grouped = np.sort(scores.reshape(n, n_group, -1), axis=2)
        best = np.argsort(-(grouped[:, :, -1] + grouped[:, :, -2]), axis=1, kind="stable")[:, :topk_group]
        kept = np.zeros((n, n_group), bool)
        np.put_along_axis(kept, best, True, axis=1)
        masked = np.where(np.repeat(kept, e // n_group, axis=1), scores, -np.inf)
        expected = np.argsort(-masked, axis=1, kind="stable")[:, :k]
        idx, _ = cpu.router.noaux_tc(logits=logits, bias=bias, k=k, n_group=n_group, topk_group=topk_group)
        rounded = np.take_along_axis(masked, idx, axis=1)
        np.testing.assert_array_equal(rounded, np.take_along_axis(masked, expected, axis=1))
        np.testing.assert_array_equal(idx, expected)


def test_wrong_arguments_are_named() -> None:
    """A ValueError names argument, value and expectation."""
    x, idx, weight = normal(3, 4), chosen(3, 2, 4), normal(3, 2)
    w: dict[str, Any] = {"w_gate": normal(4, 5, 4), "w_up": normal(4, 5, 4), "w_down": normal(4, 4, 5)}
    twice, far = np.array([[1, 1], [0, 1], [2, 3]]), np.array([[0, 1], [0, 9], [2, 3]])
    logits, scores, bias = normal(3, 16), np.abs(normal(1, 3, 4)), np.zeros(16, np.float32)
    bad = logits.copy()
    bad[1, 2], bad[2, 0] = np.nan, np.inf
    groups: dict[str, Any] = {"k": 2, "n_group": 4, "topk_group": 2}
    for call, expected in (
        (lambda: cpu.moe_experts(x=x, topk_idx=twice, topk_weight=weight, **w), r"topk_idx\[0\].*twice"),
        (lambda: cpu.moe_experts(x=x, topk_idx=far, topk_weight=weight, **w), r"topk_idx\[1, 1\] is 9; expected -1 to 3"),
        (lambda: cpu.moe_experts(x=x, topk_idx=idx, topk_weight=weight, **w, limit=0.0), "limit is 0.0"),
        (lambda: cpu.moe_experts(x=x, topk_idx=idx, topk_weight=weight, **{**w, "w_up": normal(4, 6, 4)}), r"w_up.*f = 5"),
        (lambda: cpu.moe_permute(x=x, topk_idx=idx, n_routed_experts=2), "topk_idx"),
        (lambda: cpu.moe_permute(x=x, topk_idx=idx, n_routed_experts=4, alignment=64), "alignment is 64"),
        (lambda: cpu.moe_unpermute(y_sorted=x, topk_idx=idx, topk_weight=weight, n_routed_experts=4), "y_sorted is 3 rows; expected 6"),
        (lambda: cpu.moe_layer(x=x, gate_weight=normal(4, 4), **w, shared_up=normal(2, 4), **groups), "shared_up is given"),
        (lambda: cpu.moe_layer(x=x, gate_weight=normal(4, 4), **w, num_experts_per_tok=5, n_group=1, topk_group=1), "k is 5"),
        (lambda: cpu.router.softmax(logits=logits, **{**groups, "n_group": 3}), "n_group is 3; expected a divisor of the 16"),
        (lambda: cpu.router.softmax(logits=logits, **{**groups, "k": 9}), "k is 9; expected at most 8"),
        (lambda: cpu.router.softmax(logits=bad, **groups), r"logits\[1, 2\] is nan"),
        (lambda: cpu.router.noaux_tc(logits=logits, bias=bad[2], **groups), r"bias\[0\] is inf"),
        (lambda: cpu.router.noaux_tc(logits=logits, bias=bias, **groups, gate_dtype="float16"), "gate_dtype is 'float16'"),
        (
            lambda: cpu.router.noaux_tc_bwd(logits=logits, bias=bias, topk_idx=twice, dtopk_weight=weight, **groups),
            r"topk_idx\[0, 1\] is 1",
        ),
        (lambda: cpu.router.balance_loss(scores=scores, topk_idx=far[None]), r"topk_idx\[1, 1\] is 9"),
        (lambda: cpu.router.balance_loss(scores=scores, topk_idx=idx[None], level="device", devices=3), "devices is 3"),
        (lambda: cpu.router.drop_tokens(topk_idx=idx, topk_weight=weight, capacity_factor=0.1), "capacity_factor is 0.1"),
        (lambda: cpu.router.bias_update(bias=bias[:2], counts=np.array([3, -1])), r"counts\[1\] is -1"),
        (lambda: cpu.router.bias_update(bias=bias[:2], counts=np.array([3, 1]), gamma=-1.0), "gamma is -1.0"),
        (lambda: cpu.swiglu(gate=x, up=x, limit=-1.0), "limit is -1.0"),
        (lambda: cpu.swiglu(gate=x, up=x[:2]), r"up has shape \(2, 4\)"),
        (lambda: cpu.moe_eplb(weight=np.abs(normal(1, 8)), num_replicas=4, num_groups=1, num_nodes=1, num_gpus=1), "num_replicas is 4"),
    ):
        with pytest.raises(ValueError, match=expected):
            call()
