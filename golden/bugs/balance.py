"""Bugs of the balance losses. See `balance_load` for the bias update, token dropping and replicas."""

from collections.abc import Callable, Mapping
from typing import Any

from ...ref.balance import balance_loss, balance_loss_bwd, balance_loss_fwd, counts_of
from ...ref.xp import Array, clip, xp_of
from . import Bug

Result = tuple[Array, tuple]
Sizes = tuple[int, int, int, int]  # b, s, e, k


def _sizes(scores: Array, topk_idx: Array) -> Sizes:
    return (*scores.shape, topk_idx.shape[2])


def _times(factor: Callable[[Sizes, Mapping[str, Any]], float]) -> dict[str, Any]:
    """The loss and its gradient, times a number."""

    def fwd(scores: Array, topk_idx: Array, **attrs: Any) -> Result:
        own = factor(_sizes(scores, topk_idx), {**balance_loss.defaults, **attrs})
        loss, saved = balance_loss_fwd(scores, topk_idx, **attrs)
        return loss * own, (saved, own)

    return {"fwd": fwd, "bwd": lambda dloss, saved: balance_loss_bwd(dloss * saved[1], saved[0])}


def _with(change: Callable[[Array, Array, dict[str, Any]], tuple[Array, Array, dict[str, Any]]]) -> dict[str, Any]:
    """The loss of other arguments, and its gradient; tokens that are added stand after the batch's own."""

    def fwd(scores: Array, topk_idx: Array, **attrs: Any) -> Result:
        loss, saved = balance_loss_fwd(*(c := change(scores, topk_idx, attrs))[:2], **c[2])
        return loss, (saved, scores.shape[1])

    return {"fwd": fwd, "bwd": lambda dloss, saved: balance_loss_bwd(dloss, saved[0])[:, : saved[1], :]}


def _unnormalised_top1(scores: Array, topk_idx: Array, attrs: dict[str, Any]) -> tuple[Array, Array, dict[str, Any]]:
    return scores, topk_idx, {**attrs, "normalise": False} if topk_idx.shape[2] == 1 else attrs


def _padded(scores: Array, topk_idx: Array, attrs: dict[str, Any]) -> tuple[Array, Array, dict[str, Any]]:
    """Sequences are filled up to a multiple of 16 tokens, whose scores are 1/2 and which chose the first k experts."""
    xp, (b, s, e, k) = xp_of(scores), _sizes(scores, topk_idx)
    more = xp.zeros((b, -s % 16, e), dtype=scores.dtype) + 0.5
    first = xp.broadcast_to(xp.arange(k, dtype=topk_idx.dtype)[None, None, :], (b, -s % 16, k))
    return xp.concat([scores, more], axis=1), xp.concat([topk_idx, first], axis=1), attrs


def _saved(saved: tuple, **other: Array) -> tuple:
    """balance_loss's, with another total or f"""
    scores, total, f, alpha, normalise = saved
    return scores, other.get("total", total), other.get("f", f), alpha, normalise


def _of(scores: Array, f: Array, saved: tuple) -> Result:
    """The loss of another f[b,e]"""
    xp, (b, s, _) = xp_of(scores), scores.shape
    p = xp.sum(scores / saved[1], axis=1) / s
    return saved[3] * xp.sum(f * p) / b, _saved(saved, f=f)


def _other_f(change: Callable[[Array, Array, Array, dict[str, Any]], Array]) -> dict[str, Any]:
    """change(f, scores, topk_idx, attrs)"""

    def fwd(scores: Array, topk_idx: Array, **attrs: Any) -> Result:
        _, saved = balance_loss_fwd(scores, topk_idx, **attrs)
        return _of(scores, change(saved[2], scores, topk_idx, {**balance_loss.defaults, **attrs}), saved)

    return {"fwd": fwd, "bwd": balance_loss_bwd}


