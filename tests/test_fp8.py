"""What must hold of FP8 blocks, matrix products and the linear layer. Each property comes with a mutant that breaks it."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from leadline.golden.draw import Source, gaussian_codes
from leadline.ref import (
    E4M3FN,
    OPS,
    decode,
    dequantize_block_fwd,
    dequantize_tile_fwd,
    encode,
    fp8_gemm_fwd,
    fp8_linear_bwd,
    fp8_linear_fwd,
    quantize_block_fwd,
    quantize_tile_fwd,
)

Arrays = dict[str, np.ndarray]
Gemm = Callable[..., np.ndarray]
MODELS = ("wgmma13", "mma25", "bits:7")


def gemm(a: Arrays, **attrs: Any) -> np.ndarray:
    return fp8_gemm_fwd(**a, **attrs)[0]


def operands(seed: int, n: int, o: int, d: int, tile: int = 128, positive: bool = False, rows: bool = False) -> Arrays:
    """Gaussian codes, scales of any mantissa; `rows`: a scale for each row of b too."""
    source = Source(f"fp8 gemm {seed}")
    codes = [gaussian_codes(source, shape, 100.0) & (0x7F if positive else 0xFF) for shape in ((n, d), (o, d))]
    tiles = -(-d // tile)
    scales = [np.ldexp(1 + source.uniform((p, tiles)), source.integers((p, tiles), -9, -5)) for p in (n, o if rows else -(-o // 128))]
    return {"a_codes": codes[0], "a_scale": scales[0], "b_codes": codes[1], "b_scale": scales[1]}


def dequantised(a: Arrays, tile: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Both operands as float64 matrices."""
    d, o = a["a_codes"].shape[1], a["b_codes"].shape[0]
    x = decode(E4M3FN, a["a_codes"]).astype(np.float64) * np.repeat(a["a_scale"], tile, axis=1)[:, :d]
    scale = a["b_scale"] if a["b_scale"].shape[0] == o else np.repeat(a["b_scale"], 128, axis=0)[:o]
    return x, decode(E4M3FN, a["b_codes"]).astype(np.float64) * np.repeat(scale, tile, axis=1)[:, :d]


seeds = st.integers(0, 2**32 - 1)


# blocks


