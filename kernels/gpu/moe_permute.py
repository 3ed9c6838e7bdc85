"""Tokens to experts and back: sorted by expert, then token, then slot."""

from typing import Any, NamedTuple

from ...ref.moe_permute import Alignment
from ...ref.selection import check_chosen
from ._call import arrays, empty, kernel_of, need, zeros
from ._device import THREADS, block_each, cuda, each, kernel
from .norm import total

Array = Any


@kernel
def _count(slots, counts):
    """A thread for each expert reads all slots: neighbours read the same one at the same time."""
    for expert in range(cuda.grid(1), counts.size, cuda.gridsize(1)):
        own = 0
        for i in range(slots.size):
            if slots[i] == expert:
                own += 1
        counts[expert] = own


@kernel
def _place(slots, firsts, source, place):
    """Each expert's slots, in their order, to its rows from firsts[expert] on. source and place come filled with -1."""
    for expert in range(cuda.grid(1), firsts.size, cuda.gridsize(1)):
        row = firsts[expert]
        for i in range(slots.size):
            if slots[i] == expert:
                source[row] = i
                place[i] = row
                row += 1


@kernel
def _rows(x, source, k, weight, weighted, out):
    """out[i] = x[source[i] // k], times weight[source[i]] if weighted; 0 where source is -1. A thread an element."""
    d = out.shape[1]
    for at in range(cuda.grid(1), out.size, cuda.gridsize(1)):
        i, j = at // d, at % d
        slot = source[i]
        if slot < 0:
            out[i, j] = 0
        elif weighted:
            out[i, j] = weight[slot] * x[slot // k, j]
        else:
            out[i, j] = x[slot // k, j]


@kernel
def _sums(rows, place, weight, weighted, out):
    """out[n] = sum_k weight[n,k] rows[place[n,k]], slot after slot. A thread an element."""
    d, k = out.shape[1], place.shape[1]
    for at in range(cuda.grid(1), out.size, cuda.gridsize(1)):
        n, j = at // d, at % d
        own = out.dtype.type(0)
        for slot in range(k):
            row = place[n, slot]
            if row >= 0:
                own += weight[n, slot] * rows[row, j] if weighted else rows[row, j]
        out[n, j] = own


@kernel
def _dots(x, rows, place, out):
    """out[n,k] = sum_d x[n,d] rows[place[n,k],d], 0 where there is none. A block a slot."""
    part = cuda.shared.array(THREADS, x.dtype)
    d, k = x.shape[1], place.shape[1]
    for slot in range(cuda.blockIdx.x, place.size, cuda.gridDim.x):
        n, row = slot // k, place[slot // k, slot % k]
        own = x.dtype.type(0)
        for j in range(cuda.threadIdx.x, d if row >= 0 else 0, THREADS):
            own += x[n, j] * rows[row, j]
        part[cuda.threadIdx.x] = own
        cuda.syncthreads()
        if cuda.threadIdx.x == 0:
            out[n, slot % k] = total(part)
        cuda.syncthreads()  # part is written again in the next round


class Plan(NamedTuple):
    counts: Array  # [e]
    source: Array  # [m]: the slot token·k + slot of each row, -1 in filling
    place: Array  # [n,k]: the row of each slot, -1: none


def plan_of(op: str, topk_idx: Array, e: int, alignment: int) -> Plan:
    xp, (n, k) = arrays(), topk_idx.shape
    check_chosen(op, topk_idx, n, k, e, least=-1)
    counts, slots = zeros((e,), xp.int64), topk_idx.reshape(-1)
    each(_count, e, slots, counts)
    padded = -(-counts // alignment) * alignment
    firsts = xp.cumsum(padded) - padded
    source, place = xp.full((int(padded.sum()),), -1, xp.int64), xp.full((slots.size,), -1, xp.int64)
    each(_place, e, slots, firsts, source, place)
    return Plan(counts, source, place.reshape(topk_idx.shape))


def _rows_of(x: Array, plan: Plan, weight: Array | None = None) -> Array:
    out = empty((plan.source.size, x.shape[1]), x.dtype)
    flat = zeros((1,), x.dtype) if weight is None else weight.reshape(-1)
    each(_rows, out.size, x, plan.source, max(plan.place.shape[1], 1), flat, weight is not None, out)
    return out


def _sum_slots(rows: Array, plan: Plan, weight: Array | None = None) -> Array:
    out = empty((plan.place.shape[0], rows.shape[1]), rows.dtype)
    each(_sums, out.size, rows, plan.place, zeros((1, 1), rows.dtype) if weight is None else weight, weight is not None, out)
    return out


def _check_rows(op: str, name: str, rows: Array, plan: Plan) -> None:
    need(rows.shape[0] == plan.source.size, op, name, f"{rows.shape[0]} rows", f"{plan.source.size}, those of moe.permute")


@kernel_of("moe.permute")
def moe_permute(x: Array, topk_idx: Array, *, n_routed_experts: int = 256, alignment: Alignment = 1) -> tuple[Array, Array, Array]:
    """x_sorted[i] = x[source[i] // k],   counts[e],   source sorted by (topk_idx, token, slot).

    x[n,d], topk_idx[n,k] (-1: a slot that goes nowhere). An expert's rows are filled up to a multiple of `alignment` with zeros, source -1.
    ValueError: dtypes or shapes do not fit, an index is out of range or an expert twice in a row.
    """
    plan = plan_of("moe.permute", topk_idx, n_routed_experts, alignment)
    return _rows_of(x, plan), plan.counts, plan.source


@kernel_of("moe.permute", "backward")
def moe_permute_bwd(x: Array, topk_idx: Array, dx_sorted: Array, *, n_routed_experts: int = 256, alignment: Alignment = 1) -> Array:
    """dx[n] = sum_k dx_sorted[the row of slot (n, k)]. Errors as moe_permute."""
    plan = plan_of("moe.permute", topk_idx, n_routed_experts, alignment)
    _check_rows("moe.permute", "dx_sorted", dx_sorted, plan)
    return _sum_slots(dx_sorted, plan)


@kernel_of("moe.unpermute")
def moe_unpermute(y_sorted: Array, topk_idx: Array, topk_weight: Array, *, n_routed_experts: int = 256, alignment: Alignment = 1) -> Array:
    """y[n,d] = sum_k topk_weight[n,k] y_sorted[the row that moe_permute gave to slot (n, k)]. Errors as there; y_sorted has its rows."""
    plan = plan_of("moe.unpermute", topk_idx, n_routed_experts, alignment)
    _check_rows("moe.unpermute", "y_sorted", y_sorted, plan)
    return _sum_slots(y_sorted, plan, topk_weight)


@kernel_of("moe.unpermute", "backward")
def moe_unpermute_bwd(
    y_sorted: Array, topk_idx: Array, topk_weight: Array, dy: Array, *, n_routed_experts: int = 256, alignment: Alignment = 1
) -> tuple[Array, Array]:
    """dy_sorted[i] = topk_weight of its slot times dy of its token, 0 in filling;   dtopk_weight[n,k] = sum_d dy y_sorted."""
    plan = plan_of("moe.unpermute", topk_idx, n_routed_experts, alignment)
    _check_rows("moe.unpermute", "y_sorted", y_sorted, plan)
    dtopk_weight = empty(topk_weight.shape, dy.dtype)
    block_each(_dots, plan.place.size, dy, y_sorted, plan.place, dtopk_weight)
    return _rows_of(dy, plan, topk_weight), dtopk_weight
