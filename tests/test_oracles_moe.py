"""The mixture-of-experts oracles' own tests: hand-worked numbers, invariants, other routes to the same function, differences, refusals."""

import math
from typing import Any

import numpy as np
import pytest
from oracles import ORACLES, eplb, moe, router
from oracles.tape import CTX

Arrays = dict[str, np.ndarray]
LEVELS = ("sequence", "expert", "device", "communication")
NOAUX, SOFTMAX = "router.noaux_tc", "router.softmax"


def call(op: str, direction: str = "forward", /, attrs: Any = None, **inputs: np.ndarray) -> Arrays:
    return ORACLES[op, direction](inputs, attrs or {})


def rng(seed: int = 20250103) -> np.random.Generator:
    return np.random.default_rng(seed)


def array(values: Any) -> np.ndarray:
    return np.array(values, np.float64)


def choices(n: int, k: int, e: int, nowhere: float = 0.0) -> np.ndarray:
    """topk_idx of n tokens, distinct experts, some slots -1."""
    g = rng(n + k + e)
    top = np.array([g.permutation(e)[:k] for _ in range(n)], np.int64).reshape(n, k)
    return np.where(g.random((n, k)) < nowhere, -1, top)


def check_backward(op: str, inputs: Arrays, attrs: Any = None, held: str = "") -> Arrays:
    """Every d<input> against differences of the forward along random directions, the decision `held` (an output) staying as it is.

    Two central differences of steps h and h/2 make an error of h^4 f'''''/120 and of 2^-53 f/h: 1e-12 for h = 2^-10, times what f is.
    """
    plain = call(op, attrs=attrs, **inputs)
    cotangents = {f"d{name}": rng(len(name)).standard_normal(y.shape) for name, y in plain.items() if y.dtype.kind == "f"}
    decision = {held: plain[held]} if held else {}
    got = call(op, "backward", attrs=attrs, **inputs, **decision, **cotangents)
    for name, gradient in got.items():
        x = inputs[name[1:]]
        assert gradient.dtype == np.float64
        assert gradient.shape == x.shape
        direction = rng(x.size).standard_normal(x.shape)

        def loss(step: float, name: str = name[1:], x: np.ndarray = x, direction: np.ndarray = direction) -> float:
            moved = call(op, attrs=attrs, **{**inputs, name: x + step * direction})
            if held:
                np.testing.assert_array_equal(moved[held], plain[held])  # else it is no derivative
            return math.fsum(math.fsum((moved[d[1:]] * w).ravel()) for d, w in cotangents.items())

        slopes = [(loss(h) - loss(-h)) / (2 * h) for h in (2.0**-10, 2.0**-11)]
        assert math.fsum((gradient * direction).ravel()) == pytest.approx((4 * slopes[1] - slopes[0]) / 3, rel=1e-9, abs=1e-9), name
    return got


# The softmax router


POWERS = array([[5, 1, 4, 4, 3, 3]])  # over 20, in three groups: the best expert is in the first, the best two in the second


def test_softmax_router_by_hand() -> None:
    """Groups by their largest s, not by the sum of two; weights 16 s; with norm_topk_prob 16 s / (sum + eps)."""
    attrs = {"k": 2, "n_group": 3, "topk_group": 1}
    got = call(SOFTMAX, logits=np.log(POWERS), attrs=attrs)
    assert got["topk_idx"].tolist() == [[0, 1]]
    np.testing.assert_allclose(got["topk_weight"], [[4, 0.8]], rtol=1e-14)
    attrs = {**attrs, "norm_topk_prob": True, "denominator_eps": 0.2, "routed_scaling_factor": 2.0}
    np.testing.assert_allclose(call(SOFTMAX, logits=np.log(POWERS), attrs=attrs)["topk_weight"], [[1, 0.2]], rtol=1e-14)
    two = call(SOFTMAX, logits=np.log(POWERS), attrs={"k": 3, "n_group": 3, "topk_group": 2})
    assert two["topk_idx"].tolist() == [[0, 2, 3]]  # descending, the tie to the lower index
    assert call(SOFTMAX, logits=np.log(POWERS), attrs={"k": 5, "n_group": 1, "topk_group": 1})["topk_idx"].tolist() == [[0, 2, 3, 4, 5]]


def test_softmax_router_ties_and_fill() -> None:
    """Among equal groups and equal experts the lowest index wins; no s is 0, so no masked expert is chosen with mask_fill="0" either."""
    assert call(SOFTMAX, logits=np.zeros((1, 160)))["topk_idx"].tolist() == [list(range(6))]
    steep = array([[-1000.0, -1000, 0, -900]])
    for fill in ("-inf", "0"):
        attrs = {"k": 2, "n_group": 2, "topk_group": 1, "mask_fill": fill}
        assert call(SOFTMAX, logits=steep, attrs=attrs)["topk_idx"].tolist() == [[2, 3]]


def test_softmax_router_ignores_a_shift() -> None:
    """logits + c route alike, with the same weights to float64's last bits."""
    logits = rng().integers(-64, 64, (4, 160)) / 16
    a, b = call(SOFTMAX, logits=logits), call(SOFTMAX, logits=logits + 700)
    np.testing.assert_array_equal(a["topk_idx"], b["topk_idx"])
    np.testing.assert_allclose(a["topk_weight"], b["topk_weight"], rtol=1e-15)


@pytest.mark.parametrize("normalised", [True, False])
def test_softmax_router_backward(normalised: bool) -> None:
    """dlogits equals differences, reaches the experts that were not chosen, and sums to 0 over a row."""
    logits = rng().standard_normal((6, 12))
    attrs = {"k": 4, "n_group": 4, "topk_group": 2, "norm_topk_prob": normalised, "denominator_eps": 0.1}
    inputs = {"logits": logits[router.softmax_selection_margin({"logits": logits}, attrs) > 2.0**-8]}
    assert len(inputs["logits"]) > 1
    got = check_backward(SOFTMAX, inputs, attrs, "topk_idx")["dlogits"]
    assert (got != 0).all()
    np.testing.assert_allclose(got.sum(1), 0, atol=1e-15)


