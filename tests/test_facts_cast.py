"""What must hold of any cast, encoding and decoding. Each fact is held by the reference and kills a named mutant."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from leadline.golden.bugs import Bug, bugs_of
from leadline.ref import E4M3FN, E5M2, E8M0, FP16, OPS, Format, decode, encode
from leadline.ref.formats import CASTS

OVERFLOW = ("saturate", "nan")


class Cast(NamedTuple):
    """A format's three functions, as someone implements them."""

    fmt: Format
    cast: Callable[..., np.ndarray]  # (x, overflow)
    encode: Callable[..., np.ndarray]  # (x, overflow)
    decode: Callable[..., np.ndarray]  # (codes)


class Values(NamedTuple):
    """What they are asked: numbers, a power of two, and what becomes of overflow."""

    x: np.ndarray
    power: int
    overflow: str


def functions(fmt: Format, bugs: Mapping[str, Bug]) -> Cast:
    """The reference's functions, some with a known bug."""

    def function(kind: str) -> Callable[..., np.ndarray]:
        if f"{kind}.{fmt.name}" not in OPS:  # tf32 has no storage of its own
            return lambda x, *overflow: encode(fmt, x, overflow=overflow[0]) if overflow else decode(fmt, x)
        op, bug = OPS[f"{kind}.{fmt.name}"], bugs.get(kind)
        fwd, forced = (bug.variant(op).fwd, bug.attrs) if bug else (op.fwd, {})

        def run(x: np.ndarray, overflow: str | None = None) -> np.ndarray:
            with np.errstate(all="ignore"):
                return fwd(x, **{**({"overflow": overflow} if overflow else {}), **forced})[0]

        return run

    return Cast(fmt, function("cast"), function("encode"), function("decode"))


def with_bug(fmt: Format, id: str, *kinds: str) -> Cast:
    """A bug of golden/bugs in the functions of these kinds."""
    return functions(fmt, {kind: next(b for b in bugs_of(OPS[f"{kind}.{fmt.name}"], "forward") if b.id == id) for kind in kinds})


def with_cast(fmt: Format, change: Callable[[np.ndarray], np.ndarray]) -> Cast:
    """What is cast is changed first."""
    right = functions(fmt, {})
    return right._replace(cast=lambda x, overflow: right.cast(change(x), overflow))


@st.composite
def values(draw: st.DrawFn, fmt: Format) -> Values:
    """Any bit patterns of float32 or float64; numbers of the format's own size; its values and midpoints, and their neighbours."""
    width = draw(st.sampled_from((32, 64)))
    dtype = np.dtype(f"f{width // 8}")
    x = draw(hnp.arrays(dtype, st.integers(1, 8), elements=st.floats(width=width)))
    top = 4 * fmt.max if fmt.bits <= 8 or width == 64 else float(np.finfo(dtype).max)
    near = draw(hnp.arrays(dtype, 4, elements=st.floats(-top, top, width=width) if np.isfinite(top) else st.floats(width=width)))
    units = draw(hnp.arrays(np.float64, 4, elements=st.integers(-(2 ** (fmt.mantissa_bits + 2)), 2 ** (fmt.mantissa_bits + 2))))
    middles = (units / 2 * 2.0 ** draw(st.integers(fmt.emin - fmt.mantissa_bits, 8))).astype(dtype)  # values, and halfway between them
    steps = draw(hnp.arrays(np.int8, 4, elements=st.integers(-1, 1)))
    middles = np.where(steps == 0, middles, np.nextafter(middles, np.where(steps > 0, dtype.type(np.inf), dtype.type(-np.inf))))
    x, overflow = np.concatenate([x, near, middles]), draw(st.sampled_from(OVERFLOW))
    if fmt.nan_code is None:  # it takes no NaN and makes none
        x, overflow = x[~np.isnan(x)], "saturate"
    return Values(x, draw(st.integers(-20, 20)), overflow)


