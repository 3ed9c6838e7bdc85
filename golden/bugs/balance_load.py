"""Bugs of the bias update, of token dropping and of the placement of replicas.

The op is handed the counts of the whole step: what goes wrong while they are gathered is played through on a split of them.
"""

from collections.abc import Callable
from typing import Any

from ...ref.balance import bias_update, bias_update_fwd, drop_tokens, drop_tokens_fwd
from ...ref.cast import round_to
from ...ref.eplb import eplb_fwd
from ...ref.formats import BF16, FP32
from ...ref.xp import Array, clip, xp_of
from . import Bug

Result = tuple[Array, tuple]


def _update(sign: Callable[[Any, Array], Array]) -> Callable:
    """The update with another sign of the counts [e]; centred is left as it is."""

    def fwd(bias: Array, counts: Array, **attrs: Any) -> Result:
        o = {**bias_update.defaults, **attrs}
        signs = sign(xp_of(bias), xp_of(bias).astype(counts, xp_of(bias).float64))
        if o["centred"]:
            signs = signs - xp_of(signs).mean(signs)
        return bias + o["gamma"] * xp_of(bias).astype(signs, bias.dtype), ()

    return fwd


def _counts(change: Callable[[Any, Array], Array]) -> Callable:
    """The update with other counts."""
    return lambda bias, counts, **attrs: bias_update_fwd(bias, change(xp_of(counts), counts), **attrs)


def _rounded(fmt: Any) -> Callable[[Any, Array], Array]:
    def sign(xp: Any, counts: Array) -> Array:
        low = round_to(fmt, counts)
        return xp.sign(round_to(fmt, xp.mean(low)) - low)

    return sign


def _even(xp: Any, counts: Array) -> Array:
    """The counts of one rank or micro-batch of two: here it holds the tokens of the experts with an even number."""
    return xp.where(xp.arange(counts.shape[0]) % 2 == 0, counts, xp.zeros_like(counts))


def _share(counts: Array) -> Array:
    """Mean load minus load, over the mean"""
    mean = xp_of(counts).mean(counts)
    return (mean - counts) / mean


def per_microbatch(bias: Array, counts: Array, **attrs: Any) -> Result:
    first = _even(xp_of(counts), counts)
    between, _ = bias_update_fwd(bias, first, **attrs)
    return bias_update_fwd(between, counts - first, **attrs)


def stored_in_bf16(bias: Array, counts: Array, **attrs: Any) -> Result:
    return round_to(BF16, bias_update_fwd(bias, counts, **attrs)[0]), ()


def _dropping(change: Callable[..., tuple]) -> Callable:
    """Dropping with other arguments: change(topk_idx, topk_weight, exempt, options). The weights that it keeps are the given ones."""

    def fwd(topk_idx: Array, topk_weight: Array, exempt: Array | None, **attrs: Any) -> tuple:
        o = {**drop_tokens.defaults, **attrs}
        arguments = change(topk_idx, topk_weight, exempt, o)
        (keep, _), saved = drop_tokens_fwd(*arguments, **o)
        return (keep, topk_weight * xp_of(topk_weight).astype(keep, topk_weight.dtype)), saved

    return fwd


def _each_expert(topk_idx: Array, topk_weight: Array, exempt: Array | None, o: dict[str, Any]) -> tuple:
    slots = topk_idx.shape[0] * topk_idx.shape[1]
    o["capacity_factor"] = max(o["capacity_factor"], o["n_routed_experts"] / slots)  # one slot an expert at least
    o["devices"] = o["n_routed_experts"]
    return topk_idx, topk_weight, exempt


def _first_come(topk_idx: Array, topk_weight: Array, exempt: Array | None, o: dict[str, Any]) -> tuple:
    return topk_idx, 0 * topk_weight, exempt


def _never_exempt(topk_idx: Array, topk_weight: Array, exempt: Array | None, o: dict[str, Any]) -> tuple:
    return topk_idx, topk_weight, None


def _smallest(topk_idx: Array, topk_weight: Array, exempt: Array | None, o: dict[str, Any]) -> tuple:
    return topk_idx, -topk_weight, exempt


