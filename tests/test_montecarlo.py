"""The arithmetic behind the tolerances: random rounding, the noise of sums, limits, and the drawn inputs.

Statistical bounds are at six deviations of the statistic itself, and the streams are fixed: a failure is a change, not bad luck.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from leadline.golden.band import DEVIATIONS, band_of, floor_of, in_sigma, limits_of, reach, statistics
from leadline.golden.draw import DRAWS, Source, draw, draw_case, ulp
from leadline.golden.judge import PASS, Question, as_returned, judge
from leadline.golden.montecarlo import Noise, NoisyArray, noisy_inputs
from leadline.golden.precision import PRECISIONS
from leadline.golden.vectors import make
from leadline.kernels.cpu import noise as kernel
from leadline.ref import FORMATS, OPS, Case, round_to
from leadline.ref.op import Tensor
from leadline.ref.xp import once, wide

FP64, FP32, BF16 = (PRECISIONS[name] for name in ("fp64", "fp32", "bf16-eager"))
TRIALS = 4000
UNIT = 2.0**-24  # half a unit in the last place of float32, relative


def noisy(x: np.ndarray, precision: Any = FP32, seed: int = 0, amplify: float = 1.0) -> Any:
    return noisy_inputs({"x": np.asarray(x, dtype=np.float64)}, Noise(precision, seed, amplify))["x"]


def plain(x: Any) -> np.ndarray:
    return np.asarray(x).view(np.ndarray)


# Rounding


def full(x: np.ndarray) -> np.ndarray:
    """Every bit of float32 in use (normal draws are multiples of 2^-16, so that their sums would be exact)"""
    return round_to(FORMATS["fp32"], x * np.log(2))


def distinct(x: float) -> np.ndarray:
    """x many times, but for its last bits: equal values would round alike"""
    return x * (1 + np.arange(TRIALS) * 2.0**-50)


def check_rounding(noise: Noise, value: float) -> None:
    """x is rounded to one of its two neighbours, the mean being x: with probability p for the upper one the mean of N draws lies within
    6 sqrt(p(1-p)/N) + 6/N units (Bernstein's bound at six deviations)."""
    x = distinct(value)
    unit = ulp(noise.precision.work, x)
    low, high = np.floor(x / unit) * unit, np.ceil(x / unit) * unit
    drawn = noise.rounded(x)
    assert np.all((drawn == low) | (drawn == high))
    p = (x - low) / unit
    assert abs(np.mean((drawn - x) / unit)) <= DEVIATIONS * np.sqrt(np.mean(p * (1 - p)) / TRIALS) + DEVIATIONS / TRIALS


@pytest.mark.parametrize("precision", [FP32, BF16], ids=lambda p: p.name)
@given(value=st.floats(2.0**-20, 2.0**20), sign=st.sampled_from((1, -1)))
def test_rounding_is_unbiased(precision: Any, value: float, sign: int) -> None:
    """Random rounding takes one of the two neighbours, and is right on average."""
    check_rounding(Noise(precision, 1), sign * value)


def slowly(x: np.ndarray, keys: tuple[int, int], emin: int, bits: int, extra: Any) -> np.ndarray:
    """kernels.cpu's rounding, with whole arrays and frexp"""

    def uniform(key: int) -> np.ndarray:
        z = (x.view(np.uint64) ^ np.uint64(key)) + np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
        return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    exponent = np.maximum(np.frexp(x)[1] - 1, emin) - bits
    units = np.ldexp(x, -exponent) + extra * (2 * uniform(keys[1]) - 1)
    floor = np.floor(units)
    return np.where(np.isfinite(x) & (x != 0), np.ldexp(floor + (uniform(keys[0]) < units - floor), exponent), x)


@pytest.mark.parametrize("name", ["fp64", "fp32", "fp16", "bf16", "e4m3fn", "e2m1"])
def test_the_fast_rounding_is_the_slow_one(name: str) -> None:
    """Bit for bit: every binade that float64 has, subnormals, signed zeros, infinities, NaN; no extra, a number, one an element."""
    fmt, rng = FORMATS[name], np.random.default_rng(0)
    with np.errstate(over="ignore"):
        x = np.ldexp(rng.uniform(-2, 2, (2200, 9)), np.arange(-1100, 1100)[:, None])
    x[::50, :5] = (0.0, -0.0, np.inf, -np.inf, np.nan)
    for extra in (0.0, 1.5, rng.uniform(0, 3, x.shape)):
        keys = (int(rng.integers(0, 2**64, dtype=np.uint64)), int(rng.integers(0, 2**64, dtype=np.uint64)))
        with np.errstate(all="ignore"):
            expected = slowly(x, keys, fmt.emin, fmt.mantissa_bits, extra)
        fast = kernel.rounded(x, keys[0], fmt.emin, fmt.mantissa_bits, extra, keys[1])
        assert np.array_equal(fast.view(np.uint64), expected.view(np.uint64))
        for key, emin in ((keys[0] ^ 1, fmt.emin), (keys[0], fmt.emin + 1)):
            other = kernel.rounded(x, key, emin, fmt.mantissa_bits, extra, keys[1])
            assert not np.array_equal(other, fast, equal_nan=True) or (name == "fp64" and np.ndim(extra) == 0 and extra == 0)


def scattered_slowly(total: np.ndarray, squares: np.ndarray, n: int, half: float, first: int, second: int) -> tuple[np.ndarray, np.ndarray]:
    """kernels.cpu's noise of sums, with whole arrays: the sums, and how far each has been moved at most"""
    deviation = half * np.sqrt((n + 1) * (squares / 6 + total * total / 3) / 3)
    radius = np.sqrt(-2 * np.log1p(-kernel.uniform(total, first)))
    return total + deviation * radius * np.cos(2 * np.pi * kernel.uniform(total, second)), deviation * radius


@pytest.mark.parametrize("shape", [(), (0,), (3, 50, 7)])
def test_the_fast_noise_of_sums_is_the_slow_one(shape: tuple[int, ...]) -> None:
    """Within the last places that two libraries' logarithms and cosines differ by: sums of both signs, zero among them, infinities, NaN."""
    rng = np.random.default_rng(1)
    total, squares = rng.normal(size=shape), rng.uniform(0, 9, shape)
    if total.size > 5:
        total.flat[:5], squares.flat[:5] = (0.0, -0.0, np.inf, -np.inf, np.nan), (0.0, 4.0, np.inf, np.inf, np.nan)
    asked = (20, 2.0**-12, 3**40, 5**27)
    with np.errstate(invalid="ignore"):
        expected, moved = scattered_slowly(total, squares, *asked)
        room = 2.0**-50 * (np.abs(total) + moved)
        fast = kernel.scattered(total, squares, *asked)
        sure = np.isfinite(total)
        assert fast.shape == shape
        assert np.array_equal(fast[~sure], total[~sure], equal_nan=True)
        assert np.all(np.abs(fast - expected)[sure] <= room[sure])
        for wrong in ((19, *asked[1:]), (20, 2.0**-11, *asked[2:]), (20, 2.0**-12, 5**27, 3**40)):
            assert not total.size or np.any(np.abs(kernel.scattered(total, squares, *wrong) - expected)[sure] > room[sure])


def test_uniform_numbers_are_the_published_generators() -> None:
    """SplitMix64 (Steele, Lea and Flood 2014) of state 0, 1, 2 additions of its constant on: its first published numbers of seed 0."""
    golden = 0x9E3779B97F4A7C15
    published = (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F)
    states = np.array([i * golden % 2**64 for i in range(3)], dtype=np.uint64)
    assert np.array_equal(kernel.uniform(states.view(np.float64), 0), [(z >> 11) * 2.0**-53 for z in published])
    assert kernel.uniform(np.zeros(()), golden) == (published[1] >> 11) * 2.0**-53
    assert kernel.uniform(np.zeros((2, 0)), 1).shape == (2, 0)


class Nearest(Noise):
    """Rounds to nearest, as a machine does: every run the same."""

    def rounded(self, x: np.ndarray, extra: float = 0.0, fmt: Any = None) -> np.ndarray:
        return round_to(fmt or self.precision.work, x)


class Scattered(Noise):
    """Two units of noise where none but the rounding belongs."""

    def rounded(self, x: np.ndarray, extra: float = 0.0, fmt: Any = None) -> np.ndarray:
        return super().rounded(x, extra + 2.0, fmt)


@given(value=st.floats(1, 2))
def test_equal_values_round_alike(value: float) -> None:
    """Within one operation equal values get equal results, as in a kernel; the next operation rounds them anew."""
    noise = Noise(FP32, 1)
    runs = np.stack([noise.rounded(np.full((2, 3), value)) for _ in range(64)])
    assert np.all(runs == runs[:, :1, :1])
    p = value * 2.0**23 % 1
    assert len(np.unique(runs)) == 2 or min(p, 1 - p) < 0.25  # 64 times the same side by chance: 0.75^64 = 1e-8


@pytest.mark.parametrize("mutant", [Nearest, Scattered])
def test_rounding_check_kills(mutant: type[Noise]) -> None:
    """A rounding that is biased, and one that leaves the neighbours, are found."""
    with pytest.raises(AssertionError):
        check_rounding(mutant(FP32, 1), 1 + 2.0**-25)


@pytest.mark.parametrize("name", ["fp32", "bf16-eager"])
def test_exact_results_get_no_noise(name: str) -> None:
    """Sums, differences and products that the format can hold come out as they are, and so do -x, |x|, max, sort, floor, comparisons."""
    x = noisy(np.arange(-8.0, 8.0), PRECISIONS[name])
    exact: list[Callable[[Any], Any]] = [
        lambda x: x + 1,
        lambda x: x - 3,
        lambda x: x * 4,
        lambda x: -x,
        np.abs,
        lambda x: np.maximum(x, 0.5),
        np.sort,
        np.floor,
        lambda x: np.max(x, axis=-1),
        lambda x: x > 0,
    ]
    for function in exact:
        np.testing.assert_array_equal(plain(function(x)), function(np.arange(-8.0, 8.0)))


def test_inexact_results_scatter() -> None:
    """What the format cannot hold differs from run to run: sums and products by one unit, quotients and roots by one and a half, other
    functions by three; exp, whose argument may have been rounded as x log2 e, by 0.6 units more for each unit of x."""
    x = full(1 + np.arange(1, 200) / 211.0)
    inexact: list[tuple[Callable[[Any], Any], Any]] = [
        (lambda v: v + np.float64(1e-3), 1.0),
        (lambda v: v * v, 1.0),
        (lambda v: v / 3, 1.5),
        (np.sqrt, 1.5),
        (np.log, 3.0),
        (np.exp, 3.0 + 0.6 * x),
    ]
    for function, units in inexact:
        truth = function(x)
        runs = np.stack([plain(function(noisy(x, seed=seed))) for seed in range(32)])
        assert np.all(np.abs(runs - truth) <= units * ulp(FORMATS["fp32"], truth))
        assert np.mean(np.std(runs, axis=0) > 0) > 0.9
        np.testing.assert_array_equal(round_to(FORMATS["fp32"], runs), runs)


def test_fp64_scatters_by_a_unit() -> None:
    """The carrier has already rounded in float64, so a result moves by one unit up or down, each in a quarter of the runs: the probability
    that a number uniform in ±1, rounded at random, lands there. The variance is 1/2, and so is the deviation of one square from it."""
    x = distinct(1.2345)
    units = (plain(noisy(x, FP64) * 1.1) - x * 1.1) / 2.0**-52
    assert set(np.unique(units)) == {-1.0, 0.0, 1.0}
    assert abs(np.mean(units**2) - 0.5) <= DEVIATIONS * 0.5 / np.sqrt(TRIALS)


@pytest.mark.parametrize("precision", [FP64, FP32, BF16], ids=lambda p: p.name)
def test_zero_stays_zero(precision: Any) -> None:
    """0/n, √0, 0·x and a sum of zeros are exact everywhere: their noise is below the smallest number there is."""
    tiny = 2.0 ** (precision.work.emin - precision.work.mantissa_bits)
    ways: list[Callable[[Any], Any]] = [
        lambda x: x / 3,
        np.sqrt,
        lambda x: x * 3,
        lambda x: np.sum(x, axis=-1),
        lambda x: np.mean(x, axis=-1),
    ]
    for function in ways:
        for seed in range(16):
            assert np.max(np.abs(plain(function(noisy(np.zeros((4, 7)), precision, seed))))) <= tiny


def test_infinities_and_nan_stay() -> None:
    """What is not finite passes through every rounding."""
    x = noisy(np.array([np.inf, -np.inf, np.nan, 0.0]))
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(plain(x * 1.5), [np.inf, -np.inf, np.nan, 0.0])


# Sums


def in_random_order(terms: np.ndarray, trials: int, dtype: type = np.float32) -> np.ndarray:
    """Sums of the terms one by one in that precision, each trial in an order of its own"""
    rng = np.random.Generator(np.random.Philox(key=7))
    sums = np.zeros(trials, dtype)
    order = np.argsort(rng.random((trials, len(terms))), axis=1)
    for column in order.T:
        sums += terms[column].astype(dtype)
    return sums.astype(np.float64)


TERMS = {
    "centred": full(Source("sum centred").normal((512,))),
    "positive": full(Source("sum positive").uniform((512,), 0.5, 1.5)),
    "uneven": full(Source("sum uneven").normal((512,)) * np.ldexp(1.0, Source("sum exponents").integers((512,), -6, 7))),
    "few": full(Source("sum few").uniform((5,), 0.5, 1.5)),
}


def check_sum(noise: Noise, terms: np.ndarray) -> None:
    """float32 sums in random order err as the formula says. It takes |S_j| u/√3 for an addition, where the error is uniform in half a unit
    of S_j, which lies between |S_j| u/2 and |S_j| u; and it counts S_1 (Q/n of the sum), which is not rounded. So the measured rms lies
    between half of the closed form without S_1 and the closed form, to six deviations of the measurement."""
    truth, squares, n = float(np.sum(terms)), float(np.sum(terms**2)), len(terms)
    rms = np.sqrt(np.mean((in_random_order(terms, TRIALS) - truth) ** 2))
    partial = (n + 1) * (squares / 6 + truth**2 / 3)
    closed, least = UNIT * np.sqrt(partial / 3), UNIT / 2 * np.sqrt((partial - squares / n) / 3)
    slack = 1 + DEVIATIONS / np.sqrt(2 * TRIALS)
    assert least / slack <= rms <= closed * slack
    drawn = noise.accumulated(distinct(truth), np.full(TRIALS, squares), n) - truth
    last = float(ulp(FORMATS["fp32"], np.array(truth)))  # the sum is rounded once more: half a unit at most, rms
    assert closed / slack <= np.sqrt(np.mean(drawn**2)) <= np.sqrt(closed**2 + last**2 / 4) * slack


@pytest.mark.parametrize("kind", TERMS)
def test_the_noise_of_sums_is_the_closed_form(kind: str) -> None:
    """The closed form covers what float32 sums in random order do, by a factor of two at most, and is what noisy sums get."""
    check_sum(Noise(FP32, 3), TERMS[kind])


class Terms(Noise):
    """Takes n - 1 equal additions of the last sum for the partial ones, as if every addition erred like the last."""

    def accumulated(self, total: np.ndarray, squares: np.ndarray, n: int) -> np.ndarray:
        deviation = UNIT * np.sqrt((n - 1) / 3) * np.abs(total)
        return self.rounded(total + deviation * self.rng.standard_normal(np.shape(total)))


@pytest.mark.parametrize("kind", ["centred", "positive"])
def test_sum_check_kills(kind: str) -> None:
    """A cruder formula is found: too small where terms cancel, too large where they do not."""
    with pytest.raises(AssertionError):
        check_sum(Terms(FP32, 3), TERMS[kind])


@pytest.mark.parametrize("n", [2, 3, 64, 512])
def test_the_closed_form_is_the_mean_over_orders(n: int) -> None:
    """Σ_j E[S_j²] = (n+1)(Q/6 + S²/3) for partial sums j = 1 … n in random order, against the mean over many orders (six deviations of
    that mean)."""
    terms = Source(f"orders {n}").normal((n,)) + 0.3
    rng = np.random.Generator(np.random.Philox(key=n))
    order = np.argsort(rng.random((TRIALS, n)), axis=1)
    totals = np.sum(np.cumsum(terms[order], axis=1) ** 2, axis=1)
    s, q = np.sum(terms), np.sum(terms**2)
    expected = (n + 1) * (q / 6 + s * s / 3)
    assert abs(np.mean(totals) - expected) <= DEVIATIONS * np.std(totals) / np.sqrt(TRIALS) + 1e-12


def test_sums_and_means_of_arrays_use_it() -> None:
    """np.sum, np.mean, x @ y and np.linalg.vecdot of noisy arrays scatter with the closed form's deviation, whatever the axis."""
    x, y = full(Source("matmul x").normal((40, 256))), full(Source("matmul y").normal((256, 30)))

    def closed(terms: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
        n = terms.shape[axis]
        total = np.sum(terms, axis=axis)
        noise = UNIT**2 * (n + 1) * (np.sum(terms**2, axis=axis) / 6 + total**2 / 3) / 3
        return noise, total

    ways = [
        (lambda a: np.sum(a, axis=1), closed(x, 1), 1.0),
        (lambda a: np.sum(a, axis=0), closed(x, 0), 1.0),
        (lambda a: np.mean(a, axis=1), closed(x, 1), 256.0),
        (lambda a: a @ y, closed(x[:, :, None] * y[None], 1), 1.0),
    ]
    for function, (variance, total), divisor in ways:
        runs = np.stack([plain(function(noisy(x, seed=seed))) for seed in range(64)])
        rounding = (ulp(FORMATS["fp32"], total) / divisor) ** 2  # of the sum, and where there is one of the quotient
        got = np.mean((runs - total / divisor) ** 2, axis=0)
        low, high = variance / divisor**2, variance / divisor**2 + rounding
        spread = DEVIATIONS * np.sqrt(2 / 64 / got.size)
        assert np.mean(got / high) <= 1 + spread
        assert np.mean(got / low) >= 1 - spread


def test_matrix_products_scatter_like_float32_loops() -> None:
    """x @ y: the noise is that of products accumulated one by one in float32 in random order: between the measured rms and twice it."""
    a, b = (full(Source(f"dot {name}").normal((300,))) for name in "ab")
    truth = float(np.sum(a * b))
    rounded_products = in_random_order(round_to(FORMATS["fp32"], a * b), TRIALS) - float(np.sum(round_to(FORMATS["fp32"], a * b)))
    rms = np.sqrt(np.mean(rounded_products**2))
    drawn = np.array([plain(noisy(a[None], seed=seed) @ b[:, None])[0, 0] - truth for seed in range(400)])
    slack = 1 + DEVIATIONS / np.sqrt(2 * 400)
    assert rms / slack <= np.sqrt(np.mean(drawn**2)) <= 2 * rms * slack


def test_amplify_widens() -> None:
    """amplify=a makes the noise of a sum a times as wide; a rounding becomes a uniform error of ± a/2 units, rounded at random: a times the
    half unit of rounding to nearest, variance a²/12 and at most 1/4 for the random rounding."""
    slack = 1 + DEVIATIONS / np.sqrt(2 * TRIALS)
    truth, squares = distinct(100.0), np.full(TRIALS, 1e7)
    narrow, wide = (Noise(FP32, 5, amplify).accumulated(truth, squares, 1000) - truth for amplify in (1.0, 8.0))
    assert 8 / slack**2 <= np.std(wide) / np.std(narrow) <= 8 * slack**2
    x = full(Source("amplify").uniform((TRIALS,), 1.45, 1.65))  # times log 2: squares in [1, 2), one binade
    units = (plain(noisy(x, seed=5, amplify=8.0) * x) - x * x) / ulp(FORMATS["fp32"], x * x)
    assert np.sqrt(8.0**2 / 12) / slack <= np.std(units) <= np.sqrt(8.0**2 / 12 + 1 / 4) * slack


# The array class


def survivors(x: Any) -> list[Any]:
    order = np.argsort(plain(x), axis=-1)
    return [
        np.where(plain(x) > 0, x, np.zeros_like(x)),
        np.take_along_axis(x, order, axis=-1),
        np.concat([x, np.zeros((3, 2))], axis=1),
        np.mean(x, axis=-1, keepdims=True),
        np.sum(x, axis=0),
        np.reshape(x, (4, 3)),
        np.permute_dims(x, (1, 0)),
        np.sort(x, axis=-1),
        np.repeat(x, 2, axis=1),
        np.broadcast_to(x, (2, 3, 4)),
        x[:, None, 1:],
        np.clip(x, -1.0, None),
        np.zeros_like(x),
        1 / (2 + np.abs(x)),
        x @ np.ones((4, 2)),
    ]


def test_noise_survives() -> None:
    """where, take_along_axis, concat, mean, reshape, transposition, sort, indexing and arithmetic keep the noise."""
    x = noisy(Source("survivors").normal((3, 4)))
    for y in survivors(x):
        assert isinstance(y, NoisyArray)
        assert y.noise is x.noise


def test_decisions_are_plain() -> None:
    """argsort, comparisons and isnan give plain integers and booleans."""
    x = noisy(Source("decisions").normal((3, 4)))
    for y in (np.argsort(x, axis=-1), x > 0, np.isnan(x)):
        assert np.asarray(y).dtype.kind in "ib"
    np.testing.assert_array_equal(np.argsort(x, axis=-1), np.argsort(plain(x), axis=-1))


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_attention_passes_in_the_noise_that_its_band_is_made_of(direction: str) -> None:
    """Where every operation rounds to bfloat16, the reference in fresh noise passes every case. With scores of 10,000 whose units are 64,
    a backward whose scores, or whose lse, round otherwise than the forward's finds probabilities of exp(64) and more."""
    op = OPS["attention"]
    for case in op.cases:
        vector = make(op, case, direction, BF16)
        question = Question(op, direction, vector.inputs, case.attrs, BF16)
        for seed in range(1000, 1010):
            with np.errstate(all="ignore"):
                outputs = op.run(direction, noisy_inputs(vector.inputs, Noise(BF16, seed)), case.attrs)
                found = judge(question, as_returned(question, {k: plain(y) for k, y in outputs.items()}), vector.band)
            assert found.verdict == PASS, (case.name, seed, found.reasons)


def test_what_is_kept_rounds_the_same_again_where_every_operation_rounds() -> None:
    """once: the same numbers whenever it is computed, of one run; other runs' and other values' errors are others. Where float32 operations
    err alone a fused backward computes it anew, and nothing is marked."""
    values = Source("again").normal((4, 5))
    for precision, alike in ((BF16, True), (FP32, False)):
        x = noisy_inputs({"x": values}, Noise(precision, 3))["x"]
        first, between, second = plain(once(x) * 1.1), plain(x * 1.1), plain(once(x) * 1.1)
        assert np.array_equal(first, second) is alike
        assert not np.array_equal(first, between)
        assert not np.array_equal(first, plain(once(noisy_inputs({"x": values}, Noise(precision, 4))["x"]) * 1.1))
    assert once(values) is values


def test_what_rows_are_normalised_by_is_float32_at_least() -> None:
    """wide: errors of float32 where bfloat16's are claimed; the same as ever where float32 is."""
    values = 1000 + Source("wide").normal((4, 5))
    relative = {}
    for precision in (BF16, FP32):
        x = noisy_inputs({"x": values}, Noise(precision, 3))["x"]
        relative[precision.name] = float(np.max(np.abs(plain(wide(x) * 1.1) / (values * 1.1) - 1)))
    assert 0 < relative["bf16-eager"] < 2.0**-22
    assert 0 < relative["fp32"] < 2.0**-22
    assert wide(values) is values


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if not op.exact])
def test_every_real_op_scatters(name: str) -> None:
    """No step of a reference loses the noise on the way: every real output differs from run to run in some case."""
    op = OPS[name]
    for direction in ("forward", "backward") if op.bwd else ("forward",):
        differ: set[str] = set()
        outputs: set[str] = set()
        for case in op.cases:
            inputs = draw_case(op, case, direction, FP32)
            if sum(x.size for x in inputs.values()) > 20_000:
                continue
            first, *others = (op.run(direction, noisy_inputs(inputs, Noise(FP32, seed)), case.attrs) for seed in range(4))
            given = np.concatenate([x.ravel() for x in inputs.values() if x.dtype.kind == "f"] or [np.zeros(0)])
            for t in op.signature_of(direction, inputs)[1]:
                if t.kind == "real":
                    outputs.add(t.name)
                    assert isinstance(first[t.name], NoisyArray)
                    moved = bool(np.all(np.isin(plain(first[t.name]), np.append(given, 0.0))))  # values that were only moved do not err
                    if moved or any(np.any(plain(first[t.name]) != plain(other[t.name])) for other in others):
                        differ.add(t.name)
        assert differ == outputs


