"""The router's forward: scores, selections and weights as real kernels compute them. Everything is in the logits' dtype."""

import heapq
from collections.abc import Callable

import numpy as np

from .floats import Array, to_bf16

Two = tuple[Array, Array]

# exp and sigmoid


def exp2_polynomial(y: Array) -> Array:
    """2^y within 2 units in the last place of float32: the integer part into the exponent, a polynomial for the rest."""
    whole = np.rint(y)
    f = (y - whole).astype(np.float32)
    p = np.float32(1.5353362e-4)
    for c in (1.3398874e-3, 9.6184373e-3, 5.5503324e-2, 2.4022648e-1, 6.9314720e-1, 1.0):
        p = p * f + np.float32(c)
    return np.ldexp(p, whole.astype(np.int32))


def exp_split(x: Array) -> Array:
    """exp(x) = 2^k exp(r), with ln 2 in two parts (Cody and Waite), so that the error does not grow with |x|"""
    k = np.rint(x * np.float32(1.442695))
    r = (x - k * np.float32(0.693359375)) - k * np.float32(-2.12194440e-4)
    return np.ldexp(exp2_polynomial(r * np.float32(1.442695)), k.astype(np.int32))


def exp_fast(x: Array) -> Array:
    """exp(x) = 2^(x·log2 e), the product rounded once, as CUDA's __expf and Triton's tl.exp are: the error is |x| times half a unit"""
    return exp2_polynomial(x * np.float32(1.442695))


def sigmoid(x: Array, exp: Callable[[Array], Array] = np.exp) -> Array:
    return 1 / (1 + exp(-x))


def sigmoid_tanh(x: Array) -> Array:
    """(1 + tanh(x/2))/2, which is of no use where it is small; there exp(x)/(1 + exp(x))"""
    half = x.dtype.type(0.5)
    e = np.exp(np.minimum(x, 0))
    return np.where(x > -1, half * np.tanh(half * x) + half, e / (1 + e))


def sigmoid_wide(x: Array) -> Array:
    return (1 / (1 + np.exp(-x.astype(np.float64)))).astype(x.dtype)


def softmax(x: Array, exp: Callable[[Array], Array] = np.exp) -> Array:
    e = exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def softmax_online(x: Array) -> Array:
    """Maximum and sum in one pass over blocks of 16."""
    top, total = np.full(len(x), -np.inf, x.dtype), np.zeros(len(x), x.dtype)
    for start in range(0, x.shape[1], 16):
        part = x[:, start : start + 16]
        new = np.maximum(top, part.max(-1))
        total = total * np.exp(top - new) + np.exp(part - new[:, None]).sum(-1)
        top = new
    return np.exp(x - top[:, None]) * (1 / total)[:, None]


def softplus(x: Array) -> Array:
    """x itself where float32 (float64) cannot tell it from softplus; torch's threshold of 20 is too low for float64"""
    threshold = 20 if x.dtype == np.float32 else 40
    return np.where(x > threshold, x, np.log1p(np.exp(np.minimum(x, threshold))))


def scores_plain(x: Array, scoring: str) -> Array:
    if scoring == "softmax":
        return softmax(x)
    return sigmoid(x) if scoring == "sigmoid" else np.sqrt(softplus(x))


def scores_tanh(x: Array, scoring: str) -> Array:
    if scoring == "softmax":
        return softmax_online(x)
    return sigmoid_tanh(x) if scoring == "sigmoid" else np.sqrt(np.logaddexp(x.dtype.type(0), x))


def scores_split(x: Array, scoring: str) -> Array:
    if scoring == "softmax":
        return softmax(x, exp_split)
    if scoring == "sigmoid":
        return sigmoid(x, exp_split)
    return np.sqrt(np.maximum(x, 0) + np.log1p(exp_split(-np.abs(x))))


def scores_fast(x: Array, scoring: str) -> Array:
    if scoring == "softmax":
        return softmax(x, exp_fast)
    if scoring == "sigmoid":
        return sigmoid(x, exp_fast)
    return np.sqrt(np.maximum(x, 0) + np.log1p(exp_fast(-np.abs(x))))


def scores_wide(x: Array, scoring: str) -> Array:
    """In float64, rounded at the end."""
    wide = x.astype(np.float64)
    if scoring == "sigmoid":
        return sigmoid_wide(x)
    return (softmax(wide) if scoring == "softmax" else np.sqrt(np.log1p(np.exp(wide)))).astype(x.dtype)


# the k largest of each row, the lowest index first among equals


