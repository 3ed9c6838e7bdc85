"""Bugs of attention: its mask, scale, softmax and sink. See `attention_backward`, and `parts` for merged and packed ones."""

from collections.abc import Callable, Mapping
from typing import Any

from array_api_compat import device

from ...ref.attention import attention, attention_bwd, attention_fwd, heads_first, heads_of, kept_share, rows_of, transposed
from ...ref.cast import round_to
from ...ref.formats import FP16, FP32
from ...ref.xp import Array, stored, xp_of
from . import Bug

LN2 = 0.6931471805599453
Result = tuple[tuple[Array, Array], tuple]
Grads = tuple[Array, ...]
Seen = Callable[[Array, Array, int, int], Array]  # of i[s,1], j[1,t], s, t: bool [s,t]


def bottom_right(i: Array, j: Array, s: int, t: int) -> Array:
    return j <= i + (t - s)


class Parts:
    """Attention in one block, taken apart: rows [b,g,h/g·s,·], scores z, the mask; the variants below each change one step."""

    def __init__(self, q: Array, k: Array, v: Array, sink: Array | None, attrs: Mapping[str, Any], seen: Seen = bottom_right):
        self.own = own = {**attention.defaults, **attrs}
        self.xp = xp = xp_of(q)
        (self.b, self.s, self.h, _), (_, self.t, self.g, _) = q.shape, k.shape
        self.given, self.scale = (q, k, v, sink), own["scale"] or q.shape[3] ** -0.5
        self.q, self.k, self.v = rows_of(q, self.g), heads_first(k), heads_first(v)
        i, j = xp.arange(self.s, device=device(q))[:, None], xp.arange(self.t, device=device(q))[None, :]
        mask = seen(i, j, self.s, self.t) if own["causal"] else (j >= 0) & (i >= 0)
        repeat = self.h // self.g
        self.seen = xp.reshape(xp.broadcast_to(mask[None], (repeat, *mask.shape)), (repeat * self.s, self.t))
        self.raw = xp.matmul(self.q, transposed(self.k))  # [b,g,rows,t]
        self.z = xp.where(self.seen, self.raw * self.scale, xp.zeros_like(self.raw) - float("inf"))

    def top(self) -> Array:
        """The largest score of each row, 0 for a row that sees nothing"""
        m = self.xp.max(self.z, axis=-1, keepdims=True)
        return self.xp.where(self.xp.isinf(m) & (m < 0), self.xp.zeros_like(m), m)

    def result(self, p: Array, total: Array, m: Array, v: Array | None = None) -> Result:
        """o = p v / total and lse = m + log(total), with the sink and the convention for empty rows."""
        xp, sink = self.xp, self.given[3]
        empty = total == 0
        denominator = xp.where(empty, xp.ones_like(total), total)
        logsum = m + xp.log(denominator)
        o = xp.matmul(stored(p), self.v if v is None else v) / denominator
        if sink is not None:
            o = o * kept_share(sink, logsum, self.s)
        nothing = xp.full_like(logsum, float(self.own["empty_lse"]))
        lse = xp.reshape(xp.where(empty, nothing, logsum), (self.b, self.h, self.s))
        o = heads_of(o, self.h)
        return (o, lse), (*self.given, o, lse, self.scale, self.own["causal"], self.own["block"])

    def softmax(self) -> Result:
        m = self.top()
        p = self.xp.exp(self.z - m)
        return self.result(p, self.xp.sum(p, axis=-1, keepdims=True), m)