@pytest.mark.parametrize(("fmt", "dtype"), [("fp64", np.float64), ("fp32", np.float32), ("fp16", np.float16)])
@given(value=st.floats(0, 30_000))  # NumPy overflows in the last binade of float16
def test_the_unit_in_the_last_place(fmt: str, dtype: type, value: float) -> None:
    """ulp is NumPy's spacing where NumPy has the format: from |x| to the next number outward; of zero, the smallest there is."""
    x = np.array([value, 0.0], dtype)
    np.testing.assert_array_equal(ulp(FORMATS[fmt], x.astype(np.float64)), np.spacing(x).astype(np.float64))
    np.testing.assert_array_equal(ulp(FORMATS[fmt], -x.astype(np.float64)), np.spacing(x).astype(np.float64))


# Limits


def float32_sums(x: np.ndarray) -> dict[str, np.ndarray]:
    """Correct ways to a mean in float32: NumPy's pairwise, one by one, one by one from the end"""
    y = x.astype(np.float32)
    forward = np.cumsum(y, axis=1, dtype=np.float32)[:, -1]
    backward = np.cumsum(y[:, ::-1], axis=1, dtype=np.float32)[:, -1]
    return {"pairwise": np.sum(y, axis=1), "forward": forward, "backward": backward}


def measured(y: np.ndarray, truth: np.ndarray, sigma: np.ndarray, floor: np.ndarray) -> dict[str, float]:
    return statistics(in_sigma(y.astype(np.float64) - truth, sigma), in_sigma(truth, sigma), reach(floor, sigma))


