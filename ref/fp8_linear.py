"""The linear layer as DeepSeek-V3 trained it: all three products in E4M3, fine-grained scales. Spec §4.3; V3 §3.3, App. B.2."""

from typing import Literal

from .fp8 import dequantize_tile_fwd, quantize_tile_fwd
from .fp8_accumulate import accumulator_named
from .fp8_block import quantize_block_fwd
from .fp8_gemm import fp8_gemm_fwd
from .fp8_recipes import CACHE_RECIPE, RecipeName
from .op import Case, Op, declare, signature
from .xp import Array, constant, exactly, named, xp_of


@signature("x[n,d] weight[o,d] -> y[n,o]")
def fp8_linear_fwd(
    x: Array,
    weight: Array,
    *,
    recipe: RecipeName = "v3",
    weight_recipe: RecipeName = "v3",
    accumulator: str = "wgmma13",
    promote: int = 128,
    scale_order: Literal["one by one", "product first"] = "one by one",
    cache: Literal["e4m3fn", "e5m6"] = "e4m3fn",
) -> tuple[Array, tuple]:
    """y[n,o] = Σ_d x8[n,d] weight8[o,d],   x8 in tiles of 1×128 along d, weight8 in blocks of 128×128, E4M3, products as fp8.gemm has them

    x and weight are taken as float32, whatever the working dtype: a scale in float64 would be another scale. For the backward only x8 is
    kept, or, with cache="e5m6" (the attention output, input of o_proj), x in E5M6 with power-of-two scales (CACHE_RECIPE). What is
    not finite is refused.
    """
    products = {"accumulator": accumulator, "promote": promote, "scale_order": scale_order}
    check_linear(x, weight, accumulator, promote)
    x32, w32 = exactly(x), exactly(weight)
    (x_codes, x_scale), _ = quantize_tile_fwd(x32, recipe=recipe)  # [n,d] [n,⌈d/128⌉]
    (w_codes, w_scale), _ = quantize_block_fwd(w32, recipe=weight_recipe)  # [o,d] [⌈o/128⌉,⌈d/128⌉]
    for name, array in (("x_codes", x_codes), ("x_scale", x_scale), ("weight_codes", w_codes), ("weight_scale", w_scale)):
        named(name, array)
    y, _ = fp8_gemm_fwd(x_codes, constant(x, x_scale), w_codes, constant(x, w_scale), **products)  # [n,o]
    if cache == "e5m6":
        (x_codes, x_scale), _ = quantize_tile_fwd(x32, recipe=CACHE_RECIPE, format="e5m6")
    return y, (x_codes, x_scale, w_codes, w_scale, recipe, products, cache)


def fp8_linear_bwd(dy: Array, saved: tuple) -> tuple[Array, Array]:
    """dx[n,d] = Σ_o dy8[n,o] weight8[o,d],   dweight[o,d] = Σ_n dy8'[n,o] x8'[n,d]   (gradients pass straight through the casts)

    Dgrad: dy8 in tiles of 1×128 along o, weight8 the forward's own blocks. Wgrad sums over n: dy8' is dy in tiles of 128×1 along n, and
    x8' is what was kept of x, dequantised and quantised again in tiles of 128×1, after E5M6 with power-of-two scales again.
    """
    check_finite("dy", dy)
    x_codes, x_scale, w_codes, w_scale, recipe, products, cache = saved
    xp, dy32 = xp_of(dy), exactly(dy)
    (codes, scale), _ = quantize_tile_fwd(dy32, recipe=recipe)  # [n,o] [n,⌈o/128⌉]
    dx, _ = fp8_gemm_fwd(codes, constant(dy, scale), w_codes.T, constant(dy, w_scale.T), **products)  # [n,d]
    kept, _ = dequantize_tile_fwd(x_codes, x_scale, format=cache)  # [n,d]
    (dy_codes, dy_scale), _ = quantize_tile_fwd(xp.permute_dims(dy32, (1, 0)), recipe=recipe)  # [o,n] [o,⌈n/128⌉]
    again = CACHE_RECIPE if cache == "e5m6" else recipe
    (t_codes, t_scale), _ = quantize_tile_fwd(xp.permute_dims(kept, (1, 0)), recipe=again)  # [d,n] [d,⌈n/128⌉]
    if dy.shape[0] == 0:
        return dx, xp.matmul(dy.T, constant(dy, kept))  # zeros, [o,d]
    dweight, _ = fp8_gemm_fwd(dy_codes, constant(dy, dy_scale), t_codes, constant(dy, t_scale), **products)  # [o,d]
    return dx, dweight


def check_linear(x: Array, weight: Array, accumulator: str, promote: int) -> None:
    op = "fp8.linear"
    how = accumulator_named(op, accumulator)
    if promote < 0 or (promote and 128 % promote) or (how is not None and promote % how.group):
        raise ValueError(f"{op}: promote is {promote}; expected 32, 64 or 128, or 0 for the whole tile of 128")
    check_finite("x", x)
    check_finite("weight", weight)
    if min(weight.shape) == 0:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}; expected no empty side")


def check_finite(name: str, array: Array) -> None:
    xp = xp_of(array)
    if bool(xp.any(~xp.isfinite(array))):
        i, j = (int(v[0]) for v in xp.nonzero(~xp.isfinite(array)))
        raise ValueError(f"fp8.linear: {name}[{i}, {j}] is {float(array[i, j])}; expected finite numbers")


def _case(name: str, n: int, o: int, d: int, x: tuple = ("normal", 1.0), note: str = "", **attrs: object) -> Case:
    return Case(name, {"n": n, "o": o, "d": d}, {"x": x, "weight": ("normal", 0.05), "dy": ("normal", 1e-2)}, attrs, note)


fp8_linear = declare(
    Op(
        "fp8.linear",
        fp8_linear_fwd,
        fp8_linear_bwd,
        (
            _case("ragged", 9, 70, 150, note="no side a multiple of 128"),
            _case("tokens", 140, 16, 24, note="two tiles along n in Wgrad"),
            _case("outliers", 16, 40, 256, ("outliers", 1.0, 60.0)),
            _case("e5m6", 10, 12, 140, ("outliers", 1.0, 60.0), "the attention output's cache", cache="e5m6"),
            _case("ue8m0", 8, 12, 140, note="power-of-two scales", recipe="v32-ue8m0", weight_recipe="v32-ue8m0"),
            _case("fp32", 12, 20, 300, note="float32 accumulation", accumulator="fp32"),
            _case("unpromoted", 6, 10, 128, note="32 products at a time", promote=32),
            _case("blocks", 5, 150, 140, note="two by two blocks of the weight: no shape tells its grid from the transposed"),
            _case("product-first", 4, 5, 260, note="V3.2's and V4's order of the scales", scale_order="product first"),
            _case("zero-rows", 6, 10, 130, ("zero_rows", 1.0), note="tiles of zeros"),
        ),
        "2*n*o*d",
        "spec §4.3; DeepSeek-V3 paper §3.3, §3.5.2, App. B.2",
        vary="n",
    )
)
