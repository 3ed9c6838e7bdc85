"""The CPU kernels of casts, quantisation and packing, bit for bit the reference; threads, sizes, `out=` and refusals."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from leadline.kernels import cpu
from leadline.kernels.cpu import _common
from leadline.ref import cast as ref_cast
from leadline.ref import fp8, fp8_block, pack
from leadline.ref.formats import CASTS, FORMATS, Format
from leadline.ref.fp8_recipes import RECIPES

ROUNDINGS = ("half-even", "half-away", "half-zero", "zero", "stochastic")
QUANTISED = ("e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz", "e5m6", "e2m1")
TIES = ("half-even", "half-zero")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # overflows and 0/0 on purpose


def generator(key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=key))


def same(a: np.ndarray, b: np.ndarray) -> None:
    """Bit for bit, any NaN for a NaN."""
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    np.testing.assert_array_equal(a, b)
    if a.dtype.kind == "f":
        numbers = ~np.isnan(a)
        np.testing.assert_array_equal(np.signbit(a)[numbers], np.signbit(b)[numbers])


def bit_patterns(fmt: Format, dtype: type, count: int) -> np.ndarray:
    """Random bit patterns of a carrier, without NaN where the format has none."""
    width = 8 * np.dtype(dtype).itemsize
    x = generator(width).integers(0, 2**width, count, dtype=np.uint64).astype(f"u{width // 8}").view(dtype)
    return x[~np.isnan(x)] if fmt.nan_code is None else x


def around(fmt: Format, dtype: type) -> np.ndarray:
    """Values of the format (tf32: of e5m6, whose values it has), midpoints, what lies beyond, and their neighbours in the carrier."""
    narrow = fmt if fmt.bits <= 16 else FORMATS["e5m6"]
    values = ref_cast.decode(narrow, np.arange(2**narrow.bits).astype(narrow.code_dtype)).astype(np.float64)
    values = np.unique(values[np.isfinite(values)])
    ends = [0.0, -0.0, np.inf, -np.inf, fmt.max, 1.25 * fmt.max, -1.5 * fmt.max, 2.0**-127, -(2.0**-149), 5e-324]
    x = np.concatenate([values, (values[1:] + values[:-1]) / 2, ends]).astype(dtype)
    x = np.concatenate([x, np.nextafter(x, dtype(np.inf)), np.nextafter(x, dtype(-np.inf))])
    return x if fmt.nan_code is None else np.append(x, dtype(np.nan))


def check_cast(fmt: Format, x: np.ndarray, **attrs: Any) -> None:
    if attrs["rounding"] == "stochastic":
        random = generator(3).integers(0, 2**12, x.size).astype(x.dtype) / 4096  # often exactly the fraction that is cut off
        attrs = {**attrs, "random": random}
    same(getattr(cpu.cast, fmt.name)(x=x, **attrs), ref_cast.round_to(fmt, x, **attrs))
    if fmt.bits <= 16:
        same(getattr(cpu.encode, fmt.name)(x=x, **attrs), ref_cast.encode(fmt, x, **attrs))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("fmt", CASTS, ids=lambda f: f.name)
def test_a_million_bit_patterns_round_as_the_reference_does(fmt: Format, rounding: str) -> None:
    """float32 from all over its range."""
    default = "saturate" if fmt.bits <= 8 else "nan"
    check_cast(fmt, bit_patterns(fmt, np.float32, 1_000_000), overflow=default, rounding=rounding)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("fmt", CASTS, ids=lambda f: f.name)
def test_values_and_midpoints_round_as_the_reference_does(fmt: Format, dtype: type) -> None:
    """Both carriers, both overflows, all roundings."""
    for rounding, overflow in itertools.product(ROUNDINGS, ("saturate", "nan") if fmt.nan_code is not None else ("saturate",)):
        check_cast(fmt, around(fmt, dtype), overflow=overflow, rounding=rounding)
        check_cast(fmt, bit_patterns(fmt, dtype, 10_000), overflow=overflow, rounding=rounding)


def test_every_code_decodes_and_encodes_to_itself() -> None:
    """All codes of all stored formats; a NaN's code comes back as the canonical one."""
    for fmt in (f for f in CASTS if f.bits <= 16):
        codes = np.arange(2**fmt.bits).astype(fmt.code_dtype)
        x = getattr(cpu.decode, fmt.name)(codes=codes)
        same(x, ref_cast.decode(fmt, codes))
        back = getattr(cpu.encode, fmt.name)(x=x, overflow="saturate" if fmt.inf_code is None else "nan")
        canonical = codes if fmt.nan_code is None else np.where(np.isnan(x), fmt.nan_code, codes).astype(codes.dtype)
        np.testing.assert_array_equal(back, canonical)