@pytest.mark.parametrize(
    ("attrs", "message"),
    [
        ({"n_group": 5}, "divide"),
        ({"topk_group": 0}, "topk_group"),
        ({"topk_group": 9}, "topk_group"),
        ({"k": 0}, "k 0"),
        ({"k": 7}, "left by the groups"),
        ({"mask_fill": "1"}, "mask_fill"),
    ],
)
def test_softmax_router_refuses(attrs: dict, message: str) -> None:
    """Each of the contract's ValueErrors; an unknown attribute is a TypeError."""
    with pytest.raises(ValueError, match=message):
        call(SOFTMAX, logits=np.zeros((1, 16)), attrs=attrs)
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match=r"logits\[0, 3\]"):
            call(SOFTMAX, logits=array([[0, 0, 0, bad]]), attrs={"k": 1, "n_group": 1, "topk_group": 1})
    with pytest.raises(TypeError, match="scoring"):
        call(SOFTMAX, logits=np.zeros((1, 16)), attrs={"scoring": "softmax"})


# noaux_tc: clamped denominators and the bfloat16 gate


def test_clamped_denominator() -> None:
    """Two experts of s = 1/2: 2.5 s / (1 + 4) or / max(1, 4); below eps the denominator passes no gradient, at eps it does."""
    inputs = {"logits": np.zeros((1, 2)), "bias": np.zeros(2)}
    one = {"k": 2, "n_group": 1, "topk_group": 1}
    for place, eps, weight in (("add", 4.0, 0.25), ("clamp", 4.0, 0.3125), ("clamp", 1.0, 1.25), ("clamp", 0.5, 1.25)):
        attrs = {**one, "denominator_place": place, "denominator_eps": eps}
        np.testing.assert_allclose(call(NOAUX, attrs=attrs, **inputs)["topk_weight"], [[weight] * 2], rtol=1e-15)
    held = {"topk_idx": np.array([[0, 1]]), "dtopk_weight": array([[1, 2]])}

    def dlogits(eps: float) -> list:
        attrs = {**one, "denominator_place": "clamp", "denominator_eps": eps}
        return call(NOAUX, "backward", attrs=attrs, **inputs, **held)["dlogits"].tolist()

    assert dlogits(4.0) == [[0.625 * 0.25, 2 * 0.625 * 0.25]]
    assert dlogits(1.0) == dlogits(0.5) == [[-0.3125, 0.3125]]  # 2.5 (dw - mean dw) s (1 - s)


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax", "sqrtsoftplus"])
@pytest.mark.parametrize("place", ["add", "clamp"])
def test_noaux_backward(scoring: str, place: str) -> None:
    """dlogits equals differences with both denominators, the sum below eps in some rows and above it in others."""
    inputs = {"logits": rng().standard_normal((4, 8)) * 2, "bias": rng(1).standard_normal(8) * 0.1}
    attrs = {"k": 3, "n_group": 4, "topk_group": 2, "scoring": scoring, "denominator_place": place}
    assert (router.selection_margin(inputs, attrs) > 2.0**-8).all()
    plain = call(NOAUX, attrs={**attrs, "norm_topk_prob": False, "routed_scaling_factor": 1.0}, **inputs)
    s = np.sort(plain["topk_weight"].sum(1))
    widest = int(np.argmax(np.diff(s)))
    assert s[widest + 1] - s[widest] > 2.0**-5
    check_backward(NOAUX, inputs, {**attrs, "denominator_eps": float(s[widest : widest + 2].mean())}, "topk_idx")


PLAIN = {"n_group": 1, "topk_group": 1, "norm_topk_prob": False, "routed_scaling_factor": 1.0, "gate_dtype": "bfloat16"}


def test_bfloat16_gate_by_hand() -> None:
    """sigmoid(1) = 0.73106 is 187/256 in bfloat16, and so is that of 1 + 2^-8, a tie that goes to 1; 1 + 3 * 2^-8 goes to 1 + 2^-6."""
    logits = array([[1, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-6, 0]])
    got = call(NOAUX, logits=logits, bias=np.zeros(5), attrs={**PLAIN, "k": 5})
    assert got["topk_idx"].tolist() == [[2, 3, 0, 1, 4]]
    assert got["topk_weight"].tolist() == [[188 / 256, 188 / 256, 187 / 256, 187 / 256, 0.5]]
    normed = call(NOAUX, logits=logits, bias=np.zeros(5), attrs={**PLAIN, "k": 5, "norm_topk_prob": True})
    np.testing.assert_allclose(normed["topk_weight"][0], array([188, 188, 187, 187, 128]) / 878, rtol=1e-15)  # not rounded again
    low = call(NOAUX, logits=array([[-5.01]]), bias=np.zeros(1), attrs={**PLAIN, "k": 1})["topk_weight"]
    assert low.tolist() == [[219 / 2**15]]  # of sigmoid(-5) = 0.0066929; that of -5.01 itself would be 217 / 2^15
    close = array([[1, 1.001]])
    assert call(NOAUX, logits=close, bias=np.zeros(2), attrs={**PLAIN, "k": 1})["topk_idx"].tolist() == [[0]]
    assert call(NOAUX, logits=close, bias=np.zeros(2), attrs={**PLAIN, "k": 1, "gate_dtype": "float32"})["topk_idx"].tolist() == [[1]]


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax", "sqrtsoftplus"])
def test_bfloat16_gate_backward(scoring: str) -> None:
    """ds passes both roundings; the slopes are the contract's, in the rounded s and the unrounded logits."""
    logits, ds = rng().standard_normal((3, 6)), rng(1).standard_normal((3, 6))
    top, s = np.tile(np.arange(6), (3, 1)), np.zeros((3, 6))
    attrs = {**PLAIN, "scoring": scoring, "k": 6}
    forward = call(NOAUX, logits=logits, bias=np.zeros(6), attrs=attrs)
    np.put_along_axis(s, forward["topk_idx"], forward["topk_weight"], 1)
    got = call(NOAUX, "backward", logits=logits, bias=np.zeros(6), topk_idx=top, dtopk_weight=ds, attrs=attrs)["dlogits"]
    expected = {
        "sigmoid": ds * s * (1 - s),
        "sqrtsoftplus": ds / (1 + np.exp(-logits)) / (2 * s),
        "softmax": s * (ds - (ds * s).sum(1, keepdims=True)),
    }[scoring]
    np.testing.assert_allclose(got, expected, rtol=1e-13, atol=1e-16)


