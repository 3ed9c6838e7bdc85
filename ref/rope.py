"""Rotary position embedding, interleaved and half-split, with YaRN. Spec §1.2, §1.3.

Frequencies are exact to 50 digits and angles are reduced to a turn in integers: position 163,839 is as right as position 1.
"""

import functools
import math
from collections.abc import Callable
from decimal import Decimal, localcontext
from typing import Any, Literal, NamedTuple

from array_api_compat import device

from .op import Case, Op, signature
from .xp import Array, constant, stored, xp_of

Layout = Literal["interleaved", "half"]
Gating = Literal["always", "beyond_original"]
CosSin = Literal["float32", "stored"]
PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899862803482534211706798")
DIGITS, DIGIT_BITS = 3, 24  # a frequency in turns, to 72 bits after the point


class Yarn(NamedTuple):
    """What fixes the frequencies: the base, and YaRN's parameters under the names of config.json's rope_scaling."""

    theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0
    yarn_gating: Gating = "always"
    max_position: int = 163840

    @property
    def active(self) -> bool:
        """Native code leaves YaRN out where the context fits the original length; Hugging Face always applies it."""
        beyond = self.max_position > self.original_max_position_embeddings
        return self.factor > 1 and (self.yarn_gating == "always" or beyond)

    def gain(self, k: float) -> float:
        """m(k) = 0.1 k ln(factor) + 1"""
        return 0.1 * k * math.log(self.factor) + 1.0 if self.active else 1.0

    @property
    def amplitude(self) -> float:
        """m(mscale)/m(mscale_all_dim), 1 for every DeepSeek checkpoint; m(1) if either is absent (0)"""
        if self.mscale and self.mscale_all_dim:
            return self.gain(self.mscale) / self.gain(self.mscale_all_dim)
        return self.gain(1.0)

    def softmax_scale(self, qk_head_dim: int) -> float:
        """(dn+r)^(-1/2), times m(mscale_all_dim)² under YaRN: 0.13523378 for V3"""
        return qk_head_dim**-0.5 * self.gain(self.mscale_all_dim) ** 2

    def check(self, op: str, r: int) -> None:
        if r < 2 or r % 2:
            raise ValueError(f"{op}: r is {r}; expected an even number of rope channels")
        if self.theta <= 1:
            raise ValueError(f"{op}: theta is {self.theta}; expected theta > 1")
        if self.factor < 1:
            raise ValueError(f"{op}: factor is {self.factor}; expected factor >= 1 (1 is no YaRN)")
        if self.beta_fast < self.beta_slow or self.beta_slow <= 0:
            betas = f"beta_fast is {self.beta_fast}, beta_slow {self.beta_slow}"
            raise ValueError(f"{op}: {betas}; expected beta_fast >= beta_slow > 0")


@functools.lru_cache(maxsize=64)
def exact_frequencies(r: int, yarn: Yarn) -> tuple[Decimal, ...]:
    """f_i = theta^(-2i/r); under YaRN f_i/factor·ramp_i + f_i·(1 - ramp_i), to 50 digits"""
    with localcontext() as context:
        context.prec = 60
        base, half = Decimal(yarn.theta), r // 2
        plain = [(-(Decimal(2 * i) / r) * base.ln()).exp() for i in range(half)]
        if not yarn.active:
            return tuple(plain)

        def corner(rotations: float) -> Decimal:
            """The index whose wave turns that many times within the original length."""
            return r * (Decimal(yarn.original_max_position_embeddings) / (Decimal(rotations) * 2 * PI)).ln() / (2 * base.ln())

        low = Decimal(max(math.floor(corner(yarn.beta_fast)), 0))
        high = Decimal(min(math.ceil(corner(yarn.beta_slow)), r - 1))
        high += Decimal("0.001") if low == high else 0
        ramps = [min(max((i - low) / (high - low), Decimal(0)), Decimal(1)) for i in range(half)]
        return tuple(f / Decimal(yarn.factor) * ramp + f * (1 - ramp) for f, ramp in zip(plain, ramps, strict=True))


