"""Metamorphic properties of the mixture of experts, each with a mutant that it kills."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from float64 import FP64, drawn, near
from hypothesis import given
from hypothesis import strategies as st
from leadline.golden.band import band_of
from leadline.golden.draw import Source
from leadline.ref import (
    OPS,
    Config,
    balance_loss_fwd,
    bias_update_fwd,
    eplb_fwd,
    experts_over_ranks,
    moe_experts_fwd,
    moe_layer_fwd,
    moe_permute_fwd,
    moe_unpermute_fwd,
    nodes_touched,
    router_noaux_tc_bwd,
    router_noaux_tc_fwd,
    router_softmax_fwd,
)

SEEDS = st.integers(0, 2**31)


def normal(key: str, *shape: int) -> np.ndarray:
    return Source(key).normal(shape)


# ---- routers

ROUTERS = {
    "noaux_tc": lambda x, **a: router_noaux_tc_fwd(x, np.zeros(x.shape[1]), k=8, n_group=8, topk_group=4, **a)[0],
    "softmax": lambda x, **a: router_softmax_fwd(x, k=6, n_group=8, topk_group=3, **a)[0],
}


@pytest.mark.parametrize("router", ROUTERS)
@given(seed=SEEDS)
def test_tokens_may_come_in_any_order(router: str, seed: int) -> None:
    """Rows of logits exchanged are rows of the outputs exchanged, to the bit."""
    logits = normal(f"tokens {seed}", 9, 64)
    order = np.argsort(normal(f"order {seed}", 9))
    for moved, plain in zip(ROUTERS[router](logits[order]), ROUTERS[router](logits), strict=True):
        np.testing.assert_array_equal(moved, plain[order])


@pytest.mark.parametrize("router", ROUTERS)
@given(seed=SEEDS)
def test_experts_may_be_renamed_within_and_between_groups(router: str, seed: int) -> None:
    """Groups exchanged, and experts exchanged within a group: the same experts under their new names, with the same weights. (Without ties;
    with exact ties the lowest index wins, and names matter.) An exchange across groups changes the choice of some token."""
    logits = normal(f"experts {seed}", 40, 64)
    groups = np.argsort(normal(f"groups {seed}", 8))
    inner = np.argsort(normal(f"inner {seed}", 8, 8), axis=1)
    new = (groups[:, None] * 8 + inner[groups]).ravel()  # position i holds expert new[i]
    (idx, weight), (moved, moved_weight) = ROUTERS[router](logits), ROUTERS[router](logits[:, new])
    np.testing.assert_array_equal(new[moved], idx)
    np.testing.assert_allclose(moved_weight, weight, rtol=1e-14)  # softmax sums in another order
    across = np.roll(np.arange(64), 1)
    assert np.any(np.sort(across[ROUTERS[router](logits[:, across])[0]], 1) != np.sort(idx, 1))


def leaky(logits: np.ndarray, bias: np.ndarray, topk_idx: np.ndarray) -> np.ndarray:
    """The mutant bias-leaks-into-weights"""
    s = np.take_along_axis(1 / (1 + np.exp(-logits)) + bias, topk_idx, 1)
    return s / s.sum(1, keepdims=True) * 2.5


def weights_ignore_bias(weigh: Callable) -> bool:
    logits, bias = normal("bias", 7, 64), normal("bias b", 64)
    (idx, _), _ = router_noaux_tc_fwd(logits, bias)
    return np.array_equal(weigh(logits, bias, idx), weigh(logits, -3 * bias + 1, idx))


def test_the_bias_chooses_and_never_weighs() -> None:
    """For a fixed choice the weights are the same whatever the bias; the choice itself follows it."""
    assert weights_ignore_bias(lambda logits, bias, idx: router_noaux_tc_fwd(logits, bias, topk_idx=idx)[0][1])
    assert not weights_ignore_bias(leaky)
    logits = normal("bias", 7, 64)
    chosen = [router_noaux_tc_fwd(logits, b * np.arange(64.0))[0][0] for b in (0.0, 1.0)]
    assert np.any(chosen[0] != chosen[1])


@given(SEEDS, st.floats(0.1, 20.0))
def test_weights_sum_to_the_factor_and_groups_are_few(seed: int, factor: float) -> None:
    """Normalised weights sum to routed_scaling_factor; without norm_topk_prob they do not. At most topk_group groups (nodes) are touched;
    without groups more are."""
    logits, bias = normal(f"sum {seed}", 33, 64), 0.1 * normal(f"sum b {seed}", 64)
    (idx, weight), _ = router_noaux_tc_fwd(logits, bias, routed_scaling_factor=factor)
    np.testing.assert_allclose(weight.sum(1), factor, rtol=1e-14)
    (_, plain), _ = router_noaux_tc_fwd(logits, bias, routed_scaling_factor=factor, norm_topk_prob=False)
    assert not np.any(np.isclose(plain.sum(1), factor, rtol=1e-6))
    assert nodes_touched(idx, 64, 8).max() <= 4
    (free, _), _ = router_noaux_tc_fwd(logits, bias, n_group=1, topk_group=1)
    assert nodes_touched(free, 64, 8).max() > 4


def test_no_gradient_reaches_the_bias_nor_unselected_experts() -> None:
    """Backward returns one gradient, to the logits, and exactly 0 for the experts that were not chosen (sigmoid scores)."""
    logits, bias = normal("grad", 5, 64), normal("grad b", 64)
    (idx, weight), saved = router_noaux_tc_fwd(logits, bias)
    dlogits = router_noaux_tc_bwd(np.cos(np.arange(weight.size)).reshape(weight.shape), saved)
    assert isinstance(dlogits, np.ndarray)
    rest = dlogits.copy()
    np.put_along_axis(rest, idx, 0.0, 1)
    assert not np.any(rest)
    assert np.count_nonzero(dlogits) == idx.size
    assert [t.name for t in OPS["router.noaux_tc"].signature_of("backward")[1]] == ["dlogits"]


# ---- balance


def uniform_choice(s: int, e: int, k: int) -> np.ndarray:
    return (np.arange(s * k) % e).reshape(1, s, k)


def test_the_loss_is_least_at_uniform_load() -> None:
    """alpha where load and scores are uniform; more where both lean the same way; the mutant without the factor e/k is not alpha."""
    e, k, s = 16, 4, 32
    even = np.full((1, s, e), 0.3)
    (least, _), idx = balance_loss_fwd(even, uniform_choice(s, e, k), alpha=0.01), uniform_choice(s, e, k)
    np.testing.assert_allclose(least, 0.01, rtol=1e-14)
    for seed in range(20):
        scores = np.exp(normal(f"lean {seed}", 1, s, e) + normal(f"skew {seed}", e))
        leaning = np.argsort(-scores, axis=-1, kind="stable")[..., :k]
        assert balance_loss_fwd(scores, leaning, alpha=0.01)[0] > least
    counts = np.bincount(idx.ravel(), minlength=e) / s  # the mutant's f
    assert not np.isclose(0.01 * np.sum(counts * even.mean(1)[0] / even.mean(1).sum()), 0.01)


def max_violation(update: Callable, steps: int) -> tuple[float, float]:
    """MaxVio (largest load over the mean, less 1) of a router whose scores are skewed, before and after; fresh tokens every step"""
    e, k, n = 64, 6, 512
    skew = np.linspace(-0.22, 0.22, e) ** 3 / 0.22**2 * 2.2
    bias, found = np.zeros(e, np.float32), []
    for step in range(steps):
        logits = 0.25 * normal(f"step {step}", n, e) + 4 * skew
        (idx, _), _ = router_noaux_tc_fwd(logits, bias, k=k, n_group=1, topk_group=1)
        counts = np.bincount(idx.ravel(), minlength=e)
        found.append(counts.max() / counts.mean() - 1)
        bias = update(bias, counts)
    return found[0], float(np.mean(found[-20:]))


def test_the_bias_rule_balances_a_skewed_router() -> None:
    """MaxVio from above 4 to under 0.4 within 500 steps at gamma = 1e-3; with the sign turned it stays above 4."""
    before, after = max_violation(lambda b, c: bias_update_fwd(b, c)[0], 500)
    assert before > 4
    assert after < 0.4
    assert max_violation(lambda b, c: 2 * b - bias_update_fwd(b, c)[0], 60)[1] > 4


@given(SEEDS)
def test_the_centred_rule_keeps_the_sum(seed: int) -> None:
    """Moonlight's biases keep their mean, to a few units; V3's do not."""
    bias, counts = normal(f"centred {seed}", 64), Source(f"counts {seed}").integers((64,), 0, 50)
    assert abs(bias_update_fwd(bias, counts, centred=True)[0].sum() - bias.sum()) < 1e-13
    signs = np.sign(counts.mean() - counts)
    if abs(signs.sum()) > 1:
        assert abs(bias_update_fwd(bias, counts)[0].sum() - bias.sum()) > 1e-4


# ---- dispatch and experts


@given(SEEDS, st.sampled_from((1, 2, 4)), st.sampled_from((1, 128)))
def test_permute_then_unpermute_is_the_identity(seed: int, k: int, alignment: Any) -> None:
    """With k equal weights of 1/k, a power of two, x comes back to the bit; read by another plan (the next expert's rows) it does not."""
    n, e = 11, 8
    x = normal(f"permute {seed}", n, 5)
    idx = np.argsort(normal(f"choice {seed}", n, e), axis=1)[:, :k]
    how = {"n_routed_experts": e, "alignment": alignment}
    (rows, counts, source), _ = moe_permute_fwd(x, idx, **how)
    assert counts.sum() == n * k == np.sum(source >= 0)
    assert rows.shape[0] % alignment == 0
    assert not np.any(rows[source < 0])
    np.testing.assert_array_equal(moe_unpermute_fwd(rows, idx, np.full((n, k), 1 / k), **how)[0], x)
    wrong = moe_unpermute_fwd(np.roll(rows, 1, axis=0), idx, np.full((n, k), 1 / k), **how)[0]
    assert not np.array_equal(wrong, x)


@given(SEEDS)
def test_a_token_does_not_depend_on_the_others(seed: int) -> None:
    """Other tokens changed, or left out: this one's output stays within rounding; a layer that normalises over the batch is caught."""
    op, inputs, attrs = drawn("moe.layer", "v3", seed=seed)
    band = band_of(op, "forward", inputs, attrs, FP64)
    others = inputs["x"].copy()
    others[1:] = normal(f"others {seed}", *others[1:].shape)
    y0, sigma = band.truth["y"][:1], band.sigma["y"][:1]
    assert near(op.run("forward", {**inputs, "x": others}, attrs)["y"][:1], y0, sigma)
    assert near(op.run("forward", {**inputs, "x": inputs["x"][:1]}, attrs)["y"], y0, sigma)
    centred = {**inputs, "x": others - others.mean(axis=0)}
    assert not near(op.run("forward", centred, attrs)["y"][:1], y0, sigma)


@given(SEEDS, st.permutations(range(8)))
def test_experts_may_stand_in_any_order(seed: int, order: list[int]) -> None:
    """Experts renamed together with their weights leave y; renamed alone they do not."""
    op, inputs, attrs = drawn("moe.experts", "v3", seed=seed)
    band = band_of(op, "forward", inputs, attrs, FP64)
    moved = {**inputs, **{w: inputs[w][order] for w in ("w_gate", "w_up", "w_down")}}
    renamed = {**moved, "topk_idx": np.argsort(order)[inputs["topk_idx"]]}
    assert near(op.run("forward", renamed, attrs)["y"], band.truth["y"], band.sigma["y"])
    if np.any(np.asarray(order)[inputs["topk_idx"]] != inputs["topk_idx"]):
        assert not near(op.run("forward", moved, attrs)["y"], band.truth["y"], band.sigma["y"])


def test_experts_without_tokens_get_exact_zeros() -> None:
    """Their gradients are 0 in every element and finite; those of the others are not."""
    op, inputs, attrs = drawn("moe.experts", "empty-experts", "backward")
    used = np.bincount(inputs["topk_idx"].ravel(), minlength=6) > 0
    assert used.sum() == 2
    for name in ("dw_gate", "dw_up", "dw_down"):
        g = op.run("backward", inputs, attrs)[name]
        np.testing.assert_array_equal(np.any(g != 0, axis=(1, 2)), used)


def in_rank_order(x: np.ndarray, idx: np.ndarray, weight: np.ndarray, w: list[np.ndarray], ranks: int) -> np.ndarray:
    """The mutant: each rank adds up its own experts' slots, and the partial sums are added: another order, other last bits."""
    e = len(w[0]) // ranks
    parts = [moe_experts_fwd(x, np.where(idx // e == r, idx, -1), weight, *w)[0] for r in range(ranks)]
    return np.sum(parts, axis=0, dtype=x.dtype)


@given(SEEDS, st.sampled_from((1, 2, 4, 8)), st.integers(0, 21))
def test_ranks_equal_one_rank(seed: int, ranks: int, n: int) -> None:
    """Tokens and experts over any number of ranks, dispatched and combined: the one-rank result, bit for bit, in float32."""
    e, k, d, f = 16, 4, 24, 12
    x, weight = normal(f"ranks {seed}", n, d).astype(np.float32), np.abs(normal(f"w {seed}", n, k)).astype(np.float32)
    idx = np.argsort(normal(f"idx {seed}", n, e), axis=1)[:, :k]
    w = [normal(f"{i} {seed}", *shape).astype(np.float32) for i, shape in enumerate(((e, f, d), (e, f, d), (e, d, f)))]
    whole = moe_experts_fwd(x, idx, weight, *w)[0]
    parts = experts_over_ranks(x, idx, weight, *w, ranks=ranks)
    assert len(parts) == ranks
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    if ranks == 4 and n > 8:
        assert not np.array_equal(in_rank_order(x, idx, weight, w, ranks), whole)


@given(SEEDS, st.sampled_from(((4, 2), (2, 1), (3, 2))))
def test_replicas_balance_the_gpus(seed: int, sizes: tuple[int, int]) -> None:
    """Every expert has a replica, tables are inverse, each GPU has its share of places, and the busiest GPU carries no more than with the
    experts in their own order; groups stay on a node where nodes divide them."""
    groups, nodes = sizes
    e, replicas, gpus = 24, 32, 8
    load = np.exp(normal(f"load {seed}", 1, e)).astype(np.float32)
    (phy2log, log2phy, counts), _ = eplb_fwd(load, num_replicas=replicas, num_groups=groups, num_nodes=nodes, num_gpus=gpus)
    np.testing.assert_array_equal(np.bincount(phy2log[0], minlength=e), counts[0])
    assert counts.min() >= 1
    for expert, rank in itertools.product(range(e), range(log2phy.shape[2])):
        assert (rank < counts[0, expert]) == (log2phy[0, expert, rank] >= 0)
        assert rank >= counts[0, expert] or phy2log[0, log2phy[0, expert, rank]] == expert
    share = (load / counts)[0, phy2log[0]]
    naive = np.concatenate([np.arange(e), np.arange(replicas - e)])
    before = (load / np.bincount(naive, minlength=e))[0, naive]
    if groups % nodes == 0 and nodes == 1:
        assert share.reshape(gpus, -1).sum(1).max() <= before.reshape(gpus, -1).sum(1).max() + 1e-6
    if groups % nodes == 0:
        node = np.arange(replicas) // (replicas // nodes)
        for g in range(groups):
            assert len(set(node[np.isin(phy2log[0], np.arange(g * e // groups, (g + 1) * e // groups))])) == 1


@pytest.mark.parametrize("preset", ["v2-lite", "v2", "v3", "v3.1", "kimi-k2", "moonlight"])
def test_every_preset_runs_its_layer(preset: str) -> None:
    """The released models' routing, on narrow experts: as many distinct experts a token as the model has, in no more groups than it keeps,
    with weights that sum to its factor where it normalises. Another model's attributes are another layer."""
    config = Config.preset(preset)
    e, d, f = config.n_routed_experts, 8, 2
    shapes = {"gate_weight": (e, d), "w_gate": (e, f, d), "w_up": (e, f, d), "w_down": (e, d, f)}
    w = {name: normal(f"{preset} {name}", *shape) for name, shape in shapes.items()}
    x = normal(preset, 5, d)
    (y, idx), _ = moe_layer_fwd(x, **w, **config.moe())
    assert idx.shape == (5, config.num_experts_per_tok)
    assert nodes_touched(idx, e, config.n_group).max() <= config.topk_group
    (twice, _), _ = moe_layer_fwd(x, **w, **{**config.moe(), "routed_scaling_factor": 2 * config.routed_scaling_factor})
    np.testing.assert_array_equal(twice, 2 * y)
    other = {**config.moe(), "topk_method": "softmax" if config.topk_method == "noaux_tc" else "noaux_tc"}
    assert not np.allclose(moe_layer_fwd(x, **w, **other)[0][0], y)


def test_wrong_arguments_are_named() -> None:
    """What cannot be is a ValueError that names argument, value and expectation, before any work."""
    _, layer, attrs = drawn("moe.layer", "v3")
    x, idx, w = np.zeros((2, 4)), np.array([[0, 1], [2, 2]]), np.zeros((2, 2))
    experts = [np.zeros(s) for s in ((4, 3, 4), (4, 3, 4), (4, 4, 3))]
    nan = layer["gate_weight"].copy()
    nan[1, 2] = np.nan
    for call, expected in (
        (lambda: router_softmax_fwd(np.zeros((1, 16)), k=7, n_group=4, topk_group=1), "k is 7; expected 1 to 4"),
        (lambda: router_softmax_fwd(np.zeros((1, 16)), n_group=5), "n_group is 5; expected a divisor"),
        (lambda: moe_experts_fwd(x, idx, w, *experts), r"topk_idx\[1\] chooses an expert twice"),
        (lambda: moe_experts_fwd(x, idx + 3, w, *experts), r"topk_idx\[0, 1\] is 4; expected -1 to 3"),
        (lambda: moe_experts_fwd(x, np.array([[0, 1], [2, 3]]), w[:, :1], *experts), "topk_weight has shape"),
        (lambda: moe_permute_fwd(x, idx - 5, n_routed_experts=4), r"topk_idx\[0, 0\] is -5; expected -1 to 3"),
        (lambda: moe_layer_fwd(**{**layer, "shared_up": None}, **attrs), "2 of shared_gate, shared_up and shared_down"),
        (lambda: moe_layer_fwd(**{**layer, "gate_weight": nan}, **attrs), r"logits\[0, 1\] is not finite"),
        (lambda: OPS["router.drop_tokens"].fwd(np.array([[0, 1]]), np.ones((1, 2)), n_routed_experts=8), "leaves 0 slots a device"),
        (lambda: OPS["swiglu"].fwd(x, x, limit=-1.0), "limit is -1.0"),
        (lambda: balance_loss_fwd(np.ones((1, 2, 6)), np.array([[[0], [1]]]), level="device", devices=4), "devices is 4"),
        (lambda: bias_update_fwd(np.zeros(2), np.array([1, -1])), r"counts\[1\] is -1"),
        (lambda: eplb_fwd(np.ones((1, 8)), num_replicas=7, num_groups=1, num_nodes=1, num_gpus=7), "num_replicas is 7"),
        (lambda: experts_over_ranks(x, np.array([[0, 1], [2, 3]]), w, *experts, ranks=3), "ranks is 3"),
    ):
        with pytest.raises(ValueError, match=expected):
            call()
