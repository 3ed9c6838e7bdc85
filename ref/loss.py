"""The loss of a language model: cross entropy over the rows that count. Spec §5, §7."""

from typing import Any, Literal

from array_api_compat import device

from .op import Case, Op, declare, signature
from .xp import Array, xp_of

Denominator = Literal["counted", "rows"]
Empty = Literal["nan", "zero"]


@signature("logits[n,v] labels[n]:index -> loss[]")
def cross_entropy_fwd(
    logits: Array, labels: Array, *, ignore_index: int = -100, denominator: Denominator = "counted", empty: Empty = "nan"
) -> tuple[Array, tuple]:
    """loss = 1/N Σ_n (log Σ_v exp logits[n,v] - logits[n,labels[n]]),   over the rows whose label is not ignore_index

    N is the number of those rows, or of all rows (denominator="rows": the paper's MTP loss divides by T). Where no row counts the loss is
    NaN with N=0, as torch has it, or 0 (empty="zero"); its gradient is 0 either way. Labels outside the vocabulary are refused.
    """
    xp, (n, v) = xp_of(logits), logits.shape
    counts = check_labels(labels, v, ignore_index)  # [n]
    label = xp.where(counts, labels, xp.zeros_like(labels))[:, None]
    highest = xp.max(logits, axis=-1, keepdims=True)  # [n,1]
    e = xp.exp(logits - highest)
    total = xp.sum(e, axis=-1, keepdims=True)
    nll = (highest - xp.take_along_axis(logits, label, axis=-1) + xp.log(total))[:, 0]  # the difference first: no digits are lost at ±1e4
    rows = int(xp.sum(xp.astype(counts, xp.int64))) if denominator == "counted" else n
    loss = xp.sum(xp.where(counts, nll, xp.zeros_like(nll))) / max(rows, 1)
    if rows == 0 and denominator == "counted" and empty == "nan":
        loss = loss + float("nan")
    return loss, (e, total, label, counts, max(rows, 1))


def cross_entropy_bwd(dloss: Array, saved: tuple) -> Array:
    """dlogits[n,v] = dloss/N (softmax(logits[n])[v] - [v = labels[n]]);   0 in rows that do not count"""
    e, total, label, counts, rows = saved
    xp = xp_of(e)
    hit = label == xp.arange(e.shape[1], dtype=label.dtype, device=device(label))  # [n,v]
    p = e / total
    return xp.where(counts[:, None], xp.where(hit, p - 1, p), xp.zeros_like(p)) * (dloss / rows)


def check_labels(labels: Array, v: int, ignore_index: int) -> Array:
    """[n]: which rows count"""
    if v < 1:
        raise ValueError(f"cross_entropy: logits has a vocabulary of {v}; expected one token at least")
    xp = xp_of(labels)
    counts = labels != ignore_index
    outside = counts & ((labels < 0) | (labels >= v))
    if bool(xp.any(outside)):
        i = int(xp.nonzero(outside)[0][0])
        raise ValueError(f"cross_entropy: labels[{i}] is {int(labels[i])}; expected 0 to {v - 1}, or ignore_index = {ignore_index}")
    return counts


def _case(name: str, n: int, v: int, labels: tuple, note: str = "", logits: tuple = ("normal", 2.0), **attrs: Any) -> Case:
    return Case(name, {"n": n, "v": v}, {"logits": logits, "labels": labels, "dloss": ("normal", 1.0)}, attrs, note)


cross_entropy = declare(
    Op(
        "cross_entropy",
        cross_entropy_fwd,
        cross_entropy_bwd,
        (
            _case("mean", 7, 33, ("integers", 0, 33)),
            _case("one", 1, 5, ("positions", 3)),
            _case("alone", 3, 1, ("positions", 0), "a vocabulary of one token: no loss"),
            _case("ignored", 6, 19, ("positions", 4, -100, 0, -100, -100, 18), "the mean is over three rows"),
            _case("rows", 6, 19, ("positions", 4, -100, 0, -100, -100, 18), "divided by all six", denominator="rows"),
            _case("index", 5, 12, ("positions", 0, 3, 0, 11, 7), "a token's id stands for a row that does not count", ignore_index=0),
            _case("nothing", 3, 8, ("positions", -100), "no row counts: 0 and no gradient", empty="zero"),
            _case("large", 5, 24, ("positions", 0, 23, 7, 7, 1), "exp of logits near ±1e4 overflows", logits=("normal", 4000.0)),
            _case("near", 6, 16, ("integers", 0, 16), "large and nearly equal logits", logits=("uniform", 9990.0, 10000.0)),
            _case("sure", 4, 9, ("positions", 2), "a loss far below 1", logits=("values", 0.0, 0.5, 14.0, *[-1.0] * 6)),
        ),
        "4*n*v",
        "DeepSeek-V3 paper eq. 24; spec §5; torch.nn.functional.cross_entropy",
    )
)
