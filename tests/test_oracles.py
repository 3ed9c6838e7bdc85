"""The oracles' own tests: against third parties (numpy's IEEE arithmetic, ml_dtypes, gfloat) and hand-worked cases, never against `ref`."""

import math
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from oracles import ORACLES, floats, norm, quantize, router
from oracles.cast import boundaries, default_overflow
from oracles.tape import CTX, mpfs

FORMATS = ["e4m3fn", "e5m2", "bf16", "fp16"]  # test_oracles_fp8.py has the other formats and recipes
RECIPES = [recipe for recipe in quantize.RECIPES if recipe not in ("te", "te-ue8m0", "mxfp4")]
Arrays = dict[str, np.ndarray]


def call(op: str, direction: str = "forward", /, attrs: dict | None = None, **inputs: np.ndarray) -> Arrays:
    return ORACLES[op, direction](inputs, attrs or {})


def rng() -> np.random.Generator:
    return np.random.default_rng(20250101)


def midpoints(name: str) -> list[Fraction]:
    """The exact midpoints between neighbouring non-negative values of a format, the one to the first value above its range included."""
    fmt = floats.CAST_FORMATS[name]
    values = [floats.code_fraction(c, fmt) for c in range(fmt.max_code + 2)]
    return [(a + b) / 2 for a, b in pairwise(values)]


def around_midpoints(name: str, dtype: type) -> np.ndarray:
    """Every midpoint and its two neighbours in `dtype`, both signs."""
    exact = np.array([float(m) for m in midpoints(name)], dtype)
    zero, infinity = dtype(0), dtype(np.inf)
    points = np.concatenate([exact, np.nextafter(exact, zero), np.nextafter(exact, infinity)])
    return np.concatenate([points, -points])


def all_bf16() -> np.ndarray:
    """All 2^16 bf16 values, NaNs included, as float32."""
    return (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)


def third_party_encode(name: str, x: np.ndarray) -> np.ndarray:
    """Codes by numpy (fp16) or ml_dtypes, float32 only for the latter (it rounds float64 twice), NaNs made positive."""
    if name == "fp16":
        with np.errstate(over="ignore"):
            codes = x.astype(np.float16).view(np.uint16)
    else:
        ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes, the third party for this format, is not installed")
        assert x.dtype == np.float32
        dtype = {"e4m3fn": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2, "bf16": ml_dtypes.bfloat16}[name]
        with np.errstate(invalid="ignore"):
            codes = x.astype(dtype).view(np.uint16 if name == "bf16" else np.uint8)
    fmt = floats.CAST_FORMATS[name]
    assert fmt.nan_code is not None
    magnitude = codes & (fmt.sign_bit - 1)
    is_nan = magnitude > (fmt.inf_code if fmt.inf_code is not None else fmt.max_code)
    return np.where(is_nan, codes.dtype.type(fmt.nan_code), codes)


# Casts


def check_encode(name: str, x: np.ndarray) -> None:
    expected = third_party_encode(name, x)
    got = call(f"encode.{name}", attrs={"overflow": "nan"}, x=x)["codes"]
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("name", FORMATS)
def test_encode_agrees_with_third_party(name: str) -> None:
    """encode(overflow="nan") equals numpy's or ml_dtypes' codes on all bf16 values and on all midpoints and their float32 neighbours."""
    check_encode(name, np.concatenate([all_bf16(), around_midpoints(name, np.float32)]))


@pytest.mark.parametrize("name", FORMATS)
def test_saturation_only_replaces_overflow(name: str) -> None:
    """overflow="saturate" equals overflow="nan" but where a number became NaN or infinity: there it gives the largest value, signed."""
    x = np.concatenate([all_bf16(), around_midpoints(name, np.float32)])
    plain, saturated = (call(f"cast.{name}", attrs={"overflow": o}, x=x)["y"] for o in ("nan", "saturate"))
    overflowed = ~np.isfinite(plain) & ~np.isnan(x)
    largest = floats.decode(floats.CAST_FORMATS[name].max_code, floats.CAST_FORMATS[name])
    assert largest == {"e4m3fn": 448, "e5m2": 57344, "bf16": 3.3895313892515355e38, "fp16": 65504}[name]
    np.testing.assert_array_equal(saturated, np.where(overflowed, np.copysign(np.float32(largest), x), plain))
    assert overflowed.any()
    assert default_overflow(name) == ("saturate" if name in ("e4m3fn", "e5m2") else "nan")


