"""rmsnorm and its backward pass in 50-digit arithmetic; shares nothing with `ref`.

Equation: y[n,d] = x[n,d] * weight[d] / sqrt(mean_d x^2 + eps).
Backward: the reverse-mode derivative of L = sum(dy * y) by `tape`, of that same equation; the closed form is not used.
"""

from typing import Any

import numpy as np

from .edges import carrier, choose, fill
from .tape import CTX, Scalar, Tape, mpfs, sqrt, to_float64

Arrays = dict[str, np.ndarray]


def _attributes(attrs: dict[str, Any]) -> Any:
    """eps. `cast_order` only says where a bf16 implementation rounds: it has no part in the equation."""
    at = fill({"eps": 1e-6, "cast_order": "weight_then_cast"}, attrs)
    choose("cast_order", at["cast_order"], ("weight_then_cast", "cast_then_weight"))
    return CTX.mpf(float(at["eps"]))


def rmsnorm_row(x: list[Scalar], weight: list[Scalar], eps: Any) -> list[Scalar]:
    """One row of y, on mpf or on tape variables."""
    rstd = 1 / sqrt(sum(v * v for v in x) / len(x) + eps)
    return [v * rstd * w for v, w in zip(x, weight, strict=True)]


def forward(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """rmsnorm: x, weight -> y."""
    x, eps = inputs["x"], _attributes(attrs)
    carrier(x)
    weight = mpfs(inputs["weight"].tolist())
    y = [[to_float64(v) for v in rmsnorm_row(mpfs(row), weight, eps)] for row in x.tolist()]
    return {"y": np.array(y, np.float64).reshape(x.shape)}


def backward(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """rmsnorm_bwd: x, weight, dy -> dx, dweight."""
    x, eps = inputs["x"], _attributes(attrs)
    carrier(x)
    values = mpfs(inputs["weight"].tolist())
    dx, dweight = [], [CTX.zero] * len(values)
    for row, dy in zip(x.tolist(), inputs["dy"].tolist(), strict=True):
        tape = Tape()  # rows meet only in dweight, which is a sum over them
        xs, weight = tape.vars(mpfs(row)), tape.vars(values)
        tape.backward(sum(y * g for y, g in zip(rmsnorm_row(xs, weight, eps), mpfs(dy), strict=True)))
        dx.append([to_float64(v.grad) for v in xs])
        dweight = [total + w.grad for total, w in zip(dweight, weight, strict=True)]
    return {"dx": np.array(dx, np.float64).reshape(x.shape), "dweight": np.array([to_float64(v) for v in dweight], np.float64)}
