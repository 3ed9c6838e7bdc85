"""The metrics that the field's own tests use, as those tests have them. The kill matrix prints what they reach beside Leadline's judge.

All are given what helps them: the reference rounded as the candidate is, places where both are NaN or the same infinity left out, indices
and packed bytes compared exactly, codes by the values that they stand for. An output fails if any of an op's arrays does.
"""

from collections.abc import Callable, Mapping

import numpy as np

from ..ref.cast import decode
from ..ref.formats import FORMATS, Format
from ..ref.op import Op, Tensor
from .judge import Question, Returned

TORCH_DEFAULTS = {"fp64": (1e-7, 1e-7), "fp32": (1.3e-6, 1e-5), "bf16": (1.6e-2, 1e-5), "fp16": (1e-3, 1e-5)}  # rtol, atol by dtype
CALC_DIFF, COSINE, WITHIN, SHARE = 1e-3, 0.9999, 0.1, 0.85


def allclose(x: np.ndarray, y: np.ndarray, rtol: float, atol: float) -> bool:
    """|x - y| <= atol + rtol |y| everywhere: torch.allclose and torch.testing.assert_close, y the reference."""
    with np.errstate(invalid="ignore"):
        return bool(np.all((x == y) | (np.abs(x - y) <= atol + rtol * np.abs(y))))


def calc_diff(x: np.ndarray, y: np.ndarray) -> float:
    """1 - 2<x,y> / (<x,x> + <y,y>), DeepGEMM's and FlashMLA's; 0 where both are zero."""
    power = float(np.sum(x * x) + np.sum(y * y))
    return 1.0 - 2.0 * float(np.sum(x * y)) / power if power else 0.0


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    """<x,y> / (|x| |y|); 1 where both are zero, 0 where one is."""
    lengths = float(np.sqrt(np.sum(x * x)) * np.sqrt(np.sum(y * y)))
    if lengths:
        return float(np.sum(x * y)) / lengths
    return 1.0 if not (x.any() or y.any()) else 0.0


def share_within(x: np.ndarray, y: np.ndarray, tolerance: float) -> float:
    """The share of elements whose error is at most a part of the candidate's own size."""
    with np.errstate(invalid="ignore"):
        return float(np.mean((x == y) | (np.abs(x - y) <= tolerance * np.abs(x)))) if x.size else 1.0


Metric = Callable[[np.ndarray, np.ndarray, str], bool]  # candidate, reference, the dtype's name: whether it passes
METRICS: dict[str, Metric] = {
    "allclose(1e-2)": lambda x, y, fmt: allclose(x, y, 1e-2, 1e-2),
    "assert_close": lambda x, y, fmt: allclose(x, y, *TORCH_DEFAULTS.get(fmt, (0.0, 0.0))),
    "calc_diff(1e-3)": lambda x, y, fmt: calc_diff(x, y) < CALC_DIFF,
    "cosine(0.9999)": lambda x, y, fmt: cosine(x, y) > COSINE,
    "85% in 10%": lambda x, y, fmt: share_within(x, y, WITHIN) >= SHARE,
}


def rejecting(question: Question, returned: Mapping[str, Returned], reference: Mapping[str, Returned]) -> list[str]:
    """The metrics that fail these outputs."""
    _, tensors = question.op.signature_of(question.direction, question.inputs)
    failed: set[str] = set()
    for tensor in tensors:
        x, y = returned[tensor.name].values, reference[tensor.name].values
        if x.shape != y.shape:
            return list(METRICS)
        if values := _values(question, tensor, x, y):
            failed.update(name for name, passes in METRICS.items() if not passed(passes, *values))
        else:
            x, y = (np.sort(v, -1) if _is_choice(question.op, tensor) else v for v in (x, y))
            if not np.array_equal(x, y):
                return list(METRICS)
    return [name for name in METRICS if name in failed]


def passed(metric: Metric, x: np.ndarray, y: np.ndarray, fmt: str) -> bool:
    """Whether a metric passes the candidate x. What is not finite alike is a NaN of most metrics, which no comparison passes."""
    alike = (x == y) | (np.isnan(x) & np.isnan(y))
    both = alike & ~np.isfinite(x)
    x, y = x[~both], y[~both]
    if not (np.isfinite(x) & np.isfinite(y)).all() and metric is not METRICS["85% in 10%"]:
        return False
    with np.errstate(over="ignore", invalid="ignore"):
        return metric(x, y, fmt)


def _values(question: Question, tensor: Tensor, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, str] | None:
    """Both as float64 and the dtype that they are compared in; None for what has no value (indices, packed bytes)."""
    if tensor.kind == "code":
        fmt = code_format(question)
        if fmt is None:
            return None
        x, y = (np.asarray(decode(fmt, v), dtype=np.float64) for v in (x, y))
        return x, y, fmt.name  # torch: FP8 must be equal
    if tensor.kind == "index" or x.dtype.kind != "f":
        return None
    return x.astype(np.float64), y.astype(np.float64), question.precision.io.name if tensor.kind == "real" else "fp32"


def code_format(question: Question) -> Format | None:
    """The format of an op's codes; None for bytes that are moved, whatever they mean."""
    op = question.op
    if op.name.startswith(("pack.", "unpack.")):
        return None
    return FORMATS.get(question.attrs.get("format") or op.defaults.get("format") or op.name.rsplit(".", 1)[-1])


def _is_choice(op: Op, tensor: Tensor) -> bool:
    return op.choice is not None and op.choice[0] == tensor.name
