"""Bugs of FP8 matrix products: scales at the wrong place, and accumulators that add up otherwise than tensor cores do."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from ...ref.cast import decode, round_to
from ...ref.formats import BF16, FORMATS, Format
from ...ref.fp8_accumulate import Accumulator, accumulator_named, exponents
from ...ref.fp8_gemm import check_gemm, fp8_gemm_fwd, part_of
from ...ref.xp import Array, floor_log2, power_of_two, xp_of
from . import Bug
from .fp8 import FNUZ, INVERTED, TRUNCATED, as_fnuz, mantissa_dropped
from .fp8_block import BY_SHAPE, PADDED, TRANSPOSED, grid_reread, padded_grid

# a[n,d] b[o,d] as numbers, an array of the working dtype, the format, the accumulator's name and model -> [n,o]
Part = Callable[[Array, Array, Array, Format, str, Accumulator | None], Array]


def by_parts(part: Part = part_of, add: Callable[[Array, Array], Array] = lambda y, term: y + term) -> Callable:
    """fp8.gemm with another sum of a part, or another sum of parts: add(y, term)."""

    def fwd(
        a_codes: Array,
        a_scale: Array,
        b_codes: Array,
        b_scale: Array,
        *,
        accumulator: str = "fp32",
        promote: int = 128,
        tile: int = 128,
        scale_order: Literal["one by one", "product first"] = "one by one",
        format: Any = "e4m3fn",
        out: Literal["fp32", "bf16"] = "fp32",
    ) -> tuple[Array, tuple]:
        how = accumulator_named("fp8.gemm", accumulator)
        check_gemm(a_codes, a_scale, b_codes, b_scale, promote, tile, format, how)
        fmt = FORMATS[format]
        scales = lambda k: (a_scale[:, k // tile, None], rows_of(b_scale, b_codes.shape[0])[None, :, k // tile])  # noqa: E731
        y = product(decode(fmt, a_codes), decode(fmt, b_codes), scales, promote or tile, fmt, accumulator, part, add, scale_order, a_scale)
        return (round_to(BF16, y) if out == "bf16" else y), ()

    return fwd


def rows_of(b_scale: Array, o: int) -> Array:
    """A scale for each row, where there is one for 128"""
    return b_scale if b_scale.shape[0] == o else xp_of(b_scale).repeat(b_scale, 128, axis=0)[:o, :]


def product(
    a: Array,
    b: Array,
    scales: Callable[[int], tuple[Array, Array]],
    step: int,
    fmt: Format,
    accumulator: str,
    part: Part = part_of,
    add: Callable[[Array, Array], Array] = lambda y, term: y + term,
    order: str = "one by one",
    like: Any = None,
) -> Array:
    """Σ over parts of a·b, each times both its scales: scales(first element of the part) -> [n,1], [1,o]"""
    xp, d = xp_of(a), a.shape[1]
    how = accumulator_named("fp8.gemm", accumulator)
    like = scales(0)[0] if like is None else like
    y = xp.zeros((a.shape[0], b.shape[0]), dtype=like.dtype)
    for k in range(0, d, step):
        sa, sb = scales(k)
        dot = part(a[:, k : k + step], b[:, k : k + step], like, fmt, accumulator, how)
        y = add(y, dot * sa * sb if order == "one by one" else dot * (sa * sb))
    return y


# accumulators


@dataclass(frozen=True)
class Steps:
    """How a step of the accumulator is taken: by default as ref/fp8_accumulate.py has it."""

    renormalise: bool = False  # the exponent of a product is its own, not the sum of its factors'
    nearest: bool = False  # terms and the sum are rounded to nearest
    alone: bool = False  # the accumulator takes no part in the alignment, and is not cut
    unkept: bool = False  # the sum is not cut to `kept` bits
    group: int = 32


def stepped(steps: Steps) -> Part:
    """A hardware accumulator with another step. Where none is simulated, the reference's."""

    def part(a: Array, b: Array, like: Array, fmt: Format, accumulator: str, how: Accumulator | None) -> Array:
        if how is None:
            return part_of(a, b, like, fmt, accumulator, how)
        xp = xp_of(a)
        how, a, b = replace(how, group=steps.group), xp.astype(a, xp.float64), xp.astype(b, xp.float64)
        ea, eb = exponents(a, fmt.emin), exponents(b, fmt.emin)
        c = xp.zeros((a.shape[0], b.shape[0]), dtype=xp.float64)
        for k in range(0, a.shape[1], how.group):
            group = slice(k, k + how.group)
            terms = a[:, None, group] * b[None, :, group]
            e = exponents(terms, -200) if steps.renormalise else ea[:, None, group] + eb[None, :, group]
            c = step(terms, c, xp.max(e, axis=2), how, steps)
        return xp.astype(c, like.dtype)

    return part