def test_fp16_from_float64_agrees_with_numpy() -> None:
    """float64 is rounded once: equal to numpy's direct conversion on midpoints and float64 neighbours, and unlike the way over float32."""
    x = around_midpoints("fp16", np.float64)
    got = call("encode.fp16", x=x)["codes"]
    np.testing.assert_array_equal(got, third_party_encode("fp16", x))
    with np.errstate(under="ignore"):
        assert (third_party_encode("fp16", x.astype(np.float32)) != got).any()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_midpoints_split_the_neighbours(name: str, dtype: type) -> None:
    """Midpoint c goes to the even one of codes c, c + 1; one ulp below it to c, one above to c + 1 (below the overflow)."""
    exact = np.array([float(m) for m in midpoints(name)[:-1]], dtype)
    c = np.arange(len(exact))
    for x, expected in (
        (exact, c + c % 2),
        (np.nextafter(exact, dtype(0)), c),
        (np.nextafter(exact, dtype(np.inf)), c + 1),
    ):
        np.testing.assert_array_equal(call(f"encode.{name}", x=x)["codes"], expected)


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "bf16"])
def test_float64_agrees_with_gfloat(name: str) -> None:
    """float64 inputs, saturating, give gfloat's correctly rounded values around midpoints and on random values, zeros' signs included."""
    gfloat = pytest.importorskip("gfloat", reason="gfloat, the third party for float64 inputs, is not installed")
    formats = pytest.importorskip("gfloat.formats", reason="gfloat, the third party for float64 inputs, is not installed")
    info = {"e4m3fn": formats.format_info_ocp_e4m3, "e5m2": formats.format_info_ocp_e5m2, "bf16": formats.format_info_bfloat16}[name]
    random = np.ldexp(rng().standard_normal(1000), rng().integers(-30, 12, 1000))
    x = rng().permutation(np.concatenate([around_midpoints(name, np.float64), random, [0.0, -0.0, -1e-300]]))[:4000]
    got = call(f"cast.{name}", attrs={"overflow": "saturate"}, x=x)["y"]
    expected = np.array([gfloat.round_float(info, v, rnd=gfloat.RoundMode.TiesToEven, sat=True) for v in x.tolist()])
    assert got.dtype == np.float64
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(np.signbit(got), np.signbit(expected))


@pytest.mark.parametrize("name", FORMATS)
def test_decode_agrees_with_third_party(name: str) -> None:
    """decode of every code is what numpy or ml_dtypes reads there, and encoding it gives the code back (NaNs: the positive one)."""
    fmt = floats.CAST_FORMATS[name]
    assert fmt.nan_code is not None
    codes = np.arange(1 << fmt.bits).astype(np.uint8 if fmt.bits == 8 else np.uint16)
    x = call(f"decode.{name}", codes=codes)["x"]
    assert x.dtype == np.float32
    back = call(f"encode.{name}", attrs={"overflow": "nan"}, x=x)["codes"]
    np.testing.assert_array_equal(back, np.where(np.isnan(x), fmt.nan_code, codes))
    if name == "fp16":
        expected = codes.view(np.float16).astype(np.float32)
    else:
        ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes, the third party for this format, is not installed")
        dtype = {"e4m3fn": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2, "bf16": ml_dtypes.bfloat16}[name]
        expected = codes.view(dtype).astype(np.float32)
    np.testing.assert_array_equal(x, expected)
    np.testing.assert_array_equal(np.signbit(x)[~np.isnan(x)], np.signbit(expected)[~np.isnan(x)])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("overflow", ["saturate", "nan"])
