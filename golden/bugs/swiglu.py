"""Bugs of SwiGLU and of its clamp."""

from collections.abc import Callable
from typing import Any

from ...ref.router import scores_of
from ...ref.swiglu import swiglu_bwd, swiglu_fwd
from ...ref.xp import Array, clip, xp_of
from . import Bug

Pair = tuple[Array, Array]


def swapped(gate: Array, up: Array, **attrs: Any) -> tuple[Array, tuple]:
    return swiglu_fwd(up, gate, **attrs)


def swapped_bwd(dy: Array, saved: tuple) -> Pair:
    dgate, dup = swiglu_bwd(dy, saved)
    return dup, dgate


def _activated(act: Callable[[Array, Array, float], Array]) -> Callable:
    """act(gate, up, limit): limit is infinite where there is none"""

    def fwd(gate: Array, up: Array, **attrs: Any) -> tuple[Array, tuple]:
        limit = attrs.get("limit")
        return act(gate, up, float("inf") if limit is None else limit), ()

    return fwd


def silu(g: Array) -> Array:
    return g * scores_of(g, "sigmoid")


def overflowing(gate: Array, up: Array, limit: float) -> Array:
    """g e^g/(1 + e^g): beyond 88.7 float32 has inf/inf"""
    xp, g = xp_of(gate), clip(gate, high=limit)
    big = g > 88.72
    grown = xp.exp(xp.where(big, xp.zeros_like(g), g))
    return xp.where(big, xp.full_like(g, float("nan")), g * grown / (1 + grown)) * clip(up, -limit, limit)


def slope_of_sigmoid(dy: Array, saved: tuple) -> Pair:
    """dgate = dy up σ"""
    gate, _, _, u, sigmoid, _, limit, _ = saved
    dgate = dy * u * sigmoid
    if limit is not None:
        dgate = xp_of(dy).where(gate > limit, xp_of(dy).zeros_like(dy), dgate)
    return dgate, swiglu_bwd(dy, saved)[1]


def uncut(dy: Array, saved: tuple) -> Pair:
    return swiglu_bwd(dy, (*saved[:6], None, saved[7]))


def unclamped(dy: Array, saved: tuple) -> Pair:
    """The gradient of SwiGLU without a limit"""
    return swiglu_bwd(dy, swiglu_fwd(saved[0], saved[1])[1])


SWIGLU = ("swiglu",)
BUGS = [
    Bug(
        "swiglu-gate-up-swapped",
        SWIGLU,
        "The halves are swapped: silu(up) gate.",
        "ml-explore/mlx-lm#767; flashinfer-ai/flashinfer#4130",
        fwd=swapped,
        bwd=swapped_bwd,
    ),
    Bug(
        "swiglu-sigmoid-only",
        SWIGLU,
        "The gate is σ(g) instead of g σ(g).",
        fwd=_activated(lambda g, u, limit: scores_of(clip(g, high=limit), "sigmoid") * clip(u, -limit, limit)),
    ),
    Bug("silu-exp-overflow", SWIGLU, "silu is g e^g/(1 + e^g), which is inf/inf beyond 88 in float32.", fwd=_activated(overflowing)),
    Bug("silu-slope-partial", SWIGLU, "The slope of silu is taken for σ: its term g σ(1-σ) is missing.", bwd=slope_of_sigmoid),
    Bug("swiglu-clamp-ignored", SWIGLU, "The limit is not applied.", attrs={"limit": None}),
    Bug(
        "swiglu-clamp-wrong-side",
        SWIGLU,
        "The gate is held above -limit instead of below limit.",
        fwd=_activated(lambda g, u, limit: silu(clip(g, -limit)) * clip(u, -limit, limit)),
    ),
    Bug(
        "swiglu-clamp-gate-both-sides",
        SWIGLU,
        "The gate is clipped to ±limit; below it has none.",
        fwd=_activated(lambda g, u, limit: silu(clip(g, -limit, limit)) * clip(u, -limit, limit)),
    ),
    Bug(
        "swiglu-clamp-up-one-side",
        SWIGLU,
        "up is held below limit and not above -limit.",
        fwd=_activated(lambda g, u, limit: silu(clip(g, high=limit)) * clip(u, high=limit)),
    ),
    Bug(
        "swiglu-clamp-after-silu",
        SWIGLU,
        "silu(gate) is held below limit instead of gate.",
        fwd=_activated(lambda g, u, limit: clip(silu(g), high=limit) * clip(u, -limit, limit)),
    ),
    Bug("swiglu-clamp-grad-uncut", SWIGLU, "The backward passes through the clamp: nothing is 0 beyond the limit.", bwd=uncut),
    Bug("swiglu-clamp-grad-unclamped", SWIGLU, "The backward is that of SwiGLU without the clamp.", bwd=unclamped),
]
