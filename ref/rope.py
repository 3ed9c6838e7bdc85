"""Rotary position embedding, interleaved and half-split. Spec §1.2."""

from collections.abc import Callable
from typing import Any, Literal

from array_api_compat import device

from .op import Case, Op, declare, signature
from .xp import Array, constant, stored, xp_of
from .yarn import YARN_KIMI, YARN_V2, YARN_V3, Gating, Yarn, exact_frequencies, reduced_angles, rounded_frequencies

Layout = Literal["interleaved", "half"]
CosSin = Literal["float32", "stored"]


def rotation(x: Array, positions: Array, r: int, yarn: Yarn, cos_sin: CosSin) -> tuple[Array, Array]:
    """cos and sin of positions[n]·f[i] times the amplitude, [n,r/2] each, in x's dtype.

    The reference's angle is exact. An implementation takes a power and a product in float32 and rounds both: the same two are done here,
    and only their rounding is added (nothing, on plain arrays).
    """
    xp = xp_of(x)
    exact = exact_frequencies(r, yarn)
    there = xp.astype(positions, x.dtype)

    def rounded_angle(number: Callable[[Any], Array]) -> Array:
        return number(there)[:, None] * rounded_frequencies(number, r, yarn)[None, :]  # [n,r/2]

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


def _case(name: str, n: int, h: int, r: int, positions: tuple, note: str = "", **attrs: Any) -> Case:
    draws: dict[str, tuple] = {"x": ("normal", 1.0), "dy": ("normal", 1.0), "positions": positions}
    return Case(name, {"n": n, "h": h, "r": r}, draws, attrs, note)


FAR = ("positions", 0, 1, 2, 4095, 4096, 32767, 163839)
rope = declare(
    Op(
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
)
