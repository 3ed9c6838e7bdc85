"""Bugs of the experts: what happens to a slot's row between x and y. See `moe_layer` for the layer around them."""

from collections.abc import Callable
from typing import Any

from ...ref.moe import moe_experts_bwd, moe_experts_fwd
from ...ref.moe_permute import plan_of, rows_at, sum_slots
from ...ref.xp import Array, clip, xp_of
from . import Bug
from .moe import by_source, first_slot, last_of_expert, slots_backwards

Grads = tuple[Array, ...]
Saved = tuple[Any, ...]


class Slots:
    """The experts slot by slot: each slot is a token of its own with one expert, so that it can be changed before and after."""

    def __init__(self, x: Array, topk_idx: Array, topk_weight: Array, *weights: Array, **attrs: Any):
        self.xp, (self.n, self.k), self.d = xp_of(x), topk_idx.shape, x.shape[1]
        self.x, self.idx, self.weight, self.weights, self.attrs = x, topk_idx, topk_weight, weights, {**attrs, "weight_before_down": False}

    def rows(self) -> Array:
        """[n·k,d]: the token of each slot"""
        return self.xp.repeat(self.x, self.k, axis=0)

    def column(self, a: Array) -> Array:
        return self.xp.reshape(a, (self.n * self.k, 1))

    def run(self, rows: Array, idx: Array | None = None) -> tuple[Array, Saved]:
        """[n·k,d]: the unweighted output of each slot"""
        idx = self.idx if idx is None else idx
        ones = self.xp.ones((self.n * self.k, 1), dtype=self.x.dtype)
        return moe_experts_fwd(rows, self.column(idx), ones, *self.weights, **self.attrs)

    def total(self, slots: Array, weight: Array) -> Array:
        """y[n,d]: Σ_k weight[n,k] slots[n·k,d]"""
        place = self.xp.reshape(self.xp.arange(self.n * self.k), (self.n, self.k))
        return sum_slots(slots, place, weight)


def _slots(change: Callable[[Slots], tuple[Array, Saved]]) -> Callable:
    """A forward in slots"""
    return lambda *arrays, **attrs: change(Slots(*arrays, **attrs))


def right(s: Slots) -> tuple[Array, Saved]:
    y, saved = s.run(s.rows())
    return s.total(y, s.weight), saved


def _weighed(weight: Callable[[Array], Array]) -> Callable:
    """The weight that a slot's output gets"""
    return _slots(lambda s: (s.total(s.run(s.rows())[0], weight(s.weight)), ()))


def before_activation(s: Slots) -> tuple[Array, Saved]:
    weighed = s.rows() * s.column(s.weight)
    y, saved = s.run(weighed)
    return s.total(y, s.xp.ones_like(s.weight)), (saved, s)


def before_activation_bwd(dy: Array, saved: Saved) -> Grads:
    inner, s = saved
    drows, _, *dw = moe_experts_bwd(s.xp.repeat(dy, s.k, axis=0), inner)
    dweight = s.xp.reshape(s.xp.sum(drows * s.rows(), axis=-1), (s.n, s.k))
    return s.total(drows, s.weight), dweight, *dw


def _placed(other: Callable[[Any, Array, Array], Array]) -> Callable:
    """Each slot's output is looked for at another row."""

    def change(s: Slots) -> tuple[Array, Saved]:
        _, (y_sorted, _, source, _, *rest) = moe_experts_fwd(s.x, s.idx, s.weight, *s.weights, **s.attrs)
        _, _, place = plan_of(s.idx, s.weights[0].shape[0], 1)
        m = y_sorted.shape[0]
        return sum_slots(y_sorted, other(s.xp, place, source[:m]), s.weight), tuple(rest)

    return _slots(change)


def last_row_dropped(s: Slots) -> tuple[Array, Saved]:
    counts, source, place = plan_of(s.idx, s.weights[0].shape[0], 1)
    last = last_of_expert(s.xp, counts, source, 1)
    lost = s.xp.take(last, clip(s.xp.reshape(place, (-1,)), 0))[:, None]
    y, saved = s.run(s.rows())
    return s.total(s.xp.where(lost, s.xp.zeros_like(y), y), s.weight), saved


def unrouted_to_last(s: Slots) -> tuple[Array, Saved]:
    e = s.weights[0].shape[0]
    y, saved = s.run(s.rows(), s.xp.where(s.idx < 0, s.idx + e, s.idx))
    return s.total(y, s.weight), saved


