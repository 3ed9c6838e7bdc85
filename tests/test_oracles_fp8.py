"""The FP8 oracles' own tests: against third parties (ml_dtypes, gfloat, numpy, mmasim) and hand-worked cases, never against `ref`."""

from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from oracles import ORACLES, floats, fp8_gemm, fp8_linear, quantize
from oracles.cast import boundaries, default_overflow, encode_value, mirrored

Arrays = dict[str, np.ndarray]
NEW = ["e4m3fnuz", "e5m2fnuz", "e2m1", "e8m0", "e5m6", "tf32"]
STORED = NEW[:-1]
WITH_SIGN = [name for name in floats.CAST_FORMATS if name != "e8m0"]
LARGEST = {"e4m3fnuz": 240, "e5m2fnuz": 57344, "e2m1": 6, "e8m0": 2.0**127, "e5m6": 65024, "tf32": (2 - 2.0**-10) * 2.0**127}


def call(op: str, direction: str = "forward", /, attrs: dict | None = None, **inputs: np.ndarray) -> Arrays:
    return ORACLES[op, direction](inputs, attrs or {})


def rng() -> np.random.Generator:
    return np.random.default_rng(20260101)


def values_of(name: str) -> list[Fraction]:
    """The non-negative values, ascending, and the first above them; of tf32, whose 2^18 repeat in every binade, the lowest and highest."""
    fmt = floats.CAST_FORMATS[name]
    codes = range(fmt.max_code + 2)
    return [floats.code_fraction(c, fmt) for c in (codes if fmt.bits < 17 else [*codes[:3000], *codes[-3000:]])]


def around(points: list[Fraction], dtype: type) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The points in `dtype`, which holds them, and their neighbours below and above."""
    exact = np.array([float(p) for p in points], dtype)
    return exact, np.nextafter(exact, dtype(0)), np.nextafter(exact, dtype(np.inf))


def middles(name: str) -> list[Fraction]:
    values = values_of(name)
    pairs = [(a, b) for a, b in pairwise(values) if name != "tf32" or b < 2 * a or b < Fraction(2) ** -120]  # not over the gap
    return [(a + b) / 2 for a, b in pairs]


def every_point(name: str, dtype: type = np.float32) -> np.ndarray:
    """Every value, every midpoint, their neighbours, both signs, all bf16 values that are numbers."""
    largest = Fraction(float(np.finfo(dtype).max))
    points = [p for p in (*values_of(name), *middles(name)) if p <= largest]
    x = np.concatenate(around(points, dtype))
    bf16 = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    return np.concatenate([x, -x, bf16[~np.isnan(bf16)].astype(dtype)])


# Codes


def third_party(name: str) -> Any:
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes, the third party for this format, is not installed")
    return {
        "e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
        "e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
        "e2m1": ml_dtypes.float4_e2m1fn,
        "e8m0": ml_dtypes.float8_e8m0fnu,
    }[name]


@pytest.mark.parametrize("name", ["e4m3fnuz", "e5m2fnuz", "e2m1", "e8m0"])
def test_codes_agree_with_ml_dtypes(name: str) -> None:
    """decode of every code, and encode of every value, midpoint and neighbour and of all bf16 values, are ml_dtypes' ones."""
    fmt, dtype = floats.CAST_FORMATS[name], third_party(name)
    codes = np.arange(1 << fmt.bits).astype(np.uint8)
    mine, theirs = call(f"decode.{name}", codes=codes)["x"], codes.view(dtype).astype(np.float32)
    np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_array_equal(np.signbit(mine)[~np.isnan(mine)], np.signbit(theirs)[~np.isnan(theirs)])
    x = every_point(name)
    if name == "e8m0":
        x = x[(x >= 2.0**-126) | (x <= 0)]  # of float32's subnormals ml_dtypes rounds up all that is more than 2^-127, and none of the rest
    with np.errstate(all="ignore"):
        expected = x.astype(dtype).view(np.uint8)
    attrs = {"overflow": "saturate" if name == "e2m1" else "nan"}  # as ml_dtypes has it
    got = call(f"encode.{name}", attrs=attrs, x=x)["codes"]
    np.testing.assert_array_equal(got, expected)
    if name != "e2m1":
        assert call(f"encode.{name}", x=np.array([np.nan, -np.nan], np.float32))["codes"].tolist() == [fmt.nan_code] * 2


def test_e5m6_is_fp16_with_four_bits_dropped() -> None:
    """decode is numpy's reading of the code with four zero bits after it; encode is numpy's float16 where that needs no more bits, and
    a float16's own middle bits decide the ties."""
    codes = np.arange(1 << 12).astype(np.uint16)
    got, want = call("decode.e5m6", codes=codes)["x"], (codes << 4).view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(got, want)
    known = ~np.isnan(want)
    np.testing.assert_array_equal(call("encode.e5m6", x=want)["codes"], np.where(known, codes, 0x7E0))
    bits = np.arange(0x7C00, dtype=np.uint32)  # every finite float16, rounded to nearest even by integers
    x = bits.astype(np.uint16).view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(call("encode.e5m6", x=x)["codes"], (bits + 7 + (bits >> 4 & 1)) >> 4)


def test_tf32_is_float32_with_thirteen_bits_dropped() -> None:
    """cast.tf32 is float32's pattern rounded to nearest even by integers, overflow to infinity; zeros keep their sign, NaN stays."""
    x = np.concatenate([every_point("tf32"), rng().integers(0, 1 << 32, 5000, dtype=np.uint32).view(np.float32)])
    x = x[~np.isnan(x)]
    bits = x.view(np.uint32).astype(np.uint64)
    want = (bits + 0xFFF + (bits >> np.uint64(13) & np.uint64(1)) & ~np.uint64(0x1FFF)).astype(np.uint32)
    np.testing.assert_array_equal(call("cast.tf32", x=x)["y"].view(np.uint32), want)
    assert np.isnan(call("cast.tf32", x=np.array([np.nan]))["y"])
    assert ("encode.tf32", "forward") not in ORACLES


