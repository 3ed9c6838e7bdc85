"""Tokens to experts and back: stable by expert, then token, then slot; gathers only. Spec §3.5."""

from typing import Literal

from array_api_compat import device

from .op import Case, Op, declare, signature
from .selection import check_chosen
from .xp import Array, xp_of

Alignment = Literal[1, 128]


def plan_of(topk_idx: Array, e: int, alignment: int) -> tuple[Array, Array, Array]:
    """counts[e], source[m] (the slot token·k + slot that each row holds; -1: padding) and place[n,k] (the row of each slot; -1: none)

    Rows are sorted by expert; the slots of one expert keep their order. Each expert's rows are filled up to a multiple of `alignment`.
    """
    xp, dev = xp_of(topk_idx), device(topk_idx)
    n, k = topk_idx.shape
    flat = xp.astype(xp.reshape(topk_idx, (n * k,)), xp.int64)
    experts = xp.arange(e, dtype=xp.int64, device=dev)
    counts = xp.sum(xp.astype(flat[:, None] == experts[None, :], xp.int64), axis=0)  # [e]
    padded = (counts + alignment - 1) // alignment * alignment
    ends, padded_ends = xp.cumulative_sum(counts), xp.cumulative_sum(padded)
    order = xp.argsort(xp.where(flat < 0, xp.full_like(flat, e), flat), stable=True)  # unrouted slots last
    rows = int(xp.sum(padded))
    row = xp.arange(rows, dtype=xp.int64, device=dev)
    owner = xp.searchsorted(padded_ends, row, side="right")  # the expert of each row
    owner = xp.astype(xp.clip(owner, 0, e - 1), xp.int64)
    within = row - xp.take(padded_ends - padded, owner)
    used = within < xp.take(counts, owner)
    if n * k == 0:
        return counts, row, xp.astype(topk_idx, xp.int64)
    rank = xp.clip(xp.take(ends - counts, owner) + within, 0, n * k - 1)
    source = xp.where(used, xp.take(order, rank), xp.full_like(row, -1))
    sorted_place = xp.argsort(order, stable=True)  # the rank of each slot
    safe = xp.clip(flat, 0, None)
    place = sorted_place - xp.take(ends - counts, safe) + xp.take(padded_ends - padded, safe)
    place = xp.where(flat < 0, xp.full_like(flat, -1), place)
    return counts, source, xp.reshape(place, (n, k))


def rows_at(x: Array, index: Array) -> Array:
    """x[index], zero where the index is -1: [m,d]"""
    xp = xp_of(x)
    if x.shape[0] == 0 or index.shape[0] == 0:
        return xp.zeros((index.shape[0], x.shape[1]), dtype=x.dtype, device=device(x))
    taken = xp.take(x, xp.clip(index, 0, None), axis=0)
    return xp.where((index >= 0)[:, None], taken, xp.zeros_like(taken))


def sum_slots(y_sorted: Array, place: Array, weight: Array | None) -> Array:
    """y[n,d] = Σ_k weight[n,k] y_sorted[place[n,k]], slot after slot"""
    parts = [rows_at(y_sorted, place[:, slot]) for slot in range(place.shape[1])]
    return total_of([p if weight is None else weight[:, i : i + 1] * p for i, p in enumerate(parts)], y_sorted, place.shape[0])


def total_of(parts: list[Array], like: Array, n: int) -> Array:
    """The sum of the slots' parts [n,d], the first slot first; one sum, whose order an implementation may choose"""
    xp = xp_of(like)
    if not parts:
        return xp.zeros((n, like.shape[1]), dtype=like.dtype, device=device(like))
    return xp.sum(xp.stack(parts, axis=0), axis=0)