def unit(fmt: Format, x: np.ndarray) -> np.ndarray:
    """The unit in the last place of the format at |x|"""
    _, e = np.frexp(x.astype(np.float64))
    return np.ldexp(1.0, np.maximum(e - 1, fmt.emin) - fmt.mantissa_bits)


def canonical(x: np.ndarray) -> bytes:
    """The bits of an array, all NaNs being one."""
    return (np.where(np.isnan(x), np.nan, x).astype(x.dtype) if x.dtype.kind == "f" else x).tobytes()


def assert_same(a: np.ndarray, b: np.ndarray) -> None:
    """To the bit, the sign of zero included; NaN is NaN."""
    assert a.dtype == b.dtype
    assert canonical(a) == canonical(b), f"{a} is not {b}"


def idempotent(c: Cast, q: Values) -> None:
    """cast(cast(x)) = cast(x): what is on the grid stays, infinities and NaN as the rule for overflow has them."""
    y = c.cast(q.x, q.overflow)
    assert_same(c.cast(y, q.overflow), y)


def monotone(c: Cast, q: Values) -> None:
    """x <= x' implies cast(x) <= cast(x'), infinities included."""
    x = np.sort(q.x[~np.isnan(q.x)])
    y = c.cast(x, "saturate").astype(np.float64)
    assert np.all(np.diff(y) >= 0), f"{x} became {y}"


def odd(c: Cast, q: Values) -> None:
    """cast(-x) = -cast(x), zeros included where the format has two; codes differ in the sign bit alone."""
    x = q.x[~np.isnan(q.x)]
    y = -c.cast(x, q.overflow)
    assert_same(c.cast(-x, q.overflow), y if c.fmt.negative_zero else y + 0.0 * y.dtype.type(1))
    a, b = c.encode(x, q.overflow), c.encode(-x, q.overflow)
    number = ~np.isnan(c.decode(a))
    if not c.fmt.negative_zero:
        assert not np.any((a ^ b)[a == 0])
        number &= a != 0
    assert np.all((a ^ b)[number] == 1 << (c.fmt.bits - 1))


def covariant(c: Cast, q: Values) -> None:
    """cast(2^j x) = 2^j cast(x) while both stay among the format's normal numbers."""
    x = q.x[np.abs(q.x) <= c.fmt.max].astype(np.float64)
    moved = np.ldexp(x, q.power)
    low = 2.0**c.fmt.emin
    inside = (np.abs(x) >= low) & (np.abs(moved) >= low) & (np.abs(moved) <= c.fmt.max)
    assert_same(c.cast(moved[inside], q.overflow), np.ldexp(c.cast(x[inside], q.overflow), q.power))


def nearest(c: Cast, q: Values) -> None:
    """|cast(x) - x| is half a unit in the last place at most, up to the format's maximum: rounded to nearest, and once."""
    x = q.x[np.abs(q.x) <= c.fmt.max]
    y = c.cast(x, q.overflow)
    assert np.all(np.abs(y.astype(np.float64) - x) <= unit(c.fmt, x) / 2), f"{x} became {y}"


def ties_to_even(c: Cast, q: Values) -> None:
    """Halfway between two values the even code wins."""
    x = q.x[np.abs(q.x) <= c.fmt.max].astype(np.float64)
    half = np.abs(x) / unit(c.fmt, x) % 1 == 0.5
    assert not np.any(c.encode(x[half], q.overflow) % 2)


def coherent(c: Cast, q: Values) -> None:
    """cast = decode of encode, on x's own dtype."""
    assert_same(c.cast(q.x, q.overflow), c.decode(c.encode(q.x, q.overflow)).astype(q.x.dtype))


