"""The reference agrees with oracles that share no code with it (tests/oracles), over all declared ops and both directions."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from leadline.golden import strategies
from leadline.golden.band import DEVIATIONS, SLACK, band_of
from leadline.golden.bugs import Bug, bugs_of
from leadline.golden.draw import draw_case
from leadline.golden.precision import PRECISIONS
from leadline.ref import OPS, Op
from leadline.ref.formats import CASTS
from oracles import ORACLES, block, cast, eplb, model, moe, mtp, router
from oracles.cast import boundaries, mirrored
from oracles.floats import CAST_FORMATS

Arrays = dict[str, np.ndarray]
Attrs = dict[str, Any]
PLACES = [(name, direction) for name, op in OPS.items() for direction in ("forward", "backward") if direction == "forward" or op.bwd]
EXACT = [name for name, op in OPS.items() if op.exact and all(t.kind != "index" for t in (*op.inputs, *op.outputs))]  # any sizes
DECLARED = {True: 150_000, False: 60_000}  # of a declared case, which is asked once for all bugs
COST = {True: 20_000, False: 12_000}  # elements that an oracle is given: 5 μs each in exact fractions, 50 μs in 50 digits
UNIT = 2.0**-53
ROW_BY_ROW = {"block": block.margin, "mtp": mtp.margin}
WHOLE = {"mtp.loss": mtp.loss_margin, "model": model.margin}


def canonical(x: np.ndarray) -> bytes:
    """The bits of an array, all NaNs being one."""
    return (np.where(np.isnan(x), np.nan, x).astype(x.dtype) if x.dtype.kind == "f" else x).tobytes()


def assert_same_bits(got: Any, want: np.ndarray, what: str = "") -> None:
    """Shape, dtype and bits: the sign of zero counts, NaN equals NaN."""
    got = np.asarray(got)
    assert (got.shape, got.dtype) == (want.shape, want.dtype), what
    if canonical(got) != canonical(want):
        same = (got == want) & (np.signbit(got) == np.signbit(want)) if got.dtype.kind == "f" else got == want
        same |= (got != got) & (want != want)
        i = tuple(int(v[0]) for v in np.nonzero(~same))
        raise AssertionError(f"{what}{list(i)} is {got[i]!r}; the oracle has {want[i]!r} ({int((~same).sum())} of {got.size} differ)")


@st.composite
def asked(draw: st.DrawFn, op: Op, direction: str) -> tuple[strategies.Drawn, Attrs]:
    """A question whose sizes an oracle can bear, at any precision, and its attributes: the case's, half of the options drawn anew."""
    precision = draw(st.sampled_from(("fp32", "fp64", "bf16")))
    smallest = min(int(np.prod(list(c.dims.values()))) for c in op.cases)
    questions = strategies.questions(op, direction=direction, precision=precision, large=max(20_000, smallest))
    q = draw(questions.filter(lambda q: sum(x.size for x in q.inputs.values()) <= COST[op.exact]))
    attrs = dict(q.attrs)
    for name, parameter in op.attrs.items():
        options = get_args(parameter.annotation) if get_origin(parameter.annotation) is Literal else (True, False)
        if (parameter.annotation is bool or get_origin(parameter.annotation) is Literal) and draw(st.booleans()):
            attrs[name] = draw(st.sampled_from(options))
    return q, attrs


def underflows(x: np.ndarray) -> bool:
    """Numbers so small that float64 holds neither their squares nor their units' (a few of them are drawn at fp64)"""
    return x.dtype.kind == "f" and bool(np.any((x != 0) & (np.abs(x) < 2.0**-400)))


def asked_of_op(op: Op, direction: str, inputs: Arrays, attrs: Attrs) -> Arrays | None:
    """The op's outputs, real ones in float64; None where it refuses."""
    given = inputs if op.exact else {k: x.astype(np.float64) if x.dtype.kind == "f" else x for k, x in inputs.items()}
    try:
        with np.errstate(all="ignore"):
            return op.run(direction, given, attrs)
    except ValueError:
        return None


def asked_of_oracle(op: Op, direction: str, inputs: Arrays, attrs: Attrs) -> Arrays | None:
    try:
        return ORACLES[op.name, direction](inputs, attrs)
    except ValueError:
        return None


def both(op: Op, direction: str, inputs: Arrays, attrs: Attrs) -> tuple[Arrays, Arrays] | None:
    """The op's and the oracle's outputs; None where both refuse the input."""
    got, want = asked_of_op(op, direction, inputs, attrs), asked_of_oracle(op, direction, inputs, attrs)
    assert (got is None) == (want is None), "one refuses what the other takes"
    return None if got is None or want is None else (got, want)