@pytest.mark.parametrize("name", ["e2m1", "e8m0"])
def test_float64_agrees_with_gfloat(name: str) -> None:
    """float64 inputs give gfloat's values, saturating, ties to even (e2m1), away and truncated."""
    gfloat = pytest.importorskip("gfloat", reason="gfloat, the third party for float64 inputs, is not installed")
    formats = pytest.importorskip("gfloat.formats", reason="gfloat, the third party for float64 inputs, is not installed")
    info = {"e2m1": formats.format_info_ocp_e2m1, "e8m0": formats.format_info_ocp_e8m0}[name]
    x = every_point(name, np.float64)
    x = rng().permutation(x if name == "e2m1" else x[(x >= 2.0**-127) & np.isfinite(x)])[:4000]
    modes = {"half-even": "TiesToEven", "half-away": "TiesToAway", "zero": "TowardZero"}
    for rounding, mode in modes.items():
        if rounding == "half-even" and name == "e8m0":
            continue  # gfloat takes the exponent's parity; the contract, as ml_dtypes, the significand's
        got = call(f"cast.{name}", attrs={"rounding": rounding}, x=x)["y"]
        want = np.array([gfloat.round_float(info, v, rnd=gfloat.RoundMode[mode], sat=True) for v in x.tolist()])
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(np.signbit(got), np.signbit(want))


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "bf16", "fp16"])
@pytest.mark.parametrize(("rounding", "mode"), [("half-away", "TiesToAway"), ("zero", "TowardZero")])
def test_roundings_agree_with_gfloat(name: str, rounding: str, mode: str) -> None:
    """The other roundings of the older formats, at values, midpoints and neighbours in float64."""
    gfloat = pytest.importorskip("gfloat", reason="gfloat, the third party for float64 inputs, is not installed")
    formats = pytest.importorskip("gfloat.formats", reason="gfloat, the third party for float64 inputs, is not installed")
    named = {"e4m3fn": "ocp_e4m3", "e5m2": "ocp_e5m2", "bf16": "bfloat16", "fp16": "binary16"}
    info = getattr(formats, f"format_info_{named[name]}")
    x = rng().permutation(every_point(name, np.float64))[:4000]
    got = call(f"cast.{name}", attrs={"rounding": rounding, "overflow": "saturate"}, x=x)["y"]
    want = np.array([gfloat.round_float(info, v, rnd=gfloat.RoundMode[mode], sat=True) for v in x.tolist()])
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(np.signbit(got), np.signbit(want))


@pytest.mark.parametrize("name", list(floats.CAST_FORMATS))
@pytest.mark.parametrize("rounding", [*floats.ROUNDINGS])
def test_midpoints_split_the_neighbours(name: str, rounding: str) -> None:
    """A midpoint of neighbours goes to the even one, up or down, as the rounding says; a unit off it, to the nearer one, or down if
    truncated. Both signs, from float64; e8m0 has all its ties up under half-even."""
    fmt = floats.CAST_FORMATS[name]
    codes = range(fmt.max_code) if fmt.bits < 13 else [*range(1200), *range(fmt.max_code - 1200, fmt.max_code)]
    low, high = ([floats.code_fraction(c + i, fmt) for c in codes] for i in (0, 1))
    down, up = np.array([float(v) for v in low]), np.array([float(v) for v in high])
    even = [name == "e8m0" or c % 2 for c in codes]  # the upper one is
    tie = {"half-even": np.where(even, up, down), "half-away": up}.get(rounding, down)
    exact, below, above = around([(a + b) / 2 for a, b in zip(low, high, strict=True)], np.float64)
    for x, want in ((exact, tie), (below, down), (above, down if rounding == "zero" else up), (down, down), (up, up)):
        if name == "e8m0":
            x, want = x[x >= 2.0**-127], want[x >= 2.0**-127]
        got = call(f"cast.{name}", attrs={"rounding": rounding}, x=x)["y"]
        np.testing.assert_array_equal(got, want)
        if name != "e8m0":
            mirror = call(f"cast.{name}", attrs={"rounding": rounding}, x=-x)["y"]
            np.testing.assert_array_equal(mirror, -want)
            np.testing.assert_array_equal(np.signbit(mirror), (want != 0) | fmt.negative_zero)


@pytest.mark.parametrize("name", list(floats.CAST_FORMATS))
def test_stochastic_rounding_goes_up_below_the_fraction(name: str) -> None:
    """x between neighbours v < w goes to w where random < (x - v)/(w - v), exactly, and is v where they are equal; so too in overflow."""
    fmt = floats.CAST_FORMATS[name]
    codes = [*rng().integers(0, fmt.max_code, 200).tolist(), 0, fmt.max_code]
    kept = 40 - fmt.mantissa_bits
    fractions = [Fraction(int(k), 1 << kept) for k in rng().integers(1, 1 << kept, 200)] + [Fraction(1, 4), Fraction(3, 4)]
    low, high = ([floats.code_fraction(c + i, fmt) for c in codes] for i in (0, 1))
    x = np.array([float(v + f * (w - v)) for v, w, f in zip(low, high, fractions, strict=True)])
    at = np.array([float(f) for f in fractions])
    down, up = np.array([float(v) for v in low]), np.array([float(w) for w in high])
    over = {"saturate": down[-1], "nan": np.inf if fmt.inf_code is not None else np.nan}
    for overflow in ["saturate"] if name == "e2m1" else ["saturate", "nan"]:
        up[-1] = over[overflow]
        for random, want in ((at, down), (np.nextafter(at, 0), up), (np.zeros_like(at), up), (np.full_like(at, 1 - 2.0**-53), down)):
            attrs = {"rounding": "stochastic", "overflow": overflow}
            np.testing.assert_array_equal(call(f"cast.{name}", attrs=attrs, x=x, random=random)["y"], want)
        exact = call(f"cast.{name}", attrs=attrs, x=down[:-1], random=np.zeros(len(down) - 1))["y"]
        np.testing.assert_array_equal(exact, down[:-1])


