"""Tokens to experts and back: sorted by expert, then slot."""

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from ...ref.selection import check_chosen
from ._common import integer, need, run
from ._declared import declared
from .norm import LANES, _dot

Array = NDArray[Any]


class Plan(NamedTuple):
    counts: Array  # [e]
    source: Array  # [m]: the slot token·k + slot of each row, -1 in filling
    place: Array  # [n,k]: the row of each slot, -1: none


@njit(nogil=True, cache=True)
def _plan(topk_idx, counts, ends, source, place):
    """Fills source and place; ends[e] holds each expert's first row and is moved on."""
    n, k = topk_idx.shape
    for i in range(n):
        for j in range(k):
            expert = topk_idx[i, j]
            place[i, j] = -1
            if expert >= 0:
                row = ends[expert]
                ends[expert] = row + 1
                source[row], place[i, j] = i * k + j, row


def plan_of(topk_idx: Array, e: int, alignment: int = 1) -> Plan:
    """For checked indices"""
    idx = np.ascontiguousarray(topk_idx, np.int64)
    counts = np.bincount(idx[idx >= 0], minlength=e)
    padded = -(-counts // alignment) * alignment
    ends = np.cumsum(padded)
    source, place = np.full(int(padded.sum()), -1, np.int64), np.empty(idx.shape, np.int64)
    _plan(idx, counts, ends - padded, source, place)
    return Plan(counts, source, place)


@njit(nogil=True, error_model="numpy", cache=True)
def _rows(lo, hi, x, source, k, weight, weighted, out):
    """out[i] = x[source[i] // k], times weight[source[i]] if weighted; 0 where source is -1"""
    for i in range(lo, hi):
        slot = source[i]
        if slot < 0:
            out[i] = 0
        elif weighted:
            w, row, target = weight[slot], x[slot // k], out[i]
            for j in range(row.size):
                target[j] = w * row[j]
        else:
            out[i] = x[slot // k]


@njit(nogil=True, error_model="numpy", cache=True)
def _sums(lo, hi, rows, place, weight, weighted, out):
    """out[n] = sum_k weight[n,k] rows[place[n,k]], slot after slot"""
    for n in range(lo, hi):
        target = out[n]
        target[:] = 0
        for j in range(place.shape[1]):
            if place[n, j] >= 0:
                row = rows[place[n, j]]
                w = weight[n, j] if weighted else out.dtype.type(1)
                for d in range(row.size):
                    target[d] += w * row[d]


@njit(nogil=True, error_model="numpy", cache=True)
def _dots(lo, hi, x, rows, place, out):
    """out[n,k] = sum_d x[n,d] rows[place[n,k],d], 0 where there is none"""
    lanes = np.empty(LANES)
    for n in range(lo, hi):
        for j in range(place.shape[1]):
            out[n, j] = _dot(x[n], rows[place[n, j]], lanes) if place[n, j] >= 0 else 0.0


def _readonly(x: Array) -> Array:
    view = x.view()
    view.flags.writeable = False
    return view


def rows_of(x: Array, source: Array, k: int, weight: Array | None = None) -> Array:
    """[m,d]: the token's row of x for each slot in source, times its weight"""
    out = np.empty((source.size, x.shape[1]), x.dtype)
    flat = _readonly(np.zeros(1, x.dtype) if weight is None else weight.reshape(-1))
    run(_rows, source.size, x.shape[1], _readonly(x), source, max(k, 1), flat, weight is not None, out)
    return out


def sum_slots(rows: Array, place: Array, weight: Array | None = None) -> Array:
    """[n,d]: the sum of each token's rows, times their weights"""
    (n, k), d = place.shape, rows.shape[1]
    out = np.empty((n, d), rows.dtype)
    weights = _readonly(np.zeros((1, 1), rows.dtype) if weight is None else weight)
    run(_sums, n, k * d, _readonly(rows), place, weights, weight is not None, out)
    return out


def slot_dots(x: Array, rows: Array, place: Array) -> Array:
    """[n,k]: each token's row of x with each of its rows"""
    out = np.empty(place.shape, x.dtype)
    run(_dots, place.shape[0], place.shape[1] * x.shape[1], _readonly(x), _readonly(rows), place, out)
    return out


def _checked(op: str, direction: str, arrays: dict[str, Any], attrs: dict[str, Any]) -> tuple[dict[str, Any], Plan]:
    arrays, a, letters = declared(op, direction, arrays, attrs)
    e, topk_idx = integer(op, "n_routed_experts", a["n_routed_experts"], 0), arrays["topk_idx"]
    check_chosen(op, topk_idx, letters["n"], letters["k"], e, least=-1)
    plan = plan_of(topk_idx, e, a["alignment"])
    name = {"moe.permute": "dx_sorted", "moe.unpermute": "y_sorted"}[op]
    rows = arrays.get(name)
    if rows is not None:
        need(rows.shape[0] == plan.source.size, op, name, f"{rows.shape[0]} rows", f"{plan.source.size}, those of moe.permute")
    return arrays, plan


def moe_permute(x: Array, topk_idx: Array, *, n_routed_experts: int = 256, alignment: int = 1) -> tuple[Array, Array, Array]:
    """x_sorted[i] = x[source[i] // k],   counts[e],   source sorted by (topk_idx, token, slot).

    x[n,d], topk_idx[n,k] (-1: a slot that goes nowhere). An expert's rows are filled up to a multiple of `alignment` with zeros, source -1.
    ValueError: dtypes or shapes do not fit, an index is out of range or an expert twice in a row.
    """
    attrs = {"n_routed_experts": n_routed_experts, "alignment": alignment}
    arrays, plan = _checked("moe.permute", "forward", {"x": x, "topk_idx": topk_idx}, attrs)
    return rows_of(arrays["x"], plan.source, topk_idx.shape[1]), plan.counts, plan.source


def moe_permute_bwd(x: Array, topk_idx: Array, dx_sorted: Array, *, n_routed_experts: int = 256, alignment: int = 1) -> Array:
    """dx[n] = sum_k dx_sorted[the row of slot (n, k)]. Errors as moe_permute."""
    attrs = {"n_routed_experts": n_routed_experts, "alignment": alignment}
    arrays, plan = _checked("moe.permute", "backward", {"x": x, "topk_idx": topk_idx, "dx_sorted": dx_sorted}, attrs)
    return sum_slots(arrays["dx_sorted"], plan.place)


def moe_unpermute(y_sorted: Array, topk_idx: Array, topk_weight: Array, *, n_routed_experts: int = 256, alignment: int = 1) -> Array:
    """y[n,d] = sum_k topk_weight[n,k] y_sorted[the row that moe_permute gave to slot (n, k)]. Errors as there; y_sorted has its rows."""
    attrs = {"n_routed_experts": n_routed_experts, "alignment": alignment}
    given = {"y_sorted": y_sorted, "topk_idx": topk_idx, "topk_weight": topk_weight}
    arrays, plan = _checked("moe.unpermute", "forward", given, attrs)
    return sum_slots(arrays["y_sorted"], plan.place, arrays["topk_weight"])


def moe_unpermute_bwd(
    y_sorted: Array, topk_idx: Array, topk_weight: Array, dy: Array, *, n_routed_experts: int = 256, alignment: int = 1
) -> tuple[Array, Array]:
    """dy_sorted[i] = topk_weight of its slot times dy of its token, 0 in filling;   dtopk_weight[n,k] = sum_d dy y_sorted."""
    attrs = {"n_routed_experts": n_routed_experts, "alignment": alignment}
    given = {"y_sorted": y_sorted, "topk_idx": topk_idx, "topk_weight": topk_weight, "dy": dy}
    arrays, plan = _checked("moe.unpermute", "backward", given, attrs)
    dy = arrays["dy"]
    return rows_of(dy, plan.source, topk_idx.shape[1], arrays["topk_weight"]), slot_dots(dy, arrays["y_sorted"], plan.place)
