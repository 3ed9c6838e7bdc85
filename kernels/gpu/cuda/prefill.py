"""Launchers of attention.cu and attention_backward.cu: attention over whole sequences in bfloat16, as MLA's prefill needs it."""

from typing import Any

import numpy as np

from .latent import most_shared
from .launch import Launch, aligned, fits, need, runner, taken


def _padded(width: int) -> int:
    """Bytes of a row in shared memory"""
    return -(-width // 64) * 128


def _checked(kernel: str, q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
    q, k, v = (taken(kernel, name, x, (np.uint16,), 4) for name, x in (("q", q), ("k", k), ("v", v)))
    (b, s, h, dk), (_, t, g, dv) = q.shape, v.shape
    need(k.shape == (b, t, g, dk) and v.shape[0] == b, kernel, "k", f"of shape {k.shape}", f"{(b, t, g, dk)}, that of q and v")
    need(g >= 1 and h % g == 0, kernel, "k", f"of {g} heads", f"a divisor of the {h} heads of q")
    fits(dk % 8 == 0 and dv % 8 == 0 and dk > 0 and dv > 0, kernel, "q and v", f"of widths {dk} and {dv}", "multiples of 8")
    fits(dk <= 192 and dv <= 192, kernel, "q and v", f"of widths {dk} and {dv}", "at most 192")
    fits(max(b, h) <= 65535, kernel, "q", f"of {b} sequences and {h} heads", "at most 65535 of each")
    need(aligned(q, k, v), kernel, "q, k or v", "not aligned", "addresses that are multiples of 16")
    del s
    return q, k, v


def attention(q: Any, k: Any, v: Any, sink: Any = None, *, scale: float = 0.0, causal: bool = True) -> tuple[Any, Any]:
    """o[b,s,h,v] (bfloat16 bits) and lse[b,h,s] (float32) of q[b,s,h,k], k[b,t,g,k], v[b,t,g,v], bfloat16 bits in uint16

    Causal is aligned with the end of the keys; a query without keys has o = 0 and lse = +inf. Widths are multiples of 8, at most 192.
    """
    q, k, v = _checked("attention", q, k, v)
    (b, s, h, dk), (_, t, g, dv), on = q.shape, v.shape, runner()
    if sink is not None:
        sink = taken("attention", "sink", sink, (np.float32,), 1)
        need(sink.shape == (h,), "attention", "sink", f"of shape {sink.shape}", f"({h},), one number a head")
    o, lse = on.empty((b, s, h, dv), np.uint16), on.empty((b, h, s), np.float32)
    if b * s * h:
        shared = 128 * _padded(dk) + 2 * 64 * (_padded(dk) + _padded(dv))
        fits(shared <= most_shared(), "attention", "q and v", f"of widths {dk} and {dv}", f"{most_shared()} bytes of tiles at most")
        numbers = *(np.int32(x) for x in (s, t, h, g)), np.float32(scale or dk**-0.5), np.int32(causal)
        grid = -(-s // 128), h, b
        on.launch(Launch("attention", "attention", (("DK", dk), ("DV", dv)), grid, 256, (q, k, v, sink, o, lse, *numbers), shared))
    return o, lse


def attention_bwd(
    do: Any, dlse: Any, q: Any, k: Any, v: Any, sink: Any = None, *, scale: float = 0.0, causal: bool = True
) -> tuple[Any, Any, Any]:
    """dq, dk, dv (bfloat16 bits) from do[b,s,h,v] (bits) and dlse[b,h,s] (float32); the forward is computed again

    Every run gives the same bits: nothing is added atomically. NotImplementedError: a sink.
    """
    if sink is not None:
        raise NotImplementedError("attention's backward here has no sink")
    name = "attention backward"
    q, k, v = _checked(name, q, k, v)
    do, dlse = taken(name, "do", do, (np.uint16,), 4), taken(name, "dlse", dlse, (np.float32,), 3)
    (b, s, h, dk), (_, t, g, dv), on = q.shape, v.shape, runner()
    need(do.shape == (b, s, h, dv), name, "do", f"of shape {do.shape}", f"{(b, s, h, dv)}")
    need(dlse.shape == (b, h, s), name, "dlse", f"of shape {dlse.shape}", f"{(b, h, s)}")
    need(aligned(do), name, "do", "not aligned", "an address that is a multiple of 16")
    o, lse = attention(q, k, v, scale=scale, causal=causal)
    d, grads = on.empty((b, h, s), np.float32), tuple(on.zeros(x.shape, np.uint16) for x in (q, k, v))
    if b * s * h == 0 or t == 0:
        return grads
    rows, defines = b * s * h, (("DK", dk), ("DV", dv))
    shared = (64 + 2 * 32) * (_padded(dk) + _padded(dv))
    numbers = *(np.int32(x) for x in (s, t, h, g)), np.float32(scale or dk**-0.5), np.int32(causal)
    args = o, do, lse, dlse, d, np.int32(s), np.int32(h), np.int32(rows)
    on.launch(Launch("attention_backward", "row_dots", defines, (-(-rows // 4),), 128, args))
    dq, dk_, dv_ = grads
    args = q, k, v, do, lse, d, dk_, dv_, *numbers
    on.launch(Launch("attention_backward", "attention_dkv", defines, (-(-t // 64), g, b), 128, args, shared))
    args = q, k, v, do, lse, d, dq, *numbers
    on.launch(Launch("attention_backward", "attention_dq", defines, (-(-s // 64), h, b), 128, args, shared))
    return grads