@pytest.mark.parametrize("name", NEW)
def test_overflow(name: str) -> None:
    """The largest value is the contract's; what rounds beyond it saturates or is an infinity or NaN; truncation never overflows but
    for infinities; the defaults are the contract's."""
    fmt, top = floats.CAST_FORMATS[name], LARGEST[name]
    assert floats.decode(fmt.max_code, fmt) == top
    step = top - floats.decode(fmt.max_code - 1, fmt) if name != "e8m0" else top
    tie = top + step / 2  # the largest code is odd in e2m1 (111) and in all others but e4m3fn; e8m0's tie goes up
    x = np.array([np.nextafter(tie, 0), tie, 2 * top, np.inf])
    lost = np.inf if fmt.inf_code is not None else np.nan

    def cast(**attrs: str) -> list[float]:
        return call(f"cast.{name}", attrs=attrs, x=x)["y"].tolist()

    assert cast(overflow="saturate") == [top] * 4
    assert default_overflow(name) == ("nan" if name in ("e5m6", "tf32") else "saturate")
    if name == "e2m1":
        for op in ("cast.e2m1", "encode.e2m1"):
            with pytest.raises(ValueError, match="overflow"):
                call(op, attrs={"overflow": "nan"}, x=x)
            with pytest.raises(ValueError, match="nan"):
                call(op, x=np.array([1.0, np.nan]))
        return
    np.testing.assert_array_equal(cast(overflow="nan"), [top, lost, lost, lost])
    np.testing.assert_array_equal(cast(overflow="nan", rounding="half-zero"), [top, top, lost, lost])
    np.testing.assert_array_equal(cast(overflow="nan", rounding="zero"), [top, top, top, lost])
    np.testing.assert_array_equal(cast(overflow="saturate", rounding="zero"), [top] * 4)
    np.testing.assert_array_equal(cast(), cast(overflow=default_overflow(name)))


def test_signs_of_the_formats_without_a_negative_zero() -> None:
    """fnuz: -0 and what rounds to it are code 0 and +0, NaN alone is 0x80. e8m0: zeros, negative numbers and NaN are 0xff, all that is
    positive and small is 2^-127."""
    x = np.array([-0.0, -1e-30, 1e-30, np.nan, -np.inf, -3.0], np.float32)
    for name, three in (("e4m3fnuz", 0xCC), ("e5m2fnuz", 0xC6)):
        assert call(f"encode.{name}", attrs={"overflow": "nan"}, x=x)["codes"].tolist() == [0, 0, 0, 0x80, 0x80, three]
        assert call(f"encode.{name}", attrs={"overflow": "saturate"}, x=x)["codes"].tolist() == [0, 0, 0, 0x80, 0xFF, three]
        assert not np.signbit(call(f"cast.{name}", x=x)["y"][:3]).any()
    small = np.array([0.0, -0.0, -1.0, -np.inf, np.nan, 1e-45, 2.0**-128, 2.0**-127, 1.5 * 2.0**-127, 3e38, np.inf], np.float32)
    for rounding, tie, high in (("half-even", 1, 254), ("half-zero", 0, 254), ("zero", 0, 254)):
        got = call("encode.e8m0", attrs={"rounding": rounding}, x=small)["codes"].tolist()
        assert got == [255] * 5 + [0, 0, 0, tie, high, 254]
    assert call("encode.e8m0", attrs={"overflow": "nan"}, x=small)["codes"].tolist()[-2:] == [255, 255]


def test_refusals_of_random_and_of_wide_codes() -> None:
    """Stochastic rounding needs numbers of [0, 1), others refuse them; codes beyond the format's bits are refused."""
    x = np.ones(2)
    for random in (None, np.array([0.5, 1.0]), np.array([0.5, np.nan]), np.array([-1e-9, 0.0]), np.zeros(3)):
        with pytest.raises(ValueError, match="random"):
            call("cast.e4m3fn", attrs={"rounding": "stochastic"}, x=x, **({} if random is None else {"random": random}))
    with pytest.raises(ValueError, match="random"):
        call("cast.e4m3fn", x=x, random=np.zeros(2))
    with pytest.raises(ValueError, match="rounding"):
        call("cast.e4m3fn", attrs={"rounding": "up"}, x=x)
    with pytest.raises(ValueError, match=r"\[1\] is 16"):
        call("decode.e2m1", codes=np.array([15, 16], np.uint8))
    with pytest.raises(ValueError, match="4096"):
        call("decode.e5m6", codes=np.array([4096], np.uint16))
    with pytest.raises(ValueError, match="uint16"):
        call("decode.e5m6", codes=np.array([1], np.uint8))


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("overflow", ["saturate", "nan"])
def test_boundaries_agree_with_encode(name: str, overflow: str) -> None:
    """The staircase, and its mirror, are the per-element codes on every threshold and its neighbours and on random patterns."""
    if name == "e2m1" and overflow == "nan":
        return
    fmt = floats.CAST_FORMATS[name]
    thresholds, codes = boundaries(name, overflow)
    steps = thresholds.view(np.uint32)
    assert steps[0] == 0
    assert (np.diff(steps.astype(np.int64)) > 0).all()
    near = np.concatenate([steps, steps + 1, steps[1:] - 1, [0x7F80_0000, 0x7F7F_FFFF, 1]]).astype(np.uint32)
    p = np.concatenate([rng().permutation(near)[:6000], rng().integers(0, 0x7F80_0001, 2000, dtype=np.uint32)])
    expected = codes[np.searchsorted(steps, p, side="right") - 1]

    def encoded(patterns: np.ndarray) -> list[int]:
        return [encode_value(v, fmt, overflow) for v in patterns.view(np.float32).tolist()]

    np.testing.assert_array_equal(encoded(p), expected)
    np.testing.assert_array_equal(encoded(p | np.uint32(1 << 31)), mirrored(name, expected))


# Quantisers


def test_te_recipes_are_numpys_float32() -> None:
    """te: i = MAX/a, s = 1/i, v = x i; te-ue8m0: i rounded down to a power of two first. numpy's float32, on normal rows."""
    x = (rng().standard_normal((40, 96)) * np.exp(rng().uniform(-30, 30, (40, 1)))).astype(np.float32)
    i = np.float32(448) / np.abs(x).max(1, keepdims=True)
    for recipe, factor in (("te", i), ("te-ue8m0", np.exp2(np.floor(np.log2(i.astype(np.float64)))).astype(np.float32))):
        got = call("fp8.quantize_tile", attrs={"recipe": recipe}, x=x)
        np.testing.assert_array_equal(got["scale"], np.float32(1) / factor)
        want = call("encode.e4m3fn", x=(x * factor).ravel())["codes"].reshape(x.shape)
        np.testing.assert_array_equal(got["codes"], want)