def test_limits_pass_correct_sums_and_fail_gains() -> None:
    """limits_of holds correct float32 sums, whatever their order, and refuses the same sums times 1.001."""
    x = full(Source("limits").normal((64, 300)) + 1)
    truth = np.sum(x, axis=1)
    raw = np.stack([plain(np.sum(noisy(x, seed=seed), axis=1)) for seed in range(16)]) - truth
    floor = floor_of(FP32, truth)
    limits = limits_of(round_to(FORMATS["fp32"], raw + truth) - truth, raw, floor, truth)
    sigma = np.hypot(np.sqrt(np.mean(raw**2, axis=0)), floor)

    def exceeded(y: np.ndarray) -> set[str]:
        found = measured(y, truth, sigma, floor)
        return {name for name, value in found.items() if value > limits[name]}

    for name, y in float32_sums(x).items():
        assert not exceeded(y), name
        assert {"max", "rms", "gain"} <= exceeded(y * np.float32(1.001))


def test_a_run_that_errs_alone_does_not_lift_the_limits() -> None:
    """Where one run of sixteen errs and the others are exact, an error of a thousand times its size is refused still."""
    truth, raw = np.zeros(3), np.zeros((16, 3))
    raw[5, 1] = 1e-7
    floor = floor_of(FP32, truth, np.any(raw != 0, axis=0))
    limits = limits_of(raw, raw, floor, truth)
    sigma = np.hypot(np.sqrt(np.mean(raw**2, axis=0)), floor)
    for times, passes in ((1.0, True), (1000.0, False)):
        found = measured(times * raw[5], truth, sigma, floor)
        assert all(found[k] <= limits[k] for k in limits) == passes, (times, found, limits)


