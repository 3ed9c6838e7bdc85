"""Bugs of the FP8 linear layer: which numbers are quantised, along which axis, and whose scales they meet."""

from collections.abc import Callable
from typing import Any

from ...ref.cast import decode
from ...ref.formats import E4M3FN, E5M2
from ...ref.fp8 import dequantize_tile_fwd, quantize_tile_fwd, tile_amax, turned
from ...ref.fp8_block import quantize_block_fwd
from ...ref.fp8_gemm import fp8_gemm_fwd
from ...ref.fp8_linear import fp8_linear_bwd, fp8_linear_fwd
from ...ref.fp8_recipes import RECIPES, linear_scale, round_scale_up
from ...ref.xp import Array, constant, exactly, xp_of
from . import Bug
from .fp8_block import PADDED, TRANSPOSED, grid_reread, padded_grid
from .fp8_gemm import CUT, product, rows_of

Coded = tuple[Array, Array]  # codes, scale
Saved = tuple


def coded(x: Array, recipe: str, **attrs: Any) -> Coded:
    return quantize_tile_fwd(exactly(x), recipe=recipe, **attrs)[0]


def numbers(codes: Array, scale: Array, format: str = "e4m3fn") -> Array:
    return dequantize_tile_fwd(codes, scale, format=format)[0]


def multiplied(like: Array, a: Coded, b: Coded, products: dict) -> Array:
    """The product of two quantised operands, as fp8.gemm has it"""
    return fp8_gemm_fwd(a[0], constant(like, a[1]), b[0], constant(like, b[1]), **products)[0]


