"""Cross entropy and the embedding, forward and backward: the maximum and the sum in one pass, two, or blocks; gathers and products."""

from collections.abc import Callable
from typing import Any

import numpy as np

from .floats import Array, to_bf16
from .linear import product, product_double, product_sequential
from .norm import folded, sequential

Two = tuple[Array, Array]


def at_once(x: Array) -> Two:
    """The row's maximum m and Σ exp(x - m)"""
    m = x.max(-1)
    return m, np.exp(x - m[:, None]).sum(-1)


def in_one_pass(x: Array) -> Two:
    """Column after column, the sum rescaled whenever the maximum grows."""
    m, total = x[:, 0].copy(), np.ones(len(x), x.dtype)
    for j in range(1, x.shape[1]):
        new = np.maximum(m, x[:, j])
        total = total * np.exp(m - new) + np.exp(x[:, j] - new)
        m = new
    return m, total


def in_blocks(x: Array) -> Two:
    """Blocks of the vocabulary each by itself, as tensor-parallel heads have it, the last one first."""
    parts = [at_once(x[:, i : i + 7]) for i in reversed(range(0, x.shape[1], 7))]
    m = np.max([p for p, _ in parts], axis=0)
    return m, np.sum([total * np.exp(p - m) for p, total in parts], axis=0, dtype=x.dtype)


def counted(labels: Array, ignore_index: int, denominator: str) -> tuple[Array, Array, int]:
    """Which rows count, a label for each, and how many rows the sum is divided by"""
    there = labels != ignore_index
    rows = int(there.sum()) if denominator == "counted" else len(labels)
    return there, np.where(there, labels, 0), rows


def _loss(statistics: Callable, total: Callable, wide: bool = False) -> Callable:
    def forward(
        logits: Array, labels: Array, *, ignore_index: int = -100, denominator: str = "counted", empty: str = "nan", **_: Any
    ) -> Array:
        x = logits.astype(np.float64) if wide else logits
        there, label, rows = counted(labels, ignore_index, denominator)
        if rows == 0:
            return np.asarray(np.nan if empty == "nan" else 0.0, logits.dtype)
        m, sums = statistics(x)
        nll = np.log(sums) + (m - x[np.arange(len(x)), label])
        return np.asarray(total(np.where(there, nll, x.dtype.type(0))[None])[0] / x.dtype.type(rows), logits.dtype)

    return forward


def p_divided(x: Array) -> Array:
    m, total = at_once(x)
    return np.exp(x - m[:, None]) / total[:, None]


def p_reciprocal(x: Array) -> Array:
    m, total = in_one_pass(x)
    return np.exp(x - m[:, None]) * (1 / total)[:, None]


def p_logarithm(x: Array) -> Array:
    """exp of the log-softmax"""
    m, total = in_blocks(x)
    return np.exp((x - m[:, None]) - np.log(total)[:, None])


def _loss_back(softmax: Callable, wide: bool = False) -> Callable:
    def backward(logits: Array, labels: Array, dloss: Array, *, ignore_index: int = -100, denominator: str = "counted", **_: Any) -> Array:
        x = logits.astype(np.float64) if wide else logits
        there, label, rows = counted(labels, ignore_index, denominator)
        d = softmax(x)
        d[np.arange(len(x)), label] -= 1
        d = d * (dloss.astype(x.dtype) / x.dtype.type(max(rows, 1)))
        return np.where(there[:, None], d, x.dtype.type(0)).astype(logits.dtype)

    return backward


def loss_eager(logits: Array, labels: Array, *, ignore_index: int = -100, denominator: str = "counted", empty: str = "nan") -> Array:
    """Every operation rounds to bfloat16; sums accumulate in float32."""
    r, (there, label, rows) = to_bf16, counted(labels, ignore_index, denominator)
    if rows == 0:
        return np.asarray(np.nan if empty == "nan" else 0.0, np.float32)
    m = logits.max(-1)
    total = r(r(np.exp(r(logits - m[:, None]))).sum(-1))
    nll = r(r(m - logits[np.arange(len(m)), label]) + r(np.log(total)))
    return r(r(np.where(there, nll, np.float32(0)).sum()) / np.float32(rows))


def loss_back_eager(
    logits: Array, labels: Array, dloss: Array, *, ignore_index: int = -100, denominator: str = "counted", **_: Any
) -> Array:
    r, (there, label, rows) = to_bf16, counted(labels, ignore_index, denominator)
    e = r(np.exp(r(logits - logits.max(-1, keepdims=True))))
    p = r(e / r(e.sum(-1, keepdims=True)))
    p[np.arange(len(p)), label] = r(p[np.arange(len(p)), label] - 1)
    return np.where(there[:, None], r(p * r(dloss / np.float32(max(rows, 1)))), np.float32(0))


def one_hot(ids: Array, v: int, dtype: Any) -> Array:
    """[n,v]"""
    return (ids[:, None] == np.arange(v)).astype(dtype)


def rows_of(ids: Array, weight: Array) -> Array:
    return weight[ids]


def rows_by_product(ids: Array, weight: Array) -> Array:
    """One product with ones and zeros: nothing rounds."""
    return one_hot(ids, len(weight), weight.dtype) @ weight


def scattered(ids: Array, weight: Array, dx: Array) -> Array:
    """Token after token, from the last."""
    dweight = np.zeros(weight.shape, dx.dtype)
    np.add.at(dweight, ids[::-1], dx[::-1])
    return dweight


def _by_product(matmul: Callable) -> Callable:
    return lambda ids, weight, dx: matmul(one_hot(ids, len(weight), dx.dtype).T, dx.T)


LOSS = {
    "at-once": _loss(at_once, sequential),
    "one-pass": _loss(in_one_pass, folded),
    "blocks": _loss(in_blocks, sequential),
    "double": _loss(at_once, sequential, wide=True),
}
LOSS_BACK = {
    "divided": _loss_back(p_divided),
    "reciprocal": _loss_back(p_reciprocal),
    "logarithm": _loss_back(p_logarithm),
    "double": _loss_back(p_divided, wide=True),
}
EMBEDDING = {"rows": rows_of, "product": rows_by_product}
EMBEDDING_BACK = {
    "scattered": scattered,
    "product": _by_product(product),
    "product-sequential": _by_product(product_sequential),
    "double": _by_product(product_double),
}
