"""What must hold of RMSNorm, forward and backward. Each fact is held by the reference and kills a named mutant.

Scalings are by powers of two, and where sums meet in another order the inputs are small integers: both are exact, so most facts are held to
the bit, in float64.
"""

from collections.abc import Callable
from dataclasses import replace
from math import fsum
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from leadline.golden import strategies
from leadline.golden.band import DEVIATIONS, SLACK, band_of
from leadline.golden.bugs import bugs_of
from leadline.golden.draw import Source
from leadline.golden.precision import PRECISIONS
from leadline.ref import BF16, OPS, Op, round_to

RMSNORM = OPS["rmsnorm"]
UNIT = 2.0**-53
Arrays = dict[str, np.ndarray]


class Asked(NamedTuple):
    """x[n,d], weight[d] and dy[n,d] in float64, attributes, a power of two, and a seed for what else is drawn."""

    inputs: Arrays
    attrs: dict[str, Any]
    power: int
    seed: int

    def __repr__(self) -> str:
        return f"Asked(x{list(self.inputs['x'].shape)}, {self.attrs}, power={self.power}, seed={self.seed})"


@st.composite
def asked(draw: st.DrawFn) -> Asked:
    q = draw(strategies.questions(RMSNORM, direction="backward", empty=False, large=3000))
    attrs = {"eps": q.attrs["eps"], "cast_order": draw(st.sampled_from(("weight_then_cast", "cast_then_weight")))}
    return Asked({name: x.astype(np.float64) for name, x in q.inputs.items()}, attrs, draw(st.integers(-20, 20)), q.seed)


def forward(op: Op, inputs: Arrays, attrs: dict[str, Any]) -> np.ndarray:
    return op.run("forward", inputs, attrs)["y"]