@functools.lru_cache(maxsize=64)
def turns_in_digits(frequencies: tuple[Decimal, ...]) -> tuple[tuple[int, ...], ...]:
    """Each frequency in turns (f/2π), as digits of 24 bits after the point: [digit][i]"""
    with localcontext() as context:
        context.prec = 60
        fixed = [int(f / (2 * PI) * 2 ** (DIGITS * DIGIT_BITS)) for f in frequencies]
    return tuple(tuple(v >> (DIGIT_BITS * (DIGITS - 1 - d)) & (2**DIGIT_BITS - 1) for v in fixed) for d in range(DIGITS))


def reduced_angles(xp: Any, positions: Array, frequencies: tuple[Decimal, ...], dtype: Any) -> Array:
    """positions[n]·f[i] reduced to ±half a turn, in radians: integer products of 24-bit digits, carried from the right. [n,r/2]"""
    digits = turns_in_digits(frequencies)
    p = xp.astype(positions, xp.int64)[:, None]
    carry, kept = xp.zeros_like(p), []
    for row in reversed(digits):
        total = p * xp.asarray(row, dtype=xp.int64, device=device(positions))[None, :] + carry
        kept.append(total % 2**DIGIT_BITS)
        carry = total // 2**DIGIT_BITS
    top = xp.where(kept[-1] >= 2 ** (DIGIT_BITS - 1), kept[-1] - 2**DIGIT_BITS, kept[-1])
    low = xp.astype(kept[1], dtype) * 2.0**-DIGIT_BITS + xp.astype(kept[0], dtype) * 2.0 ** (-2 * DIGIT_BITS)
    return (xp.astype(top, dtype) + low) * (2 * math.pi * 2.0**-DIGIT_BITS)