def test_boundaries_agree_with_encode(name: str, overflow: str) -> None:
    """The staircase gives the per-element oracle's codes on random patterns and on every threshold and its neighbours, both signs."""
    fmt = floats.CAST_FORMATS[name]
    thresholds, codes = boundaries(name, overflow)
    assert thresholds.dtype == np.float32
    steps = thresholds.view(np.uint32)
    assert steps[0] == 0
    assert (np.diff(steps.astype(np.int64)) > 0).all()
    near = np.concatenate([steps, steps + 1, steps[1:] - 1, [0x7F80_0000, 0x7F7F_FFFF, 1]]).astype(np.uint32)
    p = np.concatenate([rng().permutation(near)[:12000], rng().integers(0, 0x7F80_0001, 4000, dtype=np.uint32)])
    expected = codes[np.searchsorted(steps, p, side="right") - 1]
    np.testing.assert_array_equal(call(f"encode.{name}", attrs={"overflow": overflow}, x=p.view(np.float32))["codes"], expected)
    mirrored = np.where(expected == fmt.nan_code, expected, expected | fmt.sign_bit)
    negative = (p | np.uint32(1 << 31)).view(np.float32)
    np.testing.assert_array_equal(call(f"encode.{name}", attrs={"overflow": overflow}, x=negative)["codes"], mirrored)


# The model of float32 and float64 arithmetic


def random_pairs(dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """10,000 pairs: random bit patterns, a fifth made subnormal, a fifth near one another in exponent; some special values."""
    unsigned, bits = (np.uint32, 23) if dtype is np.float32 else (np.uint64, 52)
    a, b = rng().integers(0, np.iinfo(unsigned).max, (2, 10_000), dtype=unsigned, endpoint=True)
    sign_and_fraction = unsigned((1 << bits) - 1) | ~unsigned(np.iinfo(unsigned).max >> 1)
    a[:2000] &= sign_and_fraction
    one = np.ones(1, dtype).view(unsigned)[0]
    b[2000:4000] = b[2000:4000] & sign_and_fraction | one
    b[1000:1500] = b[1000:1500] & sign_and_fraction | one
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, np.finfo(dtype).smallest_subnormal, np.finfo(dtype).max], dtype)
    a[4000:4064], b[4000:4064] = (m.ravel().view(unsigned) for m in np.meshgrid(special, special))
    return a.view(dtype), b.view(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("operation", ["multiply", "divide"])
def test_arithmetic_agrees_with_numpy(operation: str, dtype: type) -> None:
    """The exact-then-round product and quotient equal the machine's IEEE ones on 10,000 pairs, subnormal results and special values too."""
    a, b = random_pairs(dtype)
    fmt = floats.BINARY32 if dtype is np.float32 else floats.BINARY64
    model: Callable = getattr(floats, operation)
    got = np.array([model(u, v, fmt) for u, v in zip(a.tolist(), b.tolist(), strict=True)], dtype)
    with np.errstate(all="ignore"):
        expected = getattr(np, operation)(a, b)
    np.testing.assert_array_equal(got, expected)
    known = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(got[known]), np.signbit(expected[known]))
    tiny = np.abs(expected) < np.finfo(dtype).tiny
    assert (tiny & (expected != 0)).sum() > 20


# Quantisers


def power_of_two_above(s: np.ndarray) -> np.ndarray:
    fraction, exponent = np.frexp(s)
    return np.ldexp(s.dtype.type(1), exponent - (fraction == 0.5)).astype(s.dtype)


def numpy_quantize(x: np.ndarray, recipe: str, biggest: float) -> tuple[np.ndarray, np.ndarray]:
    """(v, s) of 1 x d tiles in numpy's arithmetic; [log2] only where it agrees with [bits]."""
    dtype = x.dtype.type
    biggest, floor = dtype(biggest), dtype(1e-4)
    family, _, rounded = recipe.partition("-")
    a = np.abs(x).max(1, keepdims=True)
    if recipe != "v3-unclamped" and family != "flashmla":
        a = np.maximum(a, floor)
    s = a * (dtype(1) / biggest) if family in ("v32", "deepep") else a / biggest
    if family == "flashmla":
        s = np.maximum(s, floor)
    if rounded == "ue8m0" or family == "flashmla":
        s = power_of_two_above(s)
    if family in ("v3", "v32", "flashmla"):
        v = x / s
    elif rounded == "ue8m0" or family == "deepgemm":
        v = x * (dtype(1) / s)
    else:
        v = x * (biggest / a)
    return v, s


