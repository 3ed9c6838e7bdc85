"""Bugs of attention's backward."""

from collections.abc import Callable

from array_api_compat import device

from ...ref.attention import attention_bwd, heads_first
from ...ref.xp import Array, xp_of
from . import Bug
from .attention import ATTENTION, FLASH, Grads


def grads(change: Callable[[Grads, tuple], Grads]) -> Callable:
    """The right gradients, changed: change(gradients, saved)."""
    return lambda do, dlse, saved: change(attention_bwd(do, dlse, saved), saved)


def first_head_only(do: Array, dlse: Array, saved: tuple) -> Grads:
    """dk and dv of a shared key head take the first of its query heads alone."""
    xp, (_, _, h, _), g = xp_of(do), saved[0].shape, saved[1].shape[2]
    first = xp.asarray([float(i % (h // g) == 0) for i in range(h)], dtype=do.dtype, device=device(do))
    right = attention_bwd(do, dlse, saved)
    part = attention_bwd(do * first[None, None, :, None], dlse * first[None, :, None], saved)
    return (right[0], part[1], part[2], *right[3:])


def no_delta(do: Array, dlse: Array, saved: tuple) -> Grads:
    """dz = P dP: D is left out, so its gradient is handed in through lse."""
    xp, o = xp_of(do), saved[4]
    if saved[3] is not None:
        raise ValueError("no delta and a sink: no variant")
    return attention_bwd(do, dlse + xp.permute_dims(xp.sum(do * o, axis=-1), (0, 2, 1)), saved)


def poisoned(do: Array, dlse: Array, saved: tuple) -> Grads:
    """A row without keys has lse = -inf: exp(z + inf) times a mask of 0 is NaN, and dk and dv sum over rows."""
    right = attention_bwd(do, dlse, saved)
    bad = xp_of(do).any(xp_of(do).isinf(saved[5]))
    return (right[0], *(xp_of(do).where(bad, x * float("nan"), x) for x in right[1:3]), *right[3:])


def tail_of_dv(right: Grads, saved: tuple) -> Grads:
    xp, dv = xp_of(right[2]), right[2]
    whole = dv.shape[3] // 64 * 64
    return (*right[:2], xp.concat([dv[..., :whole], xp.roll(dv[..., whole:], 1, axis=1)], axis=3), *right[3:])


def heads_transposed(right: Grads, saved: tuple) -> Grads:
    return (right[0], *(xp_of(x).reshape(heads_first(x), x.shape) for x in right[1:3]), *right[3:])


BUGS = [
    Bug(
        "bwd-lse-padding-nan",
        ATTENTION,
        "A row without keys takes part in the backward: exp(z - lse) is infinite there, times 0 NaN, and dk and dv sum over rows.",
        "tile-ai/tilelang#2461; ROCm/flash-attention#179",
        bwd=poisoned,
    ),
    Bug(
        "mla-dv-tail-columns",
        ATTENTION,
        "dv's columns beyond the last multiple of 64 belong to the next row: a stride taken from the width of q and k.",
        f"{FLASH}#2552",
        bwd=grads(tail_of_dv),
    ),
    Bug(
        "attention-bwd-lse-dropped",
        ATTENTION,
        "The gradient that comes through lse is left out.",
        bwd=lambda do, dlse, saved: attention_bwd(do, 0 * dlse, saved),
    ),
    Bug("attention-bwd-delta-missing", ATTENTION, "dz = P dP: the row sum D of do·o is left out.", bwd=no_delta),
    Bug(
        "attention-bwd-dq-unscaled",
        ATTENTION,
        "dq lacks the softmax scale.",
        bwd=grads(lambda right, saved: (right[0] / saved[6], *right[1:])),
    ),
    Bug(
        "attention-bwd-dk-unscaled",
        ATTENTION,
        "dk lacks the softmax scale.",
        bwd=grads(lambda right, saved: (right[0], right[1] / saved[6], *right[2:])),
    ),
    Bug(
        "attention-bwd-heads-not-summed",
        ATTENTION,
        "dk and dv of a key head that several query heads share come from the first of these alone.",
        "NVIDIA/TransformerEngine#1975; bigcode-project/Megatron-LM#37",
        bwd=first_head_only,
    ),
    Bug("attention-bwd-heads-transposed", ATTENTION, "dk and dv are laid out heads first, [b,g,t,·].", bwd=grads(heads_transposed)),
    Bug(
        "attention-bwd-dsink-missing",
        ATTENTION,
        "The sink receives no gradient.",
        bwd=grads(lambda right, saved: (*right[:3], *(0 * x for x in right[3:]))),
    ),
    Bug(
        "attention-bwd-dsink-sign",
        ATTENTION,
        "The sink's gradient has the other sign.",
        bwd=grads(lambda right, saved: (*right[:3], *(-x for x in right[3:]))),
    ),
]