def test_te_recipes_at_the_edges() -> None:
    """A tile of zeros or with an infinity has the scale 1, the infinity saturates. Where 448/a is beyond float32's largest that is taken
    (s = 2^-128 truncated to its grid, by 1/largest), or 2^127."""
    rows = [[0.0, -0.0, 0.0], [1.0, -np.inf, 500.0], [2.0**-149, -(2.0**-148), 0.0]]
    x = np.array(rows, np.float32)
    got = call("fp8.quantize_tile", attrs={"recipe": "te"}, x=x)
    largest = np.finfo(np.float32).max
    assert got["scale"].ravel().tolist() == [1.0, 1.0, float(np.float32(1) / largest)]
    want = np.array([[0, 0x80, 0], [0x38, 0xFE, 0x7E], [0, 0x80, 0]], np.uint8)
    np.testing.assert_array_equal(got["codes"], want)
    got = call("fp8.quantize_tile", attrs={"recipe": "te-ue8m0"}, x=x)
    assert got["scale"].ravel().tolist() == [1.0, 1.0, 2.0**-127]
    np.testing.assert_array_equal(got["codes"], want)
    tiny = np.array([[2.0**-127]], np.float32)  # 448 * 2^127 is too large; 2^-127 * 2^127 is 1
    assert call("fp8.quantize_tile", attrs={"recipe": "te-ue8m0"}, x=tiny)["codes"].tolist() == [[0x38]]


def test_mxfp4_by_hand() -> None:
    """Maximum 6 gives the scale 1, a unit more 2; 6*2^-126 is the clamp: scale 2^-126, where zero rows end too. Ties by the rounding."""
    attrs = {"recipe": "mxfp4", "format": "e2m1", "tile": 32}
    ties = np.array([[6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -0.75]], np.float32)
    got = call("fp8.quantize_tile", attrs=attrs, x=ties)
    assert got["scale"].tolist() == [[1.0]]
    assert got["codes"].tolist() == [[7, 0, 2, 2, 4, 4, 6, 6, 8, 10]]
    down = call("fp8.quantize_tile", attrs={**attrs, "rounding": "half-zero"}, x=ties)["codes"]
    assert down.tolist() == [[7, 0, 1, 2, 3, 4, 5, 6, 8, 9]]
    x = (rng().standard_normal((40, 32)) * np.exp(rng().uniform(-80, 80, (40, 1)))).astype(np.float32)
    got = call("fp8.quantize_tile", attrs=attrs, x=x)
    fraction, exponent = np.frexp(np.abs(x).max(1, keepdims=True) * (np.float32(1) / np.float32(6)))
    np.testing.assert_array_equal(got["scale"], np.ldexp(np.float32(1), exponent - (fraction == 0.5)))
    want = call("encode.e2m1", x=(x / got["scale"]).ravel())["codes"].reshape(x.shape)
    np.testing.assert_array_equal(got["codes"], want)
    rows = np.array([[np.nextafter(np.float32(6), np.float32(7))], [0.0], [1e-45], [6 * 2.0**-126]], np.float32)
    assert call("fp8.quantize_tile", attrs=attrs, x=rows)["scale"].ravel().tolist() == [2.0, 2.0**-126, 2.0**-126, 2.0**-126]
    with pytest.raises(ValueError, match="nan"):
        call("fp8.quantize_tile", attrs={"format": "e2m1", "recipe": "v3-unclamped"}, x=np.zeros((1, 2)))  # 0/0 has no code


@pytest.mark.parametrize("name", quantize.FORMATS)
@pytest.mark.parametrize("recipe", ["v3", "deepep", "v32-ue8m0", "te"])
def test_blocks_are_tiles_laid_flat(name: str, recipe: str) -> None:
    """A block's codes and scale are those of the tile that its elements make in a row; both dequantise to decode * scale in numpy."""
    w = (rng().standard_normal((7, 11)) * np.exp(rng().uniform(-8, 8, (7, 1)))).astype(np.float32)
    attrs = {"recipe": recipe, "format": name}
    got = call("fp8.quantize_block", attrs={**attrs, "block": 4}, w=w)
    assert got["scale"].shape == (2, 3)
    assert got["codes"].dtype == (np.uint16 if name == "e5m6" else np.uint8)
    for i, j in np.ndindex(2, 3):
        place = slice(4 * i, 4 * i + 4), slice(4 * j, 4 * j + 4)
        flat = call("fp8.quantize_tile", attrs=attrs, x=w[place].reshape(1, -1))
        np.testing.assert_array_equal(got["codes"][place].ravel(), flat["codes"][0])
        assert got["scale"][i, j] == flat["scale"][0, 0]
    back = call("fp8.dequantize_block", attrs={"block": 4, "format": name}, **got)["w"]
    wide = np.repeat(np.repeat(got["scale"], 4, 0), 4, 1)[:7, :11]
    decoded = call(f"decode.{name}", codes=got["codes"].ravel())["x"].reshape(w.shape)
    np.testing.assert_array_equal(back, decoded * wide)
    amax = wide * np.float32(LARGEST.get(name, {"e4m3fn": 448, "e5m2": 57344}.get(name)))
    assert np.all(np.abs(back - w) <= amax / 5.99)  # half of the widest gap, e2m1's from 4 to 6


def test_quantisers_refuse_wrong_sizes() -> None:
    for op, attrs in (("fp8.quantize_tile", {"tile": 0}), ("fp8.quantize_tile", {"axis": 2}), ("fp8.quantize_tile", {"format": "e8m0"})):
        with pytest.raises(ValueError):
            call(op, attrs=attrs, x=np.zeros((2, 2)))
    with pytest.raises(ValueError, match="block"):
        call("fp8.quantize_block", attrs={"block": 0}, w=np.zeros((2, 2)))
    with pytest.raises(ValueError, match="shape"):
        call("fp8.dequantize_block", codes=np.zeros((129, 2), np.uint8), scale=np.ones((1, 1)))


# Packing