def by_sorting(t: Array, k: int) -> Array:
    return np.argsort(-t, axis=-1, kind="stable")[:, :k]


def by_heap(t: Array, k: int) -> Array:
    return np.array([heapq.nlargest(k, range(len(row)), key=lambda i: (row[i], -i)) for row in t.tolist()], dtype=np.int64)


def by_insertion(t: Array, k: int) -> Array:
    """A list of k, kept in order, as one thread would."""
    rows = []
    for row in t.tolist():
        best: list[tuple[float, int]] = []
        for i, v in enumerate(row):
            if len(best) < k or v > best[-1][0]:
                place = len(best)
                while place and best[place - 1][0] < v:
                    place -= 1
                best.insert(place, (v, i))
                del best[k:]
        rows.append([i for _, i in best])
    return np.array(rows, dtype=np.int64)


def by_partition(t: Array, k: int) -> Array:
    """The k-th value by partition; all above it, then the first of those equal to it."""
    level = np.partition(t, t.shape[1] - k, axis=-1)[:, t.shape[1] - k]
    rows = []
    for row, limit in zip(t, level, strict=True):
        above, equal = np.flatnonzero(row > limit), np.flatnonzero(row == limit)
        chosen = np.concatenate([above, equal[: k - len(above)]])
        rows.append(chosen[np.lexsort((chosen, -row[chosen]))])
    return np.array(rows, dtype=np.int64)


def by_argmax(t: Array, k: int) -> Array:
    """The largest, k times; what was taken is removed (a NaN, since what is masked is -inf already)."""
    t, out = t.copy(), np.empty((len(t), k), np.int64)
    for slot in range(k):
        out[:, slot] = np.where(np.isnan(t), -np.inf, t).argmax(-1)
        fresh = [int(np.flatnonzero(~np.isnan(row))[0]) if np.isnan(row[i]) else int(i) for row, i in zip(t, out[:, slot], strict=True)]
        out[:, slot] = fresh
        t[np.arange(len(t)), fresh] = np.nan
    return out


def by_keys(t: Array, k: int) -> Array:
    """One integer key for value and index, as a radix sort has it: the float32's bits made monotonic, the index complemented."""
    u = (t.astype(np.float32) + np.float32(0)).view(np.uint32)  # -0 becomes 0
    u = np.where(u >> np.uint32(31), ~u, u | np.uint32(0x80000000)).astype(np.uint64)
    key = (u << np.uint64(32)) | (np.uint64(0xFFFFFFFF) - np.arange(t.shape[1], dtype=np.uint64))
    return (np.uint64(0xFFFFFFFF) - (np.sort(key, axis=-1)[:, ::-1][:, :k] & np.uint64(0xFFFFFFFF))).astype(np.int64)


# the sum of a group's two largest: [n,g]


def two_sorted(t: Array, groups: int) -> Array:
    return np.sort(t.reshape(len(t), groups, -1), axis=-1)[..., -2:].sum(-1)


def two_partitioned(t: Array, groups: int) -> Array:
    part = np.partition(t.reshape(len(t), groups, -1), -2, axis=-1)
    return part[..., -2] + part[..., -1]


def two_running(t: Array, groups: int) -> Array:
    """First and second in one pass."""
    t = t.reshape(len(t), groups, -1)
    first, second = t[..., 0].copy(), np.full(t.shape[:-1], -np.inf, t.dtype)
    for i in range(1, t.shape[-1]):
        second = np.maximum(second, np.minimum(first, t[..., i]))
        first = np.maximum(first, t[..., i])
    return first + second