def empty_skipped(s: Slots) -> tuple[Array, Saved]:
    """The j-th expert that has tokens takes the weights of expert j."""
    counts, _, _ = plan_of(s.idx, s.weights[0].shape[0], 1)
    number = s.xp.cumulative_sum(s.xp.astype(counts > 0, s.xp.int64)) - 1
    moved = s.xp.reshape(s.xp.take(number, clip(s.xp.reshape(s.idx, (-1,)), 0)), s.idx.shape)
    y, saved = s.run(s.rows(), s.xp.where(s.idx < 0, s.idx, moved))
    return s.total(y, s.weight), saved


def swapped(x: Array, topk_idx: Array, weight: Array, w_gate: Array, w_up: Array, w_down: Array, **attrs: Any) -> tuple[Array, Saved]:
    return moe_experts_fwd(x, topk_idx, weight, w_up, w_gate, w_down, **attrs)


def swapped_bwd(dy: Array, saved: Saved) -> Grads:
    dx, dweight, dup, dgate, ddown = moe_experts_bwd(dy, saved)
    return dx, dweight, dgate, dup, ddown


def transposed(x: Array, topk_idx: Array, weight: Array, w_gate: Array, w_up: Array, w_down: Array, **attrs: Any) -> tuple[Array, Saved]:
    xp, (e, d, f) = xp_of(x), w_down.shape
    return moe_experts_fwd(x, topk_idx, weight, w_gate, w_up, xp.permute_dims(xp.reshape(w_down, (e, f, d)), (0, 2, 1)), **attrs)


def transposed_bwd(dy: Array, saved: Saved) -> Grads:
    *grads, ddown = moe_experts_bwd(dy, saved)
    return *grads, xp_of(dy).reshape(xp_of(dy).permute_dims(ddown, (0, 2, 1)), ddown.shape)


def of_previous(dw: Array, filled: set[int]) -> Array:
    """What is left in the buffer where nothing was written: for an expert without tokens the gradient of the one before, or ones"""
    xp, parts, last = xp_of(dw), [], 0 * dw[:1, ...] + 1
    for i in range(dw.shape[0]):
        last = dw[i : i + 1, ...] if i in filled else last
        parts.append(last)
    return xp.concat(parts, axis=0)


def empty_not_zeroed(dy: Array, saved: Saved) -> Grads:
    dx, dweight, *dws = moe_experts_bwd(dy, saved)
    return dx, dweight, *(of_previous(dw, {i for i, _, _ in saved[4]}) for dw in dws)


def with_activations(saved: Saved, change: Callable[[Saved], Saved]) -> Saved:
    """The experts' saved arrays with those of swiglu changed"""
    parts = [(i, rows, (*part[:2], change(part[2]), *part[3:])) for i, rows, part in saved[4]]
    return (*saved[:4], parts, *saved[5:])


def slope_is_sigmoid(saved: Saved) -> Saved:
    """swiglu's, so that its slope is σ(1 + 0 (1 - σ))"""
    return (*saved[:2], 0 * saved[2], *saved[3:])


def not_cut(saved: Saved) -> Saved:
    """swiglu's, without the limit that cuts gradients"""
    return (*saved[:6], None, saved[7])


def no_dweight(dy: Array, saved: Saved) -> Grads:
    dx, dweight, *dws = moe_experts_bwd(dy, saved)
    return dx, 0 * dweight, *dws


def sentinel_weighed(dy: Array, saved: Saved) -> Grads:
    """The weight's gradient is <row 0, dy> where there is no row."""
    dx, dweight, *dws = moe_experts_bwd(dy, saved)
    leak = xp_of(dy).sum(dy * saved[0][:1, :], axis=-1, keepdims=True)
    return dx, xp_of(dy).where(saved[3] < 0, leak, dweight), *dws


def weighed_by(saved: Saved, weight: Array) -> Saved:
    """The experts' saved arrays with other weights of the slots"""
    y_sorted, _, source, place, parts, weights, before_down = saved
    flat = rows_at(xp_of(weight).reshape(weight, (-1, 1)), source)
    if before_down:
        parts = [(i, rows, (*part[:5], flat[rows, :])) for i, rows, part in parts]
    return y_sorted, weight, source, place, parts, weights, before_down


def unweighted(which: tuple[int, ...]) -> Callable:
    """Some of the gradients as if every weight were 1"""

    def bwd(dy: Array, saved: Saved) -> Grads:
        ones = xp_of(saved[1]).ones_like(saved[1])
        pairs = zip(moe_experts_bwd(dy, weighed_by(saved, ones)), moe_experts_bwd(dy, saved), strict=True)
        return tuple(other if i in which else true for i, (other, true) in enumerate(pairs))

    return bwd