CASES = [
    pytest.param(name, direction, case.name, id=f"{name}-{direction}-{case.name}")
    for name, op in OPS.items()
    if not op.exact
    for direction in (("forward", "backward") if op.bwd else ("forward",))
    for case in op.cases
    if np.prod(list(case.dims.values())) < 10_000
]


HIDDEN = {  # where float32's noise hides a thousandth of some output, and why
    "one": "a single channel's gradient cancels",
    "beyond-float16": "scores of thousands",
    ("block", "backward", "v3"): "float32 angles at positions of thousands are off by 1e-4",
    ("mtp", "backward", "v3"): "float32 angles at positions of thousands are off by 1e-4",
    ("mtp.loss", "backward", "v3"): "the loss of three tokens hardly depends on whom they attend to",
    ("mtp.loss", "backward", "short"): "a token that sees itself alone: no gradient reaches its query",
    ("cross_entropy", "forward", "sure"): "a loss of 4e-6 is the logarithm of a number next to 1",
}


@pytest.mark.parametrize(("name", "direction", "case_name"), CASES)
def test_bands_pass_float32_and_fail_a_gain(name: str, direction: str, case_name: str) -> None:
    """The reference's own float32 run stays under every limit of its band; the same with a gain of 1e-3 does not, where a thousandth of
    the output is twice the rms limit or more. So it is everywhere but in the cases of HIDDEN."""
    op = OPS[name]
    case = next(c for c in op.cases if c.name == case_name)
    inputs = draw_case(op, case, direction, FP32)
    forward = {t.name: inputs[t.name] for t in op.signature_of("forward", inputs)[0]}
    choice = op.run("forward", forward, case.attrs)[op.choice[0]] if op.choice else None
    band = band_of(op, direction, inputs, case.attrs, FP32, choice)
    outputs = op.run(direction, {**inputs, **({op.choice[0]: choice} if op.choice else {})}, case.attrs)
    hidden = []
    for output, limits in band.limits.items():
        finite = np.isfinite(band.truth[output])  # lse of an empty row
        sigma, truth = (np.where(finite, x, 0.0) for x in (band.sigma[output], band.truth[output]))
        visible = 1e-3 * float(np.sqrt(np.mean(in_sigma(truth, sigma) ** 2))) > 2 * limits["rms"]
        hidden += [output] if not visible and np.any(truth) else []
        for gain in (1.0, 1.001) if visible else (1.0,):
            found = measured(np.where(finite, outputs[output].astype(np.float64), 0.0) * gain, truth, sigma, floor_of(FP32, truth))
            assert all(found[k] <= limits[k] for k in limits) == (gain == 1.0), f"{output} {gain}: {found} {limits}"
    assert bool(hidden) == ((name, direction, case_name) in HIDDEN) or case_name in HIDDEN, hidden