def step(terms: Array, c: Array, e: Array, how: Accumulator, steps: Steps) -> Array:
    xp = xp_of(c)
    cut = xp.round if steps.nearest else xp.trunc
    own = exponents(c, -126)
    e = xp.clip(e if steps.alone else xp.where(own > e, own, e), -200, None)
    unit = power_of_two(xp, e - how.fraction, xp.float64, None)
    total = xp.sum(cut(terms / unit[:, :, None]), axis=2) * unit + (c if steps.alone else cut(c / unit) * unit)
    if steps.unkept:
        return total
    last = power_of_two(xp, xp.clip(floor_log2(xp, xp.abs(total)), -126, 127) - how.kept, xp.float64, None)
    return xp.where(xp.isfinite(total), cut(total / last) * last, total) + 0.0


# scales and operands

Scales = Callable[[Array, Array, Array, Array], tuple[Array, Array, Array, Array]]  # a, a_scale, b, b_scale


def other(change: Scales) -> Callable:
    """fp8.gemm of other operands"""
    return lambda a_codes, a_scale, b_codes, b_scale, **attrs: fp8_gemm_fwd(*change(a_codes, a_scale, b_codes, b_scale), **attrs)


def with_b_scale(change: Callable[[Array], Array]) -> Callable:
    """With another grid; a scale for each row is no grid of blocks and stays."""
    return other(lambda a, sa, b, sb: (a, sa, b, sb if sb.shape[0] == b.shape[0] else change(sb)))


