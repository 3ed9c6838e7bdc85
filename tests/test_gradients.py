"""Every backward is the derivative of its forward: by differences, by torch's and JAX's automatic differentiation, in both modes."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from leadline.golden import strategies
from leadline.golden.band import DEVIATIONS, SLACK, band_of
from leadline.golden.bugs import Bug, bugs_of
from leadline.golden.draw import Source, draw_case
from leadline.golden.precision import PRECISIONS
from leadline.ref import OPS, Op

Arrays = dict[str, np.ndarray]
STAIRCASES = ("fp8.linear",)  # casts have no derivative; the backward is a declared computation of its own: see test_fp8.py
WITH_BACKWARD = [name for name, op in OPS.items() if op.bwd and name not in STAIRCASES]
# A bug with a forward of its own is another function, whose backward may well be its derivative.
WRONG = [(name, bug) for name in WITH_BACKWARD for bug in bugs_of(OPS[name], "backward") if bug.bwd and not bug.fwd]
MUTANTS = [pytest.param(name, bug, id=f"{name}-{bug.id}") for name, bug in WRONG]
UNIT = 2.0**-53
FP64 = PRECISIONS["fp64"]


def in_float64(inputs: Arrays) -> Arrays:
    return {name: x.astype(np.float64) if x.dtype.kind == "f" else x for name, x in inputs.items()}


def has_derivative(attrs: Any) -> bool:
    """A gate that rounds its scores to bfloat16 is a staircase; its backward passes straight through, by definition. A detached head's
    backward leaves out a part of the derivative, by definition."""
    return attrs.get("gate_dtype") != "bfloat16" and not attrs.get("detach_head")


def on_a_kink(q: strategies.Drawn) -> bool:
    """A number that lies on swiglu's limit, where the clamp has two slopes, or weights so nearly equal that a step drops another token"""
    if q.op.name == "router.drop_tokens":
        return bool(np.any(np.diff(np.sort(q.inputs["topk_weight"], axis=None)) < 2.0**-20))
    limit = q.attrs.get("limit")
    return limit is not None and any(bool(np.any(np.abs(q.inputs[name]) == limit)) for name in ("gate", "up") if name in q.inputs)


def asked(name: str, **options: Any) -> st.SearchStrategy[strategies.Drawn]:
    return strategies.questions(name, direction="backward", **options).filter(lambda q: has_derivative(q.attrs) and not on_a_kink(q))


def broken(name: str, bug: Bug) -> Op:
    """The op with the bug in its backward; the forward stays right."""
    return replace(OPS[name], bwd=bug.bwd)


def directions(op: Op, inputs: Arrays, seed: int) -> Arrays:
    """A random direction for each input that has a gradient, of that input's own size. Powers of two keep x ± h v nearly exact."""
    tangents = {}
    for t in op.inputs:
        if t.kind == "real" and t.name in inputs:
            x = inputs[t.name]
            finite = np.isfinite(x)  # an infinity (the lse of a part without keys) stays where it is
            size = np.sqrt(np.mean(x[finite] ** 2)) if finite.any() else 0.0
            tangents[t.name] = Source(f"direction {op.name} {t.name} {seed}").normal(x.shape) * (size or 1.0) * finite
    return tangents


def along(op: Op, inputs: Arrays, attrs: Any, tangents: Arrays, h: float) -> float:
    """(L(x + h v) - L(x - h v)) / 2h with L = <dy, fwd(x)>, a decision held as given"""
    sides = []
    for step in (h, -h):
        moved = {name: x + step * tangents[name] if name in tangents else x for name, x in inputs.items()}
        outputs = op.run("forward", moved, attrs)
        pairs = [(inputs[f"d{t.name}"], outputs[t.name]) for t in op.outputs if t.kind == "real"]
        sides.append(sum(float(np.sum(dy * np.where(np.isfinite(y), y, 0.0))) for dy, y in pairs))  # an infinite lse is a constant
    return (sides[0] - sides[1]) / (2 * h)


