"""Bugs of rotary embedding and of YaRN's frequencies. What they do inside attention is in `mla`."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from ...ref.cast import round_to
from ...ref.formats import BF16
from ...ref.rope import join_pairs, rope, rope_bwd, rope_fwd, split_pairs
from ...ref.xp import Array, constant, xp_of
from ...ref.yarn import Yarn, rope_frequencies
from . import Bug

Attrs = Mapping[str, Any]
Frequencies = Callable[[int, Yarn], list[float]]


def yarn_of(attrs: Attrs, defaults: Attrs) -> Yarn:
    own = {**defaults, **attrs}
    return Yarn(**{name: own[name] for name in Yarn._fields})


def with_arguments(change: Callable[[Array, dict], tuple[Array, dict]]) -> Callable:
    """rope of other positions and attributes: change(positions, attrs)."""

    def fwd(x: Array, positions: Array, **attrs: Any) -> tuple[Array, tuple]:
        positions, changed = change(positions, {**rope.defaults, **attrs})
        return rope_fwd(x, positions, **changed)

    return fwd


def other_layout(where: str) -> Callable:
    """Pairs that lie one way are read and written the other way."""
    other = {"interleaved": "half", "half": "interleaved"}[where]
    return with_arguments(lambda p, a: (p, {**a, "layout_in": other, "layout_out": other} if a["layout_in"] == where else a))


def cut(positions: Array, attrs: Attrs) -> Array:
    """Positions beyond the original length read the last row of a table that ends there."""
    return xp_of(positions).clip(positions, None, attrs["original_max_position_embeddings"] - 1)


def by_length(positions: Array, attrs: dict) -> tuple[Array, dict]:
    longest = int(xp_of(positions).max(positions)) + 1
    return positions, {**attrs, "factor": attrs["factor"] if longest > attrs["original_max_position_embeddings"] else 1.0}


def rotated(x: Array, angle: Array, yarn: Yarn, attrs: Attrs) -> tuple[Array, tuple]:
    """rope by the angles [n,r/2] that are given."""
    xp = xp_of(x)
    cos, sin = ((f(angle) * yarn.amplitude)[:, None, :] for f in (xp.cos, xp.sin))
    a, b = split_pairs(x, attrs["layout_in"])
    y = join_pairs(a * cos - b * sin, a * sin + b * cos, attrs["layout_out"])
    return y, (cos, sin, attrs["layout_in"], attrs["layout_out"])


def with_angles(angles: Callable[[Array, Array, Yarn], Array]) -> Callable:
    """rope by angles(x, positions in x's dtype, yarn)."""

    def fwd(x: Array, positions: Array, **attrs: Any) -> tuple[Array, tuple]:
        own = {**rope.defaults, **attrs}
        yarn = yarn_of(attrs, rope.defaults)
        return rotated(x, angles(x, xp_of(x).astype(positions, x.dtype), yarn), yarn, own)

    return fwd


def with_frequencies(frequencies: Frequencies) -> tuple[Callable, Callable]:
    """rope, and the table of frequencies, by other frequencies."""

    def table(like: Array, **attrs: Any) -> tuple[tuple[Array, Array], tuple]:
        own = {**rope_frequencies.defaults, **attrs}
        yarn = yarn_of(attrs, rope_frequencies.defaults)
        return (constant(like, frequencies(own["r"], yarn)), constant(like, yarn.amplitude)), ()

    def angles(x: Array, positions: Array, yarn: Yarn) -> Array:
        return constant(x, positions)[:, None] * constant(x, frequencies(x.shape[-1], yarn))[None, :]

    return with_angles(angles), table


def plain(r: int, yarn: Yarn) -> list[float]:
    return [yarn.theta ** (-2 * i / r) for i in range(r // 2)]


def ramps(r: int, yarn: Yarn, rounded: bool = True) -> list[float]:
    """0 where a frequency stays, 1 where it is divided by the factor."""
    if not yarn.active:
        return [0.0] * (r // 2)
    turns = yarn.original_max_position_embeddings / (2 * math.pi)
    low, high = (r * math.log(turns / beta) / (2 * math.log(yarn.theta)) for beta in (yarn.beta_fast, yarn.beta_slow))
    low, high = (math.floor(low), math.ceil(high)) if rounded else (low, high)
    low, high = max(low, 0), min(high, r - 1)
    return [min(max((i - low) / (high - low if high != low else 0.001), 0.0), 1.0) for i in range(r // 2)]


def blended(ramp: Callable[[int, Yarn], list[float]]) -> Frequencies:
    return lambda r, yarn: [f * (1 - g) + f / yarn.factor * g for f, g in zip(plain(r, yarn), ramp(r, yarn), strict=True)]


def inverted(r: int, yarn: Yarn) -> list[float]:
    return [1 - g for g in ramps(r, yarn)] if yarn.active else ramps(r, yarn)


def half_step(r: int, yarn: Yarn) -> list[float]:
    return [f * yarn.theta ** (i / r) for i, f in enumerate(blended(ramps)(r, yarn))]


def larger_base(r: int, yarn: Yarn) -> list[float]:
    growth = yarn.factor ** (r / (r - 2)) if yarn.active and r > 2 else 1.0
    return [(yarn.theta * growth) ** (-2 * i / r) for i in range(r // 2)]


def bf16_angle(x: Array, positions: Array, yarn: Yarn) -> Array:
    f = round_to(BF16, constant(x, blended(ramps)(x.shape[-1], yarn)))
    return round_to(BF16, round_to(BF16, constant(x, positions))[:, None] * f[None, :])


def shrunk_positions(x: Array, positions: Array, yarn: Yarn) -> Array:
    p = positions
    if yarn.active:
        p = xp_of(x).clip(p / yarn.factor, None, float(yarn.original_max_position_embeddings - 1))
    return constant(x, p)[:, None] * constant(x, plain(x.shape[-1], yarn))[None, :]


def other_sign(change: Callable) -> Callable:
    """rope or its backward with the angle negated."""

    def bwd(dy: Array, saved: tuple) -> Array:
        cos, sin, *layouts = saved
        return change(dy, (cos, -sin, *layouts))

    return bwd


def mirrored(x: Array, positions: Array, **attrs: Any) -> tuple[Array, tuple]:
    """The rotation by -angle."""
    own = {**rope.defaults, **attrs}
    _, (cos, sin, *layouts) = rope_fwd(x, positions, **attrs)
    y = rope_bwd(x, (cos, sin, own["layout_out"], own["layout_in"]))
    return y, (cos, -sin, *layouts)


def no_amplitude_bwd(dy: Array, saved: tuple) -> Array:
    cos, sin, *layouts = saved
    size = xp_of(cos).sqrt(cos * cos + sin * sin)
    return rope_bwd(dy, (cos / size, sin / size, *layouts))


def amplitude_one(attrs: dict) -> dict:
    """mscale as mscale_all_dim, which the softmax scale keeps; where that is absent there is no such ratio."""
    return {**attrs, "mscale": attrs["mscale_all_dim"]}


def no_amplitude(like: Array, **attrs: Any) -> tuple[tuple[Array, Array], tuple]:
    (inv_freq, amplitude), saved = rope_frequencies.fwd(like, **attrs)
    return (inv_freq, xp_of(amplitude).ones_like(amplitude)), saved


def _frequency_bugs(id: str, what: str, frequencies: Frequencies, sources: str = "") -> list[Bug]:
    of_rope, of_table = with_frequencies(frequencies)
    return [Bug(id, ROPE, what, sources, fwd=of_rope, bwd=rope_bwd), Bug(id, TABLE, what, sources, fwd=of_table)]


ROPE, TABLE, MLA = ("rope",), ("rope.frequencies",), ("mla.prefill", "mla.absorb")
UNWRITTEN = (
    (
        "rope-angle-f32-large-pos",
        "A float32 angle is what fp32 and bf16 claim: its rounding (0.004 at position 131071) is part of every band; only fp64 forbids it.",
    ),
)
BUGS = [
    Bug(
        "rope-neox-on-interleaved",
        ROPE,
        "Pairs (i, i+r/2) are rotated in place where the checkpoint's lie interleaved, (2i, 2i+1): only position 0 is right.",
        "huggingface/optimum-intel#1877; hw-native-sys/pypto-lib#244",
        fwd=other_layout("interleaved"),
        bwd=rope_bwd,
    ),
    Bug(
        "rope-interleave-on-neox-indexer",
        ROPE,
        "Pairs (2i, 2i+1) are rotated where they lie in halves, (i, i+r/2), as in V3.2's indexer.",
        "sgl-project/sglang#30342, #30111, #13530; ml-explore/mlx-lm#512; modelscope/ms-swift#8226",
        fwd=other_layout("half"),
        bwd=rope_bwd,
    ),
    Bug(
        "rope-hf-permuted-layout",
        ROPE,
        "The rotated pairs are written as halves, as Hugging Face does: scores are the same, a cached k_pe is not.",
        "huggingface/transformers#39687; deepseek-ai/DeepSeek-V3#938; vllm-project/vllm#26995",
        attrs={"layout_out": "half"},
        benign=True,
    ),
    Bug(
        "rope-angle-low-precision",
        ROPE,
        "Positions, frequencies and their product are rounded to bfloat16: integers beyond 256 collapse.",
        "huggingface/candle#3520; huggingface/transformers#29285, #25681; sgl-project/sglang#33117; flashinfer-ai/flashinfer#585",
        fwd=with_angles(bf16_angle),
        bwd=rope_bwd,
    ),
    Bug(
        "rope-cache-too-short",
        ROPE,
        "The table of cos and sin ends at the original length: every later position reads its last row.",
        "vllm-project/vllm-ascend#1266, #1530",
        fwd=with_arguments(lambda p, a: (cut(p, a), a)),
        bwd=rope_bwd,
    ),
    Bug(
        "yarn-ignored",
        (*ROPE, *TABLE, *MLA),
        "rope_scaling is not read: plain frequencies, and no mscale in the softmax scale.",
        "NVIDIA-NeMo/Automodel#2103; AI-Hypercomputer/maxtext#5279",
        attrs={"factor": 1.0},
    ),
    Bug(
        "yarn-positions-scaled",
        ROPE,
        "Positions are divided by the factor and cut at the original length; each frequency should be blended by its ramp.",
        "rasbt/LLMs-from-scratch#940, #939",
        fwd=with_angles(shrunk_positions),
        bwd=rope_bwd,
    ),
    Bug(
        "yarn-original-max-confusion",
        (*ROPE, *TABLE, *MLA),
        "The ramp is laid by max_position_embeddings (163840) instead of original_max_position_embeddings.",
        "NVIDIA/Megatron-LM#1418",
        attrs={"original_max_position_embeddings": 163840},
    ),
    Bug(
        "yarn-conditional",
        (*ROPE, *TABLE, *MLA),
        "YaRN is applied although the context fits the original length, as Hugging Face does; native code leaves it out.",
        "google/flax#4512",
        attrs={"yarn_gating": "always"},
        benign=True,
    ),
    Bug(
        "yarn-mscale-on-cos-sin",
        (*ROPE, *TABLE, *MLA),
        "cos and sin are multiplied by 0.1 ln(factor) + 1 instead of by m(mscale)/m(mscale_all_dim).",
        "ggml-org/llama.cpp#7118; antonellof/ferrox#226",
        attrs={"mscale": 0.0},
    ),
    Bug(
        "yarn-by-sequence-length",
        ROPE,
        "YaRN is left out where the positions at hand stay within the original length.",
        "google/flax#4512",
        fwd=with_arguments(by_length),
        bwd=rope_bwd,
    ),
    Bug(
        "yarn-amplitude-missing",
        ROPE,
        "cos and sin lack the factor m(mscale)/m(mscale_all_dim).",
        fwd=with_arguments(lambda p, a: (p, amplitude_one(a))),
        bwd=rope_bwd,
    ),
    Bug("yarn-amplitude-missing", TABLE, "cos and sin lack the factor m(mscale)/m(mscale_all_dim).", fwd=no_amplitude),
    *_frequency_bugs(
        "yarn-ramp-inverted", "Short waves are stretched and long ones stay: the ramp is taken for its complement.", blended(inverted)
    ),
    *_frequency_bugs(
        "yarn-corners-not-rounded",
        "The ramp's ends are not rounded outward to whole indices.",
        blended(lambda r, yarn: ramps(r, yarn, rounded=False)),
    ),
    *_frequency_bugs("yarn-ntk-base", "The base is raised (NTK) instead of blending each frequency by its ramp.", larger_base),
    *_frequency_bugs("rope-exponent-halved", "Frequencies are theta^(-i/r) instead of theta^(-2i/r).", half_step),
    Bug("rope-theta-default", (*ROPE, *TABLE, *MLA), "The base is 10000 whatever rope_theta says.", attrs={"theta": 10000.0}),
    Bug("rope-angle-negated", ROPE, "The rotation is by -angle.", fwd=mirrored, bwd=rope_bwd),
    Bug(
        "rope-position-off-by-one",
        ROPE,
        "Positions count from 1: scores are the same, a cached k_pe is not.",
        fwd=with_arguments(lambda p, a: (p + 1, a)),
        bwd=rope_bwd,
    ),
    Bug("rope-bwd-angle-not-negated", ROPE, "The backward rotates by angle, as the forward does.", bwd=other_sign(rope_bwd)),
    Bug("rope-bwd-amplitude-missing", ROPE, "The backward lacks the amplitude that the forward has.", bwd=no_amplitude_bwd),
]
