"""What must hold of fine-grained quantisation. Each fact is held by the reference and kills a named mutant."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from leadline.golden import strategies
from leadline.golden.bugs import bugs_of
from leadline.golden.draw import Source
from leadline.ref import FORMATS, OPS, RECIPES, Op, decode
from leadline.ref.fp8_recipes import FP8Name

QUANTIZE, DEQUANTIZE = OPS["fp8.quantize_tile"], OPS["fp8.dequantize_tile"]
LINEAR = [name for name, recipe in RECIPES.items() if recipe.power_of_two == "no"]
UE8M0 = [name for name in RECIPES if name not in LINEAR]


class Asked(NamedTuple):
    """x[n,d], the attributes, a power of two, and a seed for what else is drawn."""

    x: np.ndarray
    attrs: dict[str, Any]
    power: int
    seed: int

    def __repr__(self) -> str:
        return f"Asked({self.x.dtype} x{list(self.x.shape)}, {self.attrs}, power={self.power}, seed={self.seed})"


@st.composite
def asked(draw: st.DrawFn, recipes: list[str] | None = None) -> Asked:
    q = draw(strategies.questions(QUANTIZE, precision=draw(st.sampled_from(("fp32", "fp64"))), empty=False, large=4000))
    attrs = {
        "recipe": draw(st.sampled_from(recipes or list(RECIPES))),
        "format": draw(st.sampled_from(get_args(FP8Name))),
        "axis": draw(st.sampled_from((0, 1))),
        "tile": draw(st.sampled_from((1, 3, 64, 128))),
    }
    return Asked(q.inputs["x"], attrs, draw(st.integers(1, 10)), q.seed)


def quantize(op: Op, x: np.ndarray, attrs: dict[str, Any], **given: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    with np.errstate(all="ignore"):
        return op.fwd(x, **attrs, **given)[0]


def spread(per_tile: np.ndarray, x: np.ndarray, attrs: dict[str, Any]) -> np.ndarray:
    """One number a tile to one an element."""
    n, d = x.shape
    return np.repeat(per_tile, attrs["tile"], axis=attrs["axis"])[:n, :d]


def tile_max(x: np.ndarray, attrs: dict[str, Any]) -> np.ndarray:
    """max |x| of each tile, by slices"""
    axis, tile = attrs["axis"], attrs["tile"]
    parts = [np.take(x, range(i, min(i + tile, x.shape[axis])), axis=axis) for i in range(0, x.shape[axis], tile)]
    return np.stack([np.max(np.abs(part), axis=axis) for part in parts], axis=axis)


def values(codes: np.ndarray, attrs: dict[str, Any]) -> np.ndarray:
    return decode(FORMATS[attrs["format"]], codes).astype(np.float64)


def away_from_clamps(a: np.ndarray) -> np.ndarray:
    """a/57344 above 1e-4 is above every clamp; below 2^100 nothing overflows"""
    return (a > 6.0) & (a < 2.0**100)


def reaches_the_maximum(op: Op, q: Asked) -> None:
    """With a scale that is not a power of two, the largest code of each tile above the clamp is the format's maximum: no range is
    wasted."""
    codes, _ = quantize(op, q.x, q.attrs)
    a = tile_max(q.x, q.attrs)
    top = tile_max(values(codes, q.attrs), q.attrs)
    assert np.all(top[a >= 1e-4] == FORMATS[q.attrs["format"]].max)


def scale_is_a_power_of_two(op: Op, q: Asked) -> None:
    """ue8m0 recipes give scales that are powers of two."""
    _, scale = quantize(op, q.x, q.attrs)
    assert np.all(np.frexp(scale)[0] == 0.5)


def scales_with_x(op: Op, q: Asked) -> None:
    """2^j x has the codes of x and 2^j times its scale, away from the clamps. (Recipes that round log2 of the scale may fail it just above
    a power of two, where float32 holds fewer digits of a larger logarithm.)"""
    a = tile_max(q.x, q.attrs)
    mantissa = np.frexp(a.astype(np.float64) / FORMATS[q.attrs["format"]].max)[0]
    tiles = away_from_clamps(a) & (mantissa > 0.5 * (1 + 2.0**-16))
    codes, scale = quantize(op, q.x, q.attrs)
    moved_codes, moved = quantize(op, np.ldexp(q.x, q.power), q.attrs)
    inside = spread(tiles, q.x, q.attrs)
    np.testing.assert_array_equal(moved[tiles], np.ldexp(scale[tiles], q.power))
    np.testing.assert_array_equal(moved_codes[inside], codes[inside])


def is_odd(op: Op, q: Asked) -> None:
    """-x has the scale of x, and its codes with the sign bit turned."""
    codes, scale = quantize(op, q.x, q.attrs)
    turned, same = quantize(op, -q.x, q.attrs)
    fmt = FORMATS[q.attrs["format"]]
    number = ~np.isnan(values(codes, q.attrs)) & ((codes != 0) | fmt.negative_zero)
    np.testing.assert_array_equal(same, scale)
    np.testing.assert_array_equal(turned[number], codes[number] ^ (1 << (fmt.bits - 1)))
    np.testing.assert_array_equal(turned[~number], codes[~number])


def error_is_half_a_unit(op: Op, q: Asked) -> None:
    """|decode(codes) scale - x| is at most half a unit of the code, times the scale.

    The four roundings that a recipe takes at most to x over s are allowed for; and where log2 s is rounded, half a unit of it: for
    |log2 s| < 128 that is 2⁵ eps in the exponent, 22.2 eps in s.
    """
    codes, scale = quantize(op, q.x, q.attrs)
    fmt, s = FORMATS[q.attrs["format"]], spread(scale, q.x, q.attrs).astype(np.float64)
    x = q.x.astype(np.float64)
    roundings = (4 + 22.2 * (RECIPES[q.attrs["recipe"]].power_of_two == "log2")) * float(np.finfo(q.x.dtype).eps)
    usable = (s >= 2.0**-100) & (s <= 2.0**100)  # v3-unclamped alone goes further, where x/s leaves the normal numbers
    s, x, y = s[usable], x[usable], values(codes, q.attrs)[usable]
    v = np.abs(x / s) * (1 + roundings)
    unit = np.ldexp(1.0, np.maximum(np.frexp(v)[1] - 1, fmt.emin) - fmt.mantissa_bits)
    assert np.all(np.abs(y * s - x) <= s * (unit / 2 + roundings * v))


def tiles_are_independent(op: Op, q: Asked) -> None:
    """What changes in one tile changes that tile's codes and scale alone."""
    codes, scale = quantize(op, q.x, q.attrs)
    which = np.zeros(scale.shape, dtype=bool)
    which.reshape(-1)[q.seed % scale.size] = True
    changed = spread(which, q.x, q.attrs)
    other_codes, other = quantize(op, np.where(changed, q.x * 3 + 1, q.x).astype(q.x.dtype), q.attrs)
    np.testing.assert_array_equal(other[~which], scale[~which])
    np.testing.assert_array_equal(other_codes[~changed], codes[~changed])