# Selection margins


def test_softmax_margin_by_hand() -> None:
    """Kept groups 5/20 against 4/20: 1/20; without groups the nearest pair at a cut, ties of equal logits being no risk."""
    inputs = {"logits": np.log(POWERS)}
    grouped = router.softmax_selection_margin(inputs, {"k": 2, "n_group": 3, "topk_group": 1})
    assert grouped[0] == pytest.approx(1 / 20, rel=1e-14)
    assert router.softmax_selection_margin(inputs, {"k": 1, "n_group": 1, "topk_group": 1})[0] == pytest.approx(1 / 20, rel=1e-14)
    assert router.softmax_selection_margin(inputs, {"k": 6, "n_group": 1, "topk_group": 1})[0] == pytest.approx(1 / 20, rel=1e-14)
    two = array([[0, 0, 0, math.log(3)]])  # only the tie is at a cut
    assert router.softmax_selection_margin({"logits": two[:, :3]}, {"k": 2, "n_group": 1, "topk_group": 1})[0] == math.inf
    assert router.softmax_selection_margin({"logits": two}, {"k": 2, "n_group": 1, "topk_group": 1})[0] == pytest.approx(1 / 3, rel=1e-14)


def test_bfloat16_margin() -> None:
    """The distance to where the rounding turns over; it bounds the selection's margin where equal rounded scores do not."""
    for number, distance in ((1.0, 2.0**-9), (1 + 2.0**-8, 0), (-1.25 - 2.0**-10, 3 * 2.0**-10), (0.0, 2.0**-134), (2.0**-134, 0)):
        assert router.rounding_margin(CTX.mpf(number)) == distance
    inputs, s = {"logits": array([[1, 1.001]]), "bias": np.zeros(2)}, 1 / (1 + math.exp(-1))
    margin = router.selection_margin(inputs, {**PLAIN, "k": 1})[0]
    assert margin == pytest.approx((187.5 / 256 - s) / s, rel=1e-12)
    assert router.selection_margin(inputs, {**PLAIN, "k": 1, "gate_dtype": "float32"})[0] == pytest.approx(0.001 * s * (1 - s), rel=1e-3)


def test_margin_bounds_the_choice() -> None:
    """Logits moved by less than the margin, each of two neighbouring s at a slope of at most 1/2, never turn the choice."""
    logits = rng().standard_normal((40, 12))
    attrs = {"k": 4, "n_group": 4, "topk_group": 2}
    margins, top = router.softmax_selection_margin({"logits": logits}, attrs), call(SOFTMAX, logits=logits, attrs=attrs)["topk_idx"]
    assert 0 < margins.min() < 0.01 < margins.max()
    for seed in range(4):
        moved = logits + margins[:, None] * rng(seed).choice([-0.99, 0.99], logits.shape)
        np.testing.assert_array_equal(call(SOFTMAX, logits=moved, attrs=attrs)["topk_idx"], top)


# Balance losses


def loss(scores: Any, topk_idx: Any, **attrs: Any) -> float:
    return float(call("router.balance_loss", scores=array(scores), topk_idx=np.array(topk_idx), attrs={"alpha": 1.0, **attrs})["loss"])


def test_balance_loss_by_hand() -> None:
    """Uniform scores give alpha whatever the load, everything on one expert alpha e; -1 chooses nothing, but its token counts."""
    flat, one = np.ones((1, 2, 4)), np.eye(4)[[[1, 1]]]
    assert loss(flat, [[[0, 1], [0, 3]]]) == loss(flat, [[[2, 3], [2, 3]]], level="expert") == 1
    assert loss(one, [[[1], [1]]]) == 4
    assert loss(one, [[[1], [-1]]]) == 2
    assert loss(flat, [[[0, -1], [-1, -1]]]) == 0.25
    scores, chosen = [[[0.5, 0.25, 0.25, 0], [0, 0.5, 0, 0.5]]], [[[0, 1], [1, 3]]]
    assert loss(scores, chosen) == 0.25 * 1 + 0.375 * 2 + 0.25 * 1  # f = 4 / (2 * 2) a slot: 1, 2, 0, 1
    assert loss(scores, chosen, alpha=0.5) == 0.625
    assert call("router.balance_loss", scores=array(scores), topk_idx=np.array(chosen))["loss"] == 1.25e-4
    assert call("router.balance_loss", scores=array(scores), topk_idx=np.array(chosen))["loss"].shape == ()


def test_device_losses_by_hand() -> None:
    """Two devices of two experts: f is the experts' mean, or D / (M s) a token that reaches the device, counted once; P is the sum."""
    scores, chosen = [[[0.5, 0.25, 0.25, 0], [0, 0.5, 0, 0.5]]], [[[0, 1], [1, 3]]]  # f = 1, 2, 0, 1; P = 0.625, 0.375 on the devices
    assert loss(scores, chosen, level="device", devices=2) == 1.5 * 0.625 + 0.5 * 0.375
    assert loss(scores, chosen, level="communication", devices=2, topk_devices=2) == 1 * 0.625 + 0.5 * 0.375
    assert loss(scores, chosen, level="communication", devices=2, topk_devices=1) == 2 * 0.625 + 1 * 0.375
    assert loss(scores, [[[-1, -1], [-1, 3]]], level="communication", devices=2, topk_devices=1) == 0.375
    assert loss(scores, chosen, level="device", devices=4) == loss(scores, chosen)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("normalise", [True, False])