@signature("x[n,d] topk_idx[n,k]:index -> x_sorted[m,d] counts[n_routed_experts]:index source[m]:index")
def moe_permute_fwd(
    x: Array, topk_idx: Array, *, n_routed_experts: int = 256, alignment: Alignment = 1
) -> tuple[tuple[Array, Array, Array], tuple]:
    """x_sorted[i] = x[source[i] // k],   source sorted by (topk_idx, token, slot),   counts[e] = Σ_{n,k} [topk_idx[n,k] = e]

    Row i holds slot source[i] = token·k + slot. An expert's rows are filled up to a multiple of `alignment` with zeros (source -1), as
    grouped GEMMs want them; an expert without tokens has no rows. An index of -1 is a slot that goes nowhere.
    """
    check_chosen("moe.permute", topk_idx, x.shape[0], topk_idx.shape[1], n_routed_experts, least=-1)
    counts, source, place = plan_of(topk_idx, n_routed_experts, alignment)
    token = xp_of(source).where(source < 0, source, source // max(topk_idx.shape[1], 1))
    return (rows_at(x, token), counts, source), (place, source.shape[0])


def moe_permute_bwd(dx_sorted: Array, saved: tuple) -> Array:
    """dx[n] = Σ_k dx_sorted[place[n,k]]: a gather over the slots' rows"""
    place, rows = saved
    if dx_sorted.shape[0] != rows:
        raise ValueError(f"moe.permute: dx_sorted has {dx_sorted.shape[0]} rows; expected {rows}, those of x_sorted")
    return sum_slots(dx_sorted, place, None)


@signature("y_sorted[m,d] topk_idx[n,k]:index topk_weight[n,k] -> y[n,d]")
def moe_unpermute_fwd(
    y_sorted: Array, topk_idx: Array, topk_weight: Array, *, n_routed_experts: int = 256, alignment: Alignment = 1
) -> tuple[Array, tuple]:
    """y[n,d] = Σ_k topk_weight[n,k] y_sorted[place[n,k],d],   place the row that moe.permute gave to slot (n, k); -1 adds nothing"""
    check_chosen("moe.unpermute", topk_idx, topk_idx.shape[0], topk_idx.shape[1], n_routed_experts, least=-1)
    _, source, place = plan_of(topk_idx, n_routed_experts, alignment)
    if y_sorted.shape[0] != source.shape[0]:
        raise ValueError(f"moe.unpermute: y_sorted has {y_sorted.shape[0]} rows; expected {source.shape[0]}, those of moe.permute")
    return sum_slots(y_sorted, place, topk_weight), (y_sorted, topk_weight, source, place)


def moe_unpermute_bwd(dy: Array, saved: tuple) -> tuple[Array, Array]:
    """dy_sorted[i] = w[source[i]] dy[source[i] // k],   dtopk_weight[n,k] = Σ_d dy[n,d] y_sorted[place[n,k],d]"""
    y_sorted, topk_weight, source, place = saved
    xp, (n, k) = xp_of(dy), place.shape
    token = xp.where(source < 0, source, source // max(k, 1))
    dy_sorted = rows_at(dy, token) * rows_at(xp.reshape(topk_weight, (n * k, 1)), source)
    slots = [xp.sum(dy * rows_at(y_sorted, place[:, j]), axis=-1) for j in range(k)]
    return dy_sorted, xp.stack(slots, axis=1) if slots else 0 * topk_weight


def rows_of(slots: tuple[int, ...], e: int, alignment: int) -> int:
    """How many rows an explicit choice makes"""
    return sum(-(-slots.count(i) // alignment) * alignment for i in range(e))


def _cases(inverse: bool) -> tuple[Case, ...]:
    cases = []
    for name, n, k, e, alignment, slots, note in (
        ("v3", 12, 8, 32, 1, None, "distinct experts, some without tokens"),
        ("one", 1, 1, 4, 1, (2,), ""),
        ("one-expert", 5, 1, 4, 1, (3, 3, 3, 3, 3), "all tokens to one expert, three empty"),
        ("aligned", 5, 2, 4, 128, (3, 0, 0, 3, 2, 3, 3, 2, 0, 3), "rows filled up to 128; expert 1 is empty"),
        ("unrouted", 4, 2, 3, 1, (-1, 0, 2, -1, -1, -1, 0, 2), "slots that go nowhere"),
    ):
        d = 3 if alignment > 1 else 6
        m = n * k if slots is None else rows_of(slots, e, alignment)
        idx = ("experts", e) if slots is None else ("positions", *slots)
        real: dict[str, tuple] = dict.fromkeys(("y_sorted", "topk_weight", "dy") if inverse else ("x", "dx_sorted"), ("normal", 1.0))
        dims: dict[str, int] = {"n": n, "k": k, "d": d, "m": m}
        cases.append(Case(name, dims, {**real, "topk_idx": idx}, {"n_routed_experts": e, "alignment": alignment}, note))
    return tuple(cases)


SOURCE = "spec §3.5; DeepGEMM's contiguous layout; TileKernels, expand and reduce"
moe_permute = declare(Op("moe.permute", moe_permute_fwd, moe_permute_bwd, _cases(inverse=False), "m*d", SOURCE, vary=""))
moe_unpermute = declare(Op("moe.unpermute", moe_unpermute_fwd, moe_unpermute_bwd, _cases(inverse=True), "2*n*k*d", SOURCE, vary=""))
