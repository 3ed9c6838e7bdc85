"""What must hold of any cast, encoding and decoding. Each fact is held by the reference and kills a named mutant."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from leadline.golden.bugs import Bug, bugs_of
from leadline.ref import E4M3FN, E5M2, FP16, OPS, Format
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
    top = 4 * fmt.max if fmt.bits == 8 or width == 64 else float(np.finfo(dtype).max)
    near = draw(hnp.arrays(dtype, 4, elements=st.floats(-top, top, width=width) if np.isfinite(top) else st.floats(width=width)))
    units = draw(hnp.arrays(np.float64, 4, elements=st.integers(-(2 ** (fmt.mantissa_bits + 2)), 2 ** (fmt.mantissa_bits + 2))))
    middles = (units / 2 * 2.0 ** draw(st.integers(fmt.emin - fmt.mantissa_bits, 8))).astype(dtype)  # values, and halfway between them
    steps = draw(hnp.arrays(np.int8, 4, elements=st.integers(-1, 1)))
    middles = np.where(steps == 0, middles, np.nextafter(middles, np.where(steps > 0, dtype.type(np.inf), dtype.type(-np.inf))))
    return Values(np.concatenate([x, near, middles]), draw(st.integers(-20, 20)), draw(st.sampled_from(OVERFLOW)))


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
    """cast(-x) = -cast(x), zeros included; codes differ in the sign bit alone."""
    x = q.x[~np.isnan(q.x)]
    assert_same(c.cast(-x, q.overflow), -c.cast(x, q.overflow))
    a, b = c.encode(x, q.overflow), c.encode(-x, q.overflow)
    number = ~np.isnan(c.decode(a))
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
    y, z = c.cast(x, "saturate"), c.cast(x, "nan")
    assert np.all(np.abs(y.astype(np.float64)) <= c.fmt.max)
    edge = c.fmt.max + float(unit(c.fmt, np.array(c.fmt.max))) / 2
    fits = np.abs(x.astype(np.float64)) <= edge if c.fmt.max_code % 2 == 0 else np.abs(x.astype(np.float64)) < edge
    np.testing.assert_array_equal(np.isfinite(z), fits)
    assert_same(y[fits], z[fits])


def round_trip(c: Cast, q: Values | None = None) -> None:
    """encode(decode(code)) = code for every code there is; NaN codes become the positive quiet NaN."""
    codes = np.arange(2**c.fmt.bits).astype(c.fmt.code_dtype)
    x = c.decode(codes)
    back = c.encode(x, "nan")
    np.testing.assert_array_equal(back, np.where(np.isnan(x), c.fmt.nan_code, codes))
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


@pytest.mark.parametrize("fmt", CASTS, ids=lambda f: f.name)
@pytest.mark.parametrize("fact", NAMED, ids=lambda f: f.__name__)
@given(data=st.data())
def test_holds(fact: Callable, fmt: Format, data: st.DataObject) -> None:
    """The reference holds the fact, which its own docstring states, in every format."""
    fact(functions(fmt, {}), data.draw(values(fmt)))


@pytest.mark.parametrize(("fact", "mutant"), FACTS, ids=[f"{fact.__name__}-{i}" for i, (fact, _) in enumerate(FACTS)])
def test_kills(fact: Callable, mutant: Cast, killed: Callable) -> None:
    """The fact fails for its mutant on some input."""
    killed(lambda q: fact(mutant, q), values(mutant.fmt))