def axes_are_transposes(op: Op, q: Asked) -> None:
    """axis=0 of x is axis=1 of xᵀ, transposed."""
    codes, scale = quantize(op, q.x, {**q.attrs, "axis": 0})
    turned, same = quantize(op, np.ascontiguousarray(q.x.T), {**q.attrs, "axis": 1})
    np.testing.assert_array_equal(turned.T, codes)
    np.testing.assert_array_equal(same.T, scale)


def zero_tiles_are_zeros(op: Op, q: Asked) -> None:
    """A tile of zeros has codes of zeros and a scale that is positive; v3-unclamped alone has NaN codes and the scale 0 (0/0)."""
    which = np.zeros(quantize(QUANTIZE, q.x, q.attrs)[1].shape, dtype=bool)
    which.reshape(-1)[q.seed % which.size] = True
    zeros = spread(which, q.x, q.attrs)
    codes, scale = quantize(op, np.where(zeros, q.x.dtype.type(0), q.x), q.attrs)
    if q.attrs["recipe"] == "v3-unclamped":
        assert np.all(codes[zeros] == (FORMATS[q.attrs["format"]].nan_code or 0))  # e2m1 has none
        assert np.all(scale[which] == 0)
    else:
        assert not np.any(codes[zeros])
        assert np.all(scale[which] > 0)


def returns_codes_that_fit(op: Op, q: Asked) -> None:
    """With a power-of-two scale given, quantising what those codes mean gives them back, and the scale."""
    fmt, n, d = FORMATS[q.attrs["format"]], *q.x.shape
    source = Source(f"codes {q.seed}")
    codes = source.integers((n, d), 0, fmt.max_code + 1)
    sign = source.integers((n, d), 0, 2) * ((codes > 0) | fmt.negative_zero)
    codes = (codes + sign * 2 ** (fmt.bits - 1)).astype(fmt.code_dtype)
    tiles = quantize(QUANTIZE, q.x, q.attrs)[1].shape
    scale = np.ldexp(1.0, source.integers(tiles, -20, 20)).astype(q.x.dtype)
    x = (values(codes, q.attrs) * spread(scale, q.x, q.attrs)).astype(q.x.dtype)
    back, same = quantize(op, x, q.attrs, scale=scale)
    np.testing.assert_array_equal(same, scale)
    if RECIPES[q.attrs["recipe"]].value != "x*(M/a)":  # these never look at the scale
        np.testing.assert_array_equal(back, codes)