def difference_gap(op: Op, inputs: Arrays, attrs: Any, seed: int) -> tuple[float, float]:
    """|<bwd(dy), v> - d/dh <dy, fwd(x + h v)>|, and the bound on it that follows from the steps.

    Central differences D at h, h/2, h/4 and h/8 give three Richardson values R = (4 D(h/2) - D(h)) / 3, whose errors go with h⁴. The last
    is used. The distance from the one before is 15 times its error, the distance between the first two 240 times, and the bound takes
    both (an accident may make one of them small). To this comes rounding: R weighs L by (16·4 + 4·2)/3 < 24 /h in all; L errs by
    DEVIATIONS·σ of every output times |dy|, and x ± h v are rounded, which moves L by |dx||x| units. Last, bwd's own σ. Of all steps,
    the one with the smallest bound counts: it balances the two.
    """
    tangents = directions(op, inputs, seed)
    grads = {name: np.asarray(g) for name, g in op.run("backward", inputs, attrs).items()}
    analytic = sum(float(np.sum(grads[f"d{name}"] * v)) for name, v in tangents.items())
    truth = OPS[op.name]
    forward = {name: x for name, x in inputs.items() if not any(name == f"d{t.name}" for t in op.outputs)}
    choice = inputs[op.choice[0]] if op.choice else None
    sigma_y = band_of(truth, "forward", forward, attrs, FP64, choice).sigma
    sigma_dx = band_of(truth, "backward", inputs, attrs, FP64).sigma
    noise = DEVIATIONS * sum(float(np.sum(np.abs(inputs[f"d{name}"]) * sigma)) for name, sigma in sigma_y.items())
    moved = {name: np.where(np.isfinite(inputs[name]), inputs[name], 0.0) for name in tangents}
    noise += UNIT * sum(float(np.sum(np.abs(grads[f"d{name}"] * x))) for name, x in moved.items())
    own = DEVIATIONS * sum(float(np.sum(np.abs(v) * sigma_dx[f"d{name}"])) for name, v in tangents.items())
    steps = [2.0**-k for k in range(4, 28)]
    d = [along(op, inputs, attrs, tangents, h) for h in steps]
    r = [(4 * b - a) / 3 for a, b in pairwise(d)]
    bounds = [abs(r[i + 2] - r[i + 1]) + abs(r[i + 1] - r[i]) / 16 + 24 * noise / steps[i] for i in range(len(r) - 2)]
    best = int(np.argmin(bounds))
    return abs(analytic - r[best + 2]), SLACK * (bounds[best] + own)


@pytest.mark.parametrize("name", WITH_BACKWARD)
@given(data=st.data())
def test_backward_is_the_derivative(name: str, data: st.DataObject) -> None:
    """<bwd(dy), v> = d/dh <dy, fwd(x + h v)> along a random direction v of all inputs, within the bound that the steps imply."""
    q = data.draw(asked(name))
    assume(all(x.size or not len(x) for x in q.inputs.values()))  # a mean over nothing is not defined
    error, bound = difference_gap(q.op, in_float64(q.inputs), q.attrs, q.seed)
    assert error <= bound


def cases(op: Op) -> Iterator[tuple[Arrays, Any]]:
    for case in op.cases:
        if not has_derivative(case.attrs):
            continue
        yield in_float64(draw_case(op, case, "backward", PRECISIONS["fp32"])), {**op.defaults, **case.attrs}


@pytest.mark.parametrize(("name", "bug"), MUTANTS)
def test_differences_kill(name: str, bug: Bug) -> None:
    """Each known bug of a backward breaks the derivative on some declared case."""
    gaps = (difference_gap(broken(name, bug), inputs, attrs, 0) for inputs, attrs in cases(OPS[name]))
    assert any(not error <= bound for error, bound in gaps)  # NaN is found too


@pytest.mark.parametrize("name", WITH_BACKWARD)
@given(data=st.data())
def test_backward_is_linear(name: str, data: st.DataObject) -> None:
    """bwd(2 dy) = 2 bwd(dy) and bwd(-dy) = -bwd(dy), to the bit: powers of two and signs pass through every rounding but a subnormal's.

    Products below 2^-1022 lose their last bits, 2^-1075 each; what they are multiplied by later is far below 2^75 here.
    """
    q = data.draw(strategies.questions(name, direction="backward", precision="bf16"))
    inputs = in_float64(q.inputs)
    once = q.op.run("backward", inputs, q.attrs)
    for factor in (2.0, -1.0):
        scaled = {k: x * factor if any(k == f"d{t.name}" for t in q.op.outputs) else x for k, x in inputs.items()}
        for output, g in q.op.run("backward", scaled, q.attrs).items():
            np.testing.assert_allclose(g, factor * once[output], rtol=0, atol=2.0**-1000)


def smooth(op: Op, inputs: Arrays) -> Arrays:
    """Exact zeros moved off the kinks that the text has and the function has not: |x| has the derivative 0 at 0 in automatic
    differentiation, where sigmoid written with exp(-|x|) has 1/4."""
    real = {t.name for t in op.inputs if t.kind == "real"}
    return {name: np.where(x == 0, 2.0**-30, x) if name in real else x for name, x in in_float64(inputs).items()}