def backward(op: Op, inputs: Arrays, attrs: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    outputs = op.run("backward", inputs, attrs)
    return outputs["dx"], outputs["dweight"]


def integers(q: Asked) -> Arrays:
    """x and dy from -64 to 63, no row all zero: squares and their sums are exact in float64"""
    n, d = q.inputs["x"].shape
    x = Source(f"x {q.seed}").integers((n, d), -64, 64).astype(np.float64)
    x[:, 0] += x[:, 0] == 0
    return {**q.inputs, "x": x, "dy": Source(f"dy {q.seed}").integers((n, d), -64, 64).astype(np.float64)}


def scale_invariant(op: Op, q: Asked) -> None:
    """eps=0: y(2^j x) = y(x), dx(2^j x) = 2^-j dx(x), dweight the same."""
    inputs, attrs = integers(q), {**q.attrs, "eps": 0.0}
    moved = {**inputs, "x": np.ldexp(inputs["x"], q.power)}
    np.testing.assert_array_equal(forward(op, moved, attrs), forward(op, inputs, attrs))
    (dx, dweight), (dx_moved, dweight_moved) = backward(op, inputs, attrs), backward(op, moved, attrs)
    np.testing.assert_array_equal(dx_moved, np.ldexp(dx, -q.power))
    np.testing.assert_array_equal(dweight_moved, dweight)


def eps_has_the_unit_of_x_squared(op: Op, q: Asked) -> None:
    """y(2^j x, 4^j eps) = y(x, eps): eps is added to the mean square."""
    moved, attrs = {**q.inputs, "x": np.ldexp(q.inputs["x"], q.power)}, {**q.attrs, "eps": q.attrs["eps"] * 4.0**q.power}
    np.testing.assert_array_equal(forward(op, moved, attrs), forward(op, q.inputs, q.attrs))


def homogeneous_in_weight(op: Op, q: Asked) -> None:
    """y(2^j weight) = 2^j y(weight), and so is dx; dweight does not depend on weight."""
    moved = {**q.inputs, "weight": np.ldexp(q.inputs["weight"], q.power)}
    np.testing.assert_array_equal(forward(op, moved, q.attrs), np.ldexp(forward(op, q.inputs, q.attrs), q.power))
    (dx, dweight), (dx_moved, dweight_moved) = backward(op, q.inputs, q.attrs), backward(op, moved, q.attrs)
    np.testing.assert_array_equal(dx_moved, np.ldexp(dx, q.power))
    np.testing.assert_array_equal(dweight_moved, dweight)


def channels_are_alike(op: Op, q: Asked) -> None:
    """A permutation of the channels of x and weight permutes y."""
    inputs = integers(q)
    order = np.argsort(Source(f"order {q.seed}").uniform(inputs["weight"].shape))
    moved = {**inputs, "x": inputs["x"][:, order], "weight": inputs["weight"][order]}
    np.testing.assert_array_equal(forward(op, moved, q.attrs), forward(op, inputs, q.attrs)[:, order])


def the_mean_knows_no_width(op: Op, q: Asked) -> None:
    """All channels twice: y is y twice."""
    inputs = integers(q)
    twice = {**inputs, "x": np.tile(inputs["x"], (1, 2)), "weight": np.tile(inputs["weight"], 2)}
    np.testing.assert_array_equal(forward(op, twice, q.attrs), np.tile(forward(op, inputs, q.attrs), (1, 2)))


def rows_are_independent(op: Op, q: Asked) -> None:
    """What changes in one row changes that row of y and dx alone."""
    row = q.seed % len(q.inputs["x"])
    x = q.inputs["x"].copy()
    x[row] = 3 * x[row] + 1
    others = np.arange(len(x)) != row
    np.testing.assert_array_equal(forward(op, {**q.inputs, "x": x}, q.attrs)[others], forward(op, q.inputs, q.attrs)[others])
    np.testing.assert_array_equal(backward(op, {**q.inputs, "x": x}, q.attrs)[0][others], backward(op, q.inputs, q.attrs)[0][others])


def root_mean_square_is_one(op: Op, q: Asked) -> None:
    """eps=0, weight=1: the mean of y² is 1. Of d terms the mean square is exact here but for its division; the root, the reciprocal, the
    product and the square add a unit each, some of them twice: 10 units."""
    inputs = integers(q)
    y = forward(op, {**inputs, "weight": np.ones_like(inputs["weight"])}, {**q.attrs, "eps": 0.0})
    for row in y:
        assert abs(fsum(v * v for v in row.tolist()) / len(row) - 1) <= 10 * UNIT


def sign_passes_through(op: Op, q: Asked) -> None:
    """y(-x) = -y(x), y(-weight) = -y(weight)."""
    for name in ("x", "weight"):
        np.testing.assert_array_equal(forward(op, {**q.inputs, name: -q.inputs[name]}, q.attrs), -forward(op, q.inputs, q.attrs))


def cast_order_is_no_arithmetic(op: Op, q: Asked) -> None:
    """Both cast orders give the same bits where nothing is stored in 16 bits."""
    once, twice = (forward(op, q.inputs, {**q.attrs, "cast_order": order}) for order in ("weight_then_cast", "cast_then_weight"))
    np.testing.assert_array_equal(twice, once)


def noise(q: Asked, attrs: dict[str, Any]) -> Arrays:
    """What float64 rounding may do to dx and dweight: SLACK·6 σ"""
    sigma = band_of(RMSNORM, "backward", q.inputs, attrs, PRECISIONS["fp64"]).sigma
    return {name: SLACK * DEVIATIONS * s for name, s in sigma.items()}


def dx_is_orthogonal_to_x(op: Op, q: Asked) -> None:
    """eps=0: dx · x = 0 in every row (Euler: y is homogeneous of degree 0 in x)."""
    q, attrs = q._replace(inputs=integers(q)), {**q.attrs, "eps": 0.0}
    dx, _ = backward(op, q.inputs, attrs)
    assert np.all(np.abs(np.sum(dx * q.inputs["x"], axis=1)) <= np.sum(noise(q, attrs)["dx"] * np.abs(q.inputs["x"]), axis=1))


def dweight_is_the_share_of_y(op: Op, q: Asked) -> None:
    """dweight · weight = dy · y channel by channel, summed over rows (Euler: y is homogeneous of degree 1 in weight). The products
    and sums of this check itself err by n + 2 units of their terms."""
    _, dweight = backward(op, q.inputs, q.attrs)
    terms = q.inputs["dy"] * forward(RMSNORM, q.inputs, q.attrs)
    bound = noise(q, q.attrs)["dweight"] * np.abs(q.inputs["weight"]) + (len(terms) + 8) * UNIT * np.sum(np.abs(terms), axis=0)
    assert np.all(np.abs(dweight * q.inputs["weight"] - np.sum(terms, axis=0)) <= bound)


def bug(id: str) -> Op:
    return next(b for direction in ("forward", "backward") for b in bugs_of(RMSNORM, direction) if b.id == id).variant(RMSNORM)


def mutant(fwd: Callable) -> Op:
    fwd.sig = RMSNORM.sig  # type: ignore[attr-defined]
    return replace(RMSNORM, fwd=fwd)


def rotated_weight(x: np.ndarray, weight: np.ndarray, **attrs: Any) -> Any:
    """The weight is read from an offset that is off by one."""
    return RMSNORM.fwd(x, np.roll(weight, 1), **attrs)


def one_rstd(x: np.ndarray, weight: np.ndarray, **attrs: Any) -> Any:
    """One rstd for the whole batch."""
    _, (_, _, rstd, order) = RMSNORM.fwd(x, weight, **attrs)
    shared = np.broadcast_to(np.mean(rstd), rstd.shape)
    return x * shared * weight, (x, weight, shared, order)


def absolute(x: np.ndarray, weight: np.ndarray, **attrs: Any) -> Any:
    """The sign of x is lost, as with sqrt(x²)."""
    return RMSNORM.fwd(np.abs(x), weight, **attrs)


def stores_in_bf16(x: np.ndarray, weight: np.ndarray, **attrs: Any) -> Any:
    """cast_then_weight rounds whatever the carrier is."""
    y, saved = RMSNORM.fwd(x, weight, **attrs)
    return (round_to(BF16, y) if attrs.get("cast_order") == "cast_then_weight" else y), saved


FACTS: list[tuple[Callable[[Op, Asked], None], Op]] = [
    (scale_invariant, bug("rmsnorm-bwd-dweight-unnormalised")),
    (eps_has_the_unit_of_x_squared, bug("rmsnorm-eps-outside")),
    (homogeneous_in_weight, bug("rmsnorm-unit-offset")),
    (channels_are_alike, mutant(rotated_weight)),
    (the_mean_knows_no_width, bug("rmsnorm-eps-on-sum")),
    (the_mean_knows_no_width, bug("rmsnorm-sum-for-mean")),
    (rows_are_independent, mutant(one_rstd)),
    (root_mean_square_is_one, bug("rmsnorm-mean-subtracted")),
    (root_mean_square_is_one, bug("rmsnorm-inv-rms-bf16")),
    (sign_passes_through, mutant(absolute)),
    (cast_order_is_no_arithmetic, mutant(stores_in_bf16)),
    (dx_is_orthogonal_to_x, bug("rmsnorm-bwd-projection-missing")),
    (dx_is_orthogonal_to_x, bug("rmsnorm-bwd-gamma")),
    (dweight_is_the_share_of_y, bug("rmsnorm-bwd-dweight-unnormalised")),
]
NAMED = list(dict.fromkeys(fact for fact, _ in FACTS))


@pytest.mark.parametrize("fact", NAMED, ids=lambda f: f.__name__)
@given(q=asked())
def test_holds(fact: Callable, q: Asked) -> None:
    """The reference holds the fact, which its own docstring states."""
    fact(RMSNORM, q)


@pytest.mark.parametrize(("fact", "broken"), FACTS, ids=[f"{fact.__name__}-{i}" for i, (fact, _) in enumerate(FACTS)])
def test_kills(fact: Callable, broken: Op, killed: Callable) -> None:
    """The fact fails for its mutant on some input."""
    killed(lambda q: fact(broken, q), asked())


@given(q=asked())
def test_zero_rows_give_zeros(q: Asked) -> None:
    """With eps > 0 an all-zero row gives zeros, and a finite gradient: dx = dy weight / sqrt(eps)."""
    x = q.inputs["x"].copy()
    x[0] = 0.0
    inputs = {**q.inputs, "x": x}
    assert not np.any(forward(RMSNORM, inputs, q.attrs)[0])
    dx = backward(RMSNORM, inputs, q.attrs)[0][0]
    expected = q.inputs["dy"][0] * q.inputs["weight"] / q.attrs["eps"] ** 0.5
    assert np.all(np.abs(dx - expected) <= 6 * UNIT * np.abs(expected))  # root, reciprocal and two products, on either side
