"""The FP8 products' CPU kernels beyond what every op is held to: the accumulators' bits on inputs that are hard for them."""

from typing import Any

import numpy as np
import pytest
from leadline.kernels import cpu
from leadline.kernels.cpu import _common
from leadline.ref import FORMATS, OPS, decode, encode, fp8_gemm_fwd

HARDWARE = ("wgmma13", "mma25", "bits:1", "bits:7", "bits:16", "bits:17", "bits:23", "bits:24", "bits:26", "bits:30")
FEW = ("wgmma13", "bits:16", "bits:20", "mma25", "bits:28")  # one of each way that the kernel adds
FORMS = ("e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz", "e5m6", "e2m1")
RNG = np.random.Generator(np.random.Philox(key=13))


def normal(n: int, d: int, format: str = "e4m3fn", size: float = 0.25) -> np.ndarray:
    """Codes of normal numbers, the format's maximum at 1/size deviations: every binade from the subnormals on, and some saturate."""
    fmt = FORMATS[format]
    x = RNG.standard_normal((n, d)) * fmt.max * size
    return encode(fmt, x * np.exp2(-RNG.integers(0, 12, (n, d))), overflow="saturate")


def integers(n: int, d: int, *codes: int) -> np.ndarray:
    return RNG.choice(np.array(codes, np.uint8), (n, d))


def scales(n: int, d: int, dtype: type = np.float32) -> np.ndarray:
    return np.exp2(RNG.uniform(-9, -5, (n, d))).astype(dtype)


