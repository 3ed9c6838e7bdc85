"""Bugs of fine-grained quantisation. That a subject follows another recipe is a convention, and is found by the attribute `recipe`."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ...ref.cast import decode, round_to
from ...ref.formats import E4M3FN, E4M3FNUZ, E8M0, FORMATS
from ...ref.fp8 import dequantize_tile_fwd, quantize_tile_fwd, spread, tile_amax, turned
from ...ref.fp8_recipes import RECIPES, Recipe, codes_of, linear_scale, round_scale_up, scale_of
from ...ref.xp import Array, floor_log2, power_of_two, xp_of
from . import Bug

Result = tuple[tuple[Array, Array], tuple]
# x, amax of each tile, the same an element, the rule, the attributes -> codes, scale
Body = Callable[[Array, Array, Callable[[Array], Array], Recipe, dict], tuple[Array, Array]]


def tiles(body: Body) -> Callable[..., Result]:
    """quantize_tile with another way from tiles to codes and scales: body(x, amax, each, rule, attributes), each spreading a tile's number
    over its elements. Tiles of columns are those of rows, turned."""

    def fwd(x: Array, **attrs: Any) -> Result:
        o = {"recipe": "v3", "tile": 128, "axis": 1, "format": "e4m3fn", "rounding": "half-even", **attrs}
        rows = x if o["axis"] == 1 else xp_of(x).permute_dims(x, (1, 0))
        codes, scale = body(rows, tile_amax(rows, o["tile"]), lambda s: spread(s, o["tile"], rows.shape[1]), RECIPES[o["recipe"]], o)
        return ((codes, scale) if o["axis"] == 1 else (turned(codes), turned(scale))), ()

    return fwd


def right(x: Array, amax: Array, each: Callable[[Array], Array], rule: Recipe, o: dict, scale: Array | None = None) -> tuple[Array, Array]:
    """As it should be; with another scale, if one is given."""
    fmt = FORMATS[o["format"]]
    scale = scale_of(amax, rule, fmt.max) if scale is None else scale
    return codes_of(x, each(amax), each(scale), rule, fmt, o["rounding"]), scale


def other_rule(change: Callable[[Recipe], Recipe]) -> Body:
    return lambda x, amax, each, rule, o: right(x, amax, each, change(rule), o)


def other_scale(change: Callable[[Array, Array, Recipe, dict], Array]) -> Body:
    """The scale changed before it is used: change(scale, linear scale, rule, attributes)."""

    def body(x: Array, amax: Array, each: Callable[[Array], Array], rule: Recipe, o: dict) -> tuple[Array, Array]:
        top = FORMATS[o["format"]].max
        return right(x, amax, each, rule, o, change(scale_of(amax, rule, top), linear_scale(amax, rule, top), rule, o))

    return body


def max_of(tops: dict[str, float]) -> Body:
    """The scale from another maximum than the format's, operation by operation as the recipe has it."""

    def body(x: Array, amax: Array, each: Callable[[Array], Array], rule: Recipe, o: dict) -> tuple[Array, Array]:
        fmt = FORMATS[o["format"]]
        other = replace(fmt, max=tops.get(fmt.name, fmt.max))
        scale = scale_of(amax, rule, other.max)
        return codes_of(x, each(amax), each(scale), rule, other, o["rounding"]), scale

    return body


def exponent(how: str) -> Body:
    """Scales that are powers of two, the exponent rounded down or to nearest."""

    def change(scale: Array, linear: Array, rule: Recipe, o: dict) -> Array:
        xp = xp_of(scale)
        if rule.power_of_two == "no":
            return scale
        floor = power_of_two(xp, floor_log2(xp, linear), linear.dtype, None)
        other = floor if how == "floor" else xp.where(linear >= 1.5 * floor, 2 * floor, floor)
        return xp.where((linear > 0) & xp.isfinite(linear), other, scale)

    return other_scale(change)


def rounded_afterwards(x: Array, amax: Array, each: Callable[[Array], Array], rule: Recipe, o: dict) -> tuple[Array, Array]:
    """Codes of x over the linear scale, and the power of two above it stored."""
    linear = linear_scale(amax, rule, FORMATS[o["format"]].max)
    codes, _ = right(x, amax, each, rule, o, linear)
    return codes, right(x, amax, each, rule, o)[1]


def double_amax(x: Array, amax: Array, each: Callable[[Array], Array], rule: Recipe, o: dict) -> tuple[Array, Array]:
    """The scale found in float64, and what float32 would have rounded is not."""
    xp = xp_of(x)
    return right(x, amax, each, rule, o, xp.astype(scale_of(xp.astype(amax, xp.float64), rule, FORMATS[o["format"]].max), x.dtype))


