"""Rotary position embedding with YaRN, forward and backward, and the frequencies it turns with."""

import math
from collections.abc import Mapping
from decimal import Decimal, localcontext
from functools import lru_cache
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from ...ref.yarn import PI, Yarn, exact_frequencies
from ._common import need, output, run
from ._declared import declared

POSITIONS = 1 << 26  # positions from here on are refused
COST = 16  # elements of a copy that a sine and a cosine are worth, for `run`
# 1/3!, 1/5!, ... and 1/2!, 1/4!, ...: on an eighth of a turn the first terms left out are under 2^-57
SINE = tuple((-1) ** k / math.factorial(2 * k + 1) for k in range(9))
COSINE = tuple((-1) ** k / math.factorial(2 * k) for k in range(10))
TAU = 2 * math.pi


@lru_cache(maxsize=64)
def _turns(frequencies: tuple[Decimal, ...]) -> NDArray[np.uint64]:
    """Each frequency in turns (f/2π <= 1/2π) as a fraction of 96 bits: its upper 64 and its lower 32, [2,r/2]."""
    with localcontext() as context:
        context.prec = 60
        fixed = [int(f / (2 * PI) * 2**96) for f in frequencies]
    words = np.array([[v >> 32 for v in fixed], [v & 0xFFFFFFFF for v in fixed]], np.uint64)
    words.flags.writeable = False
    return words


@njit(nogil=True, error_model="numpy", cache=True)
def _tables(lo, hi, positions, turns, amplitude, cos, sin):
    """Position times frequency, modulo a turn, in integers; the nearest quarter turn off; the series for what is left, in float64."""
    F = cos.dtype.type
    upper, lower = turns[0], turns[1]
    for i in range(lo, hi):
        p = np.uint64(positions[i])
        ci, si = cos[i], sin[i]
        for j in range(upper.size):
            low = p * lower[j]  # < 2^58
            turn = p * upper[j] + (low >> np.uint64(32))
            quarter = (turn + np.uint64(1 << 61)) >> np.uint64(62)  # 4 is 0 again
            rest = np.int64(turn - (quarter << np.uint64(62)))
            x = (np.float64(rest) * 2.0**-64 + np.float64(np.int64(low & np.uint64(0xFFFFFFFF))) * 2.0**-96) * TAU
            xx = x * x
            # |x| times the polynomial would round twice as much as x plus the rest of it
            s = SINE[8]
            s = s * xx + SINE[7]
            s = s * xx + SINE[6]
            s = s * xx + SINE[5]
            s = s * xx + SINE[4]
            s = s * xx + SINE[3]
            s = s * xx + SINE[2]
            s = s * xx + SINE[1]
            s = x + x * (xx * s)
            c = COSINE[9]
            c = c * xx + COSINE[8]
            c = c * xx + COSINE[7]
            c = c * xx + COSINE[6]
            c = c * xx + COSINE[5]
            c = c * xx + COSINE[4]
            c = c * xx + COSINE[3]
            c = c * xx + COSINE[2]
            c = 1.0 + xx * (c * xx + COSINE[1])
            odd = (quarter & np.uint64(1)) != np.uint64(0)
            a, b = (s, c) if odd else (c, s)
            a = -a if ((quarter + np.uint64(1)) & np.uint64(2)) != np.uint64(0) else a
            b = -b if (quarter & np.uint64(2)) != np.uint64(0) else b
            ci[j], si[j] = F(a * amplitude), F(b * amplitude)