def dequantises_linearly(op: Op, q: Asked) -> None:
    """Code values times scale: a scale of 1 gives the values, 2^j times the scale gives 2^j times the numbers."""
    codes, scale = quantize(QUANTIZE, q.x, {**q.attrs, "recipe": "v3"})
    attrs = {name: q.attrs[name] for name in ("tile", "axis", "format")}
    np.testing.assert_array_equal(op.fwd(codes, np.ones_like(scale), **attrs)[0], values(codes, attrs).astype(scale.dtype))
    np.testing.assert_array_equal(op.fwd(codes, np.ldexp(scale, q.power), **attrs)[0], np.ldexp(op.fwd(codes, scale, **attrs)[0], q.power))


def bug(op: Op, id: str) -> Op:
    return next(b for b in bugs_of(op, "forward") if b.id == id).variant(op)


def mutant(change: Callable[[tuple[np.ndarray, ...], dict[str, Any]], Any], op: Op = QUANTIZE) -> Op:
    """The op with x or its attributes changed first."""

    def fwd(*arrays: np.ndarray, **attrs: Any) -> Any:
        return change(arrays, attrs)

    fwd.sig = op.sig  # type: ignore[attr-defined]
    return replace(op, fwd=fwd)


def run(arrays: tuple, attrs: dict, **changed: Any) -> Any:
    return QUANTIZE.fwd(*arrays, **{**attrs, **changed})


signed_max = mutant(lambda a, attrs: run(a, attrs, scale=quantize(QUANTIZE, np.clip(a[0], 0, None), attrs)[1]))
padded_scale = mutant(lambda a, attrs: run(a, attrs, scale=quantize(QUANTIZE, a[0], attrs)[1] + a[0].dtype.type(1e-6)))
one_axis = mutant(lambda a, attrs: run(a, attrs, axis=1))
unclamped = mutant(lambda a, attrs: run(a, attrs, recipe="v3-unclamped"))
linear = mutant(lambda a, attrs: run(a, attrs, recipe="v3"))
own_scale = mutant(lambda a, attrs: QUANTIZE.fwd(*a, **{k: v for k, v in attrs.items() if k != "scale"}))

FACTS: list[tuple[Callable[[Op, Asked], None], Op, list[str]]] = [
    (reaches_the_maximum, bug(QUANTIZE, "fp8-max-wrong"), LINEAR),
    (scale_is_a_power_of_two, linear, UE8M0),
    (scales_with_x, padded_scale, list(RECIPES)),
    (is_odd, signed_max, list(RECIPES)),
    (error_is_half_a_unit, bug(QUANTIZE, "fp8-scale-exponent-floor"), list(RECIPES)),
    (error_is_half_a_unit, bug(QUANTIZE, "scale-inverted"), list(RECIPES)),
    (tiles_are_independent, bug(QUANTIZE, "fp8-scale-per-row"), list(RECIPES)),
    (axes_are_transposes, one_axis, list(RECIPES)),
    (zero_tiles_are_zeros, unclamped, list(RECIPES)),
    (returns_codes_that_fit, own_scale, list(RECIPES)),
    (dequantises_linearly, bug(DEQUANTIZE, "scale-inverted"), list(RECIPES)),
    (dequantises_linearly, bug(DEQUANTIZE, "scale-dropped"), list(RECIPES)),
]
NAMED = {fact: (DEQUANTIZE if fact is dequantises_linearly else QUANTIZE, recipes) for fact, _, recipes in FACTS}


@pytest.mark.parametrize("fact", NAMED, ids=lambda f: f.__name__)
@given(data=st.data())
def test_holds(fact: Callable, data: st.DataObject) -> None:
    """The reference holds the fact, which its own docstring states, in every recipe that it is about."""
    op, recipes = NAMED[fact]
    fact(op, data.draw(asked(recipes)))


@pytest.mark.parametrize(("fact", "broken", "recipes"), FACTS, ids=[f"{fact.__name__}-{i}" for i, (fact, _, _) in enumerate(FACTS)])
def test_kills(fact: Callable, broken: Op, recipes: list[str], killed: Callable) -> None:
    """The fact fails for its mutant on some input."""
    killed(lambda q: fact(broken, q), asked(recipes))
