"""Bugs of weights in blocks: the scale grid read in another order, blocks of another size. What tiles share is in golden/bugs/fp8.py."""

from collections.abc import Callable
from typing import Any

from ...ref.fp8_block import block_amax, dequantize_block_fwd, quantize_block_fwd, spread_block
from ...ref.fp8_recipes import RECIPES
from ...ref.xp import Array, xp_of
from . import Bug
from .fp8 import CAST_FIRST, DROPPED, FNUZ, INVERTED, SHARED, TRUNCATED, Body, Result, as_e8m0, as_fnuz, mantissa_dropped, of_values

Grid = Callable[[Any, Array, int, int, int], Array]  # xp, scale, block, o, d -> scale of each element


def blocks(body: Body) -> Callable[..., Result]:
    """quantize_block with another way from blocks to codes and scales"""

    def fwd(w: Array, **attrs: Any) -> Result:
        o = {"recipe": "v3", "block": 128, "format": "e4m3fn", "rounding": "half-even", **attrs}
        each = lambda s: spread_block(s, o["block"], *w.shape)  # noqa: E731
        return body(w, block_amax(w, o["block"]), each, RECIPES[o["recipe"]], o), ()

    return fwd


def grid_reread(x: Array) -> Array:
    """The grid's transpose, read as if it were the grid: [i,j] of its flat memory. Where the grid is square, the transpose itself."""
    xp = xp_of(x)
    return xp.reshape(xp.permute_dims(x, (1, 0)), x.shape)


def padded_grid(x: Array) -> Array:
    """Rows are read at a distance of columns rounded up to 4, from a grid whose rows are not filled up."""
    xp, (p, q) = xp_of(x), x.shape
    index = xp.arange(p)[:, None] * (q + -q % 4) + xp.arange(q)[None, :]
    return xp.reshape(xp.take(xp.reshape(x, (-1,)), xp.reshape(index % (p * q), (-1,))), (p, q))


def of_grid(change: Callable[[Any, Array], Array]) -> Callable:
    return lambda codes, scale, **attrs: dequantize_block_fwd(codes, change(xp_of(scale), scale), **attrs)


def at(rows: Callable[..., Array], columns: Callable[..., Array]) -> Callable:
    """w[o,d] = value[o,d] · scale[row, column], both functions of (xp, index of o [o,1], index of d [1,d], sizes o, d, p, q, block)"""

    def fwd(codes: Array, scale: Array, *, block: int = 128, format: str = "e4m3fn") -> tuple[Array, tuple]:
        xp, (o, d), (p, q) = xp_of(scale), codes.shape, scale.shape
        ones, _ = dequantize_block_fwd(codes, xp.ones_like(scale), block=block, format=format)
        i, j = xp.arange(o)[:, None], xp.arange(d)[None, :]
        sizes = {"o": o, "d": d, "p": p, "q": q, "block": block}
        index = rows(xp, i, j, **sizes) * q + columns(xp, i, j, **sizes)
        return ones * xp.reshape(xp.take(xp.reshape(scale, (-1,)), xp.reshape(index, (-1,))), (o, d)), ()

    return fwd


def panels(xp: Any, i: Array, j: Array, o: int, d: int, **sizes: int) -> Array:
    """Where element (i,j) lies once rows are packed in panels of 32, four neighbours of a row together (VNNI): [o,d]"""
    first = i // 32 * 32
    height = xp.where(first + 32 <= o, xp.full_like(i, 32), o - first)
    whole = d // 4 * 4
    inside = xp.where(j < whole, j // 4 * (4 * height) + (i - first) * 4 + j % 4, whole * height + (i - first) * (d - whole) + j - whole)
    return first * d + inside


QUANTIZE, DEQUANTIZE = ("fp8.quantize_block",), ("fp8.dequantize_block",)
TRANSPOSED = "unslothai/unsloth#8953, #3414; uxlfoundation/oneDNN#5908"
BY_SHAPE = "NVIDIA/TensorRT-Model-Connect#1115; axolotl-ai-cloud/axolotl#3486; unslothai/unsloth-zoo#803"
PADDED = "pytorch/ao#4229"


def block_in_tiles(w: Array, **attrs: Any) -> Result:
    """A scale for each row of a block, the first of which is stored"""
    o = {"block": 128, **attrs}
    xp, (rows, _) = xp_of(w), w.shape
    parts = [quantize_block_fwd(w[i : i + 1, :], **attrs)[0] for i in range(rows)]
    codes = xp.concat([c for c, _ in parts], axis=0)
    return (codes, xp.concat([s for _, s in parts[:: o["block"]]], axis=0)), ()


BUGS = [
    *(Bug(name, QUANTIZE, what, sources, fwd=blocks(body)) for name, what, sources, body in SHARED),
    Bug(
        "fp8-block-in-tiles",
        QUANTIZE,
        "Codes are quantised row by row, each with its own scale, and the first is stored.",
        fwd=block_in_tiles,
    ),
    Bug(
        "scale-grid-transposed",
        DEQUANTIZE,
        "scale[j,i] is used for block (i,j): the grid's transpose, read with the grid's shape.",
        TRANSPOSED,
        fwd=of_grid(lambda xp, scale: grid_reread(scale)),
    ),
    Bug(
        "block-size-from-shape",
        DEQUANTIZE,
        "The block is taken to be ⌈o/p⌉ × ⌈d/q⌉ instead of 128: with an edge block every scale after the first is misplaced.",
        BY_SHAPE,
        fwd=at(lambda xp, i, j, o, p, **_: i // -(-o // p), lambda xp, i, j, d, q, **_: j // -(-d // q)),
    ),
    Bug(
        "scale-k-pad4",
        DEQUANTIZE,
        "Rows of the scale grid are read at a distance rounded up to 4, where they are not filled up.",
        PADDED,
        fwd=of_grid(lambda xp, scale: padded_grid(scale)),
    ),
    Bug(
        "mla-absorb-dequant-layout",
        DEQUANTIZE,
        "The scale grid is laid over codes that were repacked in panels of 32 rows and fours of columns (VNNI).",
        "vllm-project/vllm#56773",
        fwd=at(
            lambda xp, i, j, d, block, **s: panels(xp, i, j, d=d, **s) // d // block,
            lambda xp, i, j, d, block, **s: panels(xp, i, j, d=d, **s) % d // block,
        ),
    ),
    Bug("scale-inverted", DEQUANTIZE, "Divides by weight_scale_inv; it multiplies.", INVERTED, fwd=of_grid(lambda xp, s: 1 / s)),
    Bug("scale-dropped", DEQUANTIZE, "The scale is not applied: a bare cast.", DROPPED, fwd=of_grid(lambda xp, s: xp.ones_like(s))),
    Bug("ue8m0-truncates-f32-scale", DEQUANTIZE, "Only the exponent of the scale is read.", TRUNCATED, fwd=of_grid(mantissa_dropped)),
    Bug(
        "e4m3fnuz-vs-fn",
        DEQUANTIZE,
        "Codes of E4M3FN are read as E4M3FNUZ: half of each.",
        FNUZ,
        fwd=of_values(as_fnuz, dequantize_block_fwd),
    ),
    Bug(
        "scale-cast-fp8-dtype",
        DEQUANTIZE,
        "The codes' values are cast to the scale's dtype, E8M0, before they are multiplied: powers of two, no signs.",
        CAST_FIRST,
        fwd=of_values(as_e8m0, dequantize_block_fwd),
    ),
]
UNWRITTEN = (("block-mixes-experts", "Blocks that reach into the next expert need stacked weights; fp8.quantize_block takes one matrix."),)