def mixed(like: Array, a: Coded, b: Coded, products: dict) -> Array:
    """The same with a in E5M2"""
    sa, sb = constant(like, a[1]), rows_of(constant(like, b[1]), b[0].shape[0])
    scales = lambda k: (sa[:, k // 128, None], sb[None, :, k // 128])  # noqa: E731
    step = products["promote"] or 128
    return product(decode(E5M2, a[0]), decode(E4M3FN, b[0]), scales, step, E5M2, products["accumulator"], like=sa)


# forward


def forward(multiply: Callable[[Array, Coded, Coded, dict], Array], given: Callable[[Array, Array, dict], tuple[Coded, Coded]]) -> Callable:
    """fp8.linear with other operands, given(x, weight, attributes), of another product"""

    def fwd(x: Array, weight: Array, **attrs: Any) -> tuple[Array, Saved]:
        _, saved = fp8_linear_fwd(x, weight, **attrs)
        o = {"recipe": "v3", "weight_recipe": "v3", **attrs}
        return multiply(x, *given(exactly(x), exactly(weight), o), saved[5]), saved

    return fwd


def of_x(change: Callable[[Array, dict], Coded], multiply: Callable = multiplied) -> Callable:
    """Another x8"""
    return forward(multiply, lambda x, w, o: (change(x, o), quantize_block_fwd(w, recipe=o["weight_recipe"])[0]))


def unrounded(x: Array, recipe: str) -> Array:
    return linear_scale(tile_amax(x, 128), RECIPES[recipe], E4M3FN.max)


def told_float(x: Array, o: dict) -> Coded:
    """Codes of a scale rounded up to a power of two, and the product takes it for the scale before."""
    linear = unrounded(x, o["recipe"])
    return quantize_tile_fwd(x, recipe=o["recipe"], scale=round_scale_up(linear, "bits"))[0][0], linear


def told_power(x: Array, o: dict) -> Coded:
    """And the reverse"""
    linear = unrounded(x, o["recipe"])
    return quantize_tile_fwd(x, recipe=o["recipe"], scale=linear)[0][0], round_scale_up(linear, "bits")


def in_blocks(x: Array, recipe: str) -> Coded:
    """Blocks of 128×128, a scale for each row"""
    (codes, scale), _ = quantize_block_fwd(x, recipe=recipe)  # type: ignore[arg-type]
    return codes, rows_of(scale, x.shape[0])


def x_as_it_is(x: Array, weight: Array, **attrs: Any) -> tuple[Array, Saved]:
    """Weights alone are quantised."""
    _, saved = fp8_linear_fwd(x, weight, **attrs)
    codes, scale = saved[2], rows_of(saved[3], weight.shape[0])
    return xp_of(x).matmul(x, constant(x, numbers(codes, scale)).T), saved


def regridded(w: Array, o: dict) -> Coded:
    (codes, scale), _ = quantize_block_fwd(w, recipe=o["weight_recipe"])
    return codes, grid_reread(scale)


# backward


def backward(
    dgrad: Callable[[Array, Saved], Array] | None = None, wgrad: Callable[[Array, Saved], Array] | None = None
) -> Callable[[Array, Saved], tuple[Array, Array]]:
    """fp8.linear's backward with another dx or dweight"""

    def bwd(dy: Array, saved: Saved) -> tuple[Array, Array]:
        dx, dweight = fp8_linear_bwd(dy, saved)
        return dx if dgrad is None else dgrad(dy, saved), dweight if wgrad is None else wgrad(dy, saved)

    return bwd


def dgrad_of(quantise: Callable[[Array, str], Coded], multiply: Callable = multiplied) -> Callable[[Array, Saved], Array]:
    """dx with dy quantised in another way"""
    return lambda dy, s: multiply(dy, quantise(exactly(dy), s[4]), (s[2].T, s[3].T), s[5])


def with_grid(change: Callable[[Array], Array]) -> Callable[[Array, Saved], Array]:
    """dx with another grid for the transposed weight: change(grid of the weight)"""
    return lambda dy, s: multiplied(dy, coded(dy, s[4]), (s[2].T, change(s[3])), s[5])


def wgrad_of(
    dy8: Callable[[Array, Saved], Coded], x8: Callable[[Array, Saved], Coded], multiply: Callable = multiplied
) -> Callable[[Array, Saved], Array]:
    """dweight of these: dy8 [o,n], x8 [d,n], both from (dy, saved)"""
    return lambda dy, s: multiply(dy, dy8(dy, s), x8(dy, s), s[5])


def dy_by_tokens(dy: Array, s: Saved) -> Coded:
    return coded(dy.T, s[4])


def retiled(x: Array, s: Saved) -> Coded:
    """x[n,d] in tiles of 128×1"""
    return coded(turned(x), "tilekernels-ue8m0" if s[6] == "e5m6" else s[4])


def kept(s: Saved) -> Array:
    return numbers(s[0], s[1], s[6])


def x_by_tokens(dy: Array, s: Saved) -> Coded:
    return retiled(kept(s), s)


def forward_scales(dy: Array, s: Saved) -> Coded:
    """The codes that the forward has, and a tile of 128 tokens takes the scale of its first."""
    if s[6] == "e5m6":
        return x_by_tokens(dy, s)
    scale = xp_of(dy).repeat(s[1][::128, :], 128, axis=1)[:, : s[0].shape[1]]  # [⌈n/128⌉,d]
    return s[0].T, turned(scale)  # type: ignore[return-value]


def unscaled_x(dy: Array, s: Saved) -> Coded:
    return retiled(decode(E4M3FN, s[0]), s) if s[6] == "e4m3fn" else x_by_tokens(dy, s)


def along_features(dy: Array, s: Saved) -> Array:
    """dy8 as Dgrad has it. Its scales change along the sum, so that the product is one of numbers."""
    d8 = numbers(*coded(dy, s[4]))
    return xp_of(dy).matmul(constant(dy, d8).T, constant(dy, numbers(*x_by_tokens(dy, s))).T)


def x_not_retiled(dy: Array, s: Saved) -> Array:
    """What was kept is multiplied as it is."""
    return xp_of(dy).matmul(constant(dy, numbers(*dy_by_tokens(dy, s))), constant(dy, kept(s)))


def unquantised(dy: Array, s: Saved) -> Array:
    return xp_of(dy).matmul(dy.T, constant(dy, kept(s)))


def keeps_x(x: Array, weight: Array, **attrs: Any) -> tuple[Array, Saved]:
    y, saved = fp8_linear_fwd(x, weight, **attrs)
    return y, (*saved, exactly(x))


def original_x(dy: Array, saved: Saved) -> tuple[Array, Array]:
    *own, x = saved
    dx, _ = fp8_linear_bwd(dy, tuple(own))
    return dx, multiplied(dy, dy_by_tokens(dy, saved), retiled(x, saved), saved[5])


def e5m2(x: Array, recipe: str) -> Coded:
    return coded(x, recipe, format="e5m2")


LINEAR = ("fp8.linear",)
SWAPPED = "NVIDIA/TransformerEngine#1559; zxypro1/algolocal#86"
TOLD = "sgl-project/sglang#9946"
PAPER = "DeepSeek-V3 paper"
BUGS = [
    Bug("fp8-fmt-swap", LINEAR, "x is quantised to E5M2, not to E4M3.", SWAPPED, fwd=of_x(lambda x, o: e5m2(x, o["recipe"]), mixed)),
    Bug(
        "ue8m0-mode-mismatch",
        LINEAR,
        "x's codes are those of power-of-two scales, the product is handed others.",
        TOLD,
        fwd=of_x(told_float),
    ),
    Bug(
        "ue8m0-mode-mismatch",
        LINEAR,
        "x's codes are those of float32 scales, the product takes the powers of two.",
        TOLD,
        fwd=of_x(told_power),
    ),
    Bug(
        "fp8-x-in-blocks",
        LINEAR,
        "x is quantised in blocks of 128×128, as the weight is.",
        fwd=of_x(lambda x, o: in_blocks(x, o["recipe"])),
    ),
    Bug("fp8-x-unquantised", LINEAR, "The weight alone is quantised; x is multiplied as it is.", fwd=x_as_it_is),
    Bug(
        "scale-grid-transposed",
        LINEAR,
        "The weight's scale[j,i] is used for block (i,j).",
        TRANSPOSED,
        fwd=forward(multiplied, lambda x, w, o: (coded(x, o["recipe"]), regridded(w, o))),
    ),
    Bug("accumulator-fp32", LINEAR, "The output is that of a float32 accumulator.", attrs={"accumulator": "fp32"}, benign=True),
    Bug("accumulator-wgmma13", LINEAR, "The output is that of Hopper's FP8 wgmma.", CUT, attrs={"accumulator": "wgmma13"}, benign=True),
    Bug("accumulator-mma25", LINEAR, "The output is that of mma.sync and Blackwell.", CUT, attrs={"accumulator": "mma25"}, benign=True),
    Bug(
        "scale-grid-transposed",
        LINEAR,
        "Dgrad multiplies by Wᵀ with W's own scale grid, not transposed.",
        TRANSPOSED,
        bwd=backward(with_grid(lambda grid: grid_reread(turned(grid)))),
    ),
    Bug(
        "scale-k-pad4",
        LINEAR,
        "Rows of Wᵀ's scale grid are read at a distance rounded up to 4, where they are not.",
        PADDED,
        bwd=backward(with_grid(lambda grid: padded_grid(turned(grid)))),
    ),
    Bug(
        "dgrad-dy-in-blocks",
        LINEAR,
        "Dgrad's dy is quantised in blocks of 128×128.",
        f"{PAPER}, App. B.2",
        bwd=backward(dgrad_of(in_blocks)),
    ),
    Bug(
        "fp8-fmt-swap",
        LINEAR,
        "dy is rounded to E5M2 in Dgrad and in Wgrad; V3 has E4M3 throughout.",
        f"{PAPER}, §3.3.2; {SWAPPED}",
        bwd=backward(dgrad_of(e5m2, mixed), wgrad_of(lambda dy, s: e5m2(dy.T, s[4]), x_by_tokens, mixed)),
    ),
    Bug(
        "wgrad-scale-orientation",
        LINEAR,
        "Wgrad takes the forward's codes of x with the forward's scales: of a token's 128 channels instead of a channel's 128 tokens.",
        "pytorch/ao#4229; deepseek-ai/DeepGEMM#10",
        bwd=backward(wgrad=wgrad_of(dy_by_tokens, forward_scales)),
    ),
    Bug(
        "wgrad-dy-along-features", LINEAR, "Wgrad's dy is in tiles of 1×128 along o, as Dgrad's.", PAPER, bwd=backward(wgrad=along_features)
    ),
    Bug(
        "wgrad-x-not-retiled",
        LINEAR,
        "Wgrad's x8 is the forward's, not quantised again in 128×1.",
        PAPER,
        bwd=backward(wgrad=x_not_retiled),
    ),
    Bug("wgrad-unquantised", LINEAR, "Wgrad's dy is not quantised, nor is x again.", PAPER, bwd=backward(wgrad=unquantised)),
    Bug(
        "wgrad-x-original",
        LINEAR,
        "Wgrad quantises the x that the forward was given, not what was kept of it.",
        f"{PAPER}, §3.5.2",
        fwd=keeps_x,
        bwd=original_x,
        directions=("backward",),
    ),
    Bug(
        "fp8-dispatch-scale-dropped",
        LINEAR,
        "Activations that come in FP8 are quantised again without their scales.",
        "sgl-project/sglang#31529, #33669",
        bwd=backward(wgrad=wgrad_of(dy_by_tokens, unscaled_x)),
    ),
    Bug(
        "e5m6-requantised-in-float",
        LINEAR,
        "What was kept in E5M6 gets float32 scales in Wgrad instead of powers of two.",
        f"{PAPER}, §3.5.2",
        bwd=backward(wgrad=wgrad_of(dy_by_tokens, lambda dy, s: coded(turned(kept(s)), s[4]))),
    ),
    Bug(
        "e5m6-cache-missing",
        LINEAR,
        "The attention output is kept in E4M3, as every other input is, not in E5M6.",
        f"{PAPER}, §3.3.3",
        attrs={"cache": "e4m3fn"},
        benign=True,
        directions=("backward",),
    ),
]