def _one_more(topk_idx: Array, topk_weight: Array, exempt: Array | None, o: dict[str, Any]) -> tuple:
    slots = topk_idx.shape[0] * topk_idx.shape[1]
    o["capacity_factor"] = -(-o["capacity_factor"] * slots // o["devices"]) * o["devices"] / slots
    return topk_idx, topk_weight, exempt


def later_kept(topk_idx: Array, topk_weight: Array, exempt: Array | None, **attrs: Any) -> tuple:
    """Of equal affinities the later is kept: run from behind."""
    xp = xp_of(topk_weight)
    back = [None if a is None else xp.flip(a) for a in (topk_idx, topk_weight, exempt)]
    (keep, weight), (saved,) = drop_tokens_fwd(*back, **attrs)
    return (xp.flip(keep), xp.flip(weight)), (xp.flip(saved),)


def ties_to_the_last(weight: Array, **attrs: Any) -> tuple:
    """Of equal loads the highest index goes first: run on mirrored experts."""
    xp, e = xp_of(weight), weight.shape[1]
    (phy2log, log2phy, counts), saved = eplb_fwd(xp.flip(weight, axis=1), **attrs)
    return (e - 1 - phy2log, xp.flip(log2phy, axis=1), xp.flip(counts, axis=1)), saved


def filled_with_zero(weight: Array, **attrs: Any) -> tuple:
    (phy2log, log2phy, counts), saved = eplb_fwd(weight, **attrs)
    return (phy2log, clip(log2phy, 0), counts), saved


BIAS, DROP, EPLB = ("router.bias_update",), ("router.drop_tokens",), ("moe.eplb",)
MEGATRON = "NVIDIA/Megatron-LM"
BUGS = [
    Bug(
        "bias-update-sign",
        BIAS,
        "The sign is that of count - mean: busy experts are made busier.",
        fwd=_update(lambda xp, c: xp.sign(c - xp.mean(c))),
    ),
    Bug(
        "bias-update-count-bf16",
        BIAS,
        "Counts are held in bfloat16: near the mean they cannot be told from it.",
        f"{MEGATRON}#7081",
        fwd=_update(_rounded(BF16)),
    ),
    Bug("bias-update-count-f32", BIAS, "Counts are held in float32: beyond 2^24 they are rounded.", fwd=_update(_rounded(FP32))),
    Bug(
        "bias-update-no-allreduce",
        BIAS,
        "The sign is that of one rank's counts (here of two ranks, which hold the tokens of even and of odd experts).",
        fwd=_counts(_even),
    ),
    Bug(
        "bias-update-per-microbatch",
        BIAS,
        "The bias is updated after every micro-batch (here two: the tokens of even and of odd experts) instead of once a step.",
        "pytorch/torchtitan#1304",
        fwd=per_microbatch,
    ),
    Bug(
        "bias-count-recompute-double",
        BIAS,
        "Tokens that pass the router again in recomputation (here those of even experts) are counted twice.",
        "pytorch/torchtitan#1593",
        fwd=_counts(lambda xp, c: c + _even(xp, c)),
    ),
    Bug(
        "bias-count-eval-leak",
        BIAS,
        "The counts of an evaluation (here the batch's own, in the reverse order of experts) are added to the step's.",
        "pytorch/torchtitan#4148",
        fwd=_counts(lambda xp, c: c + xp.flip(c)),
    ),
    Bug(
        "aux-counts-padding",
        BIAS,
        "Padding tokens are counted (here a quarter of all slots, on the first two experts).",
        f"{MEGATRON}#1984, #2121, #4776, #5542; pytorch/torchtitan#4594",
        fwd=_counts(lambda xp, c: c + xp.where(xp.arange(c.shape[0]) < 2, xp.sum(c) // 8, xp.zeros_like(c))),
    ),
    Bug(
        "bias-recentred",
        BIAS,
        "The mean of the update is subtracted from it, as Moonlight does.",
        "pytorch/torchtitan#1506",
        attrs={"centred": True},
        benign=True,
    ),
    Bug(
        "bias-update-proportional",
        BIAS,
        "The step is gamma (mean - count)/mean instead of gamma times its sign.",
        fwd=_update(lambda xp, c: _share(c)),
    ),
    Bug(
        "bias-update-no-zero",
        BIAS,
        "An expert at the mean is raised: the sign is never 0.",
        fwd=_update(lambda xp, c: 2.0 * xp.astype(c <= xp.mean(c), c.dtype) - 1.0),
    ),
    Bug(
        "bias-update-mean-floored",
        BIAS,
        "The mean is rounded down to an integer.",
        fwd=_update(lambda xp, c: xp.sign(xp.floor(xp.mean(c)) - c)),
    ),
    Bug("bias-out-bf16", BIAS, "The bias is stored in bfloat16.", fwd=stored_in_bf16),
    Bug("drop-each-expert", DROP, "The capacity is an expert's (GShard) instead of a device's.", fwd=_dropping(_each_expert)),
    Bug("drop-first-come", DROP, "The first slots of a device are kept instead of those of largest affinity.", fwd=_dropping(_first_come)),
    Bug("drop-largest", DROP, "The slots of largest affinity are dropped.", fwd=_dropping(_smallest)),
    Bug("drop-exempt-ignored", DROP, "Tokens that must not be dropped are.", fwd=_dropping(_never_exempt)),
    Bug("drop-capacity-rounded-up", DROP, "The capacity is rounded up.", fwd=_dropping(_one_more)),
    Bug("drop-later-kept", DROP, "Of equal affinities the later slot is kept.", fwd=later_kept),
    Bug("drop-grad-kept", DROP, "Slots that were dropped have a gradient.", bwd=lambda dweight, saved: dweight),
    Bug(
        "eplb-groups-ignored",
        EPLB,
        "Experts are placed over all GPUs at once where nodes divide the groups.",
        fwd=lambda weight, **attrs: eplb_fwd(weight, **{**attrs, "num_groups": 1}),
    ),
    Bug("eplb-ties-to-last", EPLB, "Of equal loads the highest index goes first.", fwd=ties_to_the_last),
    Bug("eplb-filled-with-zero", EPLB, "log2phy is filled with 0 instead of -1.", fwd=filled_with_zero),
]