def select(s: Array, bias: Array, largest: Callable, two: Callable, k: int, n_group: int, topk_group: int, mask_fill: str) -> Array:
    t = s + bias
    if n_group > 1:
        kept = largest(two(t, n_group), topk_group)
        mask = np.zeros((len(t), n_group), bool)
        np.put_along_axis(mask, kept, True, axis=1)
        t = np.where(np.repeat(mask, t.shape[1] // n_group, axis=1), t, t.dtype.type(-np.inf if mask_fill == "-inf" else 0))
    return largest(t, k)


def guarded(total: Array, eps: float, place: str) -> Array:
    """The denominator, eps added or its least value"""
    return np.maximum(total, total.dtype.type(eps)) if place == "clamp" else total + total.dtype.type(eps)


def gated(scores: Callable, logits: Array, scoring: str, gate_dtype: str) -> Array:
    """With logits and scores rounded where the gate computes in bfloat16"""
    return to_bf16(scores(to_bf16(logits), scoring)).astype(logits.dtype) if gate_dtype == "bfloat16" else scores(logits, scoring)


def divided(chosen: Array, norm: bool, factor: float, eps: float, place: str = "add") -> Array:
    return chosen / guarded(chosen.sum(-1, keepdims=True), eps, place) * chosen.dtype.type(factor) if norm else chosen * factor


def reciprocal(chosen: Array, norm: bool, factor: float, eps: float, place: str = "add") -> Array:
    """One reciprocal a row, the factor joined to it."""
    if not norm:
        return factor * chosen
    total = np.zeros_like(chosen[:, 0])
    for slot in range(chosen.shape[1]):
        total = total + chosen[:, slot]
    return chosen * (chosen.dtype.type(factor) * (1 / guarded(total, eps, place)))[:, None]


def router(scores: Callable, largest: Callable, two: Callable, weigh: Callable, name: str, arrange: Callable | None = None) -> Callable:
    """A router of these parts."""

    def forward(
        logits: Array,
        bias: Array,
        *,
        k: int = 8,
        n_group: int = 8,
        topk_group: int = 4,
        norm_topk_prob: bool = True,
        routed_scaling_factor: float = 2.5,
        scoring: str = "sigmoid",
        denominator_eps: float = 1e-20,
        denominator_place: str = "add",
        mask_fill: str = "-inf",
        gate_dtype: str = "float32",
    ) -> Two:
        with np.errstate(over="ignore"):
            s = gated(scores, logits, scoring, gate_dtype)
        idx = select(s, bias.astype(s.dtype), largest, two, k, n_group, topk_group, mask_fill)
        idx = idx if arrange is None else arrange(idx)
        return idx, weigh(np.take_along_axis(s, idx, 1), norm_topk_prob, routed_scaling_factor, denominator_eps, denominator_place)

    forward.__name__ = name
    return forward


def index_order(idx: Array) -> Array:
    return np.sort(idx, axis=-1)


def odd_slots_first(idx: Array) -> Array:
    return np.concatenate([idx[:, 1::2], idx[:, ::2]], axis=1).astype(np.int32)


FORWARD = (
    router(scores_plain, by_sorting, two_sorted, divided, "sorting"),
    router(scores_tanh, by_heap, two_partitioned, reciprocal, "heap-tanh"),
    router(scores_split, by_partition, two_running, reciprocal, "partition-split-exp"),
    router(scores_plain, by_argmax, two_partitioned, divided, "argmax-index-order", index_order),
    router(scores_wide, by_insertion, two_running, divided, "insertion-float64"),
    router(scores_tanh, by_keys, two_sorted, reciprocal, "keys-odd-slots-first", odd_slots_first),
)
FAST = router(scores_fast, by_sorting, two_sorted, reciprocal, "fast-exp")
WIDE = {"sorting", "argmax-index-order", "insertion-float64"}  # right in float64 too


def forward_eager(
    logits: Array,
    bias: Array,
    *,
    k: int = 8,
    n_group: int = 8,
    topk_group: int = 4,
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 2.5,
    scoring: str = "sigmoid",
    denominator_eps: float = 1e-20,
    denominator_place: str = "add",
    mask_fill: str = "-inf",
    gate_dtype: str = "float32",
) -> Two:
    """Every operation rounds to bfloat16; sums accumulate in float32."""
    r = to_bf16
    if scoring == "sigmoid":
        e = r(np.exp(-np.abs(logits)))
        s = r(np.where(logits >= 0, np.float32(1), e) / r(1 + e))
    elif scoring == "softmax":
        e = r(np.exp(r(logits - logits.max(-1, keepdims=True))))
        s = r(e / r(e.sum(-1, keepdims=True)))
    else:
        s = r(np.sqrt(r(r(np.log1p(r(np.exp(-np.abs(logits))))) + np.maximum(logits, 0))))
    t = r(s + bias)
    if n_group > 1:
        kept = by_sorting(r(two_sorted(t, n_group)), topk_group)
        mask = np.zeros((len(t), n_group), bool)
        np.put_along_axis(mask, kept, True, axis=1)
        t = np.where(np.repeat(mask, t.shape[1] // n_group, axis=1), t, np.float32(-np.inf if mask_fill == "-inf" else 0))
    idx = by_sorting(t, k)
    chosen = np.take_along_axis(s, idx, 1)
    if norm_topk_prob:
        chosen = r(chosen / r(guarded(r(chosen.sum(-1, keepdims=True)), denominator_eps, denominator_place)))
    return idx, r(chosen * r(np.float32(routed_scaling_factor)))