def whole_row(scale: Array, linear: Array, rule: Recipe, o: dict) -> Array:
    """One scale a row, repeated for every tile."""
    xp = xp_of(scale)
    return xp.broadcast_to(xp.max(scale, axis=1, keepdims=True), scale.shape)


def returns_inverse(x: Array, amax: Array, each: Callable[[Array], Array], rule: Recipe, o: dict) -> tuple[Array, Array]:
    codes, scale = right(x, amax, each, rule, o)
    return codes, 1 / scale


def multiplied(x: Array, amax: Array, each: Callable[[Array], Array], rule: Recipe, o: dict) -> tuple[Array, Array]:
    """x·(1/s) where the recipe divides."""
    return right(x, amax, each, replace(rule, value="x*(1/s)") if rule.value == "x/s" else rule, o)


def no_negative_zero(x: Array, amax: Array, each: Callable[[Array], Array], rule: Recipe, o: dict) -> tuple[Array, Array]:
    codes, scale = right(x, amax, each, rule, o)
    return (xp_of(x).where(codes == 8, xp_of(x).zeros_like(codes), codes) if o["format"] == "e2m1" else codes), scale


def transposed_by_words(x: Array, **attrs: Any) -> Result:
    """Tiles of columns, transposed on the way: in words of two bytes, which are left as they were."""
    (codes, scale), saved = quantize_tile_fwd(x, **attrs)
    n, d = codes.shape
    if attrs.get("axis", 1) == 1 or n < 2 or d < 2:
        return (codes, scale), saved
    xp, even = xp_of(codes), (n // 2 * 2, d // 2 * 2)
    words = xp.permute_dims(xp.reshape(codes[: even[0], : even[1]], (n // 2, 2, d // 2, 2)), (0, 3, 2, 1))
    top = xp.concat([xp.reshape(words, even), codes[: even[0], even[1] :]], axis=1)
    return (xp.concat([top, codes[even[0] :, :]], axis=0), scale), saved


# dequantising


def of_scale(change: Callable[[Any, Array], Array]) -> Callable:
    """dequantize_tile with other scales"""
    return lambda codes, scale, **attrs: dequantize_tile_fwd(codes, change(xp_of(scale), scale), **attrs)


def mantissa_dropped(xp: Any, scale: Array) -> Array:
    """The power of two below |scale|, with its sign; 0 stays."""
    return xp.where(scale == 0, scale, xp.copysign(power_of_two(xp, floor_log2(xp, xp.abs(scale)), scale.dtype, None), scale))


def of_values(change: Callable[[Any, Array, dict], Array], dequantize: Callable) -> Callable:
    """dequantize_tile or _block with other values of the codes: change(xp, codes, attributes)."""

    def fwd(codes: Array, scale: Array, **attrs: Any) -> tuple[Array, tuple]:
        xp, o = xp_of(scale), {"format": "e4m3fn", **attrs}
        fmt = FORMATS[o["format"]]
        each, _ = dequantize(xp.full_like(codes, fmt.bias * 2**fmt.mantissa_bits), scale, **attrs)  # of ones
        return xp.astype(change(xp, codes, o), scale.dtype) * each, ()

    return fwd


def as_fnuz(xp: Any, codes: Array, o: dict) -> Array:
    """e4m3fn read as e4m3fnuz, and the reverse"""
    return decode({"e4m3fn": E4M3FNUZ, "e4m3fnuz": E4M3FN}.get(o["format"], FORMATS[o["format"]]), codes)


def as_e8m0(xp: Any, codes: Array, o: dict) -> Array:
    return round_to(E8M0, decode(FORMATS[o["format"]], codes), overflow="nan")


QUANTIZE, DEQUANTIZE = ("fp8.quantize_tile",), ("fp8.dequantize_tile",)
INVERTED = "naming: vllm-project/vllm#54770; NVIDIA/TransformerEngine#123, #477"
DROPPED = "wuwangzhang1216/abliterix#93; unslothai/unsloth#6978; Lightricks/LTX-2#172"
FNUZ = "sgl-project/sglang#2667; vllm-project/vllm#45681; sgl-project/sglang#40581"
TRUNCATED = "sgl-project/sglang#39193; deepseek-ai/DeepGEMM#112"
CAST_FIRST = "unslothai/unsloth-zoo#803"
WRONG_MAX = "vllm-project/vllm#45681"
# What quantising tiles and quantising blocks can do wrong alike: id, sentence, sources, how. golden/bugs/fp8_block.py takes them too.
SHARED: tuple[tuple[str, str, str, Body], ...] = (
    *(
        ("fp8-max-wrong", f"The scale is amax/{top} instead of amax/448.", WRONG_MAX, max_of({"e4m3fn": top}))
        for top in (240.0, 224.0, 256.0, 464.0)
    ),
    ("fp8-max-wrong", "E4M3FN's maximum is used with E4M3FNUZ, whose largest number is 240.", WRONG_MAX, max_of({"e4m3fnuz": 448.0})),
    (
        "scale-eps-missing-zero-block",
        "Neither amax nor the scale has a least value: zeros are 0/0, and the smallest numbers get a scale of their own.",
        "huggingface/kernels-community#681, #680; vipshop/cache-dit#1097; NVIDIA/Model-Optimizer#381; vllm-project/vllm#30496",
        other_rule(lambda rule: replace(rule, amax_min=0.0, scale_min=0.0)),
    ),
    (
        "ue8m0-floor-or-nearest",
        "The power-of-two scale is rounded down, so codes saturate.",
        "ml-explore/mlx#4353; ROCm/aiter#3212; ROCm/FlyDSL#590; pytorch/ao#1643; inclusionAI/humming#39",
        exponent("floor"),
    ),
    (
        "ue8m0-floor-or-nearest",
        "The power-of-two scale is rounded to nearest, so the codes of half the tiles saturate.",
        "jax-ml/ml_dtypes#298",
        exponent("nearest"),
    ),
    (
        "ue8m0-round-after-quant",
        "Codes are those of the unrounded scale, what is stored is the power of two above it.",
        "huggingface/transformers#46763",
        rounded_afterwards,
    ),
    (
        "ue8m0-log2-inexact",
        "The power of two comes from a rounded log2: a few units above 2^k it is 2^k.",
        "sgl-project/sglang#29954, #29956, #31210; tenstorrent/tt-metal#52665",
        other_rule(lambda rule: replace(rule, power_of_two="log2") if rule.power_of_two == "bits" else rule),
    ),
    (
        "amax-double-vs-f32",
        "amax and the scale are float64: next to a power of two the exponent is another.",
        "pytorch/ao#3171",
        double_amax,
    ),
    ("scale-inverted", "1/scale is stored where the scale that multiplies is expected.", INVERTED, returns_inverse),
    (
        "scale-reciprocal-multiply",
        "x·(1/s) instead of x/s: one unit in the last place flips codes near midpoints.",
        "arch-hdl-lang/arch-com#905; ROCm/aiter#5259; vllm-project/vllm#31514; flashinfer-ai/flashinfer#3656",
        multiplied,
    ),
)
BUGS = [
    *(Bug(name, QUANTIZE, what, sources, fwd=tiles(body)) for name, what, sources, body in SHARED),
    Bug(
        "fp8-scale-exponent-floor",
        QUANTIZE,
        "The scale is a power of two below the one that is needed, so codes saturate.",
        fwd=tiles(other_scale(lambda scale, linear, rule, o: round_scale_up(scale, "bits") / 2)),
    ),
    Bug("fp8-scale-per-row", QUANTIZE, "One scale for the whole row instead of one a tile.", fwd=tiles(other_scale(whole_row))),
    Bug(
        "fp4-negative-zero-dropped",
        QUANTIZE,
        "What rounds to zero in E2M1 is +0, as DeepGEMM has it.",
        "deepseek-ai/DeepGEMM",
        fwd=tiles(no_negative_zero),
        benign=True,
    ),
    Bug(
        "fp8-quant-tanspose-corrupt",
        QUANTIZE,
        "Tiles of columns are transposed word by word, two bytes each, and the bytes of a word stay where they were.",
        "mlc-ai/pith-train#74 (a quarter of the bytes; by its compiler)",
        fwd=transposed_by_words,
    ),
    Bug(
        "scale-inverted",
        DEQUANTIZE,
        "Divides by the scale; despite the name weight_scale_inv it multiplies.",
        INVERTED,
        fwd=of_scale(lambda xp, s: 1 / s),
    ),
    Bug("scale-dropped", DEQUANTIZE, "The scale is not applied: a bare cast.", DROPPED, fwd=of_scale(lambda xp, s: xp.ones_like(s))),
    Bug("ue8m0-truncates-f32-scale", DEQUANTIZE, "Only the exponent of the scale is read.", TRUNCATED, fwd=of_scale(mantissa_dropped)),
    Bug(
        "e4m3fnuz-vs-fn",
        DEQUANTIZE,
        "Codes of E4M3FN are read as E4M3FNUZ: half of each.",
        FNUZ,
        fwd=of_values(as_fnuz, dequantize_tile_fwd),
    ),
    Bug(
        "scale-cast-fp8-dtype",
        DEQUANTIZE,
        "The codes' values are cast to the scale's dtype, E8M0, before they are multiplied: powers of two, no signs.",
        CAST_FIRST,
        fwd=of_values(as_e8m0, dequantize_tile_fwd),
    ),
]
UNWRITTEN = (
    ("silu-bf16-before-quant", "No op here multiplies by SiLU and quantises in one; swiglu has silu='stored', and its result is an input."),
)