def by_tiles(w: np.ndarray, block: int, **attrs: Any) -> tuple[np.ndarray, np.ndarray]:
    """Each block as one tile of fp8.quantize_tile."""
    (o, d), codes = w.shape, np.zeros(w.shape, np.uint8)
    scale = np.zeros((-(-o // block), -(-d // block)), w.dtype)
    for i, j in np.ndindex(*scale.shape):
        here = (slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block))
        part = w[here]
        (c, s), _ = quantize_tile_fwd(part.reshape(1, -1), tile=part.size, **attrs)
        codes[here], scale[i, j] = c.reshape(part.shape), s[0, 0]
    return codes, scale


def rows_of_all(w: np.ndarray, block: int, **attrs: Any) -> tuple[np.ndarray, np.ndarray]:
    """block-size-from-shape: the rows shared out evenly among the blocks."""
    rows = -(-w.shape[0] // -(-w.shape[0] // block))
    return by_tiles(w, rows, **attrs) if w.shape[0] % block else by_tiles(w, block, **attrs)


@given(seed=seeds, o=st.integers(1, 40), d=st.integers(1, 40), recipe=st.sampled_from(("v3", "v32-ue8m0", "te", "deepep")))
def test_a_block_is_a_tile(seed: int, o: int, d: int, recipe: str) -> None:
    """Each block has the codes and the scale of one tile that holds its elements."""
    w = Source(f"block {seed}").normal((o, d)).astype(np.float32)
    (codes, scale), _ = quantize_block_fwd(w, block=16, recipe=recipe)  # type: ignore[arg-type]
    expected = by_tiles(w, 16, recipe=recipe)
    np.testing.assert_array_equal(codes, expected[0])
    np.testing.assert_array_equal(scale, expected[1])
    back, _ = dequantize_block_fwd(codes, scale, block=16)
    np.testing.assert_array_equal(back, codes_times(codes, scale, 16))


def codes_times(codes: np.ndarray, scale: np.ndarray, block: int) -> np.ndarray:
    """Element by element."""
    values = decode(E4M3FN, codes)
    return np.array([[values[i, j] * scale[i // block, j // block] for j in range(codes.shape[1])] for i in range(codes.shape[0])])


def test_even_rows_are_another_grid() -> None:
    """The mutant that takes the block's height from the number of blocks has other scales where 16 does not divide the rows."""
    w = Source("block").normal((40, 20)).astype(np.float32)
    (_, scale), _ = quantize_block_fwd(w, block=16)
    wrong = rows_of_all(w, 16)[1]
    assert wrong.shape != scale.shape or np.any(wrong != scale)


# products


def close(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal but for float64's rounding of sums of a few thousand terms"""
    return bool(np.allclose(a, b, rtol=1e-11, atol=1e-11 * float(np.max(np.abs(b), initial=1e-300))))


def exact_is_the_product(run: Gemm, seed: int) -> bool:
    """accumulator="exact" is the matrix product of what codes times scales mean."""
    a = operands(seed, 3, 131, 300)
    x, w = dequantised(a)
    return close(run(a, accumulator="exact"), x @ w.T)


def linear_in_scales(run: Gemm, seed: int) -> bool:
    """Four times a row's scales give four times that row, in every model, to the bit."""
    a = operands(seed, 3, 5, 200)
    factor = np.array([[4.0], [1.0], [0.5]])
    more = {**a, "a_scale": a["a_scale"] * factor}
    return all(np.array_equal(run(more, accumulator=m), run(a, accumulator=m) * factor) for m in ("exact", "fp32", *MODELS))


def transposes(run: Gemm, seed: int) -> bool:
    """With a scale for every row of both, exchanging the operands transposes the result, to the bit."""
    a = operands(seed, 4, 6, 200, rows=True)
    turned = {"a_codes": a["b_codes"], "a_scale": a["b_scale"], "b_codes": a["a_codes"], "b_scale": a["a_scale"]}
    order = {"scale_order": "product first"}
    return all(np.array_equal(run(turned, accumulator=m, **order), run(a, accumulator=m, **order).T) for m in MODELS)


def permuted(a: Arrays, order: np.ndarray) -> Arrays:
    return {**a, "a_codes": a["a_codes"][:, order], "b_codes": a["b_codes"][:, order]}


def within_groups(seed: int, d: int) -> np.ndarray:
    """A permutation of 0 to d-1 that keeps each 32 together and in place"""
    key = np.arange(d) // 32 * 2**40 + Source(f"order {seed}").integers((d,), 0, 2**30)
    return np.argsort(key)


def order_within_a_group(run: Gemm, seed: int) -> bool:
    """Exchanging products inside a group of 32 changes nothing."""
    a = operands(seed, 4, 6, 256)
    moved = permuted(a, within_groups(seed, 256))
    return all(np.array_equal(run(moved, accumulator=m), run(a, accumulator=m)) for m in MODELS)


def parts_are_independent(run: Gemm, seed: int) -> bool:
    """Promotion starts each tile afresh: the whole is the sum of its tiles' products, added in order, to the bit."""
    a = operands(seed, 4, 6, 384)
    for m in MODELS:
        total = np.zeros((4, 6))
        for t in range(3):
            k = slice(128 * t, 128 * (t + 1))
            total = total + run(
                {"a_codes": a["a_codes"][:, k], "a_scale": a["a_scale"][:, t : t + 1], "b_codes": a["b_codes"][:, k]}
                | {"b_scale": a["b_scale"][:, t : t + 1]},
                accumulator=m,
            )
        if not np.array_equal(run(a, accumulator=m), total):
            return False
    return True


def never_above(run: Gemm, seed: int) -> bool:
    """On products of one sign truncation only loses: no model is above the exact product, and more bits lose less."""
    a = operands(seed, 3, 4, 512, positive=True)
    exact, *models = (run(a, accumulator=m) for m in ("exact", "mma25", "wgmma13", "bits:7"))
    chain = [exact * (1 + 1e-12), *models]
    return all(np.all(low <= high) for high, low in pairwise(chain))


def nan_spreads(run: Gemm, seed: int) -> bool:
    """A NaN code makes its row NaN, in every model, and nothing else."""
    a = operands(seed, 3, 4, 200)
    codes = a["a_codes"].copy()
    codes[1, seed % 200] = 0x7F
    results = (run({**a, "a_codes": codes}, accumulator=m) for m in ("exact", "fp32", *MODELS))
    return all(np.array_equal(np.isnan(y), np.broadcast_to(np.array([[0], [1], [0]], bool), y.shape)) for y in results)


def with_args(change: Callable[[Arrays, dict[str, Any]], tuple[Arrays, dict[str, Any]]]) -> Gemm:
    """gemm on changed arguments."""

    def run(a: Arrays, **attrs: Any) -> np.ndarray:
        arrays, attributes = change(a, attrs)
        return gemm(arrays, **attributes)

    return run


def rows_swapped(a: Arrays, attrs: dict[str, Any]) -> tuple[Arrays, dict[str, Any]]:
    return {**a, "b_scale": a["b_scale"][::-1]}, attrs


def sloped(a: Arrays, **attrs: Any) -> np.ndarray:
    return gemm(a, **attrs) + 1e-6 * a["a_scale"][:, :1] ** 2


def first_of_group_counts_more(a: Arrays, attrs: dict[str, Any]) -> tuple[Arrays, dict[str, Any]]:
    codes = a["a_codes"].copy()
    codes[:, ::32] = 0
    return {**a, "a_codes": codes}, attrs


def unpromoted(a: Arrays, attrs: dict[str, Any]) -> tuple[Arrays, dict[str, Any]]:
    """One accumulator for all of d, the scales taken from the first tile."""
    d = a["a_codes"].shape[1]
    first = {name: a[name][:, :1] for name in ("a_scale", "b_scale")}
    return {**a, **first}, {**attrs, "tile": max(d, 128), "promote": 0}


def swaps_models(a: Arrays, attrs: dict[str, Any]) -> tuple[Arrays, dict[str, Any]]:
    return a, {**attrs, "accumulator": {"mma25": "bits:7", "bits:7": "mma25"}.get(attrs["accumulator"], attrs["accumulator"])}


def nan_ignored(a: Arrays, attrs: dict[str, Any]) -> tuple[Arrays, dict[str, Any]]:
    return {**a, "a_codes": np.where(a["a_codes"] == 0x7F, 0, a["a_codes"]).astype(np.uint8)}, attrs


PROPERTIES: list[tuple[Callable[[Gemm, int], bool], Gemm]] = [
    (exact_is_the_product, with_args(rows_swapped)),
    (linear_in_scales, sloped),
    (transposes, sloped),
    (order_within_a_group, with_args(first_of_group_counts_more)),
    (parts_are_independent, with_args(unpromoted)),
    (never_above, with_args(swaps_models)),
    (nan_spreads, with_args(nan_ignored)),
]


@pytest.mark.parametrize("holds", [p for p, _ in PROPERTIES], ids=lambda p: p.__name__)
@given(seed=seeds)
def test_product(holds: Callable[[Gemm, int], bool], seed: int) -> None:
    """The reference's product has the property that the function's docstring states."""
    with np.errstate(all="ignore"):
        assert holds(gemm, seed)


@pytest.mark.parametrize(("holds", "mutant"), PROPERTIES, ids=lambda p: getattr(p, "__name__", ""))
def test_product_mutants(holds: Callable[[Gemm, int], bool], mutant: Gemm) -> None:
    with np.errstate(all="ignore"):
        assert not all(holds(mutant, seed) for seed in range(20))


def test_order_across_groups_matters() -> None:
    """The same products in groups of other order need not give the same sum: truncation is not associative."""
    differ = 0
    for seed in range(10):
        a = operands(seed, 4, 6, 256, tile=256)
        one = {"accumulator": "wgmma13", "tile": 256, "promote": 0}
        y, turned = gemm(a, **one), gemm(permuted(a, np.arange(256)[::-1]), **one)
        differ += bool(np.any(y != turned))
        assert close(gemm(permuted(a, np.arange(256)[::-1]), **{**one, "accumulator": "exact"}), gemm(a, **{**one, "accumulator": "exact"}))
    assert differ == 10


def test_promotion_takes_the_bias_away() -> None:
    """K = 7168, products of one sign: 13 fractional bits all the way lose 5% and more; promoted every 128, under 0.1% (V3 §3.3.2)."""
    a = operands(0, 4, 8, 7168, tile=7168, positive=True)
    exact = gemm(a, accumulator="exact", tile=7168)
    never = np.abs(gemm(a, accumulator="wgmma13", tile=7168, promote=0) / exact - 1).max()
    often = np.abs(gemm(a, accumulator="wgmma13", tile=7168, promote=128) / exact - 1).max()
    assert often < 1e-3 < 0.05 < never


def test_bf16_out_rounds_once() -> None:
    """out="bf16" is the float32 result rounded to nearest even."""
    a = {k: x.astype(np.float32) if x.dtype.kind == "f" else x for k, x in operands(1, 5, 6, 300).items()}
    y, rounded = gemm(a, accumulator="wgmma13"), gemm(a, accumulator="wgmma13", out="bf16")
    np.testing.assert_array_equal(rounded, round_bf16(y))
    assert np.any(rounded != y)


def round_bf16(y: np.ndarray) -> np.ndarray:
    """Half a unit and the last kept bit added to the bits, the rest cut off"""
    bits = y.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


# the linear layer


def fake(x: np.ndarray, axis: int, recipe: str = "v3", format: str = "e4m3fn") -> np.ndarray:
    """Quantised to tiles along an axis, and back, as float64"""
    (codes, scale), _ = quantize_tile_fwd(x.astype(np.float32), axis=axis, recipe=recipe, format=format)  # type: ignore[arg-type]
    return dequantize_tile_fwd(codes, scale, axis=axis, format=format)[0].astype(np.float64)  # type: ignore[arg-type]


def straight_through(x: np.ndarray, weight: np.ndarray, dy: np.ndarray, cache: str) -> tuple[np.ndarray, ...]:
    """y, dx, dweight written out with dense matrices: every operand quantised and dequantised, every product exact. A dequantised number is
    rounded to float32, which the product of codes is not: hence only near."""
    (codes, scale), _ = quantize_block_fwd(weight.astype(np.float32))
    w8 = codes_times(codes, scale.astype(np.float64), 128)
    e5m6 = cache == "e5m6"
    kept = fake(x, 1, "tilekernels-ue8m0", "e5m6") if e5m6 else fake(x, 1)
    again = fake(kept, 0, "tilekernels-ue8m0" if e5m6 else "v3")
    return fake(x, 1) @ w8.T, fake(dy, 1) @ w8, fake(dy, 0).T @ again


def layer(x: np.ndarray, weight: np.ndarray, dy: np.ndarray, **attrs: Any) -> tuple[np.ndarray, ...]:
    y, saved = fp8_linear_fwd(x, weight, accumulator="exact", **attrs)
    return y, *fp8_linear_bwd(dy, saved)


def original_x(x: np.ndarray, weight: np.ndarray, dy: np.ndarray, **attrs: Any) -> tuple[np.ndarray, ...]:
    """Wgrad from x itself instead of what was kept of it."""
    y, dx, _ = layer(x, weight, dy, **attrs)
    return y, dx, fake(dy, 0).T @ fake(x, 0)


def tiles_of_the_forward(x: np.ndarray, weight: np.ndarray, dy: np.ndarray, **attrs: Any) -> tuple[np.ndarray, ...]:
    """Wgrad with 1×128 tiles of dy instead of 128×1."""
    y, dx, _ = layer(x, weight, dy, **attrs)
    return y, dx, fake(dy, 1).T @ fake(fake(x, 1), 0)


def agree(run: Callable[..., tuple[np.ndarray, ...]], seed: int, cache: str) -> bool:
    """Every output within float32's rounding of each dequantised number: |error| <= 3 · 2^-24 Σ |a b|"""
    source = Source(f"fp8 linear {seed}")
    n, o, d = (int(source.integers((), 1, 300)) for _ in range(3))
    x, weight, dy = source.normal((n, d)), source.normal((o, d), 0.05), source.normal((n, o), 1e-2)
    got, want = run(x, weight, dy, cache=cache), straight_through(x, weight, dy, cache)
    sums = np.abs(x) @ np.abs(weight).T, np.abs(dy) @ np.abs(weight), np.abs(dy).T @ np.abs(x)
    return all(np.all(np.abs(g - w) <= 1.5 * 3 * 2.0**-24 * s) for g, w, s in zip(got, want, sums, strict=True))


@pytest.mark.parametrize("cache", ["e4m3fn", "e5m6"])
@given(seed=seeds)
def test_gradients_pass_straight_through(cache: str, seed: int) -> None:
    """The backward is the declared computation: Dgrad and Wgrad of the quantised operands, casts passed straight through."""
    assert agree(layer, seed, cache)


@pytest.mark.parametrize("mutant", [original_x, tiles_of_the_forward])
def test_gradient_mutants(mutant: Callable) -> None:
    assert not all(agree(mutant, seed, "e4m3fn") for seed in range(5))


def test_gradients_are_near_the_plain_ones() -> None:
    """FP8 costs a few percent of a gradient, not more: relative error of y, dx and dweight under 5%, and above 0.5% (it is FP8)."""
    source = Source("fp8 linear size")
    x, weight, dy = source.normal((300, 500)), source.normal((200, 500), 0.05), source.normal((300, 200), 1e-2)
    for g, w in zip(layer(x, weight, dy), (x @ weight.T, dy @ weight, dy.T @ x), strict=True):
        assert 0.005 < np.linalg.norm(g - w) / np.linalg.norm(w) < 0.05


def test_no_tokens() -> None:
    """A batch without tokens: no rows out, no gradient to the weight."""
    y, dx, dweight = layer(np.zeros((0, 200)), np.ones((7, 200)), np.zeros((0, 7)))
    assert y.shape == (0, 7)
    assert dx.shape == (0, 200)
    np.testing.assert_array_equal(dweight, np.zeros((7, 200)))


REFUSALS: dict[str, tuple[Callable[[], Any], str]] = {
    "transposed grid": (lambda: gemm({**operands(0, 2, 256, 384), "b_scale": np.ones((3, 2))}), "b_scale has shape (3, 2); expected p = 2"),
    "zero scale": (lambda: gemm({**operands(0, 2, 3, 128), "a_scale": np.array([[1.0], [0.0]])}), "a_scale[1, 0] is 0.0"),
    "negative scale": (lambda: gemm({**operands(0, 2, 3, 128), "b_scale": np.array([[-1.0]])}), "b_scale[0, 0] is -1.0"),
    "NaN scale": (lambda: gemm({**operands(0, 2, 3, 128), "b_scale": np.array([[np.nan]])}), "b_scale[0, 0] is nan"),
    "codes": (lambda: gemm({**operands(0, 2, 3, 128), "a_codes": np.zeros((2, 128), np.uint16)}), "a_codes are uint16; expected uint8"),
    "K of zero": (lambda: gemm(operands(0, 2, 3, 0)), "expected d >= 1"),
    "promote": (lambda: gemm(operands(0, 2, 3, 256), promote=96), "promote is 96; expected a divisor of tile = 128"),
    "promote's group": (lambda: gemm(operands(0, 2, 3, 256), promote=16, accumulator="mma25"), "multiple of the accumulator's group"),
    "accumulator": (lambda: gemm(operands(0, 2, 3, 256), accumulator="bits:99"), "accumulator is 'bits:99'; expected fp32"),
    "NaN in x": (lambda: fp8_linear_fwd(np.full((2, 3), np.nan), np.ones((4, 3))), "x[0, 0] is nan; expected finite"),
    "NaN in w": (lambda: quantize_block_fwd(np.full((2, 3), np.nan)), "w[0, 0] is NaN"),
    "block grid": (
        lambda: dequantize_block_fwd(np.zeros((200, 300), np.uint8), np.ones((3, 2))),
        "scale has shape (3, 2); expected (2, 3)",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused(name: str) -> None:
    """Argument, value, expectation."""
    call, says = REFUSALS[name]
    with pytest.raises(ValueError, match=r"^fp8\.") as error:
        call()
    assert says in str(error.value)


def test_encode_names_where_nan_is() -> None:
    with pytest.raises(ValueError, match=r"x\[2\] is NaN; e2m1 has none"):
        OPS["encode.e2m1"].fwd(np.array([1.0, 2.0, np.nan]))
    assert encode(E4M3FN, np.array([np.nan], np.float32))[0] == 0x7F