def last_slot_dx(dy: Array, saved: Saved) -> Grads:
    """dx of the last slot alone: as if the other weights were 0"""
    xp, weight = xp_of(dy), saved[1]
    last = xp.arange(weight.shape[1])[None, :] == weight.shape[1] - 1
    alone = weighed_by(saved, xp.where(last, weight, xp.zeros_like(weight)))
    return moe_experts_bwd(dy, alone)[0], *moe_experts_bwd(dy, saved)[1:]


EXPERTS = ("moe.experts",)
BUGS = [
    Bug(
        "swiglu-gate-up-swapped",
        EXPERTS,
        "w_gate and w_up are swapped.",
        "ml-explore/mlx-lm#767; flashinfer-ai/flashinfer#4130",
        fwd=swapped,
        bwd=swapped_bwd,
    ),
    Bug(
        "weight-before-activation",
        EXPERTS,
        "The expert's input is multiplied by the weight (Llama 4) instead of its output.",
        "pytorch/torchtitan#4095",
        fwd=_slots(before_activation),
        bwd=before_activation_bwd,
    ),
    Bug("combine-weight-missing", EXPERTS, "The outputs are added without their weights.", fwd=_weighed(lambda w: 0 * w + 1)),
    Bug("combine-weight-twice", EXPERTS, "The weights are applied twice.", fwd=_weighed(lambda w: w * w)),
    Bug("combine-place-source-confused", EXPERTS, "The slot of a row is read as the row of a slot.", fwd=_placed(by_source)),
    Bug("combine-first-slot-repeated", EXPERTS, "Every slot of a token takes the output of its first slot.", fwd=_placed(first_slot)),
    Bug("combine-slots-backwards", EXPERTS, "A token's outputs meet its weights in the reverse order.", fwd=_placed(slots_backwards)),
    Bug("expert-last-row-dropped", EXPERTS, "The last row of each expert is left out.", fwd=_slots(last_row_dropped)),
    Bug("expert-unrouted-to-last", EXPERTS, "The index -1 is read from the end: the last expert.", fwd=_slots(unrouted_to_last)),
    Bug("expert-empty-skipped", EXPERTS, "Experts without tokens are left out of the weights' numbering too.", fwd=_slots(empty_skipped)),
    Bug(
        "expert-down-transposed",
        EXPERTS,
        "w_down is read as [f,d]: transposed, where it is square.",
        fwd=transposed,
        bwd=transposed_bwd,
    ),
    Bug("swiglu-clamp-ignored", EXPERTS, "The limit is not applied.", attrs={"limit": None}),
    Bug(
        "silu-slope-partial",
        EXPERTS,
        "The slope of silu is taken for σ: its term g σ(1-σ) is missing.",
        bwd=lambda dy, saved: moe_experts_bwd(dy, with_activations(saved, slope_is_sigmoid)),
    ),
    Bug(
        "swiglu-clamp-grad-uncut",
        EXPERTS,
        "The backward passes through the clamp: nothing is 0 beyond the limit.",
        bwd=lambda dy, saved: moe_experts_bwd(dy, with_activations(saved, not_cut)),
    ),
    Bug(
        "expert-zero-token-grad-garbage",
        EXPERTS,
        "The gradients of an expert without tokens are not written: what stood in the buffer is returned.",
        "meta-pytorch/MSLK#158; tgale96/grouped_gemm#36; huggingface/transformers#48205",
        bwd=empty_not_zeroed,
    ),
    Bug("combine-dweight-missing", EXPERTS, "The weights get no gradient.", bwd=no_dweight),
    Bug(
        "gate-grad-ep-sentinel",
        EXPERTS,
        "A slot that goes nowhere (another rank's) has weight 0 in the sum, and still the gradient of row 0.",
        "huggingface/transformers#48687, #48689, #48205",
        bwd=sentinel_weighed,
    ),
    Bug("combine-grad-weight-missing", EXPERTS, "dx lacks the weights.", bwd=unweighted((0,))),
    Bug(
        "expert-dw-weight-missing",
        EXPERTS,
        "The gradients of the experts' weights lack those of the slots.",
        bwd=unweighted((2, 3, 4)),
    ),
    Bug("permute-grad-overwritten", EXPERTS, "The slots' dx overwrite one another: the last one's is kept.", bwd=last_slot_dx),
]