def _slots_sent(f: Array, scores: Array, topk_idx: Array, o: dict[str, Any]) -> Array:
    if o["level"] != "communication":
        return f
    xp, (b, s, e, _), devices = xp_of(scores), _sizes(scores, topk_idx), o["devices"]
    sent = xp.sum(xp.reshape(counts_of(topk_idx, e), (b, devices, e // devices)), axis=-1)
    return xp.repeat(xp.astype(sent, scores.dtype), e // devices, axis=1) * (devices / (o["topk_devices"] * s))


def _routed_tokens(f: Array, scores: Array, topk_idx: Array, o: dict[str, Any]) -> Array:
    """f of the tokens that chose something"""
    xp = xp_of(topk_idx)
    routed = xp.sum(xp.astype(xp.any(topk_idx >= 0, axis=2), xp.int64), axis=1)  # [b]
    return f * (scores.shape[1] / xp.astype(clip(routed, 1), f.dtype))[:, None]


def _minus_one_is_last(f: Array, scores: Array, topk_idx: Array, o: dict[str, Any]) -> Array:
    e = scores.shape[2]
    whole = xp_of(topk_idx).where(topk_idx < 0, topk_idx + e, topk_idx)
    if o["level"] == "communication":
        return f
    _, s, _, k = _sizes(scores, topk_idx)
    return xp_of(f).astype(counts_of(whole, e), f.dtype) * (e / (k * s))


def _over_batch(f: Array, scores: Array, topk_idx: Array, o: dict[str, Any]) -> Array:
    """Σ_b f_b P_b /b with the mean of f is the product of the means."""
    return xp_of(f).mean(f, axis=0, keepdims=True) + 0 * f


def of_softmax(scores: Array, topk_idx: Array, **attrs: Any) -> Result:
    """softmax(logits) of scores sigmoid(logits): exp(logit) is s/(1-s)."""
    _, saved = balance_loss_fwd(scores, topk_idx, **attrs)
    if not saved[4]:
        return balance_loss_fwd(scores, topk_idx, **attrs)[0], (saved, None)
    rest = clip(1 - scores, 2.0**-24)
    odds = scores / rest
    loss, saved = _of(odds, saved[2], _saved(saved, total=xp_of(odds).sum(odds, axis=-1, keepdims=True)))
    return loss, ((odds, *saved[1:]), rest)


def of_softmax_bwd(dloss: Array, saved: tuple) -> Array:
    inner, rest = saved
    grad = balance_loss_bwd(dloss, inner)
    return grad if rest is None else grad / (rest * rest)


def normaliser_constant(dloss: Array, saved: tuple) -> Array:
    """dscores = dloss alpha/(b s) f/Σ s"""
    scores, total, f, alpha, _ = saved
    return dloss * (alpha / (scores.shape[0] * scores.shape[1])) * (f[:, None, :] + 0 * scores) / total


LOSS = ("router.balance_loss",)
MEGATRON = "NVIDIA/Megatron-LM"
BUGS = [
    Bug(
        "seq-aux-softmax",
        LOSS,
        "P is taken from softmax(logits) instead of the sigmoid scores over their sum.",
        f"{MEGATRON}#1438",
        fwd=of_softmax,
        bwd=of_softmax_bwd,
    ),
    Bug(
        "aux-topk-not-normalised",
        LOSS,
        "f lacks its 1/k: over the experts it adds up to k times as much.",
        "huggingface/transformers#43688, #43775",
        **_times(lambda n, o: 1.0 if o["level"] == "communication" else n[3]),
    ),
    Bug(
        "aux-experts-factor-missing",
        LOSS,
        "f lacks its factor: the number of experts (of devices, for their communication).",
        **_times(lambda n, o: 1 / (o["devices"] if o["level"] == "communication" else n[2])),
    ),
    Bug(
        "aux-score-unnormalised-k1",
        LOSS,
        "Scores are divided by their sum only where more than one expert is chosen.",
        "NVIDIA/TransformerEngine#2720",
        **_with(_unnormalised_top1),
    ),
    Bug("aux-score-unnormalised", LOSS, "Scores are not divided by their sum.", attrs={"normalise": False}),
    Bug(
        "aux-grad-dead-or-xN",
        LOSS,
        "The loss has no gradient: it was computed and never joined to the graph.",
        "NVIDIA-NeMo/Automodel#1408",
        bwd=lambda dloss, saved: 0 * balance_loss_bwd(dloss, saved),
    ),
    Bug(
        "aux-grad-times-tokens",
        LOSS,
        "The gradient is multiplied by the number of tokens.",
        "NVIDIA-NeMo/Automodel#1408",
        bwd=lambda dloss, saved: balance_loss_bwd(dloss, saved) * (saved[0].shape[0] * saved[0].shape[1]),
    ),
    Bug(
        "aux-grad-accum-overweight",
        LOSS,
        "The gradients of micro-batches (here of one sequence each) are added up, not averaged.",
        "NVIDIA-NeMo/Automodel#3359",
        bwd=lambda dloss, saved: balance_loss_bwd(dloss, saved) * saved[0].shape[0],
    ),
    Bug("aux-batch-summed", LOSS, "The losses of the sequences are added up, not averaged.", fwd=_times(lambda n, o: n[0])["fwd"]),
    Bug(
        "aux-over-batch",
        LOSS,
        "f is the mean over all sequences: the whole batch is balanced instead of each sequence.",
        **_other_f(_over_batch),
    ),
    Bug(
        "aux-counts-padding",
        LOSS,
        "Padding tokens count (here up to a multiple of 16, of score 1/2, routed to the first k experts).",
        f"{MEGATRON}#1984, #2121, #4776, #5542; pytorch/torchtitan#4594",
        **_with(_padded),
    ),
    Bug("aux-unrouted-skipped", LOSS, "Tokens that chose nothing do not count in the number of tokens.", **_other_f(_routed_tokens)),
    Bug("aux-unrouted-to-last", LOSS, "The index -1 is counted for the last expert.", **_other_f(_minus_one_is_last)),
    Bug(
        "aux-communication-counts-slots",
        LOSS,
        "Every slot that goes to a device is counted instead of each token once.",
        **_other_f(_slots_sent),
    ),
    Bug(
        "aux-grad-through-normaliser-dropped",
        LOSS,
        "The sum of the scores is taken for a constant in the backward.",
        bwd=normaliser_constant,
    ),
]