def draws(shape: tuple[int, int], dtype: type) -> dict[str, np.ndarray]:
    rng, n = generator(11), shape[0]
    low, high = (-149, 125) if dtype is np.float32 else (-1074, 1021)
    infinite = rng.standard_normal(shape)
    infinite[::3, ::17], infinite[::5, ::23], infinite[:, ::4] = np.inf, -np.inf, 0.0
    tiny, wide = np.ldexp(1.0, low), np.ldexp(1.0, rng.integers(low, high, (n, 1)).astype(int))
    drawn = {
        "normal": rng.standard_normal(shape),
        "wide": rng.standard_normal(shape) * wide,
        "subnormal": rng.integers(-20, 21, shape) * tiny,
        "zero": np.where(rng.random(shape) < 0.5, 0.0, -0.0),
        "steps": rng.integers(-24, 25, shape) * 0.25,
        "infinite": infinite,
    }
    return {name: x.astype(dtype) for name, x in drawn.items()}


@pytest.mark.parametrize("rounding", TIES)
@pytest.mark.parametrize("format", QUANTISED)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_recipe_in_every_format_is_the_references(dtype: type, format: Any, rounding: Any) -> None:
    """Tiles along both axes and blocks, ragged at every edge; zeros, subnormals and infinities among them. What one refuses (NaN in a
    format that has none), the other does."""

    def agree(ours: Callable[..., Any], reference: Callable[..., Any], x: np.ndarray, **attrs: Any) -> None:
        try:
            expected, _ = reference(x, **attrs)
        except ValueError:
            assert format == "e2m1"
            with pytest.raises(ValueError, match="gives NaN; e2m1 has none"):
                ours(x, **attrs)
            return
        for a, b in zip(ours(x, **attrs), expected, strict=True):
            same(a, b)

    for x, recipe in itertools.product(draws((37, 75), dtype).values(), RECIPES):
        attrs: dict[str, Any] = {"recipe": recipe, "format": format, "rounding": rounding}
        for tile, axis in ((32, 1), (16, 0)):
            agree(cpu.fp8.quantize_tile, fp8.quantize_tile_fwd, x, tile=tile, axis=axis, **attrs)
        agree(cpu.fp8.quantize_block, fp8_block.quantize_block_fwd, x, block=16, **attrs)


@pytest.mark.parametrize("shape", [(0, 7), (1, 1), (1, 300), (5, 1), (129, 257), (130, 3)])
@pytest.mark.parametrize("block", [1, 2, 7, 128, 1000])
def test_blocks_of_any_size_on_matrices_of_any_size(shape: tuple[int, int], block: int) -> None:
    """Empty, one element, less than a block, one more than two blocks."""
    w = generator(5).standard_normal(shape).astype(np.float32)
    (codes, scale), _ = fp8_block.quantize_block_fwd(w, block=block)
    got = cpu.fp8.quantize_block(w=w, block=block)
    same(got[0], codes)
    same(got[1], scale)
    same(cpu.fp8.dequantize_block(codes=codes, scale=scale, block=block), fp8_block.dequantize_block_fwd(codes, scale, block=block)[0])


@pytest.mark.parametrize("format", QUANTISED)
def test_every_bit_pattern_dequantises_as_the_reference_does(format: Any) -> None:
    """All codes there are; what the format has no bits for is refused."""
    fmt = FORMATS[format]
    codes = (np.arange(2**16) % 2**fmt.bits).astype(fmt.code_dtype).reshape(256, 256)
    if fmt.bits % 8:
        with pytest.raises(ValueError, match=rf"codes\[0, 1\] is {2**fmt.bits}; expected a code below"):
            cpu.fp8.dequantize_tile(codes=np.array([[0, 2**fmt.bits]], fmt.code_dtype), scale=np.ones((1, 1)), format=format)
    rng = generator(6)
    for dtype, axis in itertools.product((np.float32, np.float64), (0, 1)):
        scale = np.exp(rng.standard_normal((256, 4) if axis == 1 else (4, 256))).astype(dtype)
        expected, _ = fp8.dequantize_tile_fwd(codes, scale, tile=64, axis=axis, format=format)  # type: ignore[arg-type]
        same(cpu.fp8.dequantize_tile(codes=codes, scale=scale, tile=64, axis=axis, format=format), expected)
        scale = np.exp(rng.standard_normal((3, 3))).astype(dtype)
        expected, _ = fp8_block.dequantize_block_fwd(codes, scale, block=100, format=format)
        same(cpu.fp8.dequantize_block(codes=codes, scale=scale, block=100, format=format), expected)


