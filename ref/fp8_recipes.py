"""Scale recipes of fine-grained quantisation: how a tile's largest magnitude becomes a scale, and what is then encoded. Spec §4.2.

A recipe is a value. The recipes differ by one unit in the last place of the scale, which flips 0.03 to 0.07% of the codes.
"""

from dataclasses import dataclass
from typing import Literal

from array_api_compat import device

from .cast import encode
from .formats import FORMATS, Format
from .xp import Array, floor_log2, power_of_two, xp_of


@dataclass(frozen=True)
class Recipe:
    """How a tile's largest magnitude a becomes a scale s, and how x becomes the number that is encoded. M is the format's maximum."""

    amax_min: float = 1e-4  # a := max(a, amax_min)
    scale: Literal["a/M", "a*(1/M)", "1/(M/a)"] = (
        "a/M"  # the last with M/a := 1 where a is 0 or infinite, and no larger than the dtype's max
    )
    scale_min: float = 0.0  # s := max(s, scale_min)
    power_of_two: Literal["no", "bits", "log2"] = "no"  # s := 2^⌈log2 s⌉: exactly, or with log2 rounded to the working dtype
    value: Literal["x/s", "x*(1/s)", "x*(M/a)"] = "x/s"


RECIPES: dict[str, Recipe] = {
    "v3": Recipe(),  # DeepSeek-V3 inference/kernel.py since 2025-08-27
    "v3-unclamped": Recipe(amax_min=0.0),  # and before: a zero tile is 0/0
    "v3-ue8m0": Recipe(power_of_two="log2"),
    "v32": Recipe(scale="a*(1/M)"),  # V3.2 and V4 native
    "v32-ue8m0": Recipe(scale="a*(1/M)", power_of_two="bits"),
    "deepgemm": Recipe(value="x*(1/s)"),
    "deepgemm-ue8m0": Recipe(power_of_two="bits", value="x*(1/s)"),
    "deepep": Recipe(scale="a*(1/M)", value="x*(M/a)"),
    "deepep-ue8m0": Recipe(scale="a*(1/M)", power_of_two="bits", value="x*(1/s)"),
    "tilekernels": Recipe(value="x*(M/a)"),
    "tilekernels-ue8m0": Recipe(power_of_two="bits", value="x*(1/s)"),
    "flashmla": Recipe(amax_min=0.0, scale_min=1e-4, power_of_two="log2"),  # the clamp is on the scale
    "te": Recipe(amax_min=0.0, scale="1/(M/a)", value="x*(M/a)"),  # TransformerEngine Float8BlockScaling with float32 scales
    "te-ue8m0": Recipe(amax_min=0.0, scale="1/(M/a)", power_of_two="bits", value="x*(1/s)"),  # and its default
    "mxfp4": Recipe(amax_min=6 * 2.0**-126, scale="a*(1/M)", power_of_two="bits"),  # V4's experts: e2m1 in tiles of 32
}
RecipeName = Literal[
    "v3",
    "v3-unclamped",
    "v3-ue8m0",
    "v32",
    "v32-ue8m0",
    "deepgemm",
    "deepgemm-ue8m0",
    "deepep",
    "deepep-ue8m0",
    "tilekernels",
    "tilekernels-ue8m0",
    "flashmla",
    "te",
    "te-ue8m0",
    "mxfp4",
]
CACHE_RECIPE: RecipeName = "tilekernels-ue8m0"  # of what V3 keeps in E5M6
FP8Name = Literal["e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz", "e5m6", "e2m1"]


def _as(x: Array, value: float) -> Array:
    """A constant in x's dtype: in production it is a float32 before it meets the data."""
    return xp_of(x).asarray(value, dtype=x.dtype, device=device(x))


def inverse_scale(a: Array, top: float) -> Array:
    """M/a; 1 where a is 0 or infinite, the dtype's largest number where it overflows"""
    xp = xp_of(a)
    usable = (a > 0) & ~xp.isinf(a)
    inverse = _as(a, top) / xp.where(usable, a, xp.ones_like(a))
    inverse = xp.where(xp.isinf(inverse), xp.full_like(inverse, xp.finfo(a.dtype).max), inverse)
    return xp.where(usable, inverse, xp.ones_like(inverse))


def clamped(amax: Array, rule: Recipe) -> Array:
    """a = max(max |x|, amax_min) of each tile"""
    return xp_of(amax).clip(amax, _as(amax, rule.amax_min), None)


def linear_scale(amax: Array, rule: Recipe, top: float) -> Array:
    """s of each tile before any rounding to a power of two, from max |x|"""
    a = clamped(amax, rule)
    if rule.scale == "1/(M/a)":
        s = 1 / inverse_scale(a, top)
    else:
        s = a * (1 / _as(a, top)) if rule.scale == "a*(1/M)" else a / _as(a, top)
    return xp_of(s).clip(s, _as(a, rule.scale_min), None)