def test_packing_agrees_with_numpys_bits() -> None:
    """e2m1: np.unpackbits, little first. e5m6: np.packbits, big first, read as big-endian words. unpack is the inverse."""
    codes = rng().integers(0, 16, (3, 10), dtype=np.uint8)
    packed = call("pack.e2m1", codes=codes)["packed"]
    bits = np.unpackbits(packed, axis=1, bitorder="little").reshape(3, 10, 8 // 2)
    np.testing.assert_array_equal(np.packbits(bits, axis=2, bitorder="little")[..., 0], codes)
    np.testing.assert_array_equal(call("unpack.e2m1", packed=packed)["codes"], codes)
    assert call("pack.e2m1", codes=np.array([[0x3, 0xA]], np.uint8))["packed"].tolist() == [[0xA3]]
    codes = rng().integers(0, 4096, (3, 16), dtype=np.uint16)
    packed = call("pack.e5m6", codes=codes)["packed"]
    bits = np.unpackbits(codes[..., None].byteswap().view(np.uint8), axis=2)[..., 4:]
    np.testing.assert_array_equal(packed, np.packbits(bits.reshape(3, -1), axis=1).view(">u4"))
    assert packed.dtype == np.uint32
    np.testing.assert_array_equal(call("unpack.e5m6", packed=packed)["codes"], codes)
    for op, shape in (("pack.e2m1", (0, 4)), ("pack.e5m6", (0, 8))):
        codes = np.zeros(shape, np.uint8 if op == "pack.e2m1" else np.uint16)
        packed = call(op, codes=codes)["packed"]
        np.testing.assert_array_equal(call(f"un{op}", packed=packed)["codes"], codes)
        with pytest.raises(ValueError, match="multiple"):
            call(op, codes=np.zeros((1, 3), codes.dtype))
        with pytest.raises(ValueError, match="bits"):
            call(op, codes=np.full((1, 8), 4096 if op == "pack.e5m6" else 16, codes.dtype))


# Products


def codes_of(kind: str, n: int, d: int, top: int) -> np.ndarray:
    """Codes of e4m3 (top 0x7e) or e5m2 (top 0x7b): of one kind of number."""
    r = rng()
    sign = r.integers(0, 2, (n, d)) * 128
    if kind in ("gaussian", "positive"):
        name = "e4m3fn" if top == 0x7E else "e5m2"
        codes = call(f"encode.{name}", x=(r.standard_normal((n, d)) * 100).ravel())["codes"].reshape(n, d).astype(np.int64)
        return (codes & 0x7F if kind == "positive" else codes).astype(np.uint8)
    magnitude = {
        "subnormal": lambda: np.where(r.integers(0, 16, (n, d)) == 0, top - r.integers(0, 9, (n, d)), r.integers(0, 9, (n, d))),
        "small": lambda: r.integers(0, 4, (n, d)),
        "zero": lambda: np.zeros((n, d), np.int64),
        "every": lambda: r.integers(0, top + 1, (n, d)),
        "spread": lambda: np.where(r.integers(0, 2, (n, d)) == 0, top - r.integers(0, 3, (n, d)), 1 + r.integers(0, 3, (n, d))),
        "nan": lambda: np.where(r.integers(0, 8 * d, (n, d)) == 0, 0x7F, r.integers(0, top + 1, (n, d))),
    }[kind]()
    return (magnitude + sign).astype(np.uint8)


KINDS = ["gaussian", "positive", "subnormal", "small", "zero", "every", "spread", "nan"]


def part_of(a: np.ndarray, b: np.ndarray, accumulator: str, name: str = "e4m3fn") -> np.ndarray:
    """One part as long as d: the accumulator's own result."""
    ones = np.ones((len(a), 1), np.float32), np.ones((len(b), 1), np.float32)
    attrs = {"accumulator": accumulator, "tile": a.shape[1], "promote": 0, "format": name}
    inputs = {"a_codes": a, "a_scale": ones[0], "b_codes": b, "b_scale": ones[1]}
    y = call("fp8.gemm", attrs=attrs, **inputs)["y"]
    np.testing.assert_array_equal(y, fp8_gemm.gemm_in_float32(inputs, attrs))  # a float32 already
    return y


def simulated(a: np.ndarray, b: np.ndarray, accumulator: str, name: str) -> np.ndarray:
    ptx = pytest.importorskip("mmasim.nv_ptx", reason="mmasim, the third party for tensor cores, is not installed")
    torch = pytest.importorskip("torch", reason="torch, which mmasim needs, is not installed")
    e = {"e4m3fn": "e4m3", "e5m2": "e5m2"}[name]
    engine = (
        ptx.WGMMA("Hopper", f"m64n8k32.f32.{e}.{e}") if accumulator == "wgmma13" else ptx.MMA("RTX Blackwell", f"m16n8k32.f32.{e}.{e}.f32")
    )
    dtype = {"e4m3fn": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[name]
    x, y = (torch.from_numpy(v).view(dtype) for v in (a, b))
    c = torch.zeros((len(a), len(b)), dtype=torch.float32)
    shape = (len(a), len(b), a.shape[1])
    return engine.dpa(x[:, None].expand(shape), y[None].expand(shape), c).numpy()  # 32 products at a time


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["e4m3fn", "e5m2"])
@pytest.mark.parametrize("accumulator", ["wgmma13", "mma25"])
def test_accumulators_agree_with_mmasim(accumulator: str, name: str, kind: str) -> None:
    """Bit for bit, over 12 groups and a ragged one, on every kind of codes and where half of the products cancel the other half."""
    top = 0x7E if name == "e4m3fn" else 0x7B
    a, b = codes_of(kind, 12, 400, top), codes_of(kind, 12, 416, top)[::-1, :400]
    back = np.concatenate([a, a ^ 0x80], axis=1), np.concatenate([b, b], axis=1)
    last = np.concatenate([a[:, :64], a[:, :64] ^ 0x80, a[:, :32]], axis=1), np.concatenate([b[:, :128], b[:, :32]], axis=1)
    for x, y in ((a, b), back, last):
        x, y = np.ascontiguousarray(x), np.ascontiguousarray(y)
        got, want = part_of(x, y, accumulator, name), simulated(x, y, accumulator, name)
        np.testing.assert_array_equal(got, want)
        if kind == "nan":
            assert 0 < np.isnan(got).sum() < got.size


@pytest.mark.parametrize("wrong", ["fraction", "kept", "round", "order", "zeros"])
def test_planted_accumulator_errors_are_noticed(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a wrong number of bits, rounding to nearest, accumulating outside the group or an exponent of zero's, mmasim disagrees."""
    right = fp8_gemm.step

    def step(c: tuple[int, int], terms: list[tuple[int, int, int]], fraction: int, kept: int) -> tuple[int, int]:
        if wrong == "order":  # the products alone, then the accumulator
            m, q = right((0, 0), terms, fraction, kept)
            return right(c, [(m, q, fp8_gemm._exponent(m, q))], fraction, kept)
        if wrong == "zeros":
            terms = [(m, q, e) if m else (1, q - 60, e) for m, q, e in terms]
        return right(c, terms, fraction - (wrong == "fraction"), kept - (wrong == "kept"))

    def nearest(m: int, shift: int) -> int:
        return m << shift if shift >= 0 else (m + (1 << -shift - 1)) >> -shift

    monkeypatch.setattr(fp8_gemm, "step", step)
    if wrong == "round":
        monkeypatch.setattr(fp8_gemm, "_toward_zero", nearest)
    a, b = codes_of("every", 12, 128, 0x7E), codes_of("gaussian", 12, 128, 0x7E)
    if wrong == "zeros":
        a[:, ::2], b[:, 1::2] = codes_of("small", 12, 64, 0x7E), 0x7E  # the other factor of a zero is large
        a[:, 1::2] = 0
    assert (part_of(a, b, "wgmma13") != simulated(a, b, "wgmma13", "e4m3fn")).any()


def test_accumulator_by_hand() -> None:
    """256 + 2^-5 keeps 13 bits below 2^8; 2^-6 goes. Products are not renormalised: 1.5*1.5 aligns as 2^0. Truncation is toward zero."""

    def one(a: list[float], b: list[float], accumulator: str) -> float:
        codes = [call("encode.e4m3fn", x=np.array(v, np.float32))["codes"][None] for v in (a, b)]
        return float(part_of(codes[0], codes[1], accumulator)[0, 0])

    assert one([256, 2.0**-5], [1, 1], "wgmma13") == 256 + 2.0**-5
    assert one([256, 2.0**-6], [1, 1], "wgmma13") == 256
    assert one([-256, -(2.0**-6) * 1.5], [1, 1], "wgmma13") == -256
    assert one([256, 2.0**-6, 2.0**-6], [1, 1, 1], "wgmma13") == 256  # each is cut, not their sum
    assert one([256] + [2.0**-6] * 2, [1] * 3, "mma25") == 256 + 2.0**-5
    few = [1.5, 1.5, 1.5 * 2.0**-6], [1.5, -1.25, 2.0**-8]  # 2.25 - 1.875 + 1.5 * 2^-14, in units of 2^-14: 2.25 aligns as 2^0, not 2^1
    assert one(*few, "bits:14") == 0.375 + 2.0**-14
    assert one(*few, "bits:13") == 0.375
    assert one([1.5, 1.0], [1.0, 0.25], "bits:1") == 1.5
    assert one([448, 448], [448, -448], "bits:1") == 0.0
    assert one([256] + [0] * 31 + [2.0**-6], [1] * 33, "wgmma13") == 256  # the accumulator aligns the next group
    assert one([256] + [0] * 31 + [-256, 2.0**-9], [1] * 34, "wgmma13") == 0.0
    assert one([256] + [0] * 31 + [-256] + [0] * 31 + [2.0**-9], [1] * 65, "wgmma13") == 2.0**-9
    for wrong in ("bits:0", "bits:31", "bits:", "bits:1.5", "fp64", ""):
        with pytest.raises(ValueError, match="accumulator"):
            one([1.0], [1.0], wrong)


def gemm_inputs(n: int, o: int, d: int, tile: int, blocks: bool, name: str = "e4m3fn") -> Arrays:
    r = rng()
    fmt, dtype = floats.CAST_FORMATS[name], np.uint16 if name == "e5m6" else np.uint8
    codes = [(r.integers(0, fmt.max_code + 1, (rows, d)) | r.integers(0, 2, (rows, d)) * fmt.sign_bit).astype(dtype) for rows in (n, o)]
    if not fmt.negative_zero:
        codes = [np.where(c == fmt.nan_code, c * 0, c) for c in codes]
    scale = [np.exp2(r.uniform(-9, -5, (rows, -(-d // tile)))).astype(np.float32) for rows in (n, -(-o // 128) if blocks else o)]
    return {"a_codes": codes[0], "a_scale": scale[0], "b_codes": codes[1], "b_scale": scale[1]}


def dequantised(inputs: Arrays, tile: int, blocks: bool, name: str) -> tuple[np.ndarray, np.ndarray]:
    d = inputs["a_codes"].shape[1]
    values = [
        call(f"decode.{name}", codes=inputs[c].ravel())["x"].reshape(inputs[c].shape).astype(np.float64) for c in ("a_codes", "b_codes")
    ]
    b_scale = np.repeat(inputs["b_scale"], 128, 0)[: len(inputs["b_codes"])] if blocks else inputs["b_scale"]
    return values[0] * np.repeat(inputs["a_scale"], tile, 1)[:, :d], values[1] * np.repeat(b_scale, tile, 1)[:, :d]


@pytest.mark.parametrize("name", quantize.FORMATS)
@pytest.mark.parametrize("blocks", [True, False])
def test_gemm_is_the_product_of_what_is_dequantised(name: str, blocks: bool) -> None:
    """accumulator="exact" is numpy's float64 product of decode * scale, whatever the parts; mma25 is near it, wgmma13 less so."""
    inputs = gemm_inputs(3, 131, 70, 32, blocks, name)
    a, b = dequantised(inputs, 32, blocks, name)
    size = np.abs(a) @ np.abs(b).T
    for attrs in ({}, {"promote": 8}, {"promote": 0, "scale_order": "product first"}, {"accumulator": "fp32", "promote": 1}):
        y = call("fp8.gemm", attrs={"accumulator": "exact", "tile": 32, "promote": 32, "format": name, **attrs}, **inputs)["y"]
        assert y.dtype == np.float64
        assert np.all(np.abs(y - a @ b.T) <= 1e-14 * size)
    errors = []
    for accumulator in ("mma25", "wgmma13"):
        y = call("fp8.gemm", attrs={"accumulator": accumulator, "tile": 32, "promote": 32, "format": name}, **inputs)["y"]
        errors.append(float(np.max(np.abs(y - a @ b.T) / size)))
    assert 0 <= errors[0] < 2.0**-22
    assert errors[0] <= errors[1] < 2.0**-8
    if name == "e4m3fn":
        assert 0 < errors[0] < errors[1]
    narrow = call("fp8.gemm", attrs={"accumulator": "exact", "tile": 32, "promote": 32, "format": name, "out": "bf16"}, **inputs)["y"]
    full = call("fp8.gemm", attrs={"accumulator": "exact", "tile": 32, "promote": 32, "format": name}, **inputs)["y"]
    np.testing.assert_array_equal(narrow, call("cast.bf16", x=full.ravel())["y"].reshape(full.shape))


@pytest.mark.parametrize("order", ["one by one", "product first"])
@pytest.mark.parametrize("out", ["fp32", "bf16"])
def test_promotion_is_numpys_float32(order: str, out: str) -> None:
    """gemm_in_float32 promotes each part as numpy's float32 operations do, in the contract's order; the truth is near, not equal."""
    inputs = gemm_inputs(4, 130, 160, 64, blocks=True)
    attrs = {"accumulator": "wgmma13", "tile": 64, "promote": 32, "scale_order": order, "out": out}
    y = np.zeros((4, 130), np.float32)
    rows = inputs["b_scale"].repeat(128, 0)[:130]
    for start in range(0, 160, 32):
        dot = part_of(inputs["a_codes"][:, start : start + 32], inputs["b_codes"][:, start : start + 32], "wgmma13").astype(np.float32)
        sa, sb = inputs["a_scale"][:, start // 64, None], rows[None, :, start // 64]
        y = y + (dot * sa * sb if order == "one by one" else dot * (sa * sb))
    if out == "bf16":
        y = call("cast.bf16", x=y.ravel())["y"].reshape(y.shape)
    got = fp8_gemm.gemm_in_float32(inputs, attrs)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, y)
    truth = call("fp8.gemm", attrs=attrs, **inputs)["y"]
    np.testing.assert_allclose(got, truth, rtol=2.0**-7 if out == "bf16" else 1e-4, atol=1e-6 * np.abs(truth).max())
    other = fp8_gemm.gemm_in_float32(inputs, {**attrs, "scale_order": "product first" if order == "one by one" else "one by one"})
    assert out == "bf16" or (got != other).any()


def test_addition_agrees_with_numpy() -> None:
    """floats.add equals the machine's float32 sum on random patterns, near cancellations and special values, zeros' signs included."""
    a = rng().integers(0, 1 << 32, 6000, dtype=np.uint32).view(np.float32)
    b = rng().permutation(a)
    b[:2000] = (a[:2000].view(np.uint32) + 1 ^ 1 << 31).view(np.float32)  # the next number, negated
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0, 3.4e38, 1e-45], np.float32)
    u, v = (np.concatenate([x, m.ravel()]) for x, m in zip((a, b), np.meshgrid(special, special), strict=True))
    got = np.array([floats.add(x, y, floats.BINARY32) for x, y in zip(u.tolist(), v.tolist(), strict=True)], np.float32)
    with np.errstate(all="ignore"):
        want = u + v
    np.testing.assert_array_equal(got, want)
    known = ~np.isnan(want)
    np.testing.assert_array_equal(np.signbit(got[known]), np.signbit(want[known]))


def test_infinities_of_products() -> None:
    """e5m2: an infinity stays one, of both signs or times zero it is NaN; within a part and between parts, in every model."""
    inf, ninf, one, zero, nan = 0x7C, 0xFC, 0x3C, 0, 0x7E
    ones = np.ones((1, 2), np.float32)
    for a, b, want in (
        ([inf, one, one, one], [one] * 4, np.inf),
        ([one, one, one, ninf], [one] * 4, -np.inf),
        ([inf, ninf, one, one], [one] * 4, np.nan),
        ([inf, one, one, ninf], [one] * 4, np.nan),
        ([inf, one, one, one], [zero, one, one, one], np.nan),
        ([nan, one, one, one], [one] * 4, np.nan),
        ([ninf, one, one, inf], [ninf, one, one, inf], np.inf),
    ):
        for accumulator in ("wgmma13", "mma25", "fp32", "exact"):
            attrs = {"accumulator": accumulator, "tile": 2, "promote": 0, "format": "e5m2"}
            inputs = {"a_codes": np.array([a], np.uint8), "a_scale": ones, "b_codes": np.array([b], np.uint8), "b_scale": ones}
            np.testing.assert_array_equal(call("fp8.gemm", attrs=attrs, **inputs)["y"], [[want]])
            np.testing.assert_array_equal(fp8_gemm.gemm_in_float32(inputs, attrs), [[want]])


@pytest.mark.parametrize(
    ("change", "attrs"),
    [
        ({}, {"promote": 24}),
        ({}, {"promote": -8}),
        ({}, {"tile": 0}),
        ({}, {"scale_order": "b first"}),
        ({}, {"out": "fp16"}),
        ({}, {"format": "e5m6"}),
        ({}, {"format": "e2m1"}),
        ({}, {"format": "bf16"}),
        ({"a_scale": np.zeros((3, 3), np.float32)}, {}),
        ({"a_scale": np.full((3, 3), np.inf, np.float32)}, {}),
        ({"b_scale": np.full((2, 3), -1, np.float32)}, {}),
        ({"b_scale": np.ones((3, 3), np.float32)}, {}),
        ({"a_scale": np.ones((3, 2), np.float32)}, {}),
        ({"b_codes": np.zeros((131, 71), np.uint8)}, {}),
    ],
)
def test_gemm_refusals(change: Arrays, attrs: dict) -> None:
    """Each of the contract's limits."""
    inputs = gemm_inputs(3, 131, 70, 32, blocks=True)
    call("fp8.gemm", attrs={"tile": 32, "promote": 32, "accumulator": "exact"}, **inputs)
    with pytest.raises(ValueError):
        call("fp8.gemm", attrs={"tile": 32, "promote": 32, "accumulator": "exact", **attrs}, **{**inputs, **change})


# The linear layer


def fake(x: np.ndarray, op: str, **attrs: Any) -> np.ndarray:
    """Quantised and dequantised, in float32, given back in float64."""
    key = "w" if op.endswith("block") else "x"
    form = {"format": attrs.get("format", "e4m3fn")}
    kept = call(f"fp8.quantize_{op}", attrs=attrs, **{key: x.astype(np.float32)})
    axis = {"axis": attrs["axis"]} if "axis" in attrs else {}
    return call(f"fp8.dequantize_{op}", attrs={**form, **axis}, **kept)[key].astype(np.float64)


def check_linear(recipe: str, cache: str, n: int, o: int, d: int) -> None:
    r = rng()
    x, weight, dy = r.standard_normal((n, d)) * np.exp(r.standard_normal((n, 1))), r.standard_normal((o, d)), r.standard_normal((n, o))
    attrs = {"recipe": recipe, "weight_recipe": "v3", "accumulator": "exact", "cache": cache}
    y = call("fp8.linear", attrs=attrs, x=x, weight=weight)["y"]
    back = call("fp8.linear", "backward", attrs=attrs, x=x, weight=weight, dy=dy)
    w8 = fake(weight, "block", recipe="v3")
    again = "tilekernels-ue8m0" if cache == "e5m6" else recipe
    x8 = fake(fake(x, "tile", recipe=again, axis=1, format=cache), "tile", recipe=again, axis=0)
    for got, u, v, true in (
        (y, fake(x, "tile", recipe=recipe, axis=1), w8.T, x @ weight.T),
        (back["dx"], fake(dy, "tile", recipe=recipe, axis=1), w8, dy @ weight),
        (back["dweight"], fake(dy, "tile", recipe=recipe, axis=0).T, x8, dy.T @ x),
    ):
        assert np.all(np.abs(got - u @ v) <= 2.0**-22 * (np.abs(u) @ np.abs(v)))
        assert 1e-3 < np.linalg.norm(got - true) / np.linalg.norm(true) < 0.1
    other = call("fp8.linear", "backward", attrs={**attrs, "accumulator": "wgmma13", "promote": 32}, x=x, weight=weight, dy=dy)
    for name, got in other.items():
        assert 0 < np.abs(got - back[name]).max() < 2.0**-8 * np.abs(back[name]).max()


@pytest.mark.parametrize("cache", ["e4m3fn", "e5m6"])
@pytest.mark.parametrize("recipe", ["v3", "v32-ue8m0", "deepep"])
@pytest.mark.parametrize("sizes", [(140, 7, 9), (8, 133, 9), (8, 7, 135)])
def test_linear_is_products_of_what_was_quantised(recipe: str, cache: str, sizes: tuple[int, int, int]) -> None:
    """accumulator="exact": y, dx, dweight are numpy's float64 products of the operands quantised along what each product sums over, but
    for the rounding of what dequantises; and are near those of no quantisation. Each side once more than a tile."""
    check_linear(recipe, cache, *sizes)


def test_linear_takes_float32() -> None:
    """float64 inputs are rounded to float32 first, once: the result is that of the rounded ones, and of no other scale."""
    r = rng()
    x, weight, dy = r.standard_normal((4, 40)), r.standard_normal((6, 40)), r.standard_normal((4, 6))
    for direction, names in (("forward", ("x", "weight")), ("backward", ("x", "weight", "dy"))):
        wide = {name: v for name, v in (("x", x), ("weight", weight), ("dy", dy)) if name in names}
        narrow = {name: v.astype(np.float32) for name, v in wide.items()}
        want = ORACLES["fp8.linear", direction](narrow, {})
        for name, got in ORACLES["fp8.linear", direction](wide, {}).items():
            np.testing.assert_array_equal(got, want[name])
            assert got.dtype == np.float64
    assert np.isinf(fp8_linear._float32(np.array([1e300, -0.0]))[0])
    with pytest.raises(ValueError, match="promote"):
        call("fp8.linear", attrs={"promote": 96}, x=x, weight=weight)
    with pytest.raises(ValueError, match="cache"):
        call("fp8.linear", attrs={"cache": "e5m2"}, x=x, weight=weight)


# Planted errors


def nearest_down(m: int, rest: int, den: int) -> bool:
    return 2 * rest > den


def test_planted_rounding_errors_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ties down, and stochastic rounding that goes up at the fraction itself, fail their tests."""
    monkeypatch.setitem(floats.ROUNDINGS, "half-even", nearest_down)
    for name in ("e4m3fnuz", "e2m1", "e8m0"):
        with pytest.raises(AssertionError):
            test_midpoints_split_the_neighbours(name, "half-even")
    monkeypatch.setattr("oracles.cast.stochastic", lambda random: lambda m, rest, den: Fraction(random) <= Fraction(rest, den))
    with pytest.raises(AssertionError):
        test_stochastic_rounding_goes_up_below_the_fraction("e5m6")


@pytest.mark.parametrize("wrong", ["axis", "blocks", "cache"])
def test_planted_linear_errors_are_noticed(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """dy' or x8' in tiles along the other axis, weights' recipe for the blocks lost, x8' made from x itself: the test above fails."""
    right, blocks = fp8_linear._tiles, fp8_linear._blocks
    check_linear("v3", "e4m3fn", 8, 7, 9)
    if wrong == "axis":  # the same tiles' scales are spread over the columns of the 128x1 form

        def along_d(x: np.ndarray, recipe: str, axis: int, form: str = "e4m3fn") -> tuple[np.ndarray, np.ndarray]:
            if axis == 1:
                return right(x, recipe, axis, form)
            codes, scale = right(np.ascontiguousarray(x.T), recipe, 0, form)
            return codes.T, np.broadcast_to(scale.max(), (1, x.shape[1])).astype(np.float32)

        monkeypatch.setattr(fp8_linear, "_tiles", along_d)
    elif wrong == "blocks":
        monkeypatch.setattr(fp8_linear, "_blocks", lambda w, recipe: blocks(w, "v3-ue8m0"))
    else:
        monkeypatch.setattr(fp8_linear, "_again", lambda x, at: right(x, at["recipe"], 0))
    with pytest.raises(AssertionError):
        check_linear("v3", "e4m3fn", 8, 7, 9)