def decided(op: Op, direction: str, inputs: Arrays, attrs: Attrs) -> Any:
    """The rows whose decision float64 rounding cannot turn. s errs by 4 units at most (exp, sum, quotient, and one more), s + bias by one
    more of its own, a group's score is the sum of two: 12 units of the largest, on either side of the gap. Equal inputs tie in any
    arithmetic, so the oracle counts them as no risk."""
    if direction == "backward" or op.name not in ("router.noaux_tc", "router.softmax", "moe.layer", "moe.eplb", *ROW_BY_ROW, *WHOLE):
        return ...
    if op.name in ROW_BY_ROW:  # errors of some hundred units before the scores; a token's choice reaches no other row
        return ROW_BY_ROW[op.name](inputs, attrs) > 2.0**-36
    if op.name in WHOLE:  # a choice reaches every later row
        return ... if WHOLE[op.name](inputs, attrs) > 2.0**-36 else np.zeros((), bool)
    if op.name == "moe.eplb":  # loads are added in the inputs' own dtype, a few of them at a time
        clear = eplb.margin(inputs, attrs) > 2.0**-16
        return np.full_like(clear, clear.all())  # one layer's counts set the width of all
    if op.name == "router.softmax":
        return router.softmax_selection_margin(inputs, attrs) > 24 * UNIT
    if op.name == "moe.layer":  # products before the scores: 2 units of each of a few terms, and slopes of 2 at most
        return moe.selection_margin(inputs, attrs) > 2.0**-40
    size = np.max(np.abs(inputs["bias"]), initial=0.0) + np.sqrt(1.0 + np.max(inputs["logits"], initial=0.0))  # of s + bias, whatever s
    return router.selection_margin(inputs, attrs) > 24 * UNIT * size


def sigma_of(op: Op, direction: str, inputs: Arrays, attrs: Attrs) -> Arrays:
    return {} if op.exact else band_of(OPS[op.name], direction, inputs, attrs, PRECISIONS["fp64"]).sigma


def assert_near(op: Op, direction: str, inputs: Arrays, attrs: Attrs, got: Arrays, want: Arrays, sigma: Arrays) -> None:
    """Discrete outputs bit for bit, real ones within SLACK·6 σ of the Monte-Carlo runs at fp64."""
    rows = decided(op, direction, inputs, attrs)
    if rows is not ... and not rows.any():
        return
    for t in op.signature_of(direction, inputs)[1]:
        mine, theirs = got[t.name], want[t.name]
        if t.kind != "real":
            assert_same_bits(mine[rows], theirs[rows], t.name)
        else:
            assert mine.shape == theirs.shape
            equal = (mine == theirs) | (np.isnan(mine) & np.isnan(theirs))  # infinities and NaN among them
            with np.errstate(invalid="ignore"):
                error, bound = np.where(equal, 0.0, np.abs(mine - theirs))[rows], SLACK * DEVIATIONS * sigma[t.name][rows]
            assert np.all(error <= bound), f"{t.name}: {np.max(error / np.where(bound > 0, bound, 1e-300)):.3g} times the bound"


def assert_agrees(op: Op, direction: str, inputs: Arrays, attrs: Attrs) -> None:
    """Near enough, or both refuse."""
    if (outputs := both(op, direction, inputs, attrs)) is not None:
        assert_near(op, direction, inputs, attrs, *outputs, sigma_of(op, direction, inputs, attrs))


@pytest.mark.parametrize(("name", "direction"), PLACES)
@given(data=st.data())
def test_agrees_with_oracle(name: str, direction: str, data: st.DataObject) -> None:
    """Discrete outputs are the oracle's bit for bit; real outputs differ by no more than float64's own rounding explains. What one
    refuses, the other refuses."""
    q, attrs = data.draw(asked(OPS[name], direction))
    assume(OPS[name].exact or not any(underflows(x) for x in q.inputs.values()))
    assume(all(x.size or not len(x) for x in q.inputs.values()))  # a mean over nothing is not defined
    assert_agrees(OPS[name], direction, q.inputs, attrs)


BUGS = [(name, direction, bug) for name, direction in PLACES for bug in bugs_of(OPS[name], direction)]


@cache
def declared(name: str, direction: str, case: str) -> tuple[Arrays, Attrs, Arrays | None, Arrays] | None:
    """A declared case's inputs, attributes, the oracle's outputs and σ, worked out once for all bugs; None if the oracle takes too long."""
    op = OPS[name]
    chosen = next(c for c in op.cases if c.name == case)
    inputs, attrs = draw_case(op, chosen, direction, PRECISIONS["fp32"]), {**op.defaults, **chosen.attrs}
    if sum(x.size for x in inputs.values() if op.exact or x.dtype.kind == "f") > DECLARED[op.exact]:
        return None
    return inputs, attrs, asked_of_oracle(op, direction, inputs, attrs), sigma_of(op, direction, inputs, attrs)