def tables(positions: NDArray[np.int64], r: int, yarn: Yarn, dtype: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """cos[n,r/2], sin[n,r/2] = amplitude (cos, sin)(positions[n] f[i]), in dtype (float32 or float64), for checked arguments (`yarn_of`,
    `positions_of`). Within two units in the last place of float64 before that rounding, at any position below 2^26."""
    turns = _turns(exact_frequencies(r, yarn))
    cos, sin = np.empty((2, positions.shape[0], r // 2), dtype)
    run(_tables, positions.shape[0], r // 2 * COST, positions, turns, yarn.amplitude, cos, sin)
    return cos, sin


@njit(nogil=True, error_model="numpy", cache=True)
def _rotate(lo, hi, x, cos, sin, halves_in, halves_out, sign, y):
    """Rows lo to hi of y[n,h,r]: each pair turned by its angle (sign 1) or back (sign -1)."""
    half = cos.shape[1]
    turned = np.empty(half, x.dtype)
    for i in range(lo, hi):
        c, s = cos[i], turned
        for j in range(half):
            s[j] = sign * sin[i, j]
        for k in range(x.shape[1]):
            v, w = x[i, k], y[i, k]
            # A loop for each layout: constant strides vectorise. One output half at a time: two would be one overlap test too many.
            if halves_in and halves_out:
                a, b = v[:half], v[half:]
                w0, w1 = w[:half], w[half:]
                for j in range(half):
                    w0[j] = a[j] * c[j] - b[j] * s[j]
                for j in range(half):
                    w1[j] = a[j] * s[j] + b[j] * c[j]
            elif halves_in:
                a, b = v[:half], v[half:]
                for j in range(half):
                    w[2 * j], w[2 * j + 1] = a[j] * c[j] - b[j] * s[j], a[j] * s[j] + b[j] * c[j]
            elif halves_out:
                w0, w1 = w[:half], w[half:]
                for j in range(half):
                    w0[j] = v[2 * j] * c[j] - v[2 * j + 1] * s[j]
                for j in range(half):
                    w1[j] = v[2 * j] * s[j] + v[2 * j + 1] * c[j]
            else:
                for j in range(half):
                    w[2 * j], w[2 * j + 1] = v[2 * j] * c[j] - v[2 * j + 1] * s[j], v[2 * j] * s[j] + v[2 * j + 1] * c[j]


def rotate(
    x: NDArray[Any], cos: NDArray[Any], sin: NDArray[Any], layout_in: str, layout_out: str, y: NDArray[Any], back: bool = False
) -> NDArray[Any]:
    """y[n,h,r] = every pair of x[n,h,r] turned by its token's angle, `back` by minus that: for checked C-contiguous arrays."""
    sign = x.dtype.type(-1 if back else 1)
    run(_rotate, x.shape[0], x.shape[1] * x.shape[2], x, cos, sin, layout_in == "half", layout_out == "half", sign, y)
    return y


def yarn_of(op: str, r: int, attrs: Mapping[str, Any]) -> Yarn:
    """The Yarn of declared attributes, in Python's own numbers; ranges as Yarn.check has them."""
    yarn = Yarn(*(type(default)(attrs[name]) for name, default in Yarn._field_defaults.items()))
    yarn.check(op, r)
    return yarn


def positions_of(op: str, positions: NDArray[Any]) -> NDArray[np.int64]:
    """Integer positions[n] as int64, after a check: 0 to 2^26 - 1."""
    outside = (positions < 0) | (positions >= POSITIONS)
    if outside.any():
        i = int(np.argmax(outside))
        need(False, op, f"positions[{i}]", positions[i], f"0 to {POSITIONS - 1}")
    wide = np.array(positions, np.int64)
    wide.flags.writeable = False
    return wide


def _checked(
    op: str, direction: str, arrays: dict[str, Any], attrs: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], tuple[NDArray[Any], NDArray[Any]]]:
    """The arrays, the attributes, cos and sin"""
    arrays, a, letters = declared("rope", direction, arrays, attrs)
    yarn = yarn_of(op, letters["r"], a)
    turns = tables(positions_of(op, arrays["positions"]), letters["r"], yarn, arrays["x"].dtype)
    return arrays, a, turns


def rope(x: NDArray[Any], positions: NDArray[Any], *, out: NDArray[Any] | None = None, **attrs: Any) -> NDArray[Any]:
    """y[n,h,:] = amplitude (a cos - b sin, a sin + b cos),  angle[n,i] = positions[n] f[i],  (a, b) the i-th pair of x[n,h,:].

    x[n,h,r] is float32 or float64, and so is y; positions[n] are integers from 0 to 2^26 - 1. Attributes are those of the reference's
    rope, with its defaults. Pairs are read in layout_in and written in layout_out: "interleaved" (x[2i], x[2i+1]) or "half" (x[i],
    x[i+r/2]). cos and sin come from exact angles (`rope_frequencies`) and are rounded to x's dtype once; cos_sin ("float32", "stored")
    says where a 16-bit implementation rounds them and changes nothing here. `out` receives the result.

    ValueError: dtypes or shapes do not fit, r is odd, a position is outside, an attribute has no such value, an out that does not fit.
    """
    arrays, a, turns = _checked("rope", "forward", {"x": x, "positions": positions}, attrs)
    x = arrays["x"]
    y = output("rope", "out", out, x.shape, x.dtype, x)
    return rotate(x, *turns, a["layout_in"], a["layout_out"], y)


def rope_bwd(x: NDArray[Any], positions: NDArray[Any], dy: NDArray[Any], *, out: NDArray[Any] | None = None, **attrs: Any) -> NDArray[Any]:
    """dx[n,h,:] = amplitude (da cos + db sin, db cos - da sin),  (da, db) the i-th pair of dy[n,h,:]: the rotation by minus the angle.

    Pairs are read in layout_out and written in layout_in. Only the shape and dtype of x count; dy must have both. Attributes, `out`
    and errors as rope.
    """
    arrays, a, turns = _checked("rope_bwd", "backward", {"x": x, "positions": positions, "dy": dy}, attrs)
    x, dy = arrays["x"], arrays["dy"]
    dx = output("rope_bwd", "out", out, x.shape, x.dtype, x, dy)
    return rotate(dy, *turns, a["layout_out"], a["layout_in"], dx, back=True)


def rope_frequencies(like: NDArray[Any], **attrs: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """inv_freq[i] = f_i (ramp_i/factor + 1 - ramp_i),  f_i = theta^(-2i/r),  ramp_i = clip((i - low)/(high - low), 0, 1).

    inv_freq[r/2] in radians a position, and amplitude[] = m(mscale)/m(mscale_all_dim), m(k) = 0.1 k ln(factor) + 1, which multiplies cos
    and sin; in the dtype of like[] (float32 or float64), rounded once from 50 digits. low and high are the indices whose waves turn
    beta_fast and beta_slow times within original_max_position_embeddings, rounded outward; yarn_gating="beyond_original" leaves YaRN out
    where max_position does not exceed that. Attributes are those of the reference's rope.frequencies, with its defaults.

    ValueError: r is odd or no integer, an attribute has no such value, like is no 0-dimensional float array.
    """
    arrays, a, _ = declared("rope.frequencies", "forward", {"like": like}, attrs)
    r, dtype = int(a["r"]), arrays["like"].dtype
    yarn = yarn_of("rope_frequencies", r, a)
    return np.array([float(f) for f in exact_frequencies(r, yarn)], dtype), np.array(yarn.amplitude, dtype)