def assert_within_noise(op: Op, inputs: Arrays, attrs: Any, theirs: Arrays) -> None:
    """Two correct evaluations differ by SLACK·6 σ of the backward's Monte-Carlo runs at fp64, at most. One element in a thousand may
    differ by a hundred times that: where errors cancel in one formula by accident, they need not in the other, and σ is of the one."""
    ours = op.run("backward", inputs, attrs)
    sigma = band_of(OPS[op.name], "backward", inputs, attrs, FP64).sigma
    for output, g in theirs.items():
        assert g.shape == ours[output].shape
        error, bound = np.abs(g - ours[output]), SLACK * DEVIATIONS * sigma[output]
        assert np.all(error <= 100 * bound), output
        assert np.sum(error > bound) <= error.size // 1000, output


def reverse_by_torch(op: Op, inputs: Arrays, attrs: Any) -> Arrays:
    import torch

    real = [t.name for t in op.inputs if t.kind == "real" and t.name in inputs]
    tensors = {name: torch.tensor(x, requires_grad=name in real) for name, x in inputs.items()}
    outputs = op.run("forward", tensors, attrs)
    results = [t.name for t in op.outputs if t.kind == "real"]
    grads = torch.autograd.grad([outputs[y] for y in results], [tensors[x] for x in real], [tensors[f"d{y}"] for y in results])
    return {f"d{name}": g.numpy() for name, g in zip(real, grads, strict=True)}


@pytest.mark.peers("torch")
@pytest.mark.parametrize("name", WITH_BACKWARD)
@given(data=st.data())
def test_torch_agrees(name: str, data: st.DataObject) -> None:
    """torch.autograd through op.fwd in float64 equals op.bwd to float64's own noise."""
    q = data.draw(asked(name, empty=False))
    inputs = smooth(q.op, q.inputs)
    assert_within_noise(q.op, inputs, q.attrs, reverse_by_torch(q.op, inputs, q.attrs))


@pytest.mark.peers("torch")
@pytest.mark.parametrize(("name", "bug"), MUTANTS)
def test_torch_kills(name: str, bug: Bug) -> None:
    """Each known bug of a backward differs from torch.autograd on some declared case."""
    op = broken(name, bug)
    for inputs, attrs in cases(op):
        try:
            assert_within_noise(op, smooth(op, inputs), attrs, reverse_by_torch(op, smooth(op, inputs), attrs))
        except AssertionError:
            return
    pytest.fail(f"no declared case reveals {bug.id}")


def forward_by_torch(op: Op, inputs: Arrays, attrs: Any, tangents: Arrays, dtype: str) -> Arrays:
    """J v of every real output"""
    import torch

    tensors = {name: torch.tensor(x.astype(dtype) if x.dtype.kind == "f" else x) for name, x in inputs.items()}
    real = [t.name for t in op.outputs if t.kind == "real"]

    def run(moved: dict) -> tuple:
        outputs = op.run("forward", {**tensors, **moved}, attrs)
        return tuple(outputs[name] for name in real)

    primals = {name: tensors[name] for name in tangents}
    jv = torch.func.jvp(run, (primals,), ({name: torch.tensor(v.astype(dtype)) for name, v in tangents.items()},))[1]
    return {name: y.numpy().astype(np.float64) for name, y in zip(real, jv, strict=True)}


def adjoint_gap(op: Op, inputs: Arrays, attrs: Any, seed: int) -> tuple[float, float]:
    """|<dy, J v> - <Jᵀ dy, v>| and its bound. J v comes from torch's forward mode; its rounding in float64 is that measured in float32
    (the difference of the two, rms over the array), times the ratio of their units, 2⁻²⁹. Jᵀ dy is op.bwd, with its own σ."""
    tangents = {k: v.astype(np.float32).astype(np.float64) for k, v in directions(op, inputs, seed).items()}
    jv, rough = (forward_by_torch(op, inputs, attrs, tangents, dtype) for dtype in ("float64", "float32"))
    grads = op.run("backward", inputs, attrs)
    sigma = band_of(OPS[op.name], "backward", inputs, attrs, FP64).sigma
    error, bound = 0.0, 0.0
    for name, y in jv.items():
        dy = inputs[f"d{name}"]
        error += float(np.sum(dy * y))
        bound += float(np.sum(np.abs(dy))) * (2.0**-29 * float(np.sqrt(np.mean((rough[name] - y) ** 2))) + UNIT * float(np.max(np.abs(y))))
    for name, v in tangents.items():
        error -= float(np.sum(np.asarray(grads[f"d{name}"]) * v))
        bound += float(np.sum(np.abs(v) * sigma[f"d{name}"]))
    return abs(error), SLACK * DEVIATIONS * bound


