"""Scale recipes of FP8 and FP4 quantisation as data, and the function that makes a tile's scale."""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from ._common import flip
from ._formats import Format

QUOTIENT, PRODUCT, INVERSE = range(3)  # the scale: a / MAX, a * (1/MAX), 1 / (MAX/a)
AS_IS, LOG2, BITS = range(3)  # what becomes of it: nothing, 2^ceil(log2 s), next power of two
DIVIDE, TIMES_INVERSE, TIMES_MAX_OVER_A = range(3)  # the value: x / s, x * (1/s), x * (MAX/a)
LN2 = float(np.log(2.0))


class Recipe(NamedTuple):
    """How a tile's largest magnitude a becomes a scale s and a value v."""

    least: float = 1e-4  # a = max(a, least)
    scale: int = QUOTIENT
    least_scale: float = 0.0  # s = max(s, least_scale)
    power: int = AS_IS
    value: int = DIVIDE


RECIPES = {
    "v3-unclamped": Recipe(least=0.0),
    "v3": Recipe(),
    "v3-ue8m0": Recipe(power=LOG2),
    "v32": Recipe(scale=PRODUCT),
    "v32-ue8m0": Recipe(scale=PRODUCT, power=BITS),
    "deepgemm": Recipe(value=TIMES_INVERSE),
    "deepgemm-ue8m0": Recipe(power=BITS, value=TIMES_INVERSE),
    "deepep": Recipe(scale=PRODUCT, value=TIMES_MAX_OVER_A),
    "deepep-ue8m0": Recipe(scale=PRODUCT, power=BITS, value=TIMES_INVERSE),
    "tilekernels": Recipe(value=TIMES_MAX_OVER_A),
    "tilekernels-ue8m0": Recipe(power=BITS, value=TIMES_INVERSE),
    "flashmla": Recipe(least=0.0, least_scale=1e-4, power=LOG2),
    "te": Recipe(least=0.0, scale=INVERSE, value=TIMES_MAX_OVER_A),
    "te-ue8m0": Recipe(least=0.0, scale=INVERSE, power=BITS, value=TIMES_INVERSE),
    "mxfp4": Recipe(least=6 * 2.0**-126, scale=PRODUCT, power=BITS),
}


class Scaling(NamedTuple):
    """A recipe for one format and carrier. The first five are in the carrier's dtype, the masks are its bits."""

    floor: Any
    scale_floor: Any
    max: Any
    inverse_max: Any
    largest: Any  # finite number of the carrier
    magnitude: Any
    infinity: Any
    fraction: Any  # mask
    unit: Any  # one in the exponent field
    bias: int
    scale: int
    power: int
    value: int


@lru_cache
def scaling(recipe: Recipe, fmt: Format, dtype: np.dtype[Any]) -> Scaling:
    """The parameters of `scale_of`."""
    F, U, places, bias = (np.float32, np.uint32, 23, 127) if dtype == np.float32 else (np.float64, np.uint64, 52, 1023)
    floors = F(recipe.least), F(recipe.least_scale)
    infinity = F(np.inf).view(U)
    fraction = (1 << places) - 1
    masks = U(int(infinity) | fraction), infinity, U(fraction), U(1 << places)
    ends = F(fmt.max), F(1) / F(fmt.max), np.finfo(F).max
    return Scaling(*floors, *ends, *masks, bias, recipe.scale, recipe.power, recipe.value)


@njit(nogil=True, error_model="numpy")
def _power_of_two(s, p):
    """[bits]: the smallest power of two >= s. [log2]: 2^ceil(log2(s) rounded to s's dtype); s is then normal or infinite."""
    U = type(p.unit)
    u = flip(s)
    f = U(u & p.fraction)
    low = U(u - f)  # the bits of 2^e <= s
    if u == p.infinity or f == U(0):
        return s
    if low == U(0):  # subnormal: its bits are a whole number
        power = U(1)
        while power < u:
            power = U(power + power)
        return flip(power)
    if p.power == LOG2:
        # log2(s) = e + log2(1 + f) rounds to e itself when log2(1 + f) is under half the gap between e and the next number. That
        # decides the ceiling exactly; an evaluated log2 would have to be correctly rounded. f is tiny here: log2(1 + f) = f / ln 2.
        e = type(s)(np.int64(low // p.unit) - p.bias)
        above = flip(U(flip(e) - U(1) if e < type(s)(0) else flip(e) + U(1)))
        if np.float64(f) / np.float64(p.unit) < 0.5 * LN2 * np.float64(above - e):
            return flip(low)
    return flip(U(low + p.unit))


# Editing scale_of: Numba's caches of the kernels that call it (_quantize.py) do not notice; touch that file as well.
@njit(nogil=True, error_model="numpy")
def scale_of(a, p):
    """(scale, the number that x is divided or multiplied by) of a tile whose largest magnitude is a."""
    one = type(a)(1)
    a = max(a, p.floor)
    if p.scale == INVERSE:
        inverse = min(p.max / a, p.largest) if a > type(a)(0) and flip(a) != p.infinity else one
        if p.power == AS_IS:
            s = one / inverse
        else:  # rounded down, so that s is rounded up; MAX/a is normal: a format's maximum is above 1
            s = one / flip(type(p.unit)(flip(inverse) & p.infinity))
        return s, (inverse if p.value == TIMES_MAX_OVER_A else one / s)
    s = a / p.max if p.scale == QUOTIENT else a * p.inverse_max
    s = max(s, p.scale_floor)
    if p.power != AS_IS:
        s = _power_of_two(s, p)
    if p.value == DIVIDE:
        return s, s
    return s, (one / s if p.value == TIMES_INVERSE else p.max / a)
