"""The ops as they are written in torch, forward and by its automatic differentiation; none where torch is not installed.

`at` is the dtype that torch computes in: the arrays' own, or bfloat16, where each of torch's operations rounds once.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from . import rope
from .attention import causal_mask
from .floats import Array

try:
    import torch
except ImportError:  # an optional framework
    torch: Any = None

Two = tuple[Array, Array]


def tensor(x: Array, at: str = "") -> Any:
    return torch.tensor(x, dtype=getattr(torch, at) if at else None)  # a copy: torch takes no read-only arrays


def array(x: Any, like: Array) -> Array:
    return x.detach().to(torch.float64).numpy().astype(like.dtype)


def gradients(fn: Callable, arrays: tuple[Array, ...], dy: Array, at: str) -> tuple[Array, ...]:
    inputs = [tensor(x, at).requires_grad_() for x in arrays]
    found = torch.autograd.grad(fn(*inputs), inputs, tensor(dy, at))
    return tuple(array(g, x) for g, x in zip(found, arrays, strict=True))


def linear(x: Any, weight: Any) -> Any:
    return torch.nn.functional.linear(x, weight)


def rmsnorm(x: Any, weight: Any, eps: float) -> Any:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def swiglu(gate: Any, up: Any, limit: float | None) -> Any:
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    return torch.nn.functional.silu(gate) * up


def linear_both(at: str) -> tuple[Callable, Callable]:
    def forward(x: Array, weight: Array) -> Array:
        return array(linear(tensor(x, at), tensor(weight, at)), x)

    def backward(x: Array, weight: Array, dy: Array) -> tuple[Array, ...]:
        return gradients(linear, (x, weight), dy, at)

    return forward, backward


def rmsnorm_both(at: str) -> tuple[Callable, Callable]:
    def forward(x: Array, weight: Array, *, eps: float = 1e-6) -> Array:
        return array(rmsnorm(tensor(x, at), tensor(weight, at), eps), x)

    def backward(x: Array, weight: Array, dy: Array, *, eps: float = 1e-6) -> tuple[Array, ...]:
        return gradients(lambda a, b: rmsnorm(a, b, eps), (x, weight), dy, at)

    return forward, backward


def swiglu_both(at: str) -> tuple[Callable, Callable]:
    def forward(gate: Array, up: Array, *, limit: float | None = None) -> Array:
        return array(swiglu(tensor(gate, at), tensor(up, at), limit), gate)

    def backward(gate: Array, up: Array, dy: Array, *, limit: float | None = None) -> tuple[Array, ...]:
        return gradients(lambda a, b: swiglu(a, b, limit), (gate, up), dy, at)

    return forward, backward


def rope_both(at: str) -> tuple[Callable, Callable]:
    """A product of complex numbers, in single precision where activations have 16 bits, as DeepSeek's model code has it."""

    def turn(x: Array, cos: Array, sin: Array, layout_in: str, layout_out: str, sign: int) -> Array:
        z = torch.complex(*(tensor(np.ascontiguousarray(part)) for part in rope.pairs(x, layout_in)))
        y = z * torch.complex(tensor(cos), tensor(sign * sin))[:, None, :]
        real, imaginary = (array(part.to(getattr(torch, at)) if at else part, x) for part in (y.real, y.imag))
        return rope.joined(real, imaginary, layout_out)

    return rope._rope(rope.tables(rope.freqs_native), turn, "torch")


def attention(at: str) -> Callable:
    """Products, a masked softmax and logsumexp, each an operation; the sink is one more column."""

    def forward(
        q: Array, k: Array, v: Array, sink: Array | None = None, *, to: Callable, scale: float = 0.0, causal: bool = True, **_: Any
    ) -> Two:
        share = q.shape[2] // k.shape[2]
        a, b, c = (tensor(x, at).transpose(1, 2) for x in (q, np.repeat(k, share, 2), np.repeat(v, share, 2)))  # [b,h,s,k]
        z = a @ b.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
        hidden = torch.tensor(~causal_mask(q.shape[1], k.shape[1], causal))
        z = z.masked_fill(hidden, -torch.inf)
        lse = torch.logsumexp(z, -1)
        if sink is not None:
            z = torch.cat([z, tensor(sink, at)[None, :, None, None].expand(*z.shape[:3], 1)], -1)
        p = torch.softmax(z, -1)[..., : k.shape[1]]
        p = torch.where(hidden, torch.zeros_like(p), p)  # a row that sees nothing is 0/0
        o = tensor(to(array(p, q)), at) @ c
        lse = torch.where(torch.isneginf(lse), torch.full_like(lse, torch.inf), lse)
        return array(o.transpose(1, 2), q), array(lse, q)

    return forward


def entries(at: str = "") -> list[tuple[str, str, Callable, tuple[int, ...], bool]]:
    """Op, direction, function, the outputs that it leaves to be rounded, and whether it takes `to`."""
    if torch is None:
        return []
    pairs = {"linear": linear_both(at), "rmsnorm": rmsnorm_both(at), "swiglu": swiglu_both(at), "rope": rope_both(at)}
    rounded = {"linear": ((0,), (0, 1)), "rmsnorm": ((0,), (0, 1)), "swiglu": ((0,), (0, 1)), "rope": ((0,), (0,))}
    found = [
        (op, way, fn, left, False)
        for op, both in pairs.items()
        for way, fn, left in zip(("forward", "backward"), both, rounded[op], strict=True)
    ]
    return [*found, ("attention", "forward", attention(at), (0,), True)]