def test_balance_loss_properties(level: str, normalise: bool) -> None:
    """The loss is the mean of its sequences' losses, blind to a token's scale if it normalises, linear in it if not; dscores is right."""
    scores, chosen = rng().uniform(0.1, 1, (3, 5, 6)), choices(15, 2, 6, 0.2).reshape(3, 5, 2)
    attrs = {"level": level, "normalise": normalise, "devices": 3, "topk_devices": 2}
    whole = loss(scores, chosen, **attrs)
    assert whole == pytest.approx(np.mean([loss(scores[b : b + 1], chosen[b : b + 1], **attrs) for b in range(3)]), rel=1e-14)
    assert loss(scores * 3, chosen, **attrs) == pytest.approx(whole * (1 if normalise else 3), rel=1e-14)
    got = check_backward("router.balance_loss", {"scores": scores, "topk_idx": chosen}, {**attrs, "alpha": 1.0})["dscores"]
    along = (got * scores).sum(-1)
    if normalise:
        np.testing.assert_allclose(along, 0, atol=1e-15)
        unit = scores / scores.sum(-1, keepdims=True)
        assert loss(unit, chosen, **{**attrs, "normalise": False}) == pytest.approx(whole, rel=1e-14)


@pytest.mark.parametrize(
    ("attrs", "chosen", "message"),
    [
        ({}, [[[0, 4]]], "outside"),
        ({}, [[[0, -2]]], "outside"),
        ({}, [[[3, 3]]], "twice"),
        ({"level": "device", "devices": 3}, [[[0, 1]]], "devices"),
        ({"level": "communication", "devices": 3}, [[[0, 1]]], "devices"),
        ({"level": "communication", "devices": 2, "topk_devices": 3}, [[[0, 1]]], "topk_devices"),
        ({"level": "communication", "devices": 2, "topk_devices": 0}, [[[0, 1]]], "topk_devices"),
        ({"level": "token"}, [[[0, 1]]], "level"),
        ({}, np.zeros((1, 1, 0), int), "slots"),
        ({}, np.zeros((1, 0, 2), int), "tokens"),
        ({}, np.zeros((0, 1, 2), int), "tokens"),
    ],
)
def test_balance_loss_refuses(attrs: dict, chosen: Any, message: str) -> None:
    """Each of the contract's ValueErrors; two slots of -1 are not an expert twice, and only the device losses look at devices."""
    with pytest.raises(ValueError, match=message):
        loss(np.ones((*np.shape(chosen)[:2], 4)), chosen, **attrs)
    assert loss(np.ones((1, 1, 4)), [[[-1, -1]]], devices=3, topk_devices=9) == 0


# Dropping and the bias


def drop(topk_idx: Any, weight: Any, exempt: Any = None, **attrs: Any) -> list:
    given = {} if exempt is None else {"exempt": np.array(exempt)}
    got = call("router.drop_tokens", topk_idx=np.array(topk_idx), topk_weight=array(weight), attrs=attrs, **given)
    np.testing.assert_array_equal(got["weight"], array(weight) * got["keep"])
    assert got["keep"].dtype == np.int64
    return got["keep"].tolist()


def test_drop_tokens_by_hand() -> None:
    """The largest weights of a device stay, ties to the earlier slot; exempt tokens stay and take the places first, beyond capacity too."""
    column, weight, one = [[0], [1], [0], [1]], [[0.1], [0.4], [0.4], [0.9]], {"n_routed_experts": 2, "devices": 1, "capacity_factor": 0.5}
    assert drop(column, weight, **one) == [[0], [1], [0], [1]]
    assert drop(column, weight, [1, 0, 0, 0], **one) == [[1], [0], [0], [1]]
    assert drop(column, weight, [7, 0, -1, 1], **one) == [[1], [0], [1], [1]]
    assert drop(column, weight, **{**one, "capacity_factor": 0.9375}) == [[0], [1], [1], [1]]  # floor(3.75)
    assert drop([[0, 1], [1, 0]], [[0.5, 0.5], [0.5, 0.5]], **{**one, "capacity_factor": 0.75}) == [[1, 1], [1, 0]]
    two = {"n_routed_experts": 4, "devices": 2}
    assert drop([[0, 1], [1, 0], [2, 3]], [[0.2, 0.3], [0.1, 0.4], [0, -1]], **two) == [[1, 1], [0, 1], [1, 1]]  # three on each device


def test_drop_tokens_properties() -> None:
    """Every device keeps min(slots, capacity), none kept below one dropped; a factor of `devices` drops nothing; backward is dw keep."""
    chosen, weight = choices(40, 3, 8), rng().standard_normal((40, 3))
    attrs = {"n_routed_experts": 8, "devices": 4, "capacity_factor": 0.75}
    keep = np.array(drop(chosen, weight, **attrs))
    for device in range(4):
        here = chosen // 2 == device
        assert keep[here].sum() == min(here.sum(), 22)  # floor(0.75 * 120 / 4)
        assert here.sum() > 22
        assert weight[here & (keep == 1)].min() > weight[here & (keep == 0)].max()
    assert np.all(np.array(drop(chosen, weight, **{**attrs, "capacity_factor": 4.0})) == 1)
    got = call("router.drop_tokens", "backward", topk_idx=chosen, topk_weight=weight, dweight=weight + 1, attrs=attrs)
    np.testing.assert_array_equal(got["dtopk_weight"], (weight + 1) * keep)


