"""Where every operation rounds to bfloat16: other operations than the eager variants beside their ops have. Frameworks differ in what is
one operation (a reciprocal root, silu, a softmax: computed in float32 and rounded once), in the order, and in what they keep in float32."""

from collections.abc import Callable

import numpy as np

from . import mla_decode, moe, rope, router, swiglu
from .attention import _attention, _packed, divided, whole
from .floats import Array, to_bf16
from .linear import product, product_steps
from .mla import as_hugging_face
from .router_softmax import _router, best_of_group, softmax

Two = tuple[Array, Array]
r = to_bf16


def rmsnorm_divided(x: Array, weight: Array, *, eps: float = 1e-6) -> Array:
    """Divided by the root."""
    root = r(np.sqrt(r(r(np.mean(r(x * x), axis=-1, keepdims=True)) + np.float32(eps))))
    return r(r(x / root) * weight)


def rmsnorm_back_joined(x: Array, weight: Array, dy: Array, *, eps: float = 1e-6) -> Two:
    """dx = rstd g - xhat (rstd/d Σ g xhat);   1/√ is one operation"""
    d = np.float32(x.shape[-1])
    rstd = r(1 / np.sqrt(r(r(np.mean(r(x * x), axis=-1, keepdims=True)) + np.float32(eps))))
    xhat, g = r(x * rstd), r(dy * weight)
    share = r(r(r(g * xhat).sum(-1, keepdims=True)) * r(rstd / d))
    return r(r(rstd * g) - r(xhat * share)), r(np.sum(r(dy * xhat), axis=0))


def swiglu_silu(gate: Array, up: Array, *, limit: float | None = None) -> Array:
    """silu is one operation."""
    g, u = swiglu.clamped(gate, up, limit)
    return r(r(swiglu.times_sigmoid(g)) * u)


def swiglu_back_silu(gate: Array, up: Array, dy: Array, *, limit: float | None = None) -> Two:
    """silu and its gradient are an operation each."""
    g, u = swiglu.clamped(gate, up, limit)
    dgate = r(r(dy * u) * swiglu.slope_product(g))
    return swiglu.cut(gate, up, dgate, r(dy * r(swiglu.times_sigmoid(g))), limit)


def softmax_whole(x: Array) -> Array:
    return r(softmax(x))


def weigh_reciprocal(chosen: Array, norm_topk: bool, factor: float, eps: float) -> Array:
    if norm_topk:
        chosen = r(chosen * r(1 / r(r(chosen.sum(-1, keepdims=True)) + np.float32(eps))))
    return r(chosen * r(np.float32(factor)))


def in_slots_backwards(y: Array, weight: Array) -> Array:
    """The last slot first, every product and every sum rounded."""
    total = np.zeros_like(y[:, 0])
    for j in reversed(range(y.shape[1])):
        total = r(total + r(weight[:, j, None] * y[:, j]))
    return total


def in_one_sum(y: Array, weight: Array) -> Array:
    """Rounded products, one sum."""
    return r(r(y * weight[:, :, None]).sum(1))


def merge_softmax(o_parts: Array, lse_parts: Array) -> Two:
    """The weights are a softmax, and lse a logsumexp: an operation each."""
    lse = mla_decode.no_part(lse_parts)
    m = lse.max(0)
    m = np.where(np.isinf(m), np.float32(0), m)
    e = np.exp(lse - m)
    total = e.sum(0)
    w = mla_decode.heads_last(r(divided(e, total[None])))
    o = r(r(np.where(w > 0, o_parts, np.float32(0)) * w).sum(0))
    return o, np.where(total > 0, r(m + np.log(np.where(total > 0, total, np.float32(1)))), np.float32(np.inf))


def rope_upcast() -> tuple[Callable, Callable]:
    """In float32, rounded at the end, as DeepSeek's model code has it."""
    forward, backward = rope._rope(rope.tables(rope.freqs_native), rope.turn_complex, "upcast")
    return (lambda *a, **k: r(forward(*a, **k))), (lambda *a, **k: r(backward(*a, **k)))


def rope_halves() -> tuple[Callable, Callable]:
    """x·[cos cos] + rotate_half(x)·[sin sin], each product and the sum rounded"""

    def turn(x: Array, cos: Array, sin: Array, layout_in: str, layout_out: str, sign: int) -> Array:
        halves = np.concatenate(rope.pairs(x, layout_in), axis=-1)
        half = halves.shape[-1] // 2
        rotated = np.concatenate([-halves[..., half:], halves[..., :half]], axis=-1)
        c, s = (np.concatenate([v, v], axis=-1)[:, None, :] for v in (cos, sin))
        y = r(r(halves * c) + r(rotated * (s * sign)))
        return y if layout_out == "half" else rope.joined(y[..., :half], y[..., half:], layout_out)

    return rope._rope(rope.tables(rope.freqs_two_tables), turn, "halves")


SOFTMAX_CORE = (product, as_hugging_face, False)  # scores rounded before and after the scale, the softmax one operation
STEPS_CORE = (product_steps, lambda z, v, seen, scale, sink, to: whole(to(z), v, seen, scale, sink, to), False)
HOW = moe.How("sorted", product_steps, swiglu.times_sigmoid, in_one_sum, every=True)

# op, direction, name, function, outputs that it leaves to be rounded, whether it takes `to`
Entry = tuple[str, str, str, Callable, tuple[int, ...], bool]


def entries() -> list[Entry]:
    upcast, halves = rope_upcast(), rope_halves()
    attentions: list[Entry] = []
    for name, parts in (("softmax", SOFTMAX_CORE), ("steps", STEPS_CORE)):
        attentions += [
            ("attention", "forward", f"eager-{name}", _attention("eager", parts), (0, 1), True),
            ("attention.varlen", "forward", f"eager-{name}", _packed("eager", parts), (0, 1), True),
            ("mla.decode", "forward", f"eager-{name}", mla_decode._decode("eager", parts), (0, 1), True),
            ("mla.decode_fp8", "forward", f"eager-{name}", mla_decode._decode_fp8("eager", parts), (0, 1), True),
        ]
    plain: list[tuple[str, str, str, Callable]] = [
        ("rmsnorm", "forward", "divided", rmsnorm_divided),
        ("rmsnorm", "backward", "joined", rmsnorm_back_joined),
        ("swiglu", "forward", "silu", swiglu_silu),
        ("swiglu", "backward", "silu", swiglu_back_silu),
        ("router.softmax", "forward", "softmax", _router(softmax_whole, router.by_heap, best_of_group, weigh_reciprocal)),
        ("attention.merge", "forward", "softmax", merge_softmax),
        ("moe.unpermute", "forward", "last-slot-first", moe._unpermute(moe.rows_by_sorting, in_slots_backwards)),
        ("moe.unpermute", "forward", "one-sum", moe._unpermute(moe.rows_by_cursors, in_one_sum)),
        ("rope", "forward", "upcast", upcast[0]),
        ("rope", "backward", "upcast", upcast[1]),
        ("rope", "forward", "halves", halves[0]),
        ("rope", "backward", "halves", halves[1]),
    ]
    experts: Entry = ("moe.experts", "forward", "eager-one-sum", moe._experts(HOW), (0,), True)
    return [*((op, way, f"eager-{name}", fn, (), False) for op, way, name, fn in plain), *attentions, experts]
