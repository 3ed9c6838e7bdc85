"""Bugs of the way to the experts and back. See `moe_experts` for what happens there, and `moe_layer`."""

from collections.abc import Callable
from typing import Any

from ...ref.moe_permute import (
    moe_permute_bwd,
    moe_permute_fwd,
    moe_unpermute,
    moe_unpermute_bwd,
    moe_unpermute_fwd,
    plan_of,
    rows_at,
    sum_slots,
)
from ...ref.xp import Array, clip, xp_of
from . import Bug

Pair = tuple[Array, Array]
Place = Callable[[Any, Array, Array], Array]  # of the namespace, place[n,k], source[m]: another place[n,k]


def _dispatched(change: Callable[[Any, Array, Array, Array, int], tuple[Array, Array, Array]]) -> Callable:
    """moe.permute with other rows: change(xp, x, counts, source, k) gives x_sorted, counts and source."""

    def fwd(x: Array, topk_idx: Array, **attrs: Any) -> tuple[tuple[Array, Array, Array], tuple]:
        (_, counts, source), saved = moe_permute_fwd(x, topk_idx, **attrs)
        return change(xp_of(source), x, counts, source, max(topk_idx.shape[1], 1)), (*saved, source)

    return fwd


def _token(xp: Any, source: Array, k: int) -> Array:
    return xp.where(source < 0, source, source // k)


def _again(xp: Any, source: Array) -> Array:
    """The permutation applied to itself; where rows are filled up, with slot 0"""
    m = source.shape[0]
    return clip(xp.take(source, clip(source, 0, max(m - 1, 0))), 0) if m else source


def permuted_twice(xp: Any, x: Array, counts: Array, source: Array, k: int) -> tuple[Array, Array, Array]:
    return rows_at(x, _again(xp, source) // k), counts, source


def permuted_twice_bwd(dx_sorted: Array, saved: tuple) -> Array:
    place, source = saved[0], saved[-1]
    xp, (n, k) = xp_of(dx_sorted), place.shape
    token = _again(xp, source) // max(k, 1)
    hits = xp.astype(token[None, :] == xp.arange(n)[:, None], dx_sorted.dtype)
    return xp.matmul(hits, dx_sorted)


def _of_token(token: Callable[[Any, Array, int, int], Array]) -> Callable:
    """x_sorted of another token for each row: token(xp, source, n, k), -1 where there is none"""
    return _dispatched(lambda xp, x, counts, source, k: (rows_at(x, token(xp, source, x.shape[0], k)), counts, source))


def last_of_expert(xp: Any, counts: Array, source: Array, alignment: int) -> Array:
    """[m]: whether a row is its expert's last (of those that hold a slot)"""
    padded = (counts + alignment - 1) // alignment * alignment
    ends = xp.cumulative_sum(padded) - padded + counts
    return xp.any((xp.arange(source.shape[0])[:, None] + 1 == ends[None, :]) & (counts > 0)[None, :], axis=1)


def last_row_dropped(x: Array, topk_idx: Array, **attrs: Any) -> tuple[tuple[Array, Array, Array], tuple]:
    (rows, counts, source), saved = moe_permute_fwd(x, topk_idx, **attrs)
    last = last_of_expert(xp_of(source), counts, source, attrs.get("alignment", 1))
    return (xp_of(x).where(last[:, None], xp_of(x).zeros_like(rows), rows), counts, source), saved


def _slots_reversed(x: Array, topk_idx: Array, **attrs: Any) -> tuple[tuple[Array, Array, Array], tuple]:
    """Within an expert the last token comes first: as an unstable sort may have it."""
    xp, (n, k) = xp_of(topk_idx), topk_idx.shape
    (_, counts, source), saved = moe_permute_fwd(x, xp.flip(topk_idx), **attrs)
    source = xp.where(source < 0, source, n * k - 1 - source)
    return (rows_at(x, _token(xp, source, max(k, 1))), counts, source), saved


def counts_filled(x: Array, topk_idx: Array, **attrs: Any) -> tuple[tuple[Array, Array, Array], tuple]:
    (rows, counts, source), saved = moe_permute_fwd(x, topk_idx, **attrs)
    alignment = attrs.get("alignment", 1)
    return (rows, (counts + alignment - 1) // alignment * alignment, source), saved


def overwritten(dx_sorted: Array, saved: tuple) -> Array:
    """The last slot's gradient overwrites those before it."""
    return sum_slots(dx_sorted, saved[0][:, -1:], None)


def source_of(place: Array, m: int) -> Array:
    """[m]: the slot that each row holds, or -1"""
    xp = xp_of(place)
    hits = xp.reshape(place, (-1, 1)) == xp.arange(m)[None, :]
    return xp.where(xp.any(hits, axis=0), xp.argmax(xp.astype(hits, xp.int64), axis=0), -1)


def _placed_bwd(other: Place) -> Callable:
    """moe.permute's backward with another place"""

    def bwd(dx_sorted: Array, saved: tuple) -> Array:
        place, *rest = saved
        return moe_permute_bwd(dx_sorted, (other(xp_of(place), place, source_of(place, dx_sorted.shape[0])), *rest))

    return bwd


def _combined(change: Callable[[Any, Array, Array, Array, Array], Array]) -> Callable:
    """moe.unpermute with another sum: change(xp, y_sorted, topk_weight, source, place)"""

    def fwd(y_sorted: Array, topk_idx: Array, topk_weight: Array, **attrs: Any) -> tuple[Array, tuple]:
        o = {**moe_unpermute.defaults, **attrs}
        _, source, place = plan_of(topk_idx, o["n_routed_experts"], o["alignment"])
        _, saved = moe_unpermute_fwd(y_sorted, topk_idx, topk_weight, **attrs)
        return change(xp_of(topk_idx), y_sorted, topk_weight, source, place), saved

    return fwd


def at_place(other: Place) -> Callable:
    """The sum with another place for each slot"""
    return _combined(lambda xp, y, weight, source, place: sum_slots(y, other(xp, place, source), weight))


def by_source(xp: Any, place: Array, source: Array) -> Array:
    """source, the slot of a row, is read as the row of a slot."""
    m, slots = source.shape[0], place.shape[0] * place.shape[1]
    taken = xp.take(source, clip(xp.arange(slots), 0, max(m - 1, 0)))
    return xp.where(place < 0, place, xp.reshape(clip(taken, -1, m - 1), place.shape))


def inverse_clamped(xp: Any, place: Array, source: Array) -> Array:
    """argsort of source with filling rows clamped to the last slot: the last slot gets the first of them."""
    n, k = place.shape
    own = xp.arange(n * k) == n * k - 1
    like_last = (source < 0) | (source == n * k - 1)
    first = xp.argmax(xp.astype(like_last, xp.int64))
    flat = xp.reshape(place, (n * k,))
    return xp.reshape(xp.where(own & (flat >= 0), first, flat), place.shape)


def first_slot(xp: Any, place: Array, source: Array) -> Array:
    return xp.broadcast_to(place[:, :1], place.shape)


def wrapped(xp: Any, place: Array, source: Array) -> Array:
    return xp.where(place < 0, place + source.shape[0], place)


def slots_backwards(xp: Any, place: Array, source: Array) -> Array:
    return xp.flip(place, axis=1)


def place_twice(xp: Any, place: Array, source: Array) -> Array:
    """Rows that are back in the order of slots already are permuted again."""
    again = xp.take(xp.reshape(place, (-1,)), clip(xp.reshape(place, (-1,)), 0, place.shape[0] * place.shape[1] - 1))
    return xp.where(place < 0, place, xp.reshape(again, place.shape))


def without_weight(dy: Array, saved: tuple) -> Pair:
    y_sorted, weight, source, place = saved
    ones = xp_of(weight).ones_like(weight)
    return moe_unpermute_bwd(dy, (y_sorted, ones, source, place))[0], moe_unpermute_bwd(dy, saved)[1]


def no_dweight(dy: Array, saved: tuple) -> Pair:
    dy_sorted, dweight = moe_unpermute_bwd(dy, saved)
    return dy_sorted, 0 * dweight


def sentinel_weighed(dy: Array, saved: tuple) -> Pair:
    """A slot of another rank, whose weight is 0 in the sum, still has the gradient of row 0."""
    *rest, place = saved
    return moe_unpermute_bwd(dy, saved)[0], moe_unpermute_bwd(dy, (*rest, clip(place, 0)))[1]


def filling_not_zero(dy: Array, saved: tuple) -> Pair:
    y_sorted, weight, source, place = saved
    return moe_unpermute_bwd(dy, (y_sorted, weight, clip(source, 0), place))[0], moe_unpermute_bwd(dy, saved)[1]


PERMUTE, UNPERMUTE = ("moe.permute",), ("moe.unpermute",)
TITAN = "pytorch/torchtitan"
UNWRITTEN = (
    ("expert-gemm-large-hidden", "An index overflow of one kernel at a hidden size of 512 or more, with no other arithmetic to imitate."),
)
BUGS = [
    Bug(
        "permute-twice",
        PERMUTE,
        "The permutation is applied twice: rows of other tokens, and token 0 where rows are filled up.",
        f"{TITAN}#1237, #1340",
        fwd=_dispatched(permuted_twice),
        bwd=permuted_twice_bwd,
    ),
    Bug(
        "permute-twice",
        UNPERMUTE,
        "Rows that are back in the order of slots are permuted again.",
        f"{TITAN}#1237, #1340",
        fwd=at_place(place_twice),
    ),
    Bug(
        "permute-clamp-unaligned-M",
        PERMUTE,
        "Before the inverse permutation is sorted out filling rows are clamped to the last slot, which then gets the first of them.",
        "vllm-project/vllm#17932",
        bwd=_placed_bwd(inverse_clamped),
    ),
    Bug(
        "permute-clamp-unaligned-M",
        UNPERMUTE,
        "Before the inverse permutation is sorted out filling rows are clamped to the last slot, which then gets the first of them.",
        "vllm-project/vllm#17932",
        fwd=at_place(inverse_clamped),
    ),
    Bug(
        "permute-slot-as-token",
        PERMUTE,
        "Slot s belongs to token s mod n (tiled) instead of s // k (interleaved).",
        fwd=_of_token(lambda xp, source, n, k: xp.where(source < 0, source, source % max(n, 1))),
    ),
    Bug("permute-last-row-dropped", PERMUTE, "The last row of each expert is left out (zero).", fwd=last_row_dropped),
    Bug("permute-unstable", PERMUTE, "Within an expert tokens stand in reverse order.", fwd=_slots_reversed),
    Bug(
        "permute-filling-not-zero",
        PERMUTE,
        "Rows that fill an expert up hold token 0 instead of zeros.",
        fwd=_of_token(lambda xp, source, n, k: clip(source, 0) // k),
    ),
    Bug(
        "permute-counts-off-by-one",
        PERMUTE,
        "An expert's last row is not counted.",
        fwd=_dispatched(lambda xp, x, c, source, k: (rows_at(x, _token(xp, source, k)), clip(c - 1, 0), source)),
    ),
    Bug("permute-counts-filled", PERMUTE, "Counts include the rows that fill an expert up.", fwd=counts_filled),
    Bug(
        "permute-source-token",
        PERMUTE,
        "source is the token of a row instead of its slot.",
        fwd=_dispatched(lambda xp, x, c, source, k: (rows_at(x, _token(xp, source, k)), c, _token(xp, source, k))),
    ),
    Bug("permute-grad-overwritten", PERMUTE, "The slots' gradients overwrite one another: the last one's is kept.", bwd=overwritten),
    Bug("combine-place-source-confused", UNPERMUTE, "The slot of a row is read as the row of a slot.", fwd=at_place(by_source)),
    Bug("combine-first-slot-repeated", UNPERMUTE, "Every slot of a token takes the row of its first slot.", fwd=at_place(first_slot)),
    Bug("combine-slots-backwards", UNPERMUTE, "The rows of a token meet its weights in the reverse order.", fwd=at_place(slots_backwards)),
    Bug(
        "combine-unrouted-wraps",
        UNPERMUTE,
        "The index -1 is read from the end: a slot that goes nowhere adds the last row.",
        fwd=at_place(wrapped),
    ),
    Bug(
        "combine-weight-missing",
        UNPERMUTE,
        "The rows are added without their weights.",
        fwd=_combined(lambda xp, y, weight, source, place: sum_slots(y, place, None)),
    ),
    Bug(
        "combine-weight-twice",
        UNPERMUTE,
        "The weights are applied twice.",
        fwd=_combined(lambda xp, y, weight, source, place: sum_slots(y, place, weight * weight)),
    ),
    Bug("combine-grad-weight-missing", UNPERMUTE, "dy_sorted lacks the weights.", bwd=without_weight),
    Bug("combine-dweight-missing", UNPERMUTE, "The weights get no gradient.", bwd=no_dweight),
    Bug(
        "gate-grad-ep-sentinel",
        UNPERMUTE,
        "A slot that goes nowhere (another rank's) has weight 0 in the sum, and still the gradient of row 0.",
        "huggingface/transformers#48687, #48689, #48205",
        bwd=sentinel_weighed,
    ),
    Bug("combine-grad-filling-not-zero", UNPERMUTE, "Rows that fill an expert up get a gradient, that of slot 0.", bwd=filling_not_zero),
]