def rows_by_count(a: Array, sa: Array, b: Array, sb: Array) -> tuple[Array, Array, Array, Array]:
    """b's row takes the scale of its row over ⌈o/p⌉, not over 128."""
    xp, o, p = xp_of(sb), b.shape[0], sb.shape[0]
    return a, sa, b, xp.take(sb, xp.arange(o) // -(-o // p), axis=0)


def scales_exchanged(a: Array, sa: Array, b: Array, sb: Array) -> tuple[Array, Array, Array, Array]:
    """a's rows take b's scales and b's rows a's, as far as there are."""
    xp = xp_of(sa)
    rows = xp.take(sb if sb.shape[0] == b.shape[0] else rows_of(sb, b.shape[0]), xp.arange(a.shape[0]) % b.shape[0], axis=0)
    return a, rows, b, xp.take(sa, xp.arange(b.shape[0]) % a.shape[0], axis=0)


def next_tile(a: Array, sa: Array, b: Array, sb: Array) -> tuple[Array, Array, Array, Array]:
    """The scales of the tile before: the pipeline hands over what was loaded one step earlier."""
    return a, xp_of(sa).roll(sa, 1, axis=1), b, xp_of(sb).roll(sb, 1, axis=1)


def fnuz_b(a_codes: Array, a_scale: Array, b_codes: Array, b_scale: Array, **attrs: Any) -> tuple[Array, tuple]:
    """Every finite value is half; 0x80 is NaN."""
    xp, o = xp_of(a_scale), {"format": "e4m3fn", **attrs}
    y, saved = fp8_gemm_fwd(a_codes, a_scale, b_codes, b_scale if o["format"] != "e4m3fn" else b_scale / 2, **attrs)
    if o["format"] != "e4m3fn":
        return y, saved
    nan = xp.any(xp.isnan(as_fnuz(xp, b_codes, o)), axis=1)
    return xp.where(nan[None, :], xp.full_like(y, float("nan")), y), saved


def no_tail(a_codes: Array, a_scale: Array, b_codes: Array, b_scale: Array, *, tile: int = 128, **attrs: Any) -> tuple[Array, tuple]:
    """Whole tiles only; what is left of d is left out."""
    whole = a_codes.shape[1] // tile * tile or a_codes.shape[1]
    q = -(-whole // tile)
    return fp8_gemm_fwd(a_codes[:, :whole], a_scale[:, :q], b_codes[:, :whole], b_scale[:, :q], tile=tile, **attrs)


def in_bf16(y: Array, term: Array) -> Array:
    return round_to(BF16, y + term)


GEMM = ("fp8.gemm",)
CUT = "MMA-Sim (arXiv:2511.10909)"
BUGS = [
    Bug(
        "fp8-gemm-no-promotion",
        GEMM,
        "The tensor core's accumulator is never promoted to float32: it adds up the whole tile.",
        "deepseek-ai/DeepGEMM#50, #37; deepseek-ai/DeepSeek-V3#197; triton-lang/triton#2300; NVIDIA/cutlass#3149; thu-ml/SageAttention#287",
        attrs={"promote": 0},
    ),
    Bug("fp8-gemm-late-promotion", GEMM, "The accumulator is promoted every 256 elements instead of 128.", attrs={"promote": 256}),
    Bug("accumulator-fp32", GEMM, "The output is that of a float32 accumulator.", attrs={"accumulator": "fp32"}, benign=True),
    Bug(
        "accumulator-wgmma13",
        GEMM,
        "The output is that of Hopper's FP8 wgmma, 13 bits.",
        CUT,
        attrs={"accumulator": "wgmma13"},
        benign=True,
    ),
    Bug(
        "accumulator-mma25",
        GEMM,
        "The output is that of mma.sync and Blackwell, 25 bits.",
        CUT,
        attrs={"accumulator": "mma25"},
        benign=True,
    ),
    Bug("fp8-fmt-swap", GEMM, "Codes are read as E5M2.", "NVIDIA/TransformerEngine#1559; zxypro1/algolocal#86", attrs={"format": "e5m2"}),
    Bug(
        "accumulator-renormalised",
        GEMM,
        "Alignment is to the products' own exponents, not to the sums of their factors'.",
        fwd=by_parts(stepped(Steps(renormalise=True))),
    ),
    Bug(
        "accumulator-rounds",
        GEMM,
        "Aligned terms and sums are rounded to nearest, not truncated toward zero.",
        fwd=by_parts(stepped(Steps(nearest=True))),
    ),
    Bug("accumulator-group-16", GEMM, "Groups of 16 products instead of 32.", fwd=by_parts(stepped(Steps(group=16)))),
    Bug(
        "accumulator-unaligned",
        GEMM,
        "The accumulator is added to each group in full: it takes no part in the alignment.",
        fwd=by_parts(stepped(Steps(alone=True))),
    ),
    Bug("accumulator-wide", GEMM, "Sums are not cut to the accumulator's bits.", fwd=by_parts(stepped(Steps(unkept=True)))),
    Bug("fp8-gemm-bf16-sum", GEMM, "Parts are added up in bfloat16 instead of float32.", fwd=by_parts(add=in_bf16)),
    Bug("fp8-gemm-tail-dropped", GEMM, "What is left of d behind the last whole tile is left out.", fwd=no_tail),
    Bug(
        "scale-grid-transposed",
        GEMM,
        "b_scale[j,i] is used for block (i,j): the grid's transpose, read with the grid's shape.",
        TRANSPOSED,
        fwd=with_b_scale(grid_reread),
    ),
    Bug(
        "scale-k-pad4",
        GEMM,
        "Rows of b_scale are read at a distance rounded up to 4, where they are not.",
        PADDED,
        fwd=with_b_scale(padded_grid),
    ),
    Bug(
        "block-size-from-shape",
        GEMM,
        "A row of b_scale is taken to stand for ⌈o/p⌉ rows of b instead of 128.",
        BY_SHAPE,
        fwd=other(rows_by_count),
    ),
    Bug("fp8-gemm-scales-exchanged", GEMM, "Rows of a are scaled by b_scale, rows of b by a_scale.", fwd=other(scales_exchanged)),
    Bug("fp8-gemm-stale-scale", GEMM, "Each tile is scaled by the scales of the one before it.", fwd=other(next_tile)),
    Bug(
        "fp8-dispatch-scale-dropped",
        GEMM,
        "Activations come in FP8 and their scales are not applied.",
        "sgl-project/sglang#31529, #33669",
        fwd=other(lambda a, sa, b, sb: (a, xp_of(sa).ones_like(sa), b, sb)),
    ),
    Bug(
        "scale-dropped",
        GEMM,
        "b_scale is not applied.",
        "wuwangzhang1216/abliterix#93; unslothai/unsloth#6978",
        fwd=other(lambda a, sa, b, sb: (a, sa, b, xp_of(sb).ones_like(sb))),
    ),
    Bug("scale-inverted", GEMM, "Divides by b_scale; it multiplies.", INVERTED, fwd=other(lambda a, sa, b, sb: (a, sa, b, 1 / sb))),
    Bug(
        "ue8m0-truncates-f32-scale",
        GEMM,
        "Scales are taken for powers of two: only their exponents are read.",
        TRUNCATED,
        fwd=other(lambda a, sa, b, sb: (a, mantissa_dropped(xp_of(sa), sa), b, mantissa_dropped(xp_of(sb), sb))),
    ),
    Bug("e4m3fnuz-vs-fn", GEMM, "b's codes of E4M3FN are read as E4M3FNUZ: half of each.", FNUZ, fwd=fnuz_b),
]