@pytest.mark.parametrize(("name", "direction", "bug"), [pytest.param(*b, id=f"{b[0]}-{b[1]}-{b[2].id}") for b in BUGS])
def test_agreement_kills(name: str, direction: str, bug: Bug) -> None:
    """Each known bug, put into the reference, disagrees with the oracle on some declared case: the check above can fail."""
    for case in OPS[name].cases:
        if (known := declared(name, direction, case.name)) is None:
            continue
        inputs, attrs, want, sigma = known
        got = asked_of_op(bug.variant(OPS[name]), direction, inputs, {**attrs, **bug.attrs})
        if got is None or want is None:
            if (got is None) != (want is None):
                return
            continue
        try:
            assert_near(OPS[name], direction, inputs, attrs, got, want, sigma)
        except AssertionError:
            return
    pytest.fail(f"no declared case reveals {bug.id}")


@pytest.mark.parametrize("name", EXACT)
@given(data=st.data())
def test_exact_ops_agree_on_any_bits(name: str, data: st.DataObject) -> None:
    """On arrays of any float32 or float64 bit patterns (subnormals, infinities, NaN, extremes) and any codes, reference and oracle agree
    bit for bit, or both refuse."""
    op = OPS[name]
    q, attrs = data.draw(asked(op, "forward"))
    width = data.draw(st.sampled_from((32, 64)))
    letters = {letter: data.draw(st.integers(0, 5)) for t in op.inputs for letter in t.dims}
    inputs = {}
    for tensor in op.inputs:
        if tensor.kind == "code":
            dtype, values = q.inputs[tensor.name].dtype, st.integers(0, np.iinfo(q.inputs[tensor.name].dtype).max)
        else:
            dtype, values = np.dtype(f"f{width // 8}"), st.floats(width=width)
        inputs[tensor.name] = data.draw(hnp.arrays(dtype, tensor.shape(letters), elements=values))
    if "tile" in attrs:
        attrs["tile"] = data.draw(st.integers(1, 6))
    if (outputs := both(op, "forward", inputs, attrs)) is not None:
        for name, want in outputs[1].items():
            assert_same_bits(outputs[0][name], want, name)


@pytest.mark.parametrize("name", ["fp8.quantize_tile"])
@given(data=st.data())
def test_infinities_follow_ieee(name: str, data: st.DataObject) -> None:
    """A tile that holds an infinity comes out as IEEE arithmetic has it, in every recipe, as the oracle has it."""
    q, attrs = data.draw(asked(OPS[name], "forward"))
    x = q.inputs["x"]
    if x.size:
        x.reshape(-1)[data.draw(st.integers(0, x.size - 1))] = data.draw(st.sampled_from((np.inf, -np.inf)))
    got, want = both(OPS[name], "forward", {"x": x}, attrs) or ({}, {})
    assert got.keys() == {"codes", "scale"} or attrs["format"] == "e2m1"  # where inf/inf has no code, and both refuse
    for output in got:
        assert_same_bits(got[output], want[output], output)


CAST_MODES = [(fmt.name, overflow) for fmt in CASTS for overflow in ("saturate", "nan") if overflow == "saturate" or fmt.name != "e2m1"]
KIND_MODES = [(kind, *mode) for kind in ("cast", "encode") for mode in CAST_MODES if (kind, mode[0]) != ("encode", "tf32")]


@pytest.mark.parametrize(("fmt", "overflow"), CAST_MODES)
def test_casts_on_every_bfloat16(fmt: str, overflow: str) -> None:
    """cast and encode agree with the oracle on all 2^16 bfloat16 inputs, from float32 and from float64."""
    x = (np.arange(2**16, dtype=np.uint32) << 16).view(np.float32)
    x = x[~np.isnan(x)] if fmt == "e2m1" else x  # which refuses NaN
    for kind, output in (("cast", "y"), ("encode", "codes")):
        if (kind, fmt) == ("encode", "tf32"):
            continue
        want = ORACLES[f"{kind}.{fmt}", "forward"]({"x": x}, {"overflow": overflow})[output]
        for carrier in (np.float32, np.float64):
            with np.errstate(all="ignore"):  # the NaNs among them signal
                got = OPS[f"{kind}.{fmt}"].run("forward", {"x": x.astype(carrier)}, {"overflow": overflow})[output]
                assert_same_bits(got, want.astype(carrier) if kind == "cast" else want, output)