# Drawn inputs


def drawn(kind: str, *parameters: Any, shape: tuple[int, ...] = (6, 130), key: str = "test") -> np.ndarray:
    return DRAWS[kind](Source(key), shape, *parameters)


PARAMETERS: dict[str, tuple] = {
    "normal": (0.5,),
    "uniform": (-1.5, 2.0),
    "const": (0.25,),
    "scales": (-9, -5),
    "steps": (4, 0.5),
    "wide": (-40, 20),
    "whole": (0, 400),
    "values": (1.0, -2.5, 3.0),
    "outliers": (1.0, 60.0),
    "zero_rows": (1.0,),
    "rows_wide": (-20, 12),
    "some_infinite": (2.0,),
    "nan_tail": (1.0, 2, 100),
    "tile_ties": (128,),
    "tile_midpoints": (128,),
    "tile_edges": (128,),
}
DIGESTS = {
    "normal": "0bc1936db13baa77c832403c0aee172500df5647468d33206d85789784ff27c4",
    "uniform": "fc245a5e70789ee48e8057e311c5225917de8891949688dcca0e2a66e45416a0",
    "const": "47a4c67bde9def930d8923df30dbcad23a885bc19238b437a407d2c00fd23e6d",
    "scales": "ff14692967ddecabe7b50836eba8cd1a5d874e60f32e83e98187a71f8180872e",
    "steps": "fcd93ac55cdb5394ddc5e8c285f5f1159df9a387a623aaf282f7cc078f24f0d2",
    "wide": "e87b414ad3a09a810ef0afd619de73a2a4579264bf5c77ac7176839598d705c2",
    "whole": "446ba04a826c64126587ee926f63d3f2c2135efadf455371eaf7503fd4161c39",
    "values": "51851acb783572d707515055ae8173a137a6b426745be89e10c7aca947eb4aee",
    "outliers": "4fb524d937eed83e440fcf549122b2045e96ba83bc6405798620f54702f822ed",
    "zero_rows": "c7492cc72efefdf620187b65d168db49513ec6ccc3652a727ceed81e679f252b",
    "rows_wide": "95d08923979740fa8cc202b7b666ac378e0e7f611e3d2a79dde0213f9a1c80c8",
    "some_infinite": "94e8b25e0c45512227d76c2eca2ec4b2ffbc6fd00d535f5ddc033e6e5adb3e3e",
    "nan_tail": "9d0f9acb067a5495492bbac9e5b8dc60e778b8ef82c3f9f504b8dde460be37ae",
    "tile_ties": "e0ece0f5061eeb304fc902511ba692bf07e57660e8b4bb52fea5c5b8f703af7f",
    "tile_midpoints": "40bb900a12afa19a08dc2d9b931d2effb21f9d67db1bbb60d92c247b44cc333f",
    "tile_edges": "8f45bc80eaecd93196f2a4396acfa7eb8f6a3342324b7d7ccefa3d920b3094f7",
}