def masked(seen: Seen) -> tuple[Callable, Callable]:
    """Attention with another causal mask, and the gradient of that."""

    def fwd(q: Array, k: Array, v: Array, sink: Array | None, **attrs: Any) -> Result:
        parts = Parts(q, k, v, sink, attrs, seen)
        result, saved = parts.softmax()
        return result, (saved, parts.seen)

    def bwd(do: Array, dlse: Array, saved: tuple) -> Grads:
        (q, k, v, sink, o, lse, scale, *_), mask = saved
        if sink is not None:
            raise ValueError("a mask and a sink: no variant")
        xp, g, (b, s, h, _) = xp_of(q), k.shape[2], q.shape
        doh, kh, vh = rows_of(do, g), heads_first(k), heads_first(v)
        lse, dlse = (xp.reshape(a, (b, g, h // g * s, 1)) for a in (lse, dlse))
        mask = mask & ~xp.isinf(lse)
        z = xp.matmul(rows_of(q, g), transposed(kh)) * scale
        p = xp.where(mask, xp.exp(xp.where(mask, z - lse, xp.zeros_like(z))), xp.zeros_like(z))
        dz = p * (xp.matmul(doh, transposed(vh)) - xp.sum(doh * rows_of(o, g), axis=-1, keepdims=True) + dlse) * scale
        p, dz = stored(p), stored(dz)
        dq, dk, dv = xp.matmul(dz, kh), xp.matmul(transposed(dz), rows_of(q, g)), xp.matmul(transposed(p), doh)
        return heads_of(dq, h), heads_first(dk), heads_first(dv)

    return fwd, bwd


def step(change: Callable[[Parts], Result]) -> Callable:
    def fwd(q: Array, k: Array, v: Array, sink: Array | None, **attrs: Any) -> Result:
        return change(Parts(q, k, v, sink, attrs))

    return fwd


def padded_keys(parts: Parts) -> Result:
    """Zero keys fill the last block up; where no causal mask hides them each adds exp(0) to the denominator."""
    xp, m = parts.xp, parts.top()
    p = xp.exp(parts.z - m)
    extra = 0 if parts.own["causal"] else -parts.t % parts.own["block"]
    return parts.result(p, xp.sum(p, axis=-1, keepdims=True) + extra * xp.exp(-m), m)


def not_rescaled(parts: Parts) -> Result:
    """Later blocks with a larger maximum: the sums of earlier ones shrink, what they added to o does not."""
    xp, size = parts.xp, parts.own["block"]
    tops = [xp.max(parts.z[..., : min(a + size, parts.t)], axis=-1, keepdims=True) for a in range(0, parts.t, size)]
    own = xp.concat([xp.broadcast_to(m, (*m.shape[:-1], min(size, parts.t - i * size))) for i, m in enumerate(tops)], axis=-1)
    hidden = xp.isinf(own) & (own < 0)
    p = xp.where(hidden, xp.zeros_like(parts.z), xp.exp(parts.z - xp.where(hidden, xp.zeros_like(own), own)))
    m = parts.top()
    return parts.result(p, xp.sum(xp.exp(parts.z - m), axis=-1, keepdims=True), m)


def last_block_dropped(q: Array, k: Array, v: Array, sink: Array | None, **attrs: Any) -> Result:
    block = {**attention.defaults, **attrs}["block"]
    whole = k.shape[1] // block * block or k.shape[1]
    return masked(lambda i, j, s, t: bottom_right(i, j, s, t) & (j < whole))[0](q, k, v, sink, **attrs)


def no_maximum(parts: Parts) -> Result:
    """exp(z) as it is: beyond 88.7 float32 is infinite."""
    p = round_to(FP32, parts.xp.exp(parts.z), overflow="nan")
    m = parts.xp.zeros_like(parts.z[..., :1])
    return parts.result(p, parts.xp.sum(p, axis=-1, keepdims=True), m)


def fp16_scores(parts: Parts) -> Result:
    xp = parts.xp
    low = xp.zeros_like(parts.raw) - float("inf")
    parts.z = xp.where(parts.seen, round_to(FP16, parts.raw, overflow="nan") * parts.scale, low)
    return parts.softmax()


def with_empty_rows(o_of: Callable[[Parts], Array], lse_of: float) -> Callable:
    """Other outputs for the rows that see no key: o_of(parts) [b,g,1,v]."""

    def change(parts: Parts) -> Result:
        xp = parts.xp
        (o, lse), saved = parts.softmax()
        empty = xp.broadcast_to(~xp.any(parts.seen, axis=-1)[None, None, :, None], (*parts.z.shape[:3], 1))
        rows = xp.where(empty, o_of(parts) + xp.zeros_like(rows_of(o, parts.g)), rows_of(o, parts.g))
        flags = xp.reshape(empty, lse.shape)
        return (heads_of(rows, parts.h), xp.where(flags, xp.full_like(lse, lse_of), lse)), saved

    return step(change)


def after(change: Callable[[Any, Array, Array, Array | None], tuple[Array, Array]], fwd: Callable = attention_fwd) -> Callable:
    """The reference's o and lse, changed: change(xp, o, lse, sink)."""

    def changed(q: Array, k: Array, v: Array, sink: Array | None, **attrs: Any) -> Result:
        (o, lse), saved = fwd(q, k, v, sink, **attrs)
        return change(xp_of(q), o, lse, sink), saved

    return changed


def lse_with_sink(xp: Any, o: Array, lse: Array, sink: Array | None) -> tuple[Array, Array]:
    return (o, lse if sink is None else lse + xp.log(1 + xp.exp(sink[None, :, None] - lse)))


def with_sink(sink_of: Callable[[Array, Mapping[str, Any], int], Array | None]) -> Callable:
    def fwd(q: Array, k: Array, v: Array, sink: Array | None, **attrs: Any) -> Result:
        return attention_fwd(q, k, v, None if sink is None else sink_of(sink, attrs, q.shape[3]), **attrs)

    return fwd


def heads_in_turn(q: Array, k: Array, v: Array, sink: Array | None, **attrs: Any) -> Result:
    """Query head i takes key head i mod g: heads are regrouped before, and put back after."""
    xp, h, g = xp_of(q), q.shape[2], k.shape[2]

    def swap(x: Array, axis: int, first: int) -> Array:
        shape = (*x.shape[:axis], first, h // first, *x.shape[axis + 1 :])
        order = [*range(axis), axis + 1, axis, *range(axis + 2, len(shape))]
        return xp.reshape(xp.permute_dims(xp.reshape(x, shape), order), x.shape)

    sink = None if sink is None else swap(sink, 0, h // g)
    (o, lse), saved = attention_fwd(swap(q, 2, h // g), k, v, sink, **attrs)
    return (swap(o, 2, g), swap(lse, 1, g)), saved


def mean_of_v(parts: Parts) -> Array:
    return parts.xp.mean(parts.v, axis=2, keepdims=True)


top_left_fwd, top_left_bwd = masked(lambda i, j, s, t: j <= i)
strict_fwd, strict_bwd = masked(lambda i, j, s, t: j < i + (t - s))
ahead_fwd, ahead_bwd = masked(lambda i, j, s, t: j <= i + (t - s) + 1)
ATTENTION = ("attention",)
CACHED = ("attention", "attention.varlen", "mla.decode", "mla.decode_fp8")
FLASH = "Dao-AILab/flash-attention"
BUGS = [
    Bug(
        "mask-top-left",
        ATTENTION,
        "The mask is aligned top-left: query i sees keys 0..i instead of 0..i+t-s.",
        f"{FLASH}#282, #517; ml-explore/mlx#2835, #2836, #2967; NVIDIA/cutlass#2336",
        fwd=top_left_fwd,
        bwd=top_left_bwd,
    ),
    Bug(
        "mask-verify-sees-future",
        CACHED,
        "Every query sees all keys: speculated tokens see those after them.",
        "vllm-project/vllm#50476, #52218, #51848, #51065",
        attrs={"causal": False},
    ),
    Bug(
        "mask-empty-row-zero-output",
        ATTENTION,
        "A query that sees no key has lse = -inf; FlashMLA's convention is +inf.",
        f"{FLASH}#1778; flashinfer-ai/flashinfer#4452",
        attrs={"empty_lse": "-inf"},
        benign=True,
        directions=("forward",),
    ),
    Bug("mask-diagonal-hidden", ATTENTION, "A query does not see its own position: j < i+t-s.", fwd=strict_fwd, bwd=strict_bwd),
    Bug("mask-one-ahead", ATTENTION, "A query sees the position after its own: j <= i+t-s+1.", fwd=ahead_fwd, bwd=ahead_bwd),
    Bug(
        "mask-empty-row-mean",
        ATTENTION,
        "A query that sees no key gets the mean of v: masked scores are a finite number, which the softmax cancels.",
        f"{FLASH}#1778",
        fwd=with_empty_rows(mean_of_v, -FP32.max),
    ),
    Bug(
        "mask-empty-row-nan",
        ATTENTION,
        "A query that sees no key gets NaN: exp(-inf - -inf).",
        f"{FLASH}#1778",
        fwd=with_empty_rows(lambda parts: mean_of_v(parts) * float("nan"), float("nan")),
    ),
    Bug("attention-scale-missing", ATTENTION, "The scores are not scaled.", attrs={"scale": 1.0}),
    Bug(
        "attention-scale-of-values",
        ATTENTION,
        "The scores are scaled by the width of v, v^(-1/2), instead of that of q and k.",
        fwd=lambda q, k, v, sink, **attrs: attention_fwd(q, k, v, sink, **{**attrs, "scale": v.shape[3] ** -0.5}),
        bwd=attention_bwd,
    ),
    Bug(
        "attn-fp16-overflow",
        ATTENTION,
        "Products of q and k are held in float16 before they are scaled: beyond 65504 they are infinite.",
        "ggml-org/llama.cpp#11446; vllm-project/vllm#13232",
        fwd=step(fp16_scores),
    ),
    Bug("attention-maximum-missing", ATTENTION, "exp(z) is taken without the maximum: it overflows beyond 88.", fwd=step(no_maximum)),
    Bug("attention-rescale-missing", ATTENTION, "When a later block raises the maximum, o is not scaled down.", fwd=step(not_rescaled)),
    Bug("attention-last-block-dropped", ATTENTION, "The last, ragged block of keys is left out.", fwd=last_block_dropped),
    Bug(
        "attention-padding-in-denominator",
        ATTENTION,
        "The zero keys that fill the last block up take part: each adds exp(0) to the denominator.",
        fwd=step(padded_keys),
    ),
    Bug("attention-groups-interleaved", ATTENTION, "Query head i takes key head i mod g instead of i // (h/g).", fwd=heads_in_turn),
    Bug(
        "lse-base2-vs-e",
        ATTENTION,
        "lse is log2 of the sum of 2^z', not the natural logarithm: too large by 1/ln 2.",
        "sgl-project/sglang#40903, #35045; vllm-project/vllm#52796, #47079, #43919, #28840; flashinfer-ai/flashinfer#2113, #4485, #4547",
        fwd=after(lambda xp, o, lse, sink: (o, lse / LN2)),
    ),
    Bug(
        "sink-in-lse", ATTENTION, "The sink's logit is counted in lse; it belongs to the denominator of o alone.", fwd=after(lse_with_sink)
    ),
    Bug("sink-ignored", ATTENTION, "The sink is not used.", fwd=with_sink(lambda sink, attrs, width: None)),
    Bug(
        "sink-scaled",
        ATTENTION,
        "The sink's logit is multiplied by the softmax scale, as the scores are.",
        fwd=with_sink(lambda sink, attrs, width: sink * (attrs.get("scale") or width**-0.5)),
    ),
]
