"""Reverse-mode differentiation over 50-digit mpmath scalars; shares nothing with `ref`.

Equation: with L the last node, dL/du = sum over the nodes v made from u of dL/dv * (partial v / partial u), nodes taken in reverse order.
A formula written with +, *, /, `exp`, `sqrt`, `log1p` runs on plain mpf (its value) and on `Var` (its value and derivatives) alike.
"""

from __future__ import annotations

import math
from typing import Any

import mpmath

from .floats import BINARY64, FloatFormat, round_ratio

CTX = mpmath.MPContext()  # of our own: nobody else's mp.dps reaches it
CTX.dps = 50

ONE = CTX.mpf(1)
Scalar = Any  # mpf or Var


class Var:
    """A node: its value, and (parent, partial derivative) pairs."""

    __slots__ = ("grad", "parents", "tape", "value")

    def __init__(self, tape: Tape, value: Any, *parents: tuple[Var, Any]) -> None:
        self.tape, self.value, self.parents, self.grad = tape, value, parents, CTX.zero
        tape.nodes.append(self)

    def __add__(self, other: Scalar) -> Var:
        if isinstance(other, Var):
            return Var(self.tape, self.value + other.value, (self, ONE), (other, ONE))
        return Var(self.tape, self.value + other, (self, ONE))

    def __mul__(self, other: Scalar) -> Var:
        if isinstance(other, Var):
            return Var(self.tape, self.value * other.value, (self, other.value), (other, self.value))
        return Var(self.tape, self.value * other, (self, other))

    def __truediv__(self, other: Scalar) -> Var:
        if isinstance(other, Var):
            quotient = self.value / other.value
            return Var(self.tape, quotient, (self, 1 / other.value), (other, -quotient / other.value))
        return Var(self.tape, self.value / other, (self, ONE / other))

    def __rtruediv__(self, other: Scalar) -> Var:
        quotient = other / self.value
        return Var(self.tape, quotient, (self, -quotient / self.value))

    def __neg__(self) -> Var:
        return Var(self.tape, -self.value, (self, -ONE))

    __radd__, __rmul__ = __add__, __mul__


class Tape:
    """The nodes of one computation, in order of creation."""

    def __init__(self) -> None:
        self.nodes: list[Var] = []

    def vars(self, values: list[Any]) -> list[Var]:
        return [Var(self, v) for v in values]

    def backward(self, output: Scalar) -> None:
        """Puts d output / d node into every node's `grad`; call once per tape."""
        output.grad = ONE
        for node in reversed(self.nodes):
            if node.grad:  # what does not reach the output keeps an exact zero
                for parent, partial in node.parents:
                    parent.grad += node.grad * partial


def exp(u: Scalar) -> Scalar:
    if not isinstance(u, Var):
        return CTX.exp(u)
    value = CTX.exp(u.value)
    return Var(u.tape, value, (u, value))


def sqrt(u: Scalar) -> Scalar:
    if not isinstance(u, Var):
        return CTX.sqrt(u)
    value = CTX.sqrt(u.value)
    return Var(u.tape, value, (u, 1 / (2 * value)))


def log1p(u: Scalar) -> Scalar:
    """log(1 + u), which keeps its digits where u is tiny."""
    return Var(u.tape, CTX.log1p(u.value), (u, 1 / (1 + u.value))) if isinstance(u, Var) else CTX.log1p(u)


def mpfs(values: list[float]) -> list[Any]:
    """Python floats as mpf, exactly."""
    return [CTX.mpf(v) for v in values]


def value_of(u: Scalar) -> Any:
    """The mpf of a scalar, on the tape or not."""
    return u.value if isinstance(u, Var) else u


def to_format(number: Any, fmt: FloatFormat) -> float:
    """An mpf rounded once to a format of binary64's range or less (mpmath's own conversion rounds twice among the subnormals)."""
    if not CTX.isfinite(number):
        return float(number)
    negative, man, exponent, bits = number._mpf_
    sign = -1.0 if negative else 1.0
    if abs(exponent + bits) > 1100:  # far outside binary64, where the integers below could be of any length
        return math.copysign(math.inf if exponent + bits > 0 else 0.0, sign)
    return round_ratio(sign, int(man) << max(exponent, 0), 1 << max(-exponent, 0), fmt)


def to_float64(number: Any) -> float:
    """An mpf rounded once to binary64."""
    return to_format(number, BINARY64)
