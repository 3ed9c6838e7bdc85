"""Cross entropy and the embedding, forward and backward."""

import math
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from ...ref.embedding import check_ids
from ...ref.loss import check_labels
from . import _pool
from ._common import run
from ._declared import declared
from ._softmax import LANES, _exp, _highest

Array = NDArray[Any]


@njit(nogil=True, error_model="numpy")
def _log_sum_exp(row, lanes, sums):
    """max, and log Σ exp(row - max): the sum in float64, lane by lane"""
    top = _highest(row, lanes)
    sums[:] = 0.0
    even = row.size - row.size % LANES
    for j in range(0, even, LANES):
        part = row[j : j + LANES]
        for k in range(LANES):
            sums[k] += np.float64(_exp(part[k] - top))
    for k in range(row.size - even):
        sums[k] += np.float64(_exp(row[even + k] - top))
    return top, math.log(sums.sum())


@njit(nogil=True, error_model="numpy", cache=True)
def _losses(lo, hi, logits, labels, counts):
    """Σ over rows that count of (max - logits[label]) + log Σ exp(logits - max): the difference first, so no digits are lost at ±1e4"""
    lanes, sums, total = np.empty(LANES, logits.dtype), np.empty(LANES), 0.0
    for i in range(lo, hi):
        if counts[i]:
            top, log = _log_sum_exp(logits[i], lanes, sums)
            total += np.float64(top - logits[i, labels[i]]) + log
    return total


@njit(nogil=True, error_model="numpy", cache=True)
def _gradients(lo, hi, logits, labels, counts, factor, dlogits):
    lanes, sums, dtype = np.empty(LANES, logits.dtype), np.empty(LANES), logits.dtype.type
    for i in range(lo, hi):
        row, out = logits[i], dlogits[i]
        if not counts[i]:
            out[:] = dtype(0.0)
            continue
        top, log = _log_sum_exp(row, lanes, sums)
        share = dtype(math.exp(-log))
        for j in range(row.size):
            out[j] = _exp(row[j] - top) * share
        out[labels[i]] -= dtype(1.0)
        for j in range(row.size):
            out[j] *= factor


def _checked(direction: str, arrays: dict[str, Any], attrs: dict[str, Any]) -> tuple[dict[str, Any], Array, int, bool]:
    """The arrays, which rows count, what the sum is divided by, and whether the loss is NaN by convention"""
    views, a, _ = declared("cross_entropy", direction, arrays, attrs)
    counts = check_labels(views["labels"], views["logits"].shape[1], a["ignore_index"])
    rows = int(counts.sum()) if a["denominator"] == "counted" else counts.size
    return views, counts, max(rows, 1), rows == 0 and a["denominator"] == "counted" and a["empty"] == "nan"


def cross_entropy(logits: Array, labels: Array, **attrs: Any) -> Array:
    """loss = 1/N sum_n (log sum_v exp logits[n,v] - logits[n,labels[n]]) over the rows whose label is not ignore_index.

    logits[n,v] are float32 or float64; labels[n] integers. Sums in float64. Attributes are those of the reference's cross_entropy, with its
    defaults. ValueError: dtypes or shapes do not fit, a label is outside the vocabulary.
    """
    views, counts, rows, nothing = _checked("forward", {"logits": logits, "labels": labels}, attrs)
    x = views["logits"]
    total = math.fsum(run(_losses, *x.shape, x, views["labels"], counts))
    return np.asarray(math.nan if nothing else total / rows, x.dtype)


def cross_entropy_bwd(logits: Array, labels: Array, dloss: Array, **attrs: Any) -> Array:
    """dlogits[n,v] = dloss/N (softmax(logits[n])[v] - [v = labels[n]]), 0 in rows that do not count. Errors as cross_entropy."""
    views, counts, rows, _ = _checked("backward", {"logits": logits, "labels": labels, "dloss": dloss}, attrs)
    x = views["logits"]
    dlogits = _pool.empty(x.shape, x.dtype)
    run(_gradients, *x.shape, x, views["labels"], counts, x.dtype.type(views["dloss"] / rows), dlogits)
    return dlogits


@njit(nogil=True, error_model="numpy", cache=True)
def _gathered(lo, hi, order, first, dx, dweight):
    """Rows lo to hi of dweight; token t's are order[first[t]:first[t+1]]. Sums in float64."""
    total = np.empty(dx.shape[1])
    for t in range(lo, hi):
        if first[t] == first[t + 1]:
            dweight[t] = 0
            continue
        total[:] = 0.0
        for i in order[first[t] : first[t + 1]]:
            for j in range(total.size):
                total[j] += np.float64(dx[i, j])
        for j in range(total.size):
            dweight[t, j] = total[j]


def embedding(ids: Array, weight: Array) -> Array:
    """x[n,d] = weight[ids[n],d]. ids[n] are integers, weight[v,d] float32 or float64. ValueError: an id is outside the vocabulary."""
    views, _, _ = declared("embedding", "forward", {"ids": ids, "weight": weight}, {}, ("weight",))
    check_ids("embedding", "ids", views["ids"], views["weight"].shape[0])
    return views["weight"][views["ids"]]


def embedding_bwd(ids: Array, weight: Array, dx: Array) -> Array:
    """dweight[v,d] = sum_n [ids[n] = v] dx[n,d], exactly 0 elsewhere. Errors as embedding."""
    views, _, _ = declared("embedding", "backward", {"ids": ids, "weight": weight, "dx": dx}, {}, ("weight",))
    v, d = views["weight"].shape
    check_ids("embedding_bwd", "ids", views["ids"], v)
    ids = views["ids"].astype(np.int64)
    order = np.argsort(ids, kind="stable")
    first = np.concatenate([[0], np.cumsum(np.bincount(ids, minlength=v))])
    dweight = _pool.empty((v, d), views["dx"].dtype)
    run(_gathered, v, d, order, first, views["dx"], dweight)
    return dweight