def arrays(a: np.ndarray, b: np.ndarray, tile: int = 128, dtype: type = np.float32, rows: int = 0) -> dict[str, Any]:
    """The op's inputs for these codes; b_scale in blocks of 128 rows, or `rows` of it."""
    t, p = -(-a.shape[1] // tile), rows or -(-b.shape[0] // 128)
    return {"a_codes": a, "a_scale": scales(len(a), t, dtype), "b_codes": b, "b_scale": scales(p, t, dtype)}


def same(given: dict[str, Any], **attrs: Any) -> np.ndarray:
    """The kernel's result, after it is found to be the reference's bits."""
    y = cpu.fp8_gemm(**given, **attrs)
    with np.errstate(all="ignore"):
        expected = fp8_gemm_fwd(**given, **attrs)[0]
    assert y.dtype == expected.dtype
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(np.signbit(y), np.signbit(np.where(np.isnan(expected), y, expected)))
    return y


@pytest.mark.parametrize("accumulator", HARDWARE)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_accumulators_have_the_references_bits(accumulator: str, dtype: type) -> None:
    """Normal and all-positive codes, sides that nothing divides, in both carriers."""
    a, b = normal(13, 300), normal(131, 300)
    y = same(arrays(a, b, dtype=dtype), accumulator=accumulator)
    positive = same(arrays(a & 0x7F, b & 0x7F, dtype=dtype), accumulator=accumulator)
    assert np.isfinite(y).all()
    assert positive.min() > 0


@pytest.mark.parametrize("accumulator", FEW)
@pytest.mark.parametrize("case", ["subnormal", "zero", "zeros", "spread", "cancelled", "largest"])
def test_inputs_that_are_hard_to_align(accumulator: str, case: str) -> None:
    """Subnormals, groups of nothing but zeros, the format's whole range in one group, sums that cancel, the largest sum there is."""
    n, o, d = 6, 37, 320
    if case == "subnormal":
        a, b = integers(n, d, *range(8), 0x80, 0x83), integers(o, d, *range(8), *range(0x80, 0x88))
    elif case == "zero":
        a, b = integers(n, d, 0, 0x80), normal(o, d)
    elif case == "zeros":  # groups of zeros between others, and a product of zeros only in the middle of a group
        a, b = normal(n, d), normal(o, d)
        a[:, 32:64], b[:, 200:260], a[:, ::3] = 0, 0x80, 0
    elif case == "spread":
        a, b = integers(n, d, 1, 0x81, 0x7E, 0xFE, 0x08), integers(o, d, 1, 0x81, 0x7E, 0xFE, 0x08)
    elif case == "cancelled":  # what is left is small beside the accumulator, or nothing
        a, b = normal(n, d), normal(o, d)
        a[:, 32:64], b[:, 32:64] = a[:, :32] ^ 0x80, b[:, :32]
        a[:, 64:96], b[:, 64:96] = a[:, :32] & 0x87, b[:, :32] & 0x87
        a[:, 145:160], b[:, 145:160] = a[:, 128:143] ^ 0x80, b[:, 128:143]
    else:
        a, b = np.full((n, d), 0x7E, np.uint8), np.full((o, d), 0x7E, np.uint8)
        b[::2] = 0xFE
    for promote in (128, 32, 0):
        same(arrays(a, b), accumulator=accumulator, promote=promote)


@pytest.mark.parametrize("accumulator", FEW)
@pytest.mark.parametrize("format", FORMS)
def test_every_format(accumulator: str, format: str) -> None:
    """Normal codes, and the format's codes against each other: NaN and infinities among them."""
    same(arrays(normal(5, 160, format), normal(40, 160, format)), accumulator=accumulator, format=format)
    fmt = FORMATS[format]
    every = np.arange(0, 2**fmt.bits, 1 if fmt.bits <= 8 else 3).astype(fmt.code_dtype)
    a = every[:, None] if fmt.bits <= 8 else np.concatenate([every[:60], every[-60:], every[600:690]])[:, None]
    same(arrays(a, every[:, None]), accumulator=accumulator, format=format)


@pytest.mark.parametrize("accumulator", ["wgmma13", "mma25"])
def test_nan_and_infinity_stay_where_they_are(accumulator: str) -> None:
    """E5M2: an infinity gives one, of both signs or with a zero NaN, within a part or between two; other outputs keep their bits."""
    n, o, d, inf, nan = 9, 40, 300, 0x7C, 0x7F
    a, b = normal(n, d, "e5m2", 0.01) & 0xFB, normal(o, d, "e5m2", 0.01) & 0xFB
    clean = arrays(a, b)
    before = same(clean, accumulator=accumulator, format="e5m2")
    assert np.isfinite(before).all()
    a, b = a.copy(), b.copy()
    a[1, 7], a[2, 290], a[3, [5, 170]], a[4, [5, 6]] = inf, inf | 0x80, (inf, inf | 0x80), inf
    b[3, 17], b[5, 7], b[6, 290], b[7, 250] = nan, 0, 0x80, inf
    y = same({**clean, "a_codes": a, "b_codes": b}, accumulator=accumulator, format="e5m2")
    kinds = np.isnan(y[1:3]).any(), np.isposinf(y[1:3]).any(), np.isneginf(y[1:3]).any(), np.isnan(y[3]).any(), np.isnan(y[4]).any()
    assert all(kinds)
    rows, columns = np.setdiff1d(np.arange(n), [1, 2, 3, 4]), np.setdiff1d(np.arange(o), [3, 5, 6, 7])
    np.testing.assert_array_equal(y[np.ix_(rows, columns)], before[np.ix_(rows, columns)])
    assert np.isnan(y[:, 3]).all()


def test_e4m3_nan_in_one_part() -> None:
    """A NaN code makes its row or column NaN and nothing else."""
    a, b = normal(5, 300) & 0xF7, normal(33, 300) & 0xF7
    a[2, 299], b[31, 0] = 0x7F, 0xFF
    y = same(arrays(a, b), accumulator="wgmma13")
    expected = np.zeros(y.shape, bool)
    expected[2], expected[:, 31] = True, True
    np.testing.assert_array_equal(np.isnan(y), expected)


@pytest.mark.parametrize("accumulator", ["wgmma13", "mma25", "bits:30"])
@pytest.mark.parametrize(("n", "o", "d"), [(1, 1, 1), (1, 31, 33), (4, 32, 32), (5, 33, 127), (65, 129, 129), (67, 96, 260)])
def test_sizes_that_blocks_do_not_divide(accumulator: str, n: int, o: int, d: int) -> None:
    for promote in (128, 64, 32, 0):
        same(arrays(normal(n, d), normal(o, d)), accumulator=accumulator, promote=promote)


def test_parts_tiles_and_scales() -> None:
    """A tile that groups do not divide, one scale along all of d, a scale for each row of b, both orders of the scales, bfloat16."""
    a, b = normal(7, 410), normal(70, 410)
    for accumulator in ("wgmma13", "mma25"):
        same(arrays(a, b, 44), accumulator=accumulator, tile=44, promote=0)
        same(arrays(a, b, 512), accumulator=accumulator, tile=512)
        same(arrays(a, b, 512), accumulator=accumulator, tile=512, promote=0)
        same(arrays(a, b, rows=70), accumulator=accumulator)
        for dtype in (np.float32, np.float64):
            same(arrays(a, b, dtype=dtype), accumulator=accumulator, scale_order="product first", promote=64)
            same(arrays(a, b, dtype=dtype), accumulator=accumulator, out="bf16")
    given = {**arrays(a, b), "b_scale": scales(1, 4) * np.float32(1e36), "a_scale": scales(7, 4) * np.float32(1e3)}
    assert np.isinf(same(given, accumulator="wgmma13")).any()
    assert np.isfinite(same({**given, "b_scale": scales(1, 4) * np.float32(1e-40)}, accumulator="wgmma13")).all()


@pytest.mark.parametrize(("accumulator", "dtype"), [("fp32", np.float32), ("fp32", np.float64), ("exact", np.float32)])
def test_plain_sums(accumulator: str, dtype: type) -> None:
    """Against products of integers: with small integers as codes every order gives the same bits; NaN and infinities as IEEE has them."""
    small = encode(FORMATS["e5m2"], np.arange(-4.0, 5.0))
    a, b = RNG.choice(small, (67, 300)), RNG.choice(small, (131, 300))
    given = {**arrays(a, b, dtype=dtype), "a_scale": np.ones((67, 3), dtype), "b_scale": np.full((2, 3), 0.25, dtype)}
    exact = decode(FORMATS["e5m2"], a).astype(np.int64) @ decode(FORMATS["e5m2"], b).astype(np.int64).T
    np.testing.assert_array_equal(cpu.fp8_gemm(**given, accumulator=accumulator, format="e5m2"), exact / 4)
    a[3, 5], a[4, [6, 7]], b[9, 5], b[10, 4] = 0x7C, (0x7C, 0xFC), 0, 0x7F
    same(given | {"a_codes": a, "b_codes": b}, accumulator=accumulator, format="e5m2")


def test_results_do_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread and two give the same bits, of every accumulator."""
    given = arrays(normal(200, 520), normal(300, 520))
    for accumulator in ("fp32", "exact", *FEW):
        monkeypatch.setattr(_common, "THREADS", 2)
        two = cpu.fp8_gemm(**given, accumulator=accumulator)
        monkeypatch.setattr(_common, "THREADS", 1)
        np.testing.assert_array_equal(cpu.fp8_gemm(**given, accumulator=accumulator), two)


@pytest.mark.parametrize("accumulator", ["wgmma13", "mma25"])
def test_a_real_size(accumulator: str) -> None:
    """1024³, some rows against the reference."""
    given = arrays(normal(1024, 1024), normal(1024, 1024))
    rows = np.array([0, 1, 63, 64, 511, 1000, 1023])
    y = cpu.fp8_gemm(**given, accumulator=accumulator)
    some = {**given, "a_codes": given["a_codes"][rows], "a_scale": given["a_scale"][rows]}
    np.testing.assert_array_equal(y[rows], fp8_gemm_fwd(**some, accumulator=accumulator)[0])


def test_a_simulation_that_we_did_not_write() -> None:
    """64×64×256 against MMA-Sim's own: Hopper's wgmma and Blackwell's tcgen05, each part promoted to float32."""
    torch = pytest.importorskip("torch", reason="mmasim needs torch")
    ptx = pytest.importorskip("mmasim.nv_ptx", reason="mmasim, the simulation that the accumulators are taken from, is not installed")
    units = {"wgmma13": ptx.WGMMA("Hopper", "m64n64k32.f32.e4m3.e4m3")}
    units["mma25"] = ptx.TCGen05MMA("Blackwell", "m64n64k32.kind::f8f6f4.f32.e4m3.e4m3")
    draws = [normal(64, 256), normal(64, 256) & 0x7F, integers(64, 256, *range(10), *range(0x75, 0x7F), *range(0x80, 0x90))]
    for accumulator, unit in units.items():
        for a, b in zip(draws, (normal(64, 256), *draws[1:]), strict=True):
            given, y = arrays(a, b), np.zeros((64, 64), np.float32)
            left, right = (torch.from_numpy(c.copy()).view(torch.float8_e4m3fn) for c in (a, b))
            for t in range(2):
                c = torch.zeros(64, 64)
                for k in range(128 * t, 128 * (t + 1), 32):
                    c = unit(left[:, k : k + 32], right[:, k : k + 32].T, c)
                y = y + c.numpy() * given["a_scale"][:, t, None] * given["b_scale"][None, 0, t]
            np.testing.assert_array_equal(cpu.fp8_gemm(**given, accumulator=accumulator), y)


LINEAR: tuple[dict[str, Any], ...] = (
    {},
    {"cache": "e5m6"},
    {"recipe": "v32-ue8m0", "weight_recipe": "te"},
    {"promote": 32, "accumulator": "mma25"},
    {"promote": 0},
)


@pytest.mark.parametrize("attrs", LINEAR, ids=str)
@pytest.mark.parametrize(("n", "o", "d"), [(1, 1, 1), (9, 70, 150), (140, 24, 40), (300, 257, 130), (0, 5, 7)])
def test_the_layer_has_the_references_bits(n: int, o: int, d: int, attrs: dict[str, Any]) -> None:
    """y, dx and dweight, in both carriers; without tokens too."""
    for dtype in (np.float32, np.float64):
        x, weight, dy = (RNG.standard_normal(s) * f for s, f in (((n, d), 1.0), ((o, d), 0.05), ((n, o), 0.01)))
        given = {"x": x.astype(dtype), "weight": weight.astype(dtype), "dy": dy.astype(dtype)}
        op = OPS["fp8.linear"]
        expected = [*op.run("forward", given, attrs).values(), *op.run("backward", given, attrs).values()]
        returned = [cpu.fp8_linear(x=given["x"], weight=given["weight"], **attrs), *cpu.fp8_linear_bwd(**given, **attrs)]
        for a, b in zip(returned, expected, strict=True):
            assert a.dtype == dtype
            np.testing.assert_array_equal(a, b)


def test_wrong_arguments_are_named() -> None:
    """A ValueError names argument, value and expectation."""
    given = arrays(normal(3, 300), normal(130, 300))
    bad, zero = given["b_scale"].copy(), given["a_scale"].copy()
    bad[1, 2], zero[2, 0] = np.inf, 0
    x, weight = RNG.standard_normal((4, 8)).astype(np.float32), RNG.standard_normal((5, 8)).astype(np.float32)
    hole = x.copy()
    hole[2, 3] = np.nan
    for changes, expected in (
        ({"accumulator": "wgmma14"}, "accumulator is 'wgmma14'; expected fp32"),
        ({"accumulator": "bits:31"}, "accumulator is 'bits:31'"),
        ({"promote": 48}, "promote is 48; expected a divisor of tile = 128"),
        ({"promote": 16, "accumulator": "wgmma13"}, "promote is 16; expected a multiple of the accumulator's group of 32"),
        ({"tile": 0}, "tile is 0; expected tile >= 1"),
        ({"tile": 2.0}, "tile is 2.0; expected a finite int"),
        ({"scale_order": "both"}, "scale_order is 'both'; expected one of one by one, product first"),
        ({"format": "e5m6"}, "a_codes are uint8; expected uint16"),
        ({"format": "fp16"}, "format is 'fp16'; expected one of e4m3fn"),
        ({"out": "fp16"}, "out is 'fp16'"),
        ({"a_codes": given["a_codes"].astype(np.int64)}, "a_codes is a int64 array"),
        ({"b_codes": given["b_codes"][:, :299]}, "b_codes has shape .*; expected d = 300"),
        ({"a_scale": given["a_scale"][:2]}, "a_scale has shape .*; expected n = 3"),
        ({"a_scale": given["a_scale"][:, :2]}, "a_scale has shape .*; expected n = 3, d/tile = 3"),
        ({"b_scale": given["b_scale"].astype(np.float64)}, "b_scale is a float64 array; expected float32 like a_scale"),
        ({"b_scale": given["b_scale"][:1]}, "b_scale has shape .*; expected p = 2 .* or 130"),
        ({"b_scale": bad}, r"b_scale\[1, 2\] is inf; expected a finite scale > 0"),
        ({"a_scale": zero}, r"a_scale\[2, 0\] is 0.0; expected a finite scale > 0"),
        ({"a_codes": given["a_codes"][:, :0], "b_codes": given["b_codes"][:, :0]}, "expected d >= 1"),
    ):
        with pytest.raises(ValueError, match=expected):
            cpu.fp8_gemm(**{**given, **changes})
    for changes, expected in (
        ({"promote": 96}, "promote is 96; expected 32, 64 or 128"),
        ({"x": hole}, r"x\[2, 3\] is nan; expected finite numbers"),
        ({"weight": weight[:0]}, "weight has shape .*; expected no empty side"),
        ({"weight": weight.astype(np.float64)}, "weight is a float64 array"),
        ({"recipe": "v4"}, "recipe is 'v4'"),
        ({"cache": "e5m2"}, "cache is 'e5m2'"),
    ):
        with pytest.raises(ValueError, match=expected):
            cpu.fp8_linear(**{"x": x, "weight": weight, **changes})