def saturating(c: Cast, q: Values) -> None:
    """overflow="saturate" gives finite numbers up to ±max; overflow="nan" gives the same up to half a unit beyond the maximum, and nothing
    finite further out. Exactly there, the even code wins."""
    x = q.x[~np.isnan(q.x)]
    y = c.cast(x, "saturate")
    assert np.all(np.abs(y.astype(np.float64)) <= c.fmt.max)
    if c.fmt.nan_code is None:
        return
    z = c.cast(x, "nan")
    edge = c.fmt.max + float(unit(c.fmt, np.array(c.fmt.max))) / 2
    fits = np.abs(x.astype(np.float64)) <= edge if c.fmt.max_code % 2 == 0 else np.abs(x.astype(np.float64)) < edge
    np.testing.assert_array_equal(np.isfinite(z), fits)
    assert_same(y[fits], z[fits])


def round_trip(c: Cast, q: Values | None = None) -> None:
    """encode(decode(code)) = code for every code there is; NaN codes become the positive quiet NaN."""
    codes = np.arange(2**c.fmt.bits).astype(c.fmt.code_dtype)
    x = c.decode(codes)
    back = c.encode(x, "saturate" if c.fmt.nan_code is None else "nan")
    np.testing.assert_array_equal(back, np.where(np.isnan(x), c.fmt.nan_code or 0, codes))
    finite = x[: c.fmt.max_code + 1]
    assert np.all(np.diff(finite.astype(np.float64)) > 0)
    assert finite[0] == 0
    assert finite[-1] == c.fmt.max


def drifting(fmt: Format) -> Cast:
    """Pushes outward by a unit before it rounds."""
    return with_cast(fmt, lambda x: x * x.dtype.type(1 + 2.0**-fmt.mantissa_bits))


def wrapping(fmt: Format) -> Cast:
    """What overflows loses an exponent bit."""
    return with_cast(fmt, lambda x: np.where(np.abs(x) > fmt.max, x / 256, x))


def fixed_point(fmt: Format) -> Cast:
    """One unit for all magnitudes."""
    return with_cast(fmt, lambda x: np.round(x * 8) / 8)


FACTS: list[tuple[Callable[[Cast, Values], None], Cast]] = [
    (idempotent, drifting(E4M3FN)),
    (monotone, wrapping(E4M3FN)),
    (odd, with_bug(E4M3FN, "zero-sign-lost", "cast")),
    (odd, with_bug(E5M2, "zero-sign-lost", "encode")),
    (covariant, fixed_point(E4M3FN)),
    (nearest, with_bug(E4M3FN, "e4m3-truncate", "cast")),
    (nearest, with_bug(E5M2, "fp8-double-rounding", "cast")),
    (ties_to_even, with_bug(E5M2, "e4m3-round-half-away", "encode")),
    (coherent, with_bug(E4M3FN, "fp8-subnormal-flush", "encode")),
    (saturating, with_bug(E4M3FN, "e4m3-overflow-nan", "cast")),
    (saturating, with_bug(E5M2, "overflow-infinity", "cast")),
    (saturating, with_bug(FP16, "overflow-saturates", "cast")),
    (round_trip, with_bug(E4M3FN, "fp8-subnormal-binade", "decode")),
]
NAMED = list(dict.fromkeys(fact for fact, _ in FACTS))


SIGNED = [f for f in CASTS if f.signed]


@pytest.mark.parametrize("fmt", SIGNED, ids=lambda f: f.name)
@pytest.mark.parametrize("fact", NAMED, ids=lambda f: f.__name__)
@given(data=st.data())
def test_holds(fact: Callable, fmt: Format, data: st.DataObject) -> None:
    """The reference holds the fact, which its own docstring states, in every format."""
    fact(functions(fmt, {}), data.draw(values(fmt)))


@pytest.mark.parametrize(("fact", "mutant"), FACTS, ids=[f"{fact.__name__}-{i}" for i, (fact, _) in enumerate(FACTS)])
def test_kills(fact: Callable, mutant: Cast, killed: Callable) -> None:
    """The fact fails for its mutant on some input."""
    killed(lambda q: fact(mutant, q), values(mutant.fmt))