@pytest.mark.parametrize(
    ("chosen", "attrs", "message"),
    [
        ([[0, 4]], {}, "outside"),
        ([[0, -1]], {}, "outside"),
        ([[2, 2]], {}, "twice"),
        ([[0, 1]], {"devices": 3}, "devices"),
        ([[0, 1]], {"capacity_factor": 0.0}, "capacity_factor"),
        ([[0, 1]], {"capacity_factor": -1.0}, "capacity_factor"),
        ([[0, 1]], {"capacity_factor": 0.96875}, "capacity_factor"),
    ],
)
def test_drop_tokens_refuses(chosen: Any, attrs: dict, message: str) -> None:
    """Each of the contract's ValueErrors; a capacity below one slot is none for no tokens."""
    with pytest.raises(ValueError, match=message):
        drop(chosen, np.ones(np.shape(chosen)), **{"n_routed_experts": 4, "devices": 2, **attrs})
    assert drop(np.zeros((0, 2), int), np.ones((0, 2)), capacity_factor=0.5) == []


def test_bias_update_by_hand() -> None:
    """+gamma below the mean load, -gamma above, 0 at it; in exact integers; centred less the mean of the signs."""

    def update(counts: list[int], **attrs: Any) -> list[float]:
        return call("router.bias_update", bias=np.zeros(len(counts)), counts=np.array(counts), attrs=attrs)["bias_out"].tolist()

    assert update([3, 2, 4, 3, 3]) == [0, 0.001, -0.001, 0, 0]
    assert update([2**60 + 1, 2**60, 2**60 - 1], gamma=0.5) == [-0.5, 0, 0.5]
    assert update([2**60 + 1] * 3) == [0, 0, 0]  # a mean that no float64 holds
    assert update([0, 0, 0, 4], gamma=1.0) == [1, 1, 1, -1]
    assert update([0, 0, 0, 4], gamma=1.0, centred=True) == [0.5, 0.5, 0.5, -1.5]
    assert update([1, 2], gamma=0.0) == [0, 0]
    bias = array([0.25, -8])
    assert call("router.bias_update", bias=bias, counts=np.array([5, 1]), attrs={"gamma": 0.125})["bias_out"].tolist() == [0.125, -7.875]
    for counts, gamma, message in (([1, -1], 0.1, "counts"), ([1, 1], -0.1, "gamma")):
        with pytest.raises(ValueError, match=message):
            update(counts, gamma=gamma)


# SwiGLU


def test_swiglu_by_hand() -> None:
    """silu(0) = 0, silu(ln 3) = 3/4 ln 3; the gate is cut from above only, the other factor on both sides; exp(-gate) may be huge."""
    log = math.log(3)
    y = call("swiglu", gate=array([[0, log, -log, -2000]]), up=array([[5, 4, 4, 3]]))["y"]
    np.testing.assert_allclose(y, [[0, 3 * log, -log, 0]], rtol=1e-15)
    gate, up = array([[9, -9, log, log]]), array([[1, 1, 9, -9]])
    cut = call("swiglu", gate=gate, up=up, attrs={"limit": 2.0})["y"]
    plain = call("swiglu", gate=array([[2, -9, log, log]]), up=array([[1, 1, 2, -2]]))["y"]
    np.testing.assert_array_equal(cut, plain)
    for limit in (0.0, -1.0):
        with pytest.raises(ValueError, match="limit"):
            call("swiglu", gate=gate, up=up, attrs={"limit": limit})


