"""Dot products as one node of the tape, and arrays whose elements are mpf or tape variables; shares nothing with `ref`.

Equation: dot(x, y) = sum_i x_i y_i, summed exactly and rounded once to 50 digits; d dot / dx_i = y_i, d dot / dy_i = x_i.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from mpmath.libmp import mpf_mul, mpf_pos, mpf_sum

from .tape import CTX, ONE, Scalar, Tape, Var, to_float64, value_of

Arrays = dict[str, np.ndarray]


def dot(xs: Iterable[Scalar], ys: Iterable[Scalar]) -> Scalar:
    """sum_i x_i y_i; a single node, however long, if any operand is on the tape."""
    xs, ys = list(xs), list(ys)
    us, vs = [value_of(x) for x in xs], [value_of(y) for y in ys]
    products = [mpf_mul(u._mpf_, v._mpf_) for u, v in zip(us, vs, strict=True)]  # no precision given: exact
    summed = CTX.make_mpf(mpf_pos(mpf_sum(products), *CTX._prec_rounding))
    parents = [(x, v) for x, v in zip(xs, vs, strict=True) if isinstance(x, Var)]
    parents += [(y, u) for y, u in zip(ys, us, strict=True) if isinstance(y, Var)]
    return Var(parents[0][0].tape, summed, *parents) if parents else summed


def total(xs: Sequence[Scalar]) -> Scalar:
    """sum_i x_i."""
    return dot(xs, [ONE] * len(xs))


def matvec(matrix: Iterable[Iterable[Scalar]], vector: Sequence[Scalar]) -> list[Scalar]:
    """out_i = sum_j matrix_ij vector_j."""
    return [dot(row, vector) for row in matrix]


def log(u: Scalar) -> Scalar:
    return Var(u.tape, CTX.log(u.value), (u, ONE / u.value)) if isinstance(u, Var) else CTX.log(u)


def expect(inputs: Arrays, shapes: dict[str, tuple[int, ...]]) -> None:
    """ValueError where an input that is given has another shape, lest a slice quietly cut it to fit."""
    for name, shape in shapes.items():
        if inputs.get(name) is not None and inputs[name].shape != shape:
            raise ValueError(f"{name} has shape {inputs[name].shape}, expected {shape}")


def integers(array: np.ndarray, name: str) -> list[Any]:
    """The (nested) list of an integer array."""
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, got {array.dtype}")
    return array.tolist()


def scalars(array: np.ndarray, tape: Tape | None = None) -> np.ndarray:
    """The same array with its elements, exactly, as mpf, or, given a tape, as variables on it."""
    values = [CTX.mpf(v) for v in array.ravel().tolist()]
    return packed(values if tape is None else tape.vars(values), array.shape)


def packed(values: list[Scalar], shape: tuple[int, ...]) -> np.ndarray:
    """An array of that shape with those elements in row-major order."""
    return np.array(values, object).reshape(shape)


def rounded(array: np.ndarray) -> np.ndarray:
    """Every mpf rounded once to float64."""
    return np.array([to_float64(v) for v in array.ravel().tolist()], np.float64).reshape(array.shape)


def pull_back(tape: Tape, *pairs: tuple[np.ndarray, np.ndarray]) -> None:
    """Gradients of L = sum over (output, cotangent) of <output, cotangent>; what is a constant in an output has its cotangent ignored."""
    outputs, weights = [], []
    for output, cotangent in pairs:
        if output.shape != cotangent.shape:
            raise ValueError(f"a cotangent has shape {cotangent.shape}, its output {output.shape}")
        for u, w in zip(output.ravel().tolist(), cotangent.ravel().tolist(), strict=True):
            if isinstance(u, Var):
                outputs.append(u)
                weights.append(CTX.mpf(w))
    if outputs:
        tape.backward(dot(outputs, weights))


def gradients(array: np.ndarray) -> np.ndarray:
    """The gradient of every variable, rounded once to float64."""
    return rounded(packed([u.grad for u in array.ravel().tolist()], array.shape))


def _linear(inputs: Arrays, tape: Tape | None = None) -> tuple[Arrays, np.ndarray]:
    """y = x weight^T, row by row, as scalars."""
    (n, d), o = inputs["x"].shape, len(inputs["weight"])
    expect(inputs, {"weight": (o, d)})
    given = {name: scalars(inputs[name], tape) for name in ("x", "weight")}
    rows = [u for row in given["x"].tolist() for u in matvec(given["weight"], row)]
    return given, packed(rows, (n, o))


def forward(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """linear: x, weight -> y."""
    return {"y": rounded(_linear(inputs)[1])}


def backward(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """linear backward: x, weight, dy -> dx, dweight."""
    tape = Tape()
    given, y = _linear(inputs, tape)
    pull_back(tape, (y, inputs["dy"]))
    return {f"d{name}": gradients(array) for name, array in given.items()}
