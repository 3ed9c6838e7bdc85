"""Rotary embedding and YaRN's frequencies, as released code computes them: everything in the arrays' dtype, or in float64 on the way."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .floats import Array, to_bf16

# frequencies: [r/2] in a dtype


def gain(factor: float, k: float) -> float:
    return 0.1 * k * math.log(factor) + 1.0 if factor > 1 else 1.0


def is_active(a: dict[str, Any]) -> bool:
    return a["factor"] > 1 and (a["yarn_gating"] == "always" or a["max_position"] > a["original_max_position_embeddings"])


def amplitude_of(a: dict[str, Any]) -> float:
    if not is_active(a):
        return 1.0
    if a["mscale"] == 0 or a["mscale_all_dim"] == 0:
        return gain(a["factor"], 1.0)
    return gain(a["factor"], a["mscale"]) / gain(a["factor"], a["mscale_all_dim"])


def softmax_scale(width: int, a: dict[str, Any]) -> float:
    m = gain(a["factor"], a["mscale_all_dim"]) if is_active(a) else 1.0
    return m * m / math.sqrt(width)


def ramp_of(r: int, a: dict[str, Any], dtype: Any) -> Array:
    """0 where a frequency is kept, 1 where it is divided by the factor."""

    def corner(turns: float) -> float:
        return r * math.log(a["original_max_position_embeddings"] / (turns * 2 * math.pi)) / (2 * math.log(a["theta"]))

    low, high = max(math.floor(corner(a["beta_fast"])), 0), min(math.ceil(corner(a["beta_slow"])), r - 1)
    span = high - low if high != low else 0.001
    return np.clip((np.arange(r // 2, dtype=dtype) - low) / span, 0, 1).astype(dtype)


def freqs_native(r: int, a: dict[str, Any], dtype: Any) -> Array:
    """1/theta^(2i/r), then blended: f/factor (1 - smooth) + f smooth"""
    f = 1 / np.power(dtype(a["theta"]), np.arange(0, r, 2, dtype=dtype) / dtype(r))
    if not is_active(a):
        return f
    smooth = 1 - ramp_of(r, a, dtype)
    return f / dtype(a["factor"]) * (1 - smooth) + f * smooth


def freqs_two_tables(r: int, a: dict[str, Any], dtype: Any) -> Array:
    """One reciprocal of theta^(2i/r) and one of factor·theta^(2i/r), mixed by the ramp."""
    powers = np.power(dtype(a["theta"]), np.arange(0, r, 2, dtype=dtype) * dtype(1 / r))
    if not is_active(a):
        return 1 / powers
    keep = 1 - ramp_of(r, a, dtype)
    return 1 / (dtype(a["factor"]) * powers) * (1 - keep) + 1 / powers * keep


def freqs_exponential(r: int, a: dict[str, Any], dtype: Any) -> Array:
    """exp(-(2i/r) ln theta), and one factor for the blend."""
    f = np.exp(-np.arange(0, r, 2, dtype=dtype) / dtype(r) * dtype(math.log(a["theta"])))
    if not is_active(a):
        return f
    ramp = ramp_of(r, a, dtype)
    return f * (1 - ramp * dtype(1 - 1 / a["factor"]))


def freqs_exp2(r: int, a: dict[str, Any], dtype: Any) -> Array:
    """2^(-i · (2/r) log2 theta), the constant folded"""
    f = np.exp2(np.arange(r // 2, dtype=dtype) * dtype(-2 / r * math.log2(a["theta"])))
    if not is_active(a):
        return f
    ramp = ramp_of(r, a, dtype)
    return ramp * (f * dtype(1 / a["factor"])) + (1 - ramp) * f


def freqs_double(r: int, a: dict[str, Any], dtype: Any) -> Array:
    return freqs_native(r, a, np.float64).astype(dtype)


DEFAULTS: dict[str, Any] = {
    "theta": 10000.0,
    "factor": 1.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "yarn_gating": "always",
    "max_position": 163840,
}


def _frequencies(fn: Callable, name: str) -> Callable:
    def frequencies(like: Array, *, r: int = 64, **yarn: Any) -> tuple[Array, Array]:
        a = {**DEFAULTS, **yarn}
        return fn(r, a, like.dtype.type), np.asarray(amplitude_of(a), like.dtype)

    frequencies.__name__ = name
    return frequencies


FREQUENCIES = tuple(
    _frequencies(fn, name)
    for name, fn in (
        ("native", freqs_native),
        ("two-tables", freqs_two_tables),
        ("exp-log", freqs_exponential),
        ("exp2", freqs_exp2),
        ("double", freqs_double),
    )
)

# cos and sin, times the amplitude: [n,r/2] in a dtype

Tables = Callable[[Array, int, dict[str, Any], Any], tuple[Array, Array]]


def tables(freqs: Callable) -> Tables:
    """angle = position · frequency, rounded to the dtype"""

    def of(positions: Array, r: int, a: dict[str, Any], dtype: Any) -> tuple[Array, Array]:
        angle = np.multiply.outer(positions.astype(dtype), freqs(r, a, dtype))
        return np.cos(angle) * dtype(amplitude_of(a)), np.sin(angle) * dtype(amplitude_of(a))

    return of


def tables_double(positions: Array, r: int, a: dict[str, Any], dtype: Any) -> tuple[Array, Array]:
    """Angles, cos and sin in float64, rounded at the end."""
    angle = np.multiply.outer(positions.astype(np.float64), freqs_two_tables(r, a, np.float64))
    return (np.cos(angle) * amplitude_of(a)).astype(dtype), (np.sin(angle) * amplitude_of(a)).astype(dtype)


def tables_reduced(positions: Array, r: int, a: dict[str, Any], dtype: Any) -> tuple[Array, Array]:
    """A table of all positions up to the largest, its angles reduced to half a turn before cos and sin, then rows of it."""
    every = np.unique(positions)
    angle = np.multiply.outer(every.astype(dtype), freqs_native(r, a, dtype)).astype(np.float64)
    angle = (angle - 2 * np.pi * np.rint(angle / (2 * np.pi))).astype(dtype)
    both = np.stack([np.cos(angle), np.sin(angle)]) * dtype(amplitude_of(a))
    cos, sin = both[:, np.searchsorted(every, positions)]
    return cos, sin


# the rotation; sign -1 is the transpose


def pairs(x: Array, layout: str) -> tuple[Array, Array]:
    return (x[..., ::2], x[..., 1::2]) if layout == "interleaved" else tuple(np.split(x, 2, axis=-1))  # type: ignore[return-value]


def joined(a: Array, b: Array, layout: str) -> Array:
    y = np.empty((*a.shape[:-1], 2 * a.shape[-1]), a.dtype)
    left, right = pairs(y, layout)
    left[...], right[...] = a, b
    return y


def turn_plain(x: Array, cos: Array, sin: Array, layout_in: str, layout_out: str, sign: int) -> Array:
    a, b = pairs(x, layout_in)
    c, s = cos[:, None, :], sign * sin[:, None, :]
    return joined(a * c - b * s, b * c + a * s, layout_out)


def turn_complex(x: Array, cos: Array, sin: Array, layout_in: str, layout_out: str, sign: int) -> Array:
    """One product of complex numbers."""
    a, b = pairs(x, layout_in)
    kind = np.complex64 if x.dtype == np.float32 else np.complex128
    z = np.empty(a.shape, kind)
    z.real, z.imag = a, b
    w = np.empty(cos.shape, kind)
    w.real, w.imag = cos, sign * sin
    y = z * w[:, None, :]
    return joined(y.real, y.imag, layout_out)


def turn_rotate_half(x: Array, cos: Array, sin: Array, layout_in: str, layout_out: str, sign: int) -> Array:
    """x·[cos cos] + rotate_half(x)·[sin sin], on halves"""
    halves = np.concatenate(pairs(x, layout_in), axis=-1)
    half = halves.shape[-1] // 2
    rotated = np.concatenate([-halves[..., half:], halves[..., :half]], axis=-1)
    c, s = (np.concatenate([v, v], axis=-1)[:, None, :] for v in (cos, sin))
    y = halves * c + rotated * (s * sign)
    return y if layout_out == "half" else joined(y[..., :half], y[..., half:], layout_out)


def turn_matrix(x: Array, cos: Array, sin: Array, layout_in: str, layout_out: str, sign: int) -> Array:
    """A product of each pair with its 2×2 matrix."""
    matrix = np.stack([np.stack([cos, -sign * sin], -1), np.stack([sign * sin, cos], -1)], -2)  # [n,i,2,2]
    y = np.einsum("niab,nhib->nhia", matrix, np.stack(pairs(x, layout_in), -1))
    return joined(y[..., 0], y[..., 1], layout_out)


def turn_fused(x: Array, cos: Array, sin: Array, layout_in: str, layout_out: str, sign: int) -> Array:
    """fma(a, cos, -(b sin)): one product is not rounded. In twice the width, which holds it."""
    wide = np.float64 if x.dtype == np.float32 else np.longdouble
    a, b = pairs(x, layout_in)
    c, s = cos[:, None, :], sign * sin[:, None, :]
    first = (a.astype(wide) * c - b * s).astype(x.dtype)
    second = (a.astype(wide) * s + b * c).astype(x.dtype)
    return joined(first, second, layout_out)


Turn = Callable[[Array, Array, Array, str, str, int], Array]


def _rope(table: Tables, turn: Turn, name: str) -> tuple[Callable, Callable]:
    def forward(x: Array, positions: Array, *, layout_in: str = "interleaved", layout_out: str = "interleaved", **yarn: Any) -> Array:
        cos, sin = table(positions, x.shape[-1], {**DEFAULTS, **yarn}, x.dtype.type)
        return turn(x, cos, sin, layout_in, layout_out, 1)

    def backward(
        x: Array, positions: Array, dy: Array, *, layout_in: str = "interleaved", layout_out: str = "interleaved", **yarn: Any
    ) -> Array:
        cos, sin = table(positions, x.shape[-1], {**DEFAULTS, **yarn}, x.dtype.type)
        return turn(dy, cos, sin, layout_out, layout_in, -1)

    forward.__name__ = backward.__name__ = name
    return forward, backward


ROPES = (
    _rope(tables(freqs_native), turn_complex, "complex"),
    _rope(tables(freqs_two_tables), turn_rotate_half, "rotate-half"),
    _rope(tables(freqs_exponential), turn_plain, "exp-log"),
    _rope(tables(freqs_exp2), turn_fused, "exp2-fused"),
    _rope(tables(freqs_double), turn_matrix, "matrix"),
    _rope(tables_double, turn_plain, "double"),
    _rope(tables_reduced, turn_rotate_half, "table"),
)
FORWARD = tuple(forward for forward, _ in ROPES)
BACKWARD = tuple(backward for _, backward in ROPES)


def turn_eager(x: Array, cos: Array, sin: Array, layout_in: str, layout_out: str, sign: int) -> Array:
    """Every operation rounds to bfloat16."""
    a, b = pairs(x, layout_in)
    c, s = cos[:, None, :], sign * sin[:, None, :]
    first = to_bf16(to_bf16(a * c) - to_bf16(b * s))
    second = to_bf16(to_bf16(b * c) + to_bf16(a * s))
    return joined(first, second, layout_out)


def tables_stored(positions: Array, r: int, a: dict[str, Any], dtype: Any) -> tuple[Array, Array]:
    """cos and sin rounded to bfloat16, as Hugging Face has it"""
    cos, sin = tables(freqs_two_tables)(positions, r, a, dtype)
    return to_bf16(cos), to_bf16(sin)


EAGER = _rope(tables(freqs_native), turn_eager, "eager")
STORED = _rope(tables_stored, turn_eager, "stored-eager")
STORED_FUSED = _rope(tables_stored, turn_rotate_half, "stored")