@pytest.mark.peers("torch")
@pytest.mark.parametrize("name", WITH_BACKWARD)
@given(data=st.data())
def test_forward_and_reverse_mode_are_adjoint(name: str, data: st.DataObject) -> None:
    """<dy, J v> = <Jᵀ dy, v>, J v by torch's forward mode through op.fwd, Jᵀ dy by op.bwd."""
    q = data.draw(asked(name, empty=False))
    error, bound = adjoint_gap(q.op, smooth(q.op, q.inputs), q.attrs, q.seed)
    assume(np.isfinite(bound))  # in float32 the scores of logits near -60 leave the range when squared
    assert error <= bound


@pytest.mark.peers("torch")
@pytest.mark.parametrize(("name", "bug"), MUTANTS)
def test_adjoint_identity_kills(name: str, bug: Bug) -> None:
    """Each known bug of a backward breaks the adjoint identity on some declared case."""
    op = broken(name, bug)
    gaps = (adjoint_gap(op, smooth(op, inputs), attrs, 0) for inputs, attrs in cases(op))
    assert any(not error <= bound for error, bound in gaps)  # NaN is found too


@pytest.mark.peers("jax")
@pytest.mark.parametrize("name", WITH_BACKWARD)
@settings(max_examples=4)  # each shape is compiled
@given(data=st.data())
def test_jax_agrees(name: str, data: st.DataObject) -> None:
    """jax.vjp through op.fwd in float64 equals op.bwd to float64's own noise."""
    import jax

    q = data.draw(asked(name, empty=False))
    op, inputs = q.op, smooth(q.op, q.inputs)
    real = [t.name for t in op.inputs if t.kind == "real" and t.name in inputs]
    with jax.enable_x64(True):
        arrays = {k: jax.numpy.asarray(x) for k, x in inputs.items()}

        def run(*moved: Any) -> list:
            outputs = op.run("forward", {**arrays, **dict(zip(real, moved, strict=True))}, q.attrs)
            return [outputs[t.name] for t in op.outputs if t.kind == "real"]

        _, pull = jax.vjp(run, *(arrays[k] for k in real))
        grads = pull([arrays[f"d{t.name}"] for t in op.outputs if t.kind == "real"])
    assert_within_noise(op, inputs, q.attrs, {f"d{k}": np.asarray(g) for k, g in zip(real, grads, strict=True)})


DECIDING = [name for name in WITH_BACKWARD if OPS[name].choice and any(t.kind == "const" for t in OPS[name].inputs)]


@pytest.mark.parametrize("name", DECIDING)
@given(data=st.data())
def test_what_only_decides_has_no_gradient(name: str, data: st.DataObject) -> None:
    """Inputs declared without a gradient (the router's bias) are missing from the backward's outputs, and rightly: with the decision
    held, changing them changes no output and no gradient."""
    q = data.draw(strategies.questions(name, direction="backward"))
    constants = [t.name for t in q.op.inputs if t.kind == "const"]
    assert constants
    assert not {f"d{c}" for c in constants} & {t.name for t in q.op.signature_of("backward")[1]}
    changed = {**q.inputs, **{c: -2.0 * q.inputs[c] + 1.0 for c in constants if c in q.inputs}}
    for direction in ("forward", "backward"):
        outputs, others = (q.op.run(direction, inputs, q.attrs) for inputs in (q.inputs, changed))
        for output, y in outputs.items():
            np.testing.assert_array_equal(others[output], y)


def unselected_are_zero(op: Op, inputs: Arrays, attrs: Any) -> bool:
    """Whether experts outside topk_idx get exactly 0"""
    dlogits = op.run("backward", inputs, attrs)["dlogits"].copy()
    np.put_along_axis(dlogits, inputs["topk_idx"], 0.0, axis=-1)
    return not np.any(dlogits)


@given(strategies.questions("router.noaux_tc", direction="backward"), st.sampled_from(("sigmoid", "sqrtsoftplus")))
def test_no_gradient_through_the_selection(q: strategies.Drawn, scoring: str) -> None:
    """Experts that were not chosen get a gradient of exactly 0, but with softmax, which couples all."""
    assert unselected_are_zero(q.op, q.inputs, {**q.attrs, "scoring": scoring})


def test_selection_check_kills() -> None:
    """A gradient to experts that were not chosen is found: gate-grad-bias-or-masked-experts, and softmax's rightful coupling."""
    op = OPS["router.noaux_tc"]
    leaks = next(b for b in bugs_of(op, "backward") if b.id == "gate-grad-bias-or-masked-experts")
    inputs, attrs = next(cases(op))
    assert not unselected_are_zero(broken(op.name, leaks), inputs, attrs)
    assert not unselected_are_zero(op, inputs, {**attrs, "scoring": "softmax"})