@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize("name", ["e4m3fn", "e5m2"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_quantize_agrees_with_numpy_arithmetic(recipe: str, name: str, dtype: type) -> None:
    """Scales and codes equal the recipe carried out in numpy's arithmetic, ragged last tile and both axes included."""
    x = np.ldexp(rng().standard_normal((6, 40)), rng().integers(-20, 12, (6, 1))).astype(dtype)
    x[0, 3] = -0.0
    biggest = floats.decode(floats.CAST_FORMATS[name].max_code, floats.CAST_FORMATS[name])
    parts = [numpy_quantize(x[:, j : j + 16], recipe, biggest) for j in (0, 16, 32)]
    values, scale = np.concatenate([v for v, _ in parts], 1), np.concatenate([s for _, s in parts], 1)
    codes = call(f"encode.{name}", x=values)["codes"]
    for axis, source in ((1, x), (0, x.T)):
        got = call("fp8.quantize_tile", x=source, attrs={"recipe": recipe, "tile": 16, "axis": axis, "format": name})
        assert got["scale"].dtype == dtype
        np.testing.assert_array_equal(got["scale"] if axis else got["scale"].T, scale)
        np.testing.assert_array_equal(got["codes"] if axis else got["codes"].T, codes)


def scale_of(a: float, recipe: str, dtype: type = np.float32) -> float:
    got = call("fp8.quantize_tile", x=np.array([[a]], dtype), attrs={"recipe": recipe})
    return float(got["scale"][0, 0])


def test_log2_rounds_before_the_ceiling() -> None:
    """s one ulp above 2^-10: [bits] gives 2^-9; [log2] gives 2^-10, its log2 having rounded to -10; s well above gives 2^-9 in both."""
    for dtype in (np.float32, np.float64):
        a = float(np.nextafter(dtype(448 * 2.0**-10), dtype(1)))
        a = float(np.nextafter(dtype(a), dtype(1)))  # 448 = 1.75 * 2^8: two of its ulps make one of the quotient, about
        s = float(dtype(a) / dtype(448))
        assert 2.0**-10 < s < 2.0**-10 * (1 + 4 * float(np.finfo(dtype).eps))
        assert scale_of(a, "deepgemm-ue8m0", dtype) == 2.0**-9
        assert scale_of(a, "v3-ue8m0", dtype) == 2.0**-10
        assert scale_of(448 * 2.0**-10 * 1.001, "v3-ue8m0", dtype) == 2.0**-9
        assert scale_of(448 * 2.0**-10, "v3-ue8m0", dtype) == scale_of(448 * 2.0**-10, "v32-ue8m0", dtype) == 2.0**-10


def test_zero_and_infinite_tiles() -> None:
    """A zero tile: v3-unclamped gives 0/0; v3 the clamped scale. An infinity: an infinite scale, NaN in its place, zeros beside it."""
    zero = np.zeros((1, 4), np.float32)
    got = call("fp8.quantize_tile", x=zero, attrs={"recipe": "v3-unclamped"})
    assert got["scale"].tolist() == [[0.0]]
    assert got["codes"].tolist() == [[0x7F] * 4]
    got = call("fp8.quantize_tile", x=zero)
    assert got["scale"][0, 0] == np.float32(1e-4) / np.float32(448)
    assert got["codes"].tolist() == [[0] * 4]
    for recipe in RECIPES:
        got = call("fp8.quantize_tile", x=np.array([[1.0, -np.inf, -2.0, 0.0]], np.float32), attrs={"recipe": recipe})
        assert math.isinf(got["scale"][0, 0])
        assert got["codes"].tolist() == [[0x00, 0x7F, 0x80, 0x00]]
    with pytest.raises(ValueError, match=r"\[1, 2\]"):
        call("fp8.quantize_tile", x=np.array([[0, 0, 0], [0, 0, np.nan]], np.float32))


@pytest.mark.parametrize("axis", [0, 1])
def test_dequantize_agrees_with_numpy(axis: int) -> None:
    """decode(codes) * scale equals numpy's float32 product with the scale repeated along the tiles, for every code."""
    codes = rng().permutation(np.arange(256)).astype(np.uint8).reshape(8, 32)
    shape = (8, 3) if axis == 1 else (1, 32)
    scale = np.exp(rng().standard_normal(shape) * 30).astype(np.float32)
    got = call("fp8.dequantize_tile", codes=codes, scale=scale, attrs={"tile": 12, "axis": axis})["x"]
    wide = np.repeat(scale, 12, axis=axis)[: codes.shape[0], : codes.shape[1]]
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(got, call("decode.e4m3fn", codes=codes)["x"] * wide)


# rmsnorm and the router


def central_difference(function: Callable[[list], Any], point: list, direction: list) -> Any:
    """Directional derivative to about 25 digits of a function on 50-digit numbers."""
    h = CTX.mpf(10) ** -15  # error h^2 * f''' ~ 1e-30, cancellation ~ 1e-50 / h
    up, down = ([p + sign * h * d for p, d in zip(point, direction, strict=True)] for sign in (1, -1))
    return (function(up) - function(down)) / (2 * h)


def test_rmsnorm_forward_known_values() -> None:
    """(3, 4) has mean square 12.5; rows of weight one have mean square 1 when eps = 0; eps enters under the root."""
    y = call("rmsnorm", x=np.array([[3.0, 4.0]]), weight=np.array([1.0, 2.0]), attrs={"eps": 0.0})["y"]
    np.testing.assert_allclose(y, [[3 / math.sqrt(12.5), 8 / math.sqrt(12.5)]], rtol=1e-15)
    x = rng().standard_normal((3, 64)).astype(np.float32)
    y = call("rmsnorm", x=x, weight=np.ones(64, np.float32), attrs={"eps": 0.0})["y"]
    np.testing.assert_allclose((y**2).mean(1), 1, rtol=1e-14)
    y = call("rmsnorm", x=np.zeros((1, 3)) + 3, weight=np.ones(3), attrs={"eps": 16.0})["y"]
    np.testing.assert_array_equal(y, 3 / 5)


def test_rmsnorm_backward_agrees_with_differences_and_closed_form() -> None:
    """The tape's gradient equals central differences of the 50-digit forward, and the textbook closed form in float64."""
    x, dy = rng().standard_normal((2, 2, 24))
    weight = rng().standard_normal(24)
    got = call("rmsnorm", "backward", x=x, weight=weight, dy=dy)
    eps = CTX.mpf(1e-6)

    def loss(flat: list) -> Any:
        rows = [norm.rmsnorm_row(flat[24 * i : 24 * i + 24], flat[48:], eps) for i in range(2)]
        return sum(a * b for row, g in zip(rows, dy.tolist(), strict=True) for a, b in zip(row, mpfs(g), strict=True))

    for seed in range(4):
        direction = np.random.default_rng(seed).standard_normal(72)
        slope = central_difference(loss, mpfs(x.ravel().tolist() + weight.tolist()), mpfs(direction.tolist()))
        expected = math.fsum(np.concatenate([got["dx"].ravel(), got["dweight"]]) * direction)
        assert float(slope) == pytest.approx(expected, rel=1e-12)
    xhat = x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-6)
    g = dy * weight
    np.testing.assert_allclose(got["dx"], (g - xhat * (g * xhat).mean(1, keepdims=True)) * xhat / x, atol=1e-13)
    np.testing.assert_allclose(got["dweight"], (dy * xhat).sum(0), atol=1e-13)


def router_inputs(n: int = 5, e: int = 32) -> Arrays:
    return {"logits": rng().standard_normal((n, e)).astype(np.float32), "bias": (rng().standard_normal(e) * 0.1).astype(np.float32)}


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax", "sqrtsoftplus"])
def test_router_weights_sum_to_the_factor(scoring: str) -> None:
    """Normalised weights are positive and sum to the factor; unnormalised they are the factor times numpy's scores at the indices."""
    inputs = router_inputs()
    got = call("router.noaux_tc", attrs={"scoring": scoring}, **inputs)
    assert got["topk_idx"].dtype == np.int64
    np.testing.assert_allclose(got["topk_weight"].sum(1), 2.5, rtol=1e-15)
    assert (got["topk_weight"] > 0).all()
    z = inputs["logits"].astype(np.float64)
    powers = np.exp(z)
    s = {"sigmoid": 1 / (1 + 1 / powers), "softmax": powers / powers.sum(1, keepdims=True), "sqrtsoftplus": np.sqrt(np.log1p(powers))}
    plain = call("router.noaux_tc", attrs={"scoring": scoring, "norm_topk_prob": False, "routed_scaling_factor": 3.0}, **inputs)
    np.testing.assert_array_equal(plain["topk_idx"], got["topk_idx"])
    np.testing.assert_allclose(plain["topk_weight"], 3 * np.take_along_axis(s[scoring], plain["topk_idx"], 1), rtol=1e-13)


def test_router_selection_by_hand() -> None:
    """Groups by the sum of their two best, ties to the lowest index, order by descending t, bias in the selection but not in the weight."""
    logits = np.array([[9.0, -9.0, -9.0, 1.0, 1.0, 1.0, 2.0, 2.0, 0.0]])  # groups of three: sums near 1.0, 1.46, 1.76
    attrs = {"k": 2, "n_group": 3, "topk_group": 2}
    bias = np.zeros(9)
    got = call("router.noaux_tc", logits=logits, bias=bias, attrs=attrs)
    assert got["topk_idx"].tolist() == [[6, 7]]  # expert 0 has the best t but its group is out
    assert call("router.noaux_tc", logits=logits, bias=bias, attrs={**attrs, "k": 6})["topk_idx"].tolist() == [[6, 7, 3, 4, 5, 8]]
    unmasked = call("router.noaux_tc", logits=logits, bias=bias, attrs={"k": 3, "n_group": 1, "topk_group": 1})
    assert unmasked["topk_idx"].tolist() == [[0, 6, 7]]
    bias[5] = 0.5
    got = call("router.noaux_tc", logits=logits, bias=bias, attrs=attrs)
    assert got["topk_idx"].tolist() == [[5, 6]]
    sigmoid = 1 / (1 + np.exp(-logits[0, [5, 6]]))
    np.testing.assert_allclose(got["topk_weight"][0], 2.5 * sigmoid / sigmoid.sum(), rtol=1e-14)
    equal = call("router.noaux_tc", logits=np.zeros((1, 9)), bias=np.zeros(9), attrs=attrs)
    assert equal["topk_idx"].tolist() == [[0, 1]]
    assert math.isinf(router.selection_margin({"logits": np.zeros((1, 9)), "bias": np.zeros(9)}, attrs)[0])


def test_router_mask_fill() -> None:
    """Where all t are negative, mask_fill="0" lifts the experts of the dropped groups above the kept ones; "-inf" does not."""
    logits, bias = np.array([[3.0, 2.0, 0.0, -1.0]]), np.full(4, -2.0)
    attrs = {"k": 2, "n_group": 2, "topk_group": 1}
    assert call("router.noaux_tc", logits=logits, bias=bias, attrs=attrs)["topk_idx"].tolist() == [[0, 1]]
    assert call("router.noaux_tc", logits=logits, bias=bias, attrs={**attrs, "mask_fill": "0"})["topk_idx"].tolist() == [[2, 3]]


@pytest.mark.parametrize(
    ("attrs", "place", "message"),
    [
        ({"n_group": 5}, None, "divide"),
        ({"topk_group": 9}, None, "topk_group"),
        ({"k": 17}, None, "left by the groups"),
        ({"n_group": 32, "topk_group": 32}, None, "two largest"),
        ({}, (2, 7), r"logits\[2, 7\]"),
    ],
)
def test_router_value_errors(attrs: dict, place: tuple[int, int] | None, message: str) -> None:
    """Each of the contract's ValueErrors is raised, the non-finite one naming the first index."""
    inputs = router_inputs()
    if place:
        inputs["logits"][place], inputs["logits"][4, 0] = np.inf, np.nan
    with pytest.raises(ValueError, match=message):
        call("router.noaux_tc", attrs=attrs, **inputs)


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax", "sqrtsoftplus"])
@pytest.mark.parametrize("normalised", [True, False])
def test_router_backward_agrees_with_differences(scoring: str, normalised: bool) -> None:
    """The tape's gradient equals central differences of the 50-digit weights at fixed indices; unselected experts get exactly 0."""
    inputs, attrs = router_inputs(2), {"scoring": scoring, "norm_topk_prob": normalised}
    top = call("router.noaux_tc", attrs=attrs, **inputs)["topk_idx"]
    cotangent = rng().standard_normal(top.shape)
    got = call("router.noaux_tc", "backward", attrs=attrs, topk_idx=top, dtopk_weight=cotangent, **inputs)["dlogits"]
    at = {**router.DEFAULTS, **attrs}
    for row in range(2):

        def loss(flat: list, row: int = row) -> Any:
            s = router.scores(flat, scoring)
            w = router.weights([s[i] for i in top[row].tolist()], at)
            return sum(a * b for a, b in zip(w, mpfs(cotangent[row].tolist()), strict=True))

        for expert in (int(top[row, 0]), int(top[row, 5]), int(np.setdiff1d(np.arange(32), top[row])[0])):
            unit = mpfs([float(i == expert) for i in range(32)])
            slope = float(central_difference(loss, mpfs(inputs["logits"][row].tolist()), unit))
            assert got[row, expert] == pytest.approx(slope, rel=1e-14, abs=1e-25)
        unselected = np.setdiff1d(np.arange(32), top[row])
        # The chosen scores' softmax denominators cancel in the normalised weights but for denominator_eps.
        assert (got[row, unselected] == 0).all() == (scoring != "softmax")


def test_extreme_logits_stay_finite() -> None:
    """Logits of magnitude 1e3 and 3e38 pass through every scoring, forward and backward, without NaN or infinity."""
    logits = np.array([[1e3, -1e3, 3e38, -3e38] * 8])
    for scoring in ("sigmoid", "softmax", "sqrtsoftplus"):
        forward = call("router.noaux_tc", logits=logits, bias=np.zeros(32), attrs={"scoring": scoring})
        assert np.isfinite(forward["topk_weight"]).all()
        every = {"topk_idx": np.array([[0, 1, 2, 3, 4, 5, 6, 7]]), "dtopk_weight": np.ones((1, 8))}
        back = call("router.noaux_tc", "backward", logits=logits, bias=np.zeros(32), attrs={"scoring": scoring}, **every)
        assert np.isfinite(back["dlogits"]).all()


# Planted errors


def truncate_code(num: int, den: int, fmt: floats.FloatFormat, *_: floats.Up) -> int:
    """A wrong rounding: towards zero."""
    value = Fraction(num, den)
    code = floats.round_code(num, den, fmt)
    return code - (floats.code_fraction(code, fmt) > value)


def ties_away_code(num: int, den: int, fmt: floats.FloatFormat, *_: floats.Up) -> int:
    """A wrong rounding: to nearest, ties away from zero."""
    value = Fraction(num, den)
    code = truncate_code(num, den, fmt)
    return code + (2 * value >= floats.code_fraction(code, fmt) + floats.code_fraction(code + 1, fmt))


def flushing_code(num: int, den: int, fmt: floats.FloatFormat, *_: floats.Up) -> int:
    """A wrong rounding: subnormals of the format become zero."""
    code = floats.round_code(num, den, fmt)
    return code if code >> fmt.mantissa_bits else 0


@pytest.mark.parametrize("wrong", [truncate_code, ties_away_code, flushing_code])
@pytest.mark.parametrize("name", FORMATS)
def test_planted_rounding_errors_are_noticed(name: str, wrong: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a wrong rounding put into the cast oracle, the comparison with the third party on a few hundred midpoints fails."""
    x = around_midpoints(name, np.float32)[:300]
    check_encode(name, x)
    monkeypatch.setattr("oracles.cast.round_code", wrong)
    with pytest.raises(AssertionError):
        check_encode(name, x)


def test_planted_double_rounding_is_noticed() -> None:
    """float64 sent through float32 first disagrees with the oracle for every format, at the float64 neighbours of midpoints."""
    for name in FORMATS:
        x = around_midpoints(name, np.float64)
        with np.errstate(over="ignore", under="ignore"):
            narrow = x.astype(np.float32)
        assert (call(f"encode.{name}", x=x)["codes"] != call(f"encode.{name}", x=narrow)["codes"]).any()


def test_planted_gradient_error_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the derivative of the root off by 1e-9 in the tape, the comparison of rmsnorm's gradient with differences fails."""
    right = norm.sqrt

    def wrong(u: Any) -> Any:
        root = right(u)
        if hasattr(root, "parents"):
            root.parents = tuple((parent, partial * (1 + CTX.mpf("1e-9"))) for parent, partial in root.parents)
        return root

    monkeypatch.setattr(norm, "sqrt", wrong)
    with pytest.raises(AssertionError):
        test_rmsnorm_backward_agrees_with_differences_and_closed_form()