@pytest.mark.parametrize("silu", ["float32", "stored"])
def test_swiglu_backward(silu: str) -> None:
    """dgate = dy up s (1 + g (1 - s)), dup = dy g s, s = sigmoid(g); 0 strictly beyond the limit, not at it."""
    gate, up, dy = rng().standard_normal((3, 4, 16)) * 3
    gate[0, :3], up[0, :3] = [2, 2, 3], [2, -2, 1]
    for limit in (None, 2.0):
        got = call("swiglu", "backward", gate=gate, up=up, dy=dy, attrs={"limit": limit, "silu": silu})
        bound = math.inf if limit is None else limit
        g, u = np.minimum(gate, bound), np.clip(up, -bound, bound)
        s = 1 / (1 + np.exp(-g))
        np.testing.assert_allclose(got["dgate"], np.where(gate > bound, 0, dy * u * s * (1 + g * (1 - s))), rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(got["dup"], np.where(np.abs(up) > bound, 0, dy * g * s), rtol=1e-14)
        assert ((got["dgate"] == 0) == (gate > bound)).all()


# Permutation


def test_permute_by_hand() -> None:
    """Rows by expert, then slot number; experts are filled up to the alignment, but empty ones have no rows; -1 goes nowhere."""
    x, chosen = array([[1, 2], [3, 4], [5, 6]]), np.array([[2, 0], [-1, 2], [0, -1]])
    got = call("moe.permute", x=x, topk_idx=chosen, attrs={"n_routed_experts": 4})
    assert got["source"].tolist() == [1, 4, 0, 3]
    assert got["counts"].tolist() == [2, 0, 2, 0]
    assert got["x_sorted"].tolist() == [[1, 2], [5, 6], [1, 2], [3, 4]]
    filled = call("moe.permute", x=x, topk_idx=chosen, attrs={"n_routed_experts": 4, "alignment": 128})
    assert filled["source"].tolist() == [1, 4, *[-1] * 126, 0, 3, *[-1] * 126]
    assert filled["counts"].tolist() == [2, 0, 2, 0]
    np.testing.assert_array_equal(filled["x_sorted"][filled["source"] >= 0], got["x_sorted"])
    assert not filled["x_sorted"][filled["source"] < 0].any()


@pytest.mark.parametrize("alignment", [1, 128])
def test_permutation_properties(alignment: int) -> None:
    """Unpermuting the permuted gives x times the sum of its weights; dx of the permutation is unpermuting with weights 1; dy likewise."""
    x, chosen, weight = rng().standard_normal((7, 3)), choices(7, 4, 6, 0.3), rng(1).standard_normal((7, 4))
    attrs = {"n_routed_experts": 6, "alignment": alignment}
    there = call("moe.permute", x=x, topk_idx=chosen, attrs=attrs)
    assert len(there["source"]) == (-(-there["counts"] // alignment) * alignment).sum()
    back = call("moe.unpermute", y_sorted=there["x_sorted"], topk_idx=chosen, topk_weight=weight, attrs=attrs)["y"]
    used = np.where(chosen >= 0, weight, 0)
    np.testing.assert_allclose(back, x * used.sum(1, keepdims=True), rtol=1e-13, atol=1e-15)
    g = rng(2).standard_normal(there["x_sorted"].shape)
    dx = call("moe.permute", "backward", x=x, topk_idx=chosen, dx_sorted=g, attrs=attrs)["dx"]
    ones = call("moe.unpermute", y_sorted=g, topk_idx=chosen, topk_weight=np.ones((7, 4)), attrs=attrs)["y"]
    np.testing.assert_array_equal(dx, ones)
    got = call("moe.unpermute", "backward", y_sorted=g, topk_idx=chosen, topk_weight=weight, dy=x, attrs=attrs)
    real = there["source"] >= 0
    scale = np.where(real, weight.ravel()[there["source"]], 0)[:, None]
    np.testing.assert_allclose(got["dy_sorted"], there["x_sorted"] * scale, rtol=1e-15)
    expected = np.zeros(28)
    expected[there["source"][real]] = (there["x_sorted"] * g).sum(1)[real]
    np.testing.assert_allclose(got["dtopk_weight"], expected.reshape(7, 4), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(("chosen", "message"), [([[0, 4]], "outside"), ([[-2, 0]], "outside"), ([[1, 1]], "twice")])
def test_experts_refuse(chosen: Any, message: str) -> None:
    """Indices outside -1..e-1 and an expert twice, in permute, unpermute and experts; other alignments; rows that permute does not make."""
    x, top, w = np.ones((1, 2)), np.array(chosen), np.ones((4, 2, 2))
    with pytest.raises(ValueError, match=message):
        call("moe.permute", x=x, topk_idx=top, attrs={"n_routed_experts": 4})
    with pytest.raises(ValueError, match=message):
        call("moe.unpermute", y_sorted=np.ones((2, 2)), topk_idx=top, topk_weight=x, attrs={"n_routed_experts": 4})
    with pytest.raises(ValueError, match=message):
        call("moe.experts", x=x, topk_idx=top, topk_weight=x, w_gate=w, w_up=w, w_down=w)
    with pytest.raises(ValueError, match="alignment"):
        call("moe.permute", x=x, topk_idx=np.array([[0, 1]]), attrs={"alignment": 64})
    with pytest.raises(ValueError, match="3 rows"):
        call("moe.unpermute", y_sorted=np.ones((3, 2)), topk_idx=np.array([[0, 1]]), topk_weight=x)


# Experts and the layer


def expert_weights(e: int, d: int, f: int) -> Arrays:
    g = rng(e * d * f)
    return {"w_gate": g.standard_normal((e, f, d)), "w_up": g.standard_normal((e, f, d)), "w_down": g.standard_normal((e, d, f))}


def numpy_ffn(x: np.ndarray, weights: list[np.ndarray], limit: float) -> np.ndarray:
    gate, up, down = weights
    g, u = np.minimum(x @ gate.T, limit), np.clip(x @ up.T, -limit, limit)
    return (g / (1 + np.exp(-g)) * u) @ down.T


@pytest.mark.parametrize("attrs", [{}, {"weight_before_down": True, "silu": "stored"}, {"limit": 0.5}])
def test_experts(attrs: dict) -> None:
    """y equals permuting, one numpy FFN an expert, unpermuting; every gradient equals differences; unused experts have none."""
    x, chosen, weight, w = rng().standard_normal((5, 3)), choices(5, 2, 6, 0.3), rng(1).standard_normal((5, 2)), expert_weights(6, 3, 4)
    chosen[chosen == 2] = -1
    inputs = {"x": x, "topk_idx": chosen, "topk_weight": weight, **w}
    there = call("moe.permute", x=x, topk_idx=chosen, attrs={"n_routed_experts": 6})
    bounds = np.cumsum(there["counts"])[:-1]
    rows = [numpy_ffn(x, [w[n][i] for n in w], attrs.get("limit", math.inf)) for i, x in enumerate(np.split(there["x_sorted"], bounds))]
    back = {"y_sorted": np.concatenate(rows), "topk_idx": chosen, "topk_weight": weight}
    expected = call("moe.unpermute", attrs={"n_routed_experts": 6}, **back)["y"]
    np.testing.assert_allclose(call("moe.experts", attrs=attrs, **inputs)["y"], expected, rtol=1e-12, atol=1e-14)
    got = (
        check_backward("moe.experts", inputs, attrs)
        if "limit" not in attrs
        else call("moe.experts", "backward", attrs=attrs, **inputs, dy=x)
    )
    assert not got["dtopk_weight"][chosen < 0].any()
    for name in w:
        assert [bool(got[f"d{name}"][i].any()) for i in range(6)] == [i in chosen for i in range(6)]


def layer_inputs(shared: bool = True, bias: bool = True) -> Arrays:
    """Small integers in x and gate_weight: the logits are exact in any arithmetic."""
    g, e, d = rng(), 8, 4
    given = {"x": g.integers(-2, 3, (5, d)) / 2, "gate_weight": g.integers(-8, 9, (e, d)) / 8, **expert_weights(e, d, 3)}
    if bias:
        given["e_score_correction_bias"] = g.standard_normal(e) * 0.3
    if shared:
        given |= {name: g.standard_normal((2, d) if name != "shared_down" else (d, 2)) for name in moe.SHARED}
    return given


ROUTES = [
    {},
    {"scoring": "sqrtsoftplus", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.5, "weight_before_down": True},
    {"scoring": "softmax", "norm_topk_prob": False},
    {"topk_method": "softmax", "norm_topk_prob": False, "routed_scaling_factor": 16.0},
    {"gate_dtype": "bfloat16"},
    {"limit": 0.75, "denominator_eps": 0.5},
]
SMALL = {"num_experts_per_tok": 3, "n_group": 4, "topk_group": 2}


@pytest.mark.parametrize("attrs", ROUTES)
@pytest.mark.parametrize(("shared", "bias"), [(True, True), (False, True), (True, False)])
def test_layer_is_its_parts(attrs: dict, shared: bool, bias: bool) -> None:
    """y is the experts' y, routed by the router's oracle, plus numpy's shared FFN; no bias is a bias of 0, unused by softmax routing."""
    inputs, attrs = layer_inputs(shared, bias), {**SMALL, **attrs}
    got = call("moe.layer", attrs=attrs, **inputs)
    routing = {name: attrs[name] for name in attrs if name in router.DEFAULTS} | {"k": attrs["num_experts_per_tok"]}
    logits = inputs["x"] @ inputs["gate_weight"].T
    if attrs.get("topk_method") == "softmax":
        chosen = call(SOFTMAX, logits=logits, attrs=routing)
    else:
        chosen = call(NOAUX, logits=logits, bias=inputs.get("e_score_correction_bias", np.zeros(8)), attrs=routing)
    np.testing.assert_array_equal(got["topk_idx"], chosen["topk_idx"])
    at = {name: attrs[name] for name in attrs if name in moe.EXPERTS}
    y = call("moe.experts", x=inputs["x"], **chosen, **{name: inputs[name] for name in moe.FFN}, attrs=at)["y"]
    if shared:
        y = y + numpy_ffn(inputs["x"], [inputs[name] for name in moe.SHARED], attrs.get("limit", math.inf))
    np.testing.assert_allclose(got["y"], y, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("attrs", ROUTES[:4])
@pytest.mark.parametrize("shared", [True, False])
def test_layer_backward(attrs: dict, shared: bool) -> None:
    """Every gradient, the gate's too, equals differences of the layer; the bias has none."""
    inputs, attrs = layer_inputs(shared), {**SMALL, **attrs}
    inputs["gate_weight"] = inputs["gate_weight"] + rng(3).standard_normal(inputs["gate_weight"].shape) * 0.1
    inputs["x"] = inputs["x"][moe.selection_margin(inputs, attrs) > 2.0**-7]
    assert len(inputs["x"]) > 1
    got = check_backward("moe.layer", inputs, attrs, "topk_idx")
    assert set(got) == {f"d{name}" for name in inputs} - {"de_score_correction_bias"}
    assert all(gradient.any() for gradient in got.values())


def test_layer_holds_the_choice() -> None:
    """The backward pass takes topk_idx as it is given: another choice gives other experts their gradients."""
    inputs = layer_inputs()
    for held in ([0, 1, 2], [7, 3, 5]):
        given = {"topk_idx": np.tile(held, (5, 1)), "dy": np.ones((5, 4))}
        got = call("moe.layer", "backward", attrs=SMALL, **inputs, **given)
        assert [i for i in range(8) if got["dw_down"][i].any()] == sorted(held)
        assert [i for i in range(8) if got["dgate_weight"][i].any()] == sorted(held)


def test_layer_refuses() -> None:
    """Some of the shared weights without the others, logits that are not finite, the router's and SwiGLU's refusals, a wrong shape."""
    inputs = layer_inputs()
    broken: list[tuple[dict, dict, str]] = [
        ({"shared_up": None}, {}, "shared"),
        ({"x": np.full((5, 4), np.inf)}, {}, "finite"),
        ({}, {"topk_group": 5}, "topk_group"),
        ({}, {"num_experts_per_tok": 5}, "left by the groups"),
        ({}, {"limit": 0.0}, "limit"),
        ({}, {"topk_method": "greedy"}, "topk_method"),
        ({"gate_weight": np.ones((7, 4))}, {}, "gate_weight"),
    ]
    for change, attrs, message in broken:
        with pytest.raises(ValueError, match=message):
            call("moe.layer", attrs={**SMALL, **attrs}, **{**inputs, **change})


def test_layer_margin() -> None:
    """That of the router on the same logits; tokens of zeros tie for certain, equal rows of the gate only where a logit is one product."""
    inputs = layer_inputs()
    margins = moe.selection_margin(inputs, SMALL)
    logits = {"logits": inputs["x"] @ inputs["gate_weight"].T, "bias": inputs["e_score_correction_bias"]}
    np.testing.assert_allclose(margins, router.selection_margin(logits, {"k": 3, "n_group": 4, "topk_group": 2}), rtol=1e-14)
    one = {"num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}
    inputs = {**layer_inputs(bias=False), "x": array([[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]), "gate_weight": np.ones((8, 4))}
    assert moe.selection_margin(inputs, one).tolist() == [math.inf, math.inf, 0]
    turn = {**inputs, "x": array([[1 + 2.0**-8, 0, 0, 0], [1 + 2.0**-8 - 2.0**-12, 0, 0, 0]])}
    assert moe.selection_margin(turn, {**one, "gate_dtype": "bfloat16"}).tolist() == [0, 2.0**-12]


# Expert placement


def place(weight: Any, replicas: int, groups: int, nodes: int, gpus: int) -> Arrays:
    return call("moe.eplb", weight=array(weight), attrs=dict(zip(eplb.NAMES, (replicas, groups, nodes, gpus), strict=True)))


def test_eplb_published_example() -> None:
    """The worked example that DeepSeek's EPLB is published with: two layers of 12 experts, 16 replicas, 4 groups, 2 nodes, 8 GPUs."""
    weight = [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
    got = place(weight, 16, 4, 2, 8)
    assert got["phy2log"].tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    assert got["counts"][0].tolist() == [1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1]
    assert got["log2phy"].shape == (2, 12, 2)
    assert got["log2phy"][0, 5].tolist() == [0, 2]
    assert got["log2phy"][0, 9].tolist() == [9, -1]


def test_eplb_by_hand() -> None:
    """One GPU keeps the copies in order of load; the heaviest share is copied first; one place a GPU leaves the order as it is."""
    got = place([[10, 1, 2]], 6, 1, 1, 1)
    assert got["counts"].tolist() == [[4, 1, 1]]  # shares of 10, 5, 10/3
    assert got["phy2log"].tolist() == [[0, 0, 0, 0, 2, 1]]
    assert got["log2phy"].tolist() == [[[0, 1, 2, 3], [5, -1, -1, -1], [4, -1, -1, -1]]]
    assert place([[1, 9, 4, 7]], 4, 1, 1, 4)["phy2log"].tolist() == [[0, 1, 2, 3]]
    assert place([[1, 9, 4, 7]], 4, 1, 1, 2)["phy2log"].tolist() == [[1, 0, 3, 2]]  # 9 | 7, then 4 to the 7, 1 to what has room
    assert place([[5, 5, 5, 5]], 4, 1, 1, 2)["phy2log"].tolist() == [[0, 2, 1, 3]]
    apart = place([[6, 4, 8]], 4, 1, 1, 2)  # 6 | 4 and the first 4 of 8, then the second to what has room: in the order they were made
    assert apart["phy2log"].tolist() == [[0, 2, 1, 2]]
    assert apart["log2phy"][0, 2].tolist() == [3, 1]
    assert place([[1, 9, 4, 7, 2, 8]], 6, 3, 2, 6)["phy2log"].tolist() == [[0, 1, 2, 3, 4, 5]]  # no groups where nodes are no divisor
    assert place([[0, 0, 0, 0]], 8, 1, 1, 2)["counts"].tolist() == [[5, 1, 1, 1]]


def test_eplb_ties_inside_a_node() -> None:
    """A node's experts stand in the order in which its groups were packed: of equal shares the heavier group's is copied."""
    assert place([[1, 2, 3, 2]], 6, 2, 1, 1)["counts"].tolist() == [[1, 1, 2, 2]]
    assert place([[1, 2, 3, 2]], 6, 1, 1, 1)["counts"].tolist() == [[1, 2, 2, 1]]


@pytest.mark.parametrize(("groups", "nodes"), [(4, 2), (2, 2), (1, 1), (3, 2)])
def test_eplb_properties(groups: int, nodes: int) -> None:
    """Every expert has a copy, counts add up, log2phy and phy2log are inverse; groups stay on one node where nodes divides groups, and are
    split where it does not; no other expert's share would have been heavier than the one that was copied."""
    e, r, gpus = 12, 20, 4
    weight = rng().integers(1, 200, (6, e))
    got = place(weight, r, groups, nodes, gpus)
    crossing = 0
    for l in range(6):
        phy2log, log2phy, counts = (got[name][l] for name in ("phy2log", "log2phy", "counts"))
        assert counts.min() >= 1
        assert (np.bincount(phy2log, minlength=e) == counts).all()
        for i in range(e):
            assert (log2phy[i] >= 0).tolist() == [c < counts[i] for c in range(got["log2phy"].shape[2])]
            assert sorted(log2phy[i, : counts[i]]) == np.flatnonzero(phy2log == i).tolist()
        node = {i: set(np.flatnonzero(phy2log == i) // (r // nodes)) for i in range(e)}
        crossing += sum(len(set.union(*(node[i] for i in range(g, g + e // groups)))) > 1 for g in range(0, e, e // groups))
        whole = [[i for i in range(e) if n in node[i]] for n in range(nodes)] if groups % nodes == 0 else [list(range(e))]
        for members in whole:
            share, before = weight[l] / counts, weight[l] / np.maximum(counts - 1, 0.5)
            assert share[members].max() <= before[[i for i in members if counts[i] > 1]].min()
    assert (crossing == 0) == (groups % nodes == 0)


@pytest.mark.parametrize(
    ("last", "numbers", "message"),
    [
        (4, (3, 1, 1, 1), "3 < 4 experts"),
        (4, (5, 1, 1, 2), "5 replicas .* by 2"),
        (4, (6, 3, 1, 1), "4 experts .* by 3"),
        (4, (6, 2, 2, 3), "3 GPUs .* by 2"),
        (4, (6, 1, 1, 0), "at least 1"),
        (np.nan, (6, 1, 1, 1), "weight"),
    ],
)
def test_eplb_refuses(last: float, numbers: tuple[int, int, int, int], message: str) -> None:
    """Fewer places than experts, what cannot be split evenly, no GPU, a weight that is no number."""
    with pytest.raises(ValueError, match=message):
        place([[1, 2, 3, last]], *numbers)


def test_eplb_margin() -> None:
    """The nearest two loads that were compared: 10/2 and 4 when the last copy is placed; equal weights are no risk."""
    attrs = {"num_replicas": 4, "num_groups": 1, "num_nodes": 1, "num_gpus": 1}
    weight = array([[10, 4, 1], [3, 3, 3], [10, 5, 1]])
    margins = eplb.margin({"weight": weight}, attrs)
    assert margins[0] == pytest.approx(1 / 5)  # 5, 5, 4, 1
    assert margins[1] == pytest.approx(1 / 2)  # 3, 3, 3/2, 3/2
    assert margins[2] == pytest.approx(1 / 2)  # 5, 5, 5, 1
    attrs = {"num_replicas": 6, "num_groups": 1, "num_nodes": 1, "num_gpus": 2}
    equal = eplb.margin({"weight": array([[4, 3, 1, 1, 1, 0], [2] * 6])}, attrs)
    assert equal.tolist() == [0, 0.5]  # 4 or 3 + 1 is less: another arithmetic may differ; 2 or 2 cannot, so the nearest is 2 or 2 + 2