def sha256(x: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(x, dtype="<f8").tobytes()).hexdigest()


@pytest.mark.parametrize("kind", DRAWS)
def test_draws_are_these_bits_everywhere(kind: str) -> None:
    """The same bits on any machine and any NumPy: SHA-256 of a small draw of each kind, written down here."""
    assert sha256(drawn(kind, *PARAMETERS[kind])) == DIGESTS[kind]


def test_drawn_cases_are_these_bits_everywhere() -> None:
    """The kinds that belong to an op (codes, every bfloat16, the boundaries of a format) through draw_case, likewise."""
    assert {name: sha256(draw_case(OPS[name], OPS[name].cases[i], "forward", FP32)[x]) for name, i, x in OWN} == OWN_DIGESTS


OWN = (("cast.e4m3fn", 0, "x"), ("cast.bf16", 0, "x"), ("cast.e5m2", 3, "x"), ("decode.fp16", 0, "codes"))
OWN_DIGESTS = {
    "cast.e4m3fn": "64ee40713f0bf393c9add7e425c557b6fb0065ab7f3d647c7826fdd613ccc034",
    "cast.bf16": "469c8911bd397da317d36d26d26104136d82d0b2693e06f7c61dc0d6ee4ece22",
    "cast.e5m2": "f7b6c4afac93ce1d8273b77c77a5f607551edc44c83c6ec7ac230abf8b4527f4",
    "decode.fp16": "85e2c50cd49d049641de967e9a810e14ed805b815c4085974e5af4507cd76e16",
}