def test_packed_words_are_the_codes_bits_in_order() -> None:
    """Written out by hand: eight codes 0x001 ... 0x008, and the nibbles of 0x21."""
    codes = np.arange(1, 9, dtype=np.uint16)[None]
    assert [f"{word:08x}" for word in cpu.pack_e5m6(codes=codes)[0]] == ["00100200", "30040050", "06007008"]
    assert cpu.pack_e2m1(codes=np.array([[1, 2]], np.uint8))[0, 0] == 0x21


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (1, 8), (7, 24), (300, 1024)])
def test_packing_is_the_references_and_comes_back(shape: tuple[int, int]) -> None:
    """Odd numbers of rows and groups, and enough of them for several threads."""
    rng = generator(8)
    for name, dtype, count in (("e2m1", np.uint8, 16), ("e5m6", np.uint16, 4096)):
        codes = rng.integers(0, count, shape).astype(dtype)
        packed = getattr(cpu, f"pack_{name}")(codes=codes)
        same(packed, getattr(pack, f"pack_{name}_fwd")(codes)[0])
        same(getattr(cpu, f"unpack_{name}")(packed=packed), codes)
    words = rng.integers(0, 2**32, (shape[0], shape[1] // 8 * 3), dtype=np.uint64).astype(np.uint32)
    same(cpu.unpack_e5m6(packed=words), pack.unpack_e5m6_fwd(words)[0])


def calls() -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """A call of each kernel that is large enough for several threads."""
    rng = generator(9)
    x = rng.standard_normal((700, 515)).astype(np.float32)
    random = rng.random(x.shape).astype(np.float32)
    nibbles, twelve = rng.integers(0, 16, (700, 512)).astype(np.uint8), rng.integers(0, 4096, (700, 512)).astype(np.uint16)
    codes, scale = cpu.fp8.quantize_block(w=x)
    return {
        "cast": (cpu.cast.e4m3fnuz, {"x": x}),
        "cast, stochastic": (cpu.cast.e4m3fn, {"x": x, "random": random, "rounding": "stochastic"}),
        "encode": (cpu.encode.e8m0, {"x": x}),
        "encode, half-zero": (cpu.encode.e2m1, {"x": x, "rounding": "half-zero"}),
        "decode": (cpu.decode.e4m3fnuz, {"codes": codes}),
        "decode, e8m0": (cpu.decode.e8m0, {"codes": codes}),
        "rows": (cpu.fp8.quantize_tile, {"x": x, "recipe": "te"}),
        "columns": (cpu.fp8.quantize_tile, {"x": x, "axis": 0, "format": "e5m6"}),
        "blocks": (cpu.fp8.quantize_block, {"w": x, "recipe": "te-ue8m0", "format": "e5m2fnuz"}),
        "small blocks": (cpu.fp8.quantize_block, {"w": x, "block": 3, "recipe": "mxfp4", "format": "e2m1"}),
        "dequantise": (cpu.fp8.dequantize_block, {"codes": codes, "scale": scale}),
        "pack e2m1": (cpu.pack_e2m1, {"codes": nibbles}),
        "unpack e2m1": (cpu.unpack_e2m1, {"packed": nibbles}),
        "pack e5m6": (cpu.pack_e5m6, {"codes": twelve}),
        "unpack e5m6": (cpu.unpack_e5m6, {"packed": cpu.pack_e5m6(codes=twelve)}),
    }


@pytest.mark.parametrize("name", calls())
def test_threads_and_out_change_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread and three, and arrays of the caller's, give the same bits; the caller's arrays are what is returned."""
    kernel, arguments = calls()[name]
    results: dict[int, tuple[np.ndarray, ...]] = {}
    for threads in (1, 3):
        monkeypatch.setattr(_common, "THREADS", threads)
        returned = kernel(**arguments)
        results[threads] = returned if isinstance(returned, tuple) else (returned,)
    filled = tuple(np.full_like(a, 1) for a in results[1])
    out: Any = filled if len(filled) > 1 else next(iter(filled))
    returned = kernel(**arguments, out=out)
    assert returned is out or all(a is b for a, b in zip(returned, filled, strict=True))
    for one, many, given in zip(results[1], results[3], filled, strict=True):
        same(one, many)
        same(one, given)


def test_arguments_are_refused_by_name() -> None:
    """The message names the argument, its value and what was expected."""
    x, codes, scale = np.ones((3, 4), np.float32), np.full((3, 4), 7, np.uint8), np.ones((1, 1), np.float32)
    nan, high, sixteen = x.copy(), codes.copy(), np.full((2, 8), 4096, np.uint16)
    nan[1, 2], high[2, 1] = np.nan, 16
    refused: list[tuple[Callable[[], Any], str]] = [
        (lambda: cpu.encode.e2m1(x=nan), r"encode.e2m1: x\[1, 2\] is NaN; e2m1 has none"),
        (lambda: cpu.cast.e2m1(x=nan[1], rounding="zero"), r"cast.e2m1: x\[2\] is NaN"),
        (lambda: cpu.cast.e2m1(x=x, overflow="nan"), "overflow is 'nan'"),
        (lambda: cpu.cast.e5m6(x=x, rounding="up"), "rounding is 'up'"),
        (lambda: cpu.cast.e5m6(x=x, rounding="stochastic"), "random is missing"),
        (lambda: cpu.cast.e5m6(x=x, random=x), "random is given"),
        (lambda: cpu.cast.e5m6(x=x, random=x, rounding="stochastic"), r"outside \[0, 1\)"),
        (lambda: cpu.cast.e5m6(x=x, random=-x, rounding="stochastic"), r"outside \[0, 1\)"),
        (lambda: cpu.cast.e5m6(x=x, random=nan * 0, rounding="stochastic"), r"outside \[0, 1\)"),
        (lambda: cpu.cast.e5m6(x=x, random=x[0] * 0, rounding="stochastic"), r"expected x's shape \(3, 4\)"),
        (lambda: cpu.decode.e2m1(codes=high), "reaches 16; expected 4 bits, below 16"),
        (lambda: cpu.decode.e5m6(codes=sixteen), "reaches 4096; expected 12 bits"),
        (lambda: cpu.decode.e5m6(codes=codes), "uint8"),
        (lambda: cpu.decode.e8m0(codes=codes, out=np.empty((3, 4))), "out"),
        (lambda: cpu.fp8.quantize_tile(x=x, rounding="zero"), "rounding is 'zero'"),
        (lambda: cpu.fp8.quantize_tile(x=x, format="e8m0"), "format is 'e8m0'"),
        (lambda: cpu.fp8.quantize_tile(x=x, axis=2), "axis is 2"),
        (lambda: cpu.fp8.quantize_block(w=nan), r"quantize_block: w\[1, 2\] is NaN"),
        (lambda: cpu.fp8.quantize_block(w=nan, block=1), r"quantize_block: w\[1, 2\] is NaN"),
        (lambda: cpu.fp8.quantize_block(w=x, block=0), "block is 0"),
        (lambda: cpu.fp8.quantize_block(w=x, recipe="v4"), "recipe is 'v4'"),
        (lambda: cpu.fp8.quantize_block(w=x.astype(np.float16)), "float16"),
        (lambda: cpu.fp8.dequantize_block(codes=codes, scale=scale, block=2), r"expected shape \(2, 2\)"),
        (lambda: cpu.fp8.dequantize_block(codes=codes, scale=scale, format="e5m6"), "uint16"),
        (lambda: cpu.fp8.dequantize_block(codes=codes, scale=scale, out=x[:2]), "out"),
        (lambda: cpu.pack_e2m1(codes=high), r"codes\[2, 1\] is 16; expected a code below 16"),
        (lambda: cpu.pack_e2m1(codes=codes[:, :3]), "multiple of 2"),
        (lambda: cpu.pack_e5m6(codes=sixteen), r"codes\[0, 0\] is 4096"),
        (lambda: cpu.pack_e5m6(codes=sixteen[:, :4]), "multiple of 8"),
        (lambda: cpu.unpack_e5m6(packed=np.zeros((1, 4), np.uint32)), "multiple of 3"),
        (lambda: cpu.unpack_e2m1(packed=sixteen), "uint16"),  # type: ignore[arg-type]
    ]
    for call, expected in refused:
        with pytest.raises(ValueError, match=expected):
            call()
