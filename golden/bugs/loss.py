"""Bugs of cross entropy and of the embedding."""

from typing import Any

from ...ref.embedding import embedding_bwd, embedding_fwd
from ...ref.loss import cross_entropy_bwd, cross_entropy_fwd
from ...ref.moe_permute import rows_at
from ...ref.xp import Array, xp_of
from . import Bug

Result = tuple[Any, Any]


def ignored_as_zero(logits: Array, labels: Array, *, ignore_index: int = -100, **attrs: Any) -> Result:
    """Rows that do not count are trained toward token 0."""
    xp = xp_of(labels)
    return cross_entropy_fwd(logits, xp.where(labels == ignore_index, xp.zeros_like(labels), labels), ignore_index=-1, **attrs)


def no_maximum(logits: Array, labels: Array, **attrs: Any) -> Result:
    """exp of the logits as they are"""
    xp = xp_of(logits)
    _, (_, _, label, counts, rows) = cross_entropy_fwd(logits, labels, **attrs)
    e = xp.exp(logits)
    total = xp.sum(e, axis=-1, keepdims=True)
    nll = (xp.log(total) - xp.take_along_axis(logits, label, axis=-1))[:, 0]
    return xp.sum(xp.where(counts, nll, xp.zeros_like(nll))) / rows, (e, total, label, counts, rows)


def two_ranks(logits: Array, labels: Array, **attrs: Any) -> Result:
    """Each of two ranks holds all of the vocabulary, and the sum over ranks counts it twice."""
    return cross_entropy_fwd(xp_of(logits).concat([logits, logits], axis=1), labels, **attrs)


def two_ranks_bwd(dloss: Array, saved: tuple) -> Array:
    both = cross_entropy_bwd(dloss, saved)
    return both[:, : both.shape[1] // 2]


def micro_batches(logits: Array, labels: Array, **attrs: Any) -> Result:
    """The mean over the first half of the rows and the mean over the others, averaged"""
    half = (logits.shape[0] + 1) // 2
    found = [cross_entropy_fwd(logits[:half, :], labels[:half], **{**attrs, "empty": "zero"})]
    if half < logits.shape[0]:
        found.append(cross_entropy_fwd(logits[half:, :], labels[half:], **{**attrs, "empty": "zero"}))
    return sum(loss for loss, _ in found) / len(found), [saved for _, saved in found]


def micro_batches_bwd(dloss: Array, saved: list) -> Array:
    return xp_of(dloss).concat([cross_entropy_bwd(dloss / len(saved), part) for part in saved], axis=0)


def every_row_pushed(dloss: Array, saved: tuple) -> Array:
    """Rows that do not count receive softmax over N, as if no label were right."""
    e, total, _, counts, rows = saved
    xp = xp_of(e)
    return cross_entropy_bwd(dloss, saved) + xp.where(counts[:, None], xp.zeros_like(e), e / total * (dloss / rows))


def last_wins(dx: Array, saved: tuple) -> Array:
    """dweight[ids[n]] = dx[n]: of a token's rows the last is kept."""
    ids, v = saved
    last = {int(ids[n]): n for n in range(ids.shape[0])}
    return rows_at(dx, xp_of(ids).asarray([last.get(token, -1) for token in range(v)], dtype=ids.dtype))


def without_token_0(dx: Array, saved: tuple) -> Array:
    dweight = embedding_bwd(dx, saved)
    return xp_of(dx).concat([0 * dweight[:1, :], dweight[1:, :]], axis=0)


LOSS, EMBEDDING = ("cross_entropy",), ("embedding",)
BUGS = [
    Bug(
        "vocab-parallel-ce-on-gathered",
        LOSS,
        "Logits that were gathered are taken for one rank's share: two ranks count the vocabulary twice, and the loss grows by ln 2.",
        "NVIDIA/Megatron-LM#7452",
        fwd=two_ranks,
        bwd=two_ranks_bwd,
    ),
    Bug(
        "cross-entropy-microbatch-mean",
        LOSS,
        "Each micro-batch's own mean is averaged (here two halves): not the mean over all rows that count.",
        "huggingface/transformers#34191; ml-explore/mlx-lm#1413",
        fwd=micro_batches,
        bwd=micro_batches_bwd,
    ),
    Bug("cross-entropy-all-rows", LOSS, "The mean is over all rows, those that do not count too.", attrs={"denominator": "rows"}),
    Bug(
        "cross-entropy-ignored-as-token-0",
        LOSS,
        "Rows that do not count are trained toward token 0.",
        fwd=ignored_as_zero,
        bwd=cross_entropy_bwd,
    ),
    Bug("cross-entropy-no-maximum", LOSS, "exp of the logits without their maximum subtracted overflows.", fwd=no_maximum),
    Bug(
        "cross-entropy-bwd-no-maximum",
        LOSS,
        "The backward's softmax is taken without the maximum subtracted: inf/inf.",
        fwd=no_maximum,
        bwd=cross_entropy_bwd,
        directions=("backward",),
    ),
    Bug("cross-entropy-bwd-ignored-rows", LOSS, "Rows that do not count receive the gradient of their softmax.", bwd=every_row_pushed),
    Bug(
        "cross-entropy-bwd-not-averaged",
        LOSS,
        "The gradient is that of the sum over rows, not of the mean.",
        bwd=lambda dloss, saved: cross_entropy_bwd(dloss * saved[4], saved),
    ),
    Bug(
        "cross-entropy-bwd-label-missing",
        LOSS,
        "1 is not subtracted at the label.",
        bwd=lambda dloss, saved: cross_entropy_bwd(dloss, (*saved[:2], saved[2] - saved[0].shape[1], *saved[3:])),
    ),
    Bug(
        "embedding-scaled",
        EMBEDDING,
        "Rows are multiplied by √d, as Gemma and T5 have it.",
        fwd=lambda ids, weight: embedding_fwd(ids, weight * weight.shape[1] ** 0.5),
    ),
    Bug("embedding-bwd-last-wins", EMBEDDING, "Of the rows of one token the last is kept, not their sum.", bwd=last_wins),
    Bug("embedding-bwd-padding-token", EMBEDDING, "Token 0 is taken for padding and gets no gradient.", bwd=without_token_0),
]