@pytest.mark.parametrize("kind", [kind for kind in DRAWS if kind not in ("const", "values")])
def test_draws_depend_on_their_key_alone(kind: str) -> None:
    """One key gives one array, another key another."""
    once, again, other = (drawn(kind, *PARAMETERS[kind], key=key) for key in ("a", "a", "b"))
    np.testing.assert_array_equal(once, again)
    assert np.any(once != other)


@pytest.mark.parametrize("name", OPS)
def test_inputs_depend_on_name_and_seed(name: str) -> None:
    """draw_case: the same bits for the same name and seed, other bits for another seed, unless all values are listed."""
    op = OPS[name]
    case = op.cases[min(1, len(op.cases) - 1)]
    first, again, other = (draw_case(op, case, "forward", FP32, seed) for seed in (0, 0, 1))
    for tensor, x in first.items():
        np.testing.assert_array_equal(again[tensor], x)
        if x.size > 1 and case.draw[tensor][0] not in ("codes", "every_bf16", "boundary", "const", "values", "positions", "ascending"):
            assert np.any(other[tensor] != x)


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=lambda p: p.name)
@pytest.mark.parametrize("name", OPS)
def test_inputs_are_representable(name: str, precision: Any) -> None:
    """Every drawn number is one of the format that the precision stores it in: rounding it there changes nothing."""
    op = OPS[name]
    for case in op.cases:
        if np.prod(list(case.dims.values())) > 70_000:
            continue
        for direction in ("forward", "backward") if op.bwd else ("forward",):
            inputs = draw_case(op, case, direction, precision)
            for t in op.signature_of(direction, inputs)[0]:
                x = inputs[t.name]
                if x.dtype.kind == "f":
                    assert x.dtype == (np.float64 if precision.format_of(t).bits == 64 else np.float32)
                    with np.errstate(all="ignore"):
                        np.testing.assert_array_equal(round_to(precision.format_of(t), x, overflow="nan"), x)


