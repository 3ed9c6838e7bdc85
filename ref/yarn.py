"""YaRN: which frequency each pair of channels turns with. Spec §1.3.

Frequencies are exact to 50 digits and angles are reduced to a turn in integers: position 163,839 is as right as position 1.
"""

import functools
import math
from collections.abc import Callable
from decimal import Decimal, localcontext
from typing import Any, Literal, NamedTuple

from array_api_compat import device

from .op import Case, Op, declare, signature
from .xp import Array, constant, xp_of

Gating = Literal["always", "beyond_original"]
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
        if self.original_max_position_embeddings < 1:
            length = self.original_max_position_embeddings
            raise ValueError(f"{op}: original_max_position_embeddings is {length}; expected at least 1")
        for name in ("mscale", "mscale_all_dim"):
            if getattr(self, name) < 0:
                raise ValueError(f"{op}: {name} is {getattr(self, name)}; expected {name} >= 0 (0 stands for absent)")
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


def rounded_frequencies(number: Callable[[Any], Array], r: int, yarn: Yarn) -> Array:
    """The frequencies as an implementation takes them, a power and a blend, of numbers in its arithmetic. [r/2]"""
    exponent = number([2 * i / r for i in range(r // 2)]) * number([math.log(yarn.theta)])
    blend = number([float(f) * yarn.theta ** (2 * i / r) for i, f in enumerate(exact_frequencies(r, yarn))])  # 1 without YaRN
    return xp_of(exponent).exp(-exponent) * blend


@signature("like[]:like -> inv_freq[r/2] amplitude[]")
def rope_frequencies_fwd(
    like: Array,
    *,
    r: int = 64,
    theta: float = 10000.0,
    factor: float = 1.0,
    original_max_position_embeddings: int = 4096,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    mscale: float = 1.0,
    mscale_all_dim: float = 1.0,
    yarn_gating: Gating = "always",
    max_position: int = 163840,
) -> tuple[tuple[Array, Array], tuple]:
    """inv_freq[i] = f_i (ramp_i/factor + 1 - ramp_i),   f_i = theta^(-2i/r),   ramp_i = clip((i - low)/(high - low), 0, 1)

    low and high are the indices whose waves turn beta_fast and beta_slow times within original_max_position_embeddings, rounded outward;
    equal ones are 0.001 apart. amplitude = m(mscale)/m(mscale_all_dim), m(k) = 0.1 k ln(factor) + 1, multiplies cos and sin.
    yarn_gating="beyond_original" (native code) leaves YaRN out where max_position does not exceed the original length. In radians a
    position; `like` gives the framework, dtype and device.
    """
    yarn = Yarn(theta, factor, original_max_position_embeddings, beta_fast, beta_slow, mscale, mscale_all_dim, yarn_gating, max_position)
    yarn.check("rope.frequencies", r)
    plain = rounded_frequencies(lambda v: xp_of(like).asarray(v, dtype=like.dtype, device=device(like)), r, yarn)
    rounding = rounded_frequencies(lambda v: constant(like, v), r, yarn) - plain  # nothing, on plain arrays
    return (constant(like, [float(f) for f in exact_frequencies(r, yarn)]) + rounding, constant(like, yarn.amplitude)), ()


YARN_V3: dict[str, Any] = {"factor": 40.0}
YARN_V2: dict[str, Any] = {"factor": 40.0, "mscale": 0.707, "mscale_all_dim": 0.707}
YARN_KIMI: dict[str, Any] = {"theta": 50000.0, "factor": 32.0, "beta_fast": 1.0}

rope_frequencies = declare(
    Op(
        "rope.frequencies",
        rope_frequencies_fwd,
        None,
        tuple(
            Case(name, {}, {"like": ("const", 1.0)}, attrs, note)
            for name, note, attrs in (
                ("plain", "", {}),
                ("v3", "", YARN_V3),
                ("v2", "", YARN_V2),
                ("kimi-k2", "equal corners: one step between two indices", YARN_KIMI),
                (
                    "gated",
                    "native: no YaRN within the original length",
                    {**YARN_V3, "yarn_gating": "beyond_original", "max_position": 4096},
                ),
                ("amplitude", "mscale over mscale_all_dim is not 1", {**YARN_V3, "mscale_all_dim": 0.707}),
                ("absent-mscale", "neither is given: m(1)", {**YARN_V3, "mscale": 0.0, "mscale_all_dim": 0.0}),
                ("v4", "V4's base and original length", {"theta": 160000.0, "factor": 16.0, "original_max_position_embeddings": 65536}),
                ("narrow", "one pair", {**YARN_V3, "r": 2}),
            )
        ),
        "r",
        "spec §1.3; DeepSeek-V3 inference/model.py, precompute_freqs_cis; YaRN, arXiv 2309.00071",
        vary="",
    )
)
