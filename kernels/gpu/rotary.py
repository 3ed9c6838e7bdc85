"""Rotary position embedding with YaRN, forward and backward. A thread takes one pair of channels of one token, for all heads."""

import math
from typing import Any

import numpy as np

from ...ref.op import op_named
from ...ref.rope import check_positions
from ...ref.yarn import DIGIT_BITS, Yarn, exact_frequencies, turns_in_digits
from ._call import arrays, empty, kernel_of
from ._device import cuda, each, kernel

Array = Any
DIGIT = 1 << DIGIT_BITS
TAU = 2 * math.pi


@kernel
def _rotate(x, positions, digits, amplitude, halves_in, halves_out, back, y):
    """Each pair turned by its token's angle, or back. digits[3,r/2]: the frequencies in turns, 24 bits a digit after the point."""
    F, (n, h, r) = x.dtype.type, x.shape
    half = r // 2
    for k in range(cuda.grid(1), n * half, cuda.gridsize(1)):
        t, i = k // half, k % half
        # position times frequency modulo a turn, in integers: position 163,839 is as right as position 1
        p = np.int64(positions[t])
        low = p * digits[2, i]
        middle = p * digits[1, i] + low // DIGIT
        top = (p * digits[0, i] + middle // DIGIT) % DIGIT
        top = top - DIGIT if top >= DIGIT // 2 else top
        turns = (float(top) + (float(middle % DIGIT) + float(low % DIGIT) / DIGIT) / DIGIT) / DIGIT
        c, s = F(math.cos(TAU * turns) * amplitude), F(math.sin(TAU * turns) * amplitude)
        s = -s if back else s
        a_in, b_in = (i, i + half) if halves_in else (2 * i, 2 * i + 1)
        a_out, b_out = (i, i + half) if halves_out else (2 * i, 2 * i + 1)
        for j in range(h):
            a, b = x[t, j, a_in], x[t, j, b_in]
            y[t, j, a_out] = a * c - b * s
            y[t, j, b_out] = a * s + b * c


def _turned(op: str, x: Array, positions: Array, attrs: dict[str, Any], back: bool) -> Array:
    a = {**op_named("rope").defaults, **attrs}
    n, _, r = x.shape
    yarn = Yarn(*(type(default)(a[name]) for name, default in Yarn._field_defaults.items()))
    yarn.check(op, r)
    check_positions(op, positions)
    digits = arrays().asarray(np.array(turns_in_digits(exact_frequencies(r, yarn)), np.int64))
    layouts = a["layout_in"] == "half", a["layout_out"] == "half"
    y = empty(x.shape, x.dtype)
    each(_rotate, n * (r // 2), x, positions, digits, yarn.amplitude, *(layouts[::-1] if back else layouts), back, y)
    return y


@kernel_of("rope")
def rope(x: Array, positions: Array, **attrs: Any) -> Array:
    """y[n,h,:] = amplitude (a cos - b sin, a sin + b cos),   angle[n,i] = positions[n] f[i],   (a, b) the i-th pair of x[n,h,:].

    x[n,h,r] and y are float32 or float64 alike, positions[n] integers from 0 to 2^26 - 1. Attributes are those of the reference's rope,
    with its defaults: pairs are read in layout_in and written in layout_out. cos and sin are those of exact angles, rounded to x's dtype
    once. ValueError: dtypes or shapes do not fit, r is odd, a position is outside, an attribute has no such value.
    """
    return _turned("rope", x, positions, attrs, False)


@kernel_of("rope", "backward")
def rope_bwd(x: Array, positions: Array, dy: Array, **attrs: Any) -> Array:
    """dx[n,h,:] = amplitude (da cos + db sin, db cos - da sin),   (da, db) the i-th pair of dy[n,h,:]: the rotation by minus the angle.

    Pairs are read in layout_out and written in layout_in. The rest as rope.
    """
    return _turned("rope_bwd", dy, positions, attrs, True)
