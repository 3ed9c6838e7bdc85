"""Cross entropy and embedding with their backward passes in 50-digit arithmetic; shares nothing with `ref`.

Equation: loss = sum over the rows that count of ln sum_v exp(z_v - z_label), over how many count, or over all rows; x[n] = weight[ids[n]].
Written as ln(1 + sum over v other than the label), so that a loss far below 1 keeps its digits.
Backward: the reverse-mode derivative of L = dloss * loss, or sum(dx * x), by `tape`; no closed form is used.
"""

from typing import Any

import numpy as np

from .edges import carrier, choose, fill
from .linear import Arrays, expect, gradients, integers, packed, pull_back, rounded, scalars, total
from .tape import CTX, Scalar, Tape, exp, log1p

LOSS: dict[str, Any] = {"ignore_index": -100, "denominator": "counted", "empty": "nan"}


def nll(logits: list[Scalar], label: int) -> Scalar:
    """-ln softmax(logits)[label], on mpf or on tape variables."""
    own = -logits[label]
    return log1p(total([exp(z + own) for v, z in enumerate(logits) if v != label]))


def places(array: np.ndarray, name: str, size: int, ignored: int | None = None) -> Any:
    """The (nested) list of indices; ValueError naming the first outside 0..size-1 that is not `ignored`."""
    values = integers(array, name)
    for place, value in zip(np.ndindex(array.shape), array.ravel().tolist(), strict=True):
        if not 0 <= value < size and value != ignored:
            raise ValueError(f"{name}{list(place)} is {value}: outside 0..{size - 1}")
    return values


def _cross_entropy(inputs: Arrays, attrs: dict[str, Any], tape: Tape | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(logits, loss) as scalars."""
    at = fill(LOSS, attrs)
    choose("denominator", at["denominator"], ("counted", "rows"))
    empty = choose("empty", at["empty"], ("nan", "zero"))
    carrier(inputs["logits"])
    n, v = inputs["logits"].shape
    expect(inputs, {"labels": (n,)})
    labels = places(inputs["labels"], "labels", v, at["ignore_index"])
    logits = scalars(inputs["logits"], tape)
    terms = [nll(row, label) for row, label in zip(logits.tolist(), labels, strict=True) if label != at["ignore_index"]]
    if terms:
        loss = total(terms) / (len(terms) if at["denominator"] == "counted" else n)
    else:
        loss = CTX.nan if at["denominator"] == "counted" and empty == "nan" else CTX.zero
    return logits, packed([loss], ())


def cross_entropy(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """cross_entropy: logits, labels -> loss."""
    return {"loss": rounded(_cross_entropy(inputs, attrs)[1])}


def cross_entropy_backward(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """cross_entropy backward: logits, labels, dloss -> dlogits; where nothing counts 0, whatever the loss."""
    tape = Tape()
    logits, loss = _cross_entropy(inputs, attrs, tape)
    pull_back(tape, (loss, inputs["dloss"]))
    return {"dlogits": gradients(logits)}


def _embedding(inputs: Arrays, attrs: dict[str, Any], tape: Tape | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(weight, x) as scalars."""
    fill({}, attrs)
    carrier(inputs["weight"])
    v, d = inputs["weight"].shape
    ids, weight = places(inputs["ids"], "ids", v), scalars(inputs["weight"], tape)
    return weight, packed([u for i in ids for u in weight[i].tolist()], (len(ids), d))


def embedding(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """embedding: ids, weight -> x."""
    return {"x": rounded(_embedding(inputs, attrs)[1])}


def embedding_backward(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """embedding backward: ids, weight, dx -> dweight."""
    tape = Tape()
    weight, x = _embedding(inputs, attrs, tape)
    pull_back(tape, (x, inputs["dx"]))
    return {"dweight": gradients(weight)}