def test_source_is_normal_and_uniform() -> None:
    """normal: mean 0, variance 1, within six deviations (the variance of x² is 2 - 6/(5·12) for a sum of twelve uniforms), all within ±6.
    uniform: mean 1/2, variance 1/12. integers: every value as often as the next."""
    n = 100_000
    x = Source("moments").normal((n,))
    assert abs(np.mean(x)) <= DEVIATIONS / np.sqrt(n)
    assert abs(np.var(x) - 1) <= DEVIATIONS * np.sqrt((2 - 6 / 60) / n)
    assert np.max(np.abs(x)) < 6
    u = Source("uniform").uniform((n,))
    assert abs(np.mean(u) - 0.5) <= DEVIATIONS * np.sqrt(1 / 12 / n)
    assert abs(np.var(u) - 1 / 12) <= DEVIATIONS * np.sqrt(1 / 180 / n)
    assert u.min() >= 0
    assert u.max() < 1
    counts = np.bincount(Source("integers").integers((n,), -3, 7) + 3, minlength=10)
    assert np.max(np.abs(counts - n / 10)) <= DEVIATIONS * np.sqrt(n * 0.09)


@pytest.mark.parametrize("kind", ["tile_ties", "tile_midpoints", "tile_edges"])
def test_tile_draws_do_what_they_say(kind: str) -> None:
    """Each tile begins with its maximum, which fixes the scale; tile_ties' values are midpoints of codes times that scale."""
    x = round_to(FORMATS["fp32"], drawn(kind, 128, shape=(8, 256)))
    tiles = np.abs(x).reshape(8, 2, 128)
    np.testing.assert_array_equal(tiles.max(axis=2), tiles[:, :, 0])
    if kind == "tile_ties":
        v = tiles[:, :, 1:] / (tiles[:, :, :1] / 448)
        assert np.all(v / ulp(FORMATS["e4m3fn"], v) % 1 == 0.5)


def test_one_array_is_one_draw() -> None:
    """draw: shape, dtype and format are those of the tensor and the precision: a constant stays float32 in a 16-bit precision."""
    op, case = OPS["router.noaux_tc"], Case("c", {"n": 2, "e": 8, "k": 2}, {})
    for kind, fmt in (("real", "bf16"), ("const", "fp32")):
        x = draw(op, Tensor("t", ("n", "e"), kind), ("normal", 1.0), (2, 8), Source(case.name), PRECISIONS["bf16"])
        assert (x.shape, x.dtype) == ((2, 8), np.float32)
        np.testing.assert_array_equal(round_to(FORMATS[fmt], x), x)