@cache
def staircase(fmt: str, overflow: str, negative: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The encoder on one sign's patterns 0 to 0x7fffffff, NaNs included if it takes them: first pattern of each step (and the end), its
    code, its value."""
    thresholds, codes = boundaries(fmt, overflow)
    ends, nan = [0x7F800001], CAST_FORMATS[fmt].nan_code
    codes = mirrored(fmt, codes) if negative else codes
    if nan is not None:
        ends, codes = [*ends, 0x80000000], np.concatenate([codes, np.array([nan], codes.dtype)])
    starts = np.concatenate([thresholds.view(np.uint32), np.array(ends, np.uint32)]).astype(np.int64)
    return starts, codes, cast.decode(fmt, {"codes": codes}, {})["x"]


def chunks(size: int) -> Iterator[tuple[int, bool]]:
    return ((start, negative) for negative in (False, True) for start in range(0, 2**31, size))


def check_every_float32(kind: str, fmt: str, overflow: str, function: Callable, size: int, only: int | None = None) -> None:
    """The whole of float32, in chunks of ascending patterns, where the expected output is constant but at the oracle's thresholds."""
    staircases = {negative: staircase(fmt, overflow, negative) for negative in (False, True)}
    for count, (start, negative) in enumerate(chunks(size)):
        starts, codes, values = staircases[negative]
        stop = min(start + size, int(starts[-1]))
        if (only is not None and count % only) or stop <= start:
            continue
        x = np.arange(start | negative << 31, stop | negative << 31, dtype=np.uint64).astype(np.uint32).view(np.float32)
        first = int(np.searchsorted(starts, start, side="right")) - 1
        last = int(np.searchsorted(starts, stop, side="left"))
        lengths = np.diff(np.clip(starts[first : last + 1], start, stop))
        if kind == "encode":
            same = function(x) == np.repeat(codes[first:last], lengths)
        else:
            want, got = np.repeat(values[first:last], lengths), function(x)
            same = (got.view(np.uint32) == want.view(np.uint32)) | (np.isnan(got) & np.isnan(want))
        if not np.all(same):
            i = int(np.argmin(same))
            raise AssertionError(f"{kind}.{fmt} {overflow}: pattern {x.view(np.uint32)[i]:#x} ({x[i]!r}) differs from the oracle")


def implementation(who: str, kind: str, fmt: str, overflow: str) -> Callable:
    if who == "ref":
        return lambda x: OPS[f"{kind}.{fmt}"].fwd(x, overflow=overflow)[0]
    kernels = pytest.importorskip("leadline.kernels.cpu")
    function = getattr(getattr(kernels, kind), fmt)
    return lambda x: function(x=x, overflow=overflow)


@pytest.mark.parametrize(("kind", "fmt", "overflow"), KIND_MODES)
def test_sample_of_float32(kind: str, fmt: str, overflow: str) -> None:
    """The reference agrees with the oracle's staircase on one chunk of 4,096 float32 patterns in 4,095: every exponent, both signs."""
    with np.errstate(all="ignore"):
        check_every_float32(kind, fmt, overflow, implementation("ref", kind, fmt, overflow), 2**12, only=4095)


def test_staircase_check_can_fail() -> None:
    """A code that is wrong for one pattern of the chunk is found: encode as if 464 overflowed already."""

    def off_by_one(x: np.ndarray) -> np.ndarray:
        right = OPS["encode.e4m3fn"].fwd(x, overflow="nan")[0]
        return np.where(x == 464.0, np.uint8(0x7F), right)

    start = int(np.float32(464.0).view(np.uint32)) // 2**12
    with pytest.raises(AssertionError, match=r"464\.0"):
        check_every_float32("encode", "e4m3fn", "nan", off_by_one, 2**12, only=start)


# The reference's text casts 30 million and encodes 8 million elements a second, the kernels 2,000 million.
EVERY = [
    *(("ref", "encode", "e4m3fn", overflow) for overflow in ("saturate", "nan")),
    *(("ref", "cast", *mode) for mode in CAST_MODES),
    *(("kernels", *mode) for mode in KIND_MODES),
]


@pytest.mark.slow
@pytest.mark.parametrize(("who", "kind", "fmt", "overflow"), EVERY)
def test_every_float32(who: str, kind: str, fmt: str, overflow: str) -> None:
    """All 2^32 float32 patterns, NaNs included, against the oracle's staircase: the reference's text (encode.e4m3fn and every cast) and
    the Numba kernels (everything).

    Last run: 2026-11-22 at a5892fd, no difference in any of the 26 (44 minutes on one shared core: 6 a mode for the reference's encode,
    4 for its cast, 15 seconds for a kernel).
    """
    with np.errstate(all="ignore"):
        check_every_float32(kind, fmt, overflow, implementation(who, kind, fmt, overflow), 2**18 if who == "ref" else 2**22)
