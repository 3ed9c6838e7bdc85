"""Where an output is wrong: its error in σ on a grid of at most 64 × 64 cells, each the largest of what it covers; a histogram; the worst
elements. Small enough to stand in a report's line.

The axes are the signature's letters. An output with heads and positions is seen as heads × positions first, then as rows × channels:
o[b,s,h,v] is b·h × s, and b·s·h × v. A cell covers a power of two of elements, so the borders of tiles and blocks are borders of cells.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..ref.cast import round_to
from ..ref.op import Tensor
from .band import in_sigma
from .judge import Judgement, Question, Returned, code_format, differing
from .precision import Precision

CELLS = 64
EDGE, STEP = 8.0, 0.5  # the histogram: -8 to 8 σ in halves, and what is beyond on either side
WORST = 3
HEADS, POSITIONS = ("h", "g"), ("s", "n", "t", "m")


def error_maps(question: Question, returned: Mapping[str, Returned], judgement: Judgement) -> dict[str, dict[str, Any]]:
    """By output name: unit ("σ", or "differs" for what is judged bit for bit), dims, shape, views, histogram, worst. Empty where nothing
    could be compared (a wrong shape)."""
    if judgement.band is None:
        return {}
    op = question.op
    maps = {}
    for tensor in op.signature_of(question.direction, question.inputs)[1]:
        got, truth = returned[tensor.name].values, judgement.band.truth[tensor.name]
        if tensor.kind == "real":
            z = deviations(got, truth, judgement.band.sigma[tensor.name], judgement.judged[tensor.name], question.precision)
        elif tensor.kind == "index" and op.choice and tensor.name == op.choice[0]:
            z = (~np.any(got[..., :, None] == truth[..., None, :], axis=-1)).astype(np.float64)  # a set: what is not in the reference's
        else:
            z = differing(tensor, got, truth, code_format(question)).astype(np.float64)
        if z.size:
            maps[tensor.name] = _map(tensor, z, got, truth)
    return maps


def deviations(got: np.ndarray, truth: np.ndarray, sigma: np.ndarray, judged: np.ndarray, precision: Precision) -> np.ndarray:
    """The error in σ, as the judge has it; infinite where no rounding leads, NaN where nothing is judged."""
    got = got.astype(np.float64)
    rounded = round_to(precision.io, truth, overflow="nan")
    finite = np.isfinite(rounded)
    strange = np.where(finite, ~np.isfinite(got), ~((got == rounded) | (np.isnan(got) & np.isnan(rounded))))
    usable = finite & np.isfinite(truth) & np.isfinite(got)
    z = in_sigma(np.where(usable, got - np.where(usable, truth, 0.0), 0.0), sigma)
    certain = usable & (sigma == 0) & (round_to(precision.io, got, overflow="nan") != truth)
    with np.errstate(invalid="ignore"):  # ∞ - ∞
        z = np.where(strange, np.inf, np.where(certain, np.copysign(np.inf, got - truth), z))
    return np.where(judged, z, np.nan)


def views(dims: tuple[str, ...]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The axes that make the rows and those that make the columns, for each way to look at an output; the axes left out are reduced."""
    if not dims:
        return [((), ())]
    found = [(tuple(range(len(dims) - 1)), (len(dims) - 1,))]
    head = next((i for i, d in enumerate(dims) if d in HEADS), None)
    position = next((i for i, d in enumerate(dims) if d in POSITIONS), None)
    if head is not None and position is not None:
        rows = tuple(i for i in range(head + 1) if i != position)
        found.insert(0, (rows, (position,)))
    return list(dict.fromkeys(found))


def reduced(z: np.ndarray, rows: tuple[int, ...], columns: tuple[int, ...]) -> tuple[np.ndarray, tuple[int, int], tuple[int, int]]:
    """The cells (the element of the largest magnitude in each, with its sign; NaN where none is judged), the rows and columns that there
    are, and those that a cell covers."""
    rest = tuple(i for i in range(z.ndim) if i not in rows + columns)
    count = (math.prod(z.shape[i] for i in rows), math.prod(z.shape[i] for i in columns))
    grid = z.transpose(rows + columns + rest).reshape(*count, -1)
    cell = tuple(1 << max(0, math.ceil(math.log2(n / CELLS))) for n in count)
    high, low = np.fmax.reduce(grid, axis=2), np.fmin.reduce(grid, axis=2)
    for axis in (0, 1):
        starts = np.arange(0, count[axis], cell[axis])
        high, low = np.fmax.reduceat(high, starts, axis=axis), np.fmin.reduceat(low, starts, axis=axis)
    return np.where(-low > high, low, high), count, (cell[0], cell[1])


def histogram(z: np.ndarray) -> list[int]:
    """Elements below -8 σ, in each half of a σ from there to 8, and above; what is not judged is in none."""
    edges = np.r_[-np.inf, np.arange(-EDGE, EDGE + STEP, STEP), np.inf]
    return np.histogram(z[~np.isnan(z)], edges)[0].tolist()


def _map(tensor: Tensor, z: np.ndarray, got: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    judged = ~np.isnan(z)
    magnitude = np.where(judged, np.abs(z), -1.0)
    order = np.argsort(-magnitude, axis=None, kind="stable")[:WORST]
    places = [tuple(int(i) for i in np.unravel_index(int(i), z.shape)) for i in order]
    drawn = []
    for rows, columns in views(tensor.dims):
        cells, count, cell = reduced(z, rows, columns)
        names = [" · ".join(tensor.dims[i] for i in axes) or "1" for axes in (rows, columns)]
        drawn.append({"axes": names, "count": list(count), "cell": list(cell), "cells": [[_short(v) for v in row] for row in cells]})
    about: dict[str, Any] = {"unit": "σ" if tensor.kind == "real" else "differs", "dims": list(tensor.dims), "shape": list(z.shape)}
    about |= {"judged": int(judged.sum()), "wrong": int(np.sum(magnitude > 0)) if tensor.kind != "real" else None}
    about |= {"histogram": histogram(z) if tensor.kind == "real" else None, "views": drawn}
    about["worst"] = [
        {"at": list(at), "error": _short(z[at]), "returned": _text(got[at]), "truth": _text(truth[at])}
        for at in places
        if magnitude[at] > 0
    ]
    return about


def _short(value: float) -> float | str | None:
    """Three digits; JSON has no infinity and no NaN."""
    if np.isnan(value):
        return None
    if np.isinf(value):
        return "inf" if value > 0 else "-inf"
    short = float(f"{value:.3g}")
    return int(short) if short == int(short) else short


def _text(value: Any) -> str:
    return f"{value:.8g}" if value.dtype.kind == "f" else str(value)