def rotation(x: Array, positions: Array, r: int, yarn: Yarn, cos_sin: CosSin) -> tuple[Array, Array]:
    """cos and sin of positions[n]·f[i] times the amplitude, [n,r/2] each, in x's dtype.

    The reference's angle is exact. An implementation takes a power and a product in float32 and rounds both: the same two are done here,
    and only their rounding is added (nothing, on plain arrays).
    """
    xp = xp_of(x)
    exact = exact_frequencies(r, yarn)
    there = xp.astype(positions, x.dtype)

    def rounded_angle(number: Callable[[Any], Array]) -> Array:
        power = xp.exp(-number([2 * i / r for i in range(r // 2)]) * number([math.log(yarn.theta)]))
        blend = number([float(f) * yarn.theta ** (2 * i / r) for i, f in enumerate(exact)])  # 1 without YaRN
        return number(there)[:, None] * (power * blend)[None, :]  # [n,r/2]

    rounding = rounded_angle(lambda v: constant(x, v)) - rounded_angle(lambda v: xp.asarray(v, dtype=x.dtype, device=device(x)))
    angle = reduced_angles(xp, positions, exact, x.dtype) + rounding
    cos, sin = xp.cos(angle) * yarn.amplitude, xp.sin(angle) * yarn.amplitude
    return (stored(cos), stored(sin)) if cos_sin == "stored" else (cos, sin)


def split_pairs(x: Array, layout: Layout) -> tuple[Array, Array]:
    """The two members of each pair: (x[2i], x[2i+1]), or (x[i], x[i+r/2])"""
    half = x.shape[-1] // 2
    return (x[..., 0::2], x[..., 1::2]) if layout == "interleaved" else (x[..., :half], x[..., half:])


def join_pairs(a: Array, b: Array, layout: Layout) -> Array:
    xp = xp_of(a)
    if layout == "interleaved":
        return xp.reshape(xp.stack([a, b], axis=-1), (*a.shape[:-1], 2 * a.shape[-1]))
    return xp.concat([a, b], axis=-1)


@signature("x[n,h,r] positions[n]:index -> y[n,h,r]")
def rope_fwd(
    x: Array,
    positions: Array,
    *,
    layout_in: Layout = "interleaved",
    layout_out: Layout = "interleaved",
    cos_sin: CosSin = "float32",
    theta: float = 10000.0,
    factor: float = 1.0,
    original_max_position_embeddings: int = 4096,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    mscale: float = 1.0,
    mscale_all_dim: float = 1.0,
    yarn_gating: Gating = "always",
    max_position: int = 163840,
) -> tuple[Array, tuple]:
    """y = amplitude (a cos - b sin, a sin + b cos),   angle[n,i] = positions[n] f'[i],   (a,b) the i-th pair of x[n,h,:]

    Pairs are read in layout_in (DeepSeek's checkpoints: interleaved) and written in layout_out (Hugging Face: half). Scores do not depend
    on layout_out as long as q and k share it; a cached k_pe does. cos_sin="stored" says that an implementation rounds cos and sin to the
    activations' format before it multiplies (Hugging Face).
    """
    yarn = Yarn(theta, factor, original_max_position_embeddings, beta_fast, beta_slow, mscale, mscale_all_dim, yarn_gating, max_position)
    yarn.check("rope", x.shape[-1])
    check_positions("rope", positions)
    cos, sin = (v[:, None, :] for v in rotation(x, positions, x.shape[-1], yarn, cos_sin))  # [n,1,r/2]
    a, b = split_pairs(x, layout_in)
    y = join_pairs(a * cos - b * sin, a * sin + b * cos, layout_out)
    return y, (cos, sin, layout_in, layout_out)


def rope_bwd(dy: Array, saved: tuple) -> Array:
    """The rotation by -angle, from layout_out back to layout_in:   dx = amplitude (da cos + db sin, db cos - da sin)"""
    cos, sin, layout_in, layout_out = saved
    da, db = split_pairs(dy, layout_out)
    return join_pairs(da * cos + db * sin, db * cos - da * sin, layout_in)


def check_positions(op: str, positions: Array) -> None:
    xp = xp_of(positions)
    if positions.shape[0] and bool(xp.any((positions < 0) | (positions >= 2**26))):
        bad = (positions < 0) | (positions >= 2**26)
        i = int(xp.nonzero(bad)[0][0])
        raise ValueError(f"{op}: positions[{i}] is {int(positions[i])}; expected 0 to {2**26 - 1}")


YARN_V3 = {"factor": 40.0}
YARN_V2 = {"factor": 40.0, "mscale": 0.707, "mscale_all_dim": 0.707}
YARN_KIMI = {"theta": 50000.0, "factor": 32.0, "beta_fast": 1.0}


def _case(name: str, n: int, h: int, r: int, positions: tuple, note: str = "", **attrs: Any) -> Case:
    draws: dict[str, tuple] = {"x": ("normal", 1.0), "dy": ("normal", 1.0), "positions": positions}
    return Case(name, {"n": n, "h": h, "r": r}, draws, attrs, note)


FAR = ("positions", 0, 1, 2, 4095, 4096, 32767, 163839)
rope = Op(
    "rope",
    rope_fwd,
    rope_bwd,
    (
        _case("plain", 5, 2, 64, ("ascending", 0)),
        _case("far", 7, 2, 64, FAR, "to the last position of V3"),
        _case("yarn-v3", 7, 2, 64, FAR, "", **YARN_V3),
        _case("yarn-v2", 7, 2, 64, FAR, "", **YARN_V2),
        _case("yarn-kimi-k2", 7, 2, 64, FAR, "equal betas: one step between two corners", **YARN_KIMI),
        _case(
            "yarn-gated",
            4,
            2,
            64,
            ("ascending", 3000),
            "native: no YaRN within the original length",
            yarn_gating="beyond_original",
            max_position=4096,
            **YARN_V3,
        ),
        _case("amplitude", 4, 1, 64, FAR, "mscale over mscale_all_dim is not 1", factor=40.0, mscale=1.0, mscale_all_dim=0.707),
        _case("hugging-face", 7, 2, 64, FAR, "interleaved in, halves out", layout_out="half", **YARN_V3),
        _case("neox", 4, 2, 64, FAR, "halves in and out, as V3.2's indexer has it", layout_in="half", layout_out="half"),
        _case("narrow", 3, 1, 2, FAR, "one pair"),
    ),
    "3*n*h*r",
    "spec §1.2, §1.3; DeepSeek-V3 inference/model.py, precompute_freqs_cis and apply_rotary_emb; YaRN, arXiv 2309.00071",
    vary="nh",
)