def round_scale_up(s: Array, how: str) -> Array:
    """2^⌈log2 s⌉. "bits" is exact. "log2" rounds log2(s) to s's dtype first, so an s just above a power of two may become that power."""
    xp = xp_of(s)
    if how == "bits":
        e = floor_log2(xp, s)
        p = power_of_two(xp, e, s.dtype, device(s))
        up = power_of_two(xp, e + 1, s.dtype, device(s))
        p = xp.where(s > p, up, p)
    else:
        safe = xp.where(s > 0, s, xp.ones_like(s))
        log2 = xp.astype(xp.log2(xp.astype(safe, xp.float64)), s.dtype)
        finite = xp.where(xp.isinf(log2), xp.zeros_like(log2), log2)
        p = power_of_two(xp, xp.astype(xp.ceil(finite), xp.int64), s.dtype, device(s))
    return xp.where((s > 0) & ~xp.isinf(s), p, s)


def scale_of(amax: Array, rule: Recipe, top: float) -> Array:
    """The scale of each tile from max |x|. Rounding 1/(M/a) up to a power of two is rounding M/a down, as TransformerEngine does."""
    s = linear_scale(amax, rule, top)
    if rule.power_of_two == "no":
        return s
    if rule.scale == "1/(M/a)":  # 1/i may round where i does not lie on a power of two
        xp, i = xp_of(amax), inverse_scale(clamped(amax, rule), top)
        return 1 / power_of_two(xp, floor_log2(xp, i), i.dtype, device(i))
    return round_scale_up(s, rule.power_of_two)


def codes_of(x: Array, amax: Array, scale: Array, rule: Recipe, fmt: Format, rounding: str) -> Array:
    """The codes of x; amax and scale have x's shape (or one that broadcasts): each element's own tile's."""
    if rule.value == "x/s":
        value = x / scale
    elif rule.value == "x*(1/s)":
        value = x * (1 / scale)
    elif rule.scale == "1/(M/a)":
        value = x * inverse_scale(amax, fmt.max)
    else:
        value = x * (_as(x, fmt.max) / clamped(amax, rule))
    xp = xp_of(value)
    if fmt.nan_code is None and bool(xp.any(xp.isnan(value))):  # inf/inf, 0/0
        i, j = (int(v[0]) for v in xp.nonzero(xp.isnan(value)))
        raise ValueError(f"fp8.quantize: [{i}, {j}] = {float(x[i, j])} by the scale {float(scale[i, j])} gives NaN; {fmt.name} has none")
    return encode(fmt, value, overflow="saturate", rounding=rounding)  # type: ignore[arg-type]


def regret_of_power(amax: Array, scale: Array, recipe: str, format: str) -> Array:
    """How far log2 of the linear scale would have to move for `scale` to be its power of two; inf where the recipe leaves no room.

    Only a recipe that goes through a rounded log2 leaves any: implementations of log2 differ in the last place.
    """
    xp, rule = xp_of(amax), RECIPES[recipe]
    s = linear_scale(amax, rule, FORMATS[format].max)
    never = xp.full_like(s, float("inf"))
    if rule.power_of_two != "log2":
        return never
    power = power_of_two(xp, floor_log2(xp, scale), scale.dtype, device(scale)) == scale
    usable = power & (s > 0) & ~xp.isinf(s)
    e, t = xp.log2(xp.where(usable, scale, xp.ones_like(s))), xp.log2(xp.where(usable, s, xp.ones_like(s)))
    gap = xp.clip(xp.where(t > e, t - e, e - 1 - t), 0.0, None)
    return xp.where(usable, gap, never)


def check_quantised(op: str, x: Array, name: str, tile: int, what: str = "tile") -> None:
    """Refuses a tile of no size and NaN."""
    xp = xp_of(x)
    if tile < 1:
        raise ValueError(f"{op}: {what} is {tile}; expected {what} >= 1")
    if bool(xp.any(xp.isnan(x))):
        i, j = (int(v[0]) for v in xp.nonzero(xp.isnan(x)))
        raise ValueError(f"{op}: {name}[{i}, {j}] is NaN; expected no NaN")


def check_codes(op: str, name: str, codes: Array, format: str) -> None:
    """Refuses another dtype than the format's codes have, and codes of more bits than it has."""
    xp, fmt = xp_of(codes), FORMATS[format]
    if codes.dtype != getattr(xp, fmt.code_dtype):
        raise ValueError(f"{op}: {name} are {codes.dtype}; expected {fmt.code_dtype}")
    if fmt.bits % 8 and bool(xp.any(xp.astype(codes, xp.int64) >= 2**fmt.bits)):
        i, j = (int(v[0]) for v in xp.nonzero(xp.astype(codes, xp.int64) >= 2**fmt.bits))
        raise ValueError(f"{op}: {name}[{i}, {j}] is {int(codes[i, j])}; expected a code below {2**fmt.bits}")