def test_scales_are_powers_of_two() -> None:
    """e8m0: every code but 255 is 2^(code-127) and comes back; x becomes the nearest power of two, the larger one from 1.5·2^k on; what is
    not above zero has no code. A bug that counts from 1 as the signed formats do, or takes 1.5·2^k down, is found."""

    def check(c: Cast) -> None:
        codes = np.arange(256, dtype=np.uint8)
        x = c.decode(codes).astype(np.float64)
        np.testing.assert_array_equal(x[:255], np.ldexp(1.0, np.arange(255) - 127))
        np.testing.assert_array_equal(c.encode(x, "nan"), codes)
        middles = 1.5 * x[:254]
        for factor, expected in ((1.0, codes[1:255]), (1 - 2.0**-52, codes[:254])):
            np.testing.assert_array_equal(c.encode(middles * factor, "nan"), expected)
        np.testing.assert_array_equal(c.encode(np.array([0.0, -0.0, -1.0, np.nan, -np.inf, np.inf, 1e39]), "nan"), 255)
        np.testing.assert_array_equal(c.encode(np.array([np.inf, 1e39, 2.0**-140]), "saturate"), [254, 254, 0])

    right = functions(E8M0, {})
    check(right)
    for wrong in (
        right._replace(encode=lambda x, overflow: right.encode(x, overflow) + np.uint8(1)),
        right._replace(encode=lambda x, overflow: right.encode(x * (1 - 2.0**-40), overflow)),
    ):
        with pytest.raises(AssertionError):
            check(wrong)


ROUNDINGS = {  # of q >= 0, as its definition says it
    "half-away": lambda q: np.floor(q) + (q - np.floor(q) >= 0.5),
    "half-zero": lambda q: np.floor(q) + (q - np.floor(q) > 0.5),
    "zero": np.floor,
}


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("fmt", SIGNED, ids=lambda f: f.name)
@given(data=st.data())
def test_other_roundings(fmt: Format, rounding: str, data: st.DataObject) -> None:
    """Inside the range each rounding is its definition in units of the last place; truncation never overflows a finite number."""
    q = data.draw(values(fmt))
    x = q.x[np.abs(q.x) < fmt.max].astype(np.float64)
    expected = np.copysign(ROUNDINGS[rounding](np.abs(x) / unit(fmt, x)) * unit(fmt, x), x)
    y = OPS[f"cast.{fmt.name}"].fwd(x, rounding=rounding, overflow="saturate")[0]
    np.testing.assert_array_equal(y, expected)
    finite = q.x[np.isfinite(q.x)].astype(np.float64)
    if rounding == "zero" and fmt.nan_code is not None:
        assert np.all(np.isfinite(OPS[f"cast.{fmt.name}"].fwd(finite, rounding=rounding, overflow="nan")[0]))


@pytest.mark.parametrize("fmt", SIGNED, ids=lambda f: f.name)
def test_stochastic_rounding_is_unbiased(fmt: Format) -> None:
    """E[cast(x)] = x: over 2^16 evenly spread random numbers the mean is x to 2^-15 of a unit, for both signs; each result is a
    neighbour. Rounding to nearest, whose mean is off by up to half a unit, is found."""
    random = (np.arange(2**16) + 0.5) / 2**16
    fn = OPS[f"cast.{fmt.name}"].fwd
    wrong = 0
    for x in (1.0 + 0.3 * 2.0**-fmt.mantissa_bits, -(1.5 + 0.77 * 2.0**-fmt.mantissa_bits), 0.4 * 2.0 ** (fmt.emin - fmt.mantissa_bits)):
        many = np.full(2**16, x)
        y = fn(many, random, rounding="stochastic")[0]
        u = float(unit(fmt, np.array(x)))
        assert np.all(np.abs(y - x) < u)
        assert abs(float(np.mean(y)) - x) <= u * 2.0**-15
        wrong += abs(float(np.mean(fn(many)[0])) - x) > u * 2.0**-15
    assert wrong == 3
