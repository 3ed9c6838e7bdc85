"""What keeps experts balanced: losses, dropped slots, the bias. Everything is in the inputs' dtype."""

import heapq
from collections import Counter
from collections.abc import Callable

import numpy as np

from .floats import Array, to_bf16

Two = tuple[Array, Array]

# router.balance_loss


def shares(topk_idx: Array, e: int, level: str, devices: int, topk_devices: int) -> Array:
    """f[b,e], by counting"""
    (b, s, k), size = topk_idx.shape, e // devices if level in ("device", "communication") else 1
    f = np.zeros((b, e))
    for row, tokens in zip(f, topk_idx.tolist(), strict=True):
        if level == "communication":
            sent = Counter(d for token in tokens for d in {i // size for i in token if i >= 0})
            row[:] = [sent[i // size] * devices / (topk_devices * s) for i in range(e)]
            continue
        chosen = Counter(i for token in tokens for i in token if i >= 0)
        each = [chosen[i] * e / (k * s) for i in range(e)]
        row[:] = each if level != "device" else np.repeat(np.add.reduceat(each, range(0, e, size)) / size, size)
    return f


def shares_one_hot(topk_idx: Array, e: int, level: str, devices: int, topk_devices: int) -> Array:
    """The same by a one-hot table"""
    s, k = topk_idx.shape[1:]
    hot = topk_idx[..., None] == np.arange(e)  # [b,s,k,e]
    if level == "communication":
        reached = hot.any(2).reshape(*topk_idx.shape[:2], devices, -1).any(-1).sum(1)
        return np.repeat(reached, e // devices, axis=1) * (devices / (topk_devices * s))
    counts = hot.sum((1, 2))
    if level == "device":
        counts = np.repeat(counts.reshape(len(counts), devices, -1).sum(-1), e // devices, axis=1) / (e // devices)
    return counts * (e / (k * s))


def loss_means(x: Array, f: Array, alpha: float, normalise: bool) -> Array:
    p = (x / x.sum(-1, keepdims=True) if normalise else x).mean(1)
    return alpha * (f * p).sum(-1).mean()


def loss_tokens(x: Array, f: Array, alpha: float, normalise: bool) -> Array:
    """Token after token: Σ f s / Σ s, with no s' of its own"""
    total = x.dtype.type(0)
    for b in range(x.shape[0]):
        for row in x[b]:
            own = (row * f[b]).sum()
            total = total + (own / row.sum() if normalise else own)
    return np.asarray(total * x.dtype.type(alpha / (x.shape[0] * x.shape[1])))


def loss_product(x: Array, f: Array, alpha: float, normalise: bool) -> Array:
    """The sums over tokens as a product with reciprocals"""
    inverse = 1 / (x @ np.ones((x.shape[2], 1), x.dtype)) if normalise else np.ones_like(x[..., :1])
    p = (inverse.swapaxes(1, 2) @ x)[:, 0]  # [b,e]
    return np.asarray(np.vdot(f, p) * x.dtype.type(alpha) / x.dtype.type(x.shape[0] * x.shape[1]))


def loss_eager(x: Array, f: Array, alpha: float, normalise: bool) -> Array:
    r = to_bf16
    p = r(r(x / r(x.sum(-1, keepdims=True)) if normalise else x).mean(1))
    return r(r(np.float32(alpha)) * r(r(r(f * p).sum(-1)).mean()))


def back_plain(x: Array, f: Array, dloss: Array, scale: float, normalise: bool) -> Array:
    g = np.broadcast_to(f[:, None], x.shape)
    if normalise:
        total = x.sum(-1, keepdims=True)
        g = (g - (g * (x / total)).sum(-1, keepdims=True)) / total
    return dloss * x.dtype.type(scale) * g


def back_chain(x: Array, f: Array, dloss: Array, scale: float, normalise: bool) -> Array:
    """Through the quotient: ds'/S - Σ ds' s / S²"""
    ds = np.broadcast_to((f * (dloss * x.dtype.type(scale)))[:, None], x.shape)
    if not normalise:
        return ds.copy()
    total = x.sum(-1, keepdims=True)
    return ds / total - (ds * x).sum(-1, keepdims=True) / (total * total)


def back_tokens(x: Array, f: Array, dloss: Array, scale: float, normalise: bool) -> Array:
    """(f S - Σ f s)/S², token after token"""
    out = np.zeros_like(x)
    for b in range(x.shape[0]):
        for t, row in enumerate(x[b]):
            total = row.sum()
            out[b, t] = (f[b] * total - f[b] @ row) / (total * total) if normalise else f[b]
    return out * (dloss * x.dtype.type(scale))


def back_eager(x: Array, f: Array, dloss: Array, scale: float, normalise: bool) -> Array:
    r = to_bf16
    ds = np.broadcast_to(r(f * r(dloss * r(np.float32(scale))))[:, None], x.shape)
    if not normalise:
        return ds.copy()
    total = r(x.sum(-1, keepdims=True))
    return r(r(ds - r(r(ds * r(x / total)).sum(-1, keepdims=True))) / total)


def _loss(count: Callable, core: Callable, wide: bool = False) -> Callable:
    def forward(
        scores: Array,
        topk_idx: Array,
        *,
        alpha: float = 1e-4,
        level: str = "sequence",
        normalise: bool = True,
        devices: int = 8,
        topk_devices: int = 3,
    ) -> Array:
        x = scores.astype(np.float64) if wide else scores
        f = count(topk_idx, scores.shape[2], level, devices, topk_devices).astype(x.dtype)
        return np.asarray(core(x, f, alpha, normalise), scores.dtype)

    return forward


def _loss_backward(count: Callable, core: Callable, wide: bool = False) -> Callable:
    def backward(
        scores: Array,
        topk_idx: Array,
        dloss: Array,
        *,
        alpha: float = 1e-4,
        level: str = "sequence",
        normalise: bool = True,
        devices: int = 8,
        topk_devices: int = 3,
    ) -> Array:
        x = scores.astype(np.float64) if wide else scores
        f = count(topk_idx, scores.shape[2], level, devices, topk_devices).astype(x.dtype)
        return core(x, f, dloss.astype(x.dtype), alpha / (x.shape[0] * x.shape[1]), normalise).astype(scores.dtype)

    return backward


LOSS = {
    "means": _loss(shares_one_hot, loss_means),
    "tokens": _loss(shares, loss_tokens),
    "product": _loss(shares_one_hot, loss_product),
    "double": _loss(shares, loss_means, wide=True),
}
LOSS_BACK = {
    "plain": _loss_backward(shares_one_hot, back_plain),
    "chain": _loss_backward(shares, back_chain),
    "tokens": _loss_backward(shares, back_tokens),
    "double": _loss_backward(shares_one_hot, back_chain, wide=True),
}
LOSS_EAGER, LOSS_BACK_EAGER = _loss(shares, loss_eager), _loss_backward(shares, back_eager)

# router.drop_tokens and router.bias_update


def kept_sorted(owner: Array, affinity: Array, free: Array, capacity: int) -> Array:
    """One sort by device, then exempt, then affinity"""
    order = np.lexsort((np.arange(len(owner)), -affinity, ~free, owner))
    first = np.searchsorted(owner[order], owner[order])
    keep = np.zeros(len(owner), np.int64)
    keep[order] = np.arange(len(owner)) - first < capacity
    return keep | free


def kept_heaps(owner: Array, affinity: Array, free: Array, capacity: int) -> Array:
    """A heap for each device"""
    keep = free.astype(np.int32)
    for device in set(owner.tolist()):
        mine = [(bool(free[i]), float(affinity[i]), -i) for i in np.flatnonzero(owner == device).tolist()]
        for _, _, i in heapq.nlargest(capacity, mine):
            keep[-i] = 1
    return keep


def kept_counted(owner: Array, affinity: Array, free: Array, capacity: int) -> Array:
    """By how many go before it"""
    keep, slots = np.zeros(len(owner), np.uint8), np.arange(len(owner))
    for i in slots:
        better = (affinity > affinity[i]) | ((affinity == affinity[i]) & (slots < i))
        before = (free & ~free[i]) | ((free == free[i]) & better)
        keep[i] = free[i] or np.sum(before & (owner == owner[i])) < capacity
    return keep


def _drop(kept: Callable, back: bool) -> Callable:
    def keep_of(topk_idx: Array, topk_weight: Array, exempt: Array | None, experts: int, devices: int, factor: float) -> Array:
        n, k = topk_idx.shape
        free = np.zeros(n * k, bool) if exempt is None else np.repeat(exempt != 0, k)
        capacity = int(factor * n * k / devices)
        return kept(topk_idx.ravel() // (experts // devices), topk_weight.ravel(), free, capacity).reshape(n, k)

    def forward(
        topk_idx: Array,
        topk_weight: Array,
        exempt: Array | None = None,
        *,
        n_routed_experts: int = 160,
        devices: int = 8,
        capacity_factor: float = 1.0,
    ) -> Two:
        keep = keep_of(topk_idx, topk_weight, exempt, n_routed_experts, devices, capacity_factor)
        return keep, np.where(keep != 0, topk_weight, topk_weight.dtype.type(0))

    def backward(
        topk_idx: Array,
        topk_weight: Array,
        dweight: Array,
        exempt: Array | None = None,
        *,
        n_routed_experts: int = 160,
        devices: int = 8,
        capacity_factor: float = 1.0,
    ) -> Array:
        return dweight * keep_of(topk_idx, topk_weight, exempt, n_routed_experts, devices, capacity_factor).astype(dweight.dtype)

    return backward if back else forward


KEPT = {"sorted": kept_sorted, "heaps": kept_heaps, "counted": kept_counted}
DROP = {name: _drop(kept, back=False) for name, kept in KEPT.items()}
DROP_BACK = {name: _drop(kept, back=True) for name, kept in KEPT.items()}


def signs_whole(counts: Array) -> Array:
    total = sum(counts.tolist())
    return np.array([(total > len(counts) * c) - (total < len(counts) * c) for c in counts.tolist()])


def signs_wide(counts: Array) -> Array:
    return np.sign(counts.astype(np.float64).mean() - counts)


def signs_remainder(counts: Array) -> Array:
    """By the mean's whole part and remainder"""
    mean, rest = divmod(int(counts.sum()), len(counts))
    return np.where(counts > mean, -1, np.where((counts < mean) | (rest > 0), 1, 0))


def _bias(signs: Callable, wide: bool = False) -> Callable:
    def forward(bias: Array, counts: Array, *, gamma: float = 1e-3, centred: bool = False) -> Array:
        sign = signs(counts).astype(np.float64 if wide else bias.dtype)
        step = sign - sign.mean() if centred else sign
        return (bias + step * step.dtype.type(gamma)).astype(bias.dtype)

    return forward


BIAS = {"whole": _bias(signs_whole), "float64": _bias(signs_wide, wide=True), "remainder": _bias(signs_remainder)}
