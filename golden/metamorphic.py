"""How the answers to two related questions are compared, with no vector of either (the relations are in properties.py).

What two calls return is compared with the room that two correct calls have: for real numbers twice the judge's own, 2·SLACK·DEVIATIONS σ
of the band for these inputs; for codes, scales and indices none. Rows whose decision rounding could turn are left out.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..ref.op import Case, Op, Tensor
from .band import DEVIATIONS, SLACK, Arrays, Band, band_of
from .judge import Question, choosable, code_format, differing, regrets, unstable_rows
from .strategies import SIZES, Drawn


@dataclass(frozen=True)
class Ask:
    """The subject, as a function of a question; and whether its backward is handed the forward's decision."""

    answer: Callable[[Drawn], Arrays]
    handed_choice: bool = True

    def __call__(self, q: Drawn) -> Arrays:
        return self.answer(q)


def case_sizes(op: Op, case: Case) -> dict[str, int]:
    """A case's sizes; those that may vary, as large as they come."""
    return {**case.dims, **{letter: max(SIZES) for letter in op.vary if letter in case.dims}}


class PropertyError(AssertionError):
    """A property does not hold; says where."""


class Inapplicable(Exception):
    """These inputs say nothing about the property."""


@dataclass(frozen=True)
class Property:
    """What must hold, of which ops and directions, and the check: it asks, and raises PropertyError. suits: the cases that say something
    about it, by their attributes (the op's defaults among them) and sizes."""

    name: str
    what: str
    applies: Callable[[Op, str], bool]
    check: Callable[[Ask, Drawn], None]
    suits: Callable[[Mapping[str, Any]], bool] = lambda about: True

    def narrowed(self, op: Op, large: int = 20_000) -> Op:
        """The op with the cases that suit, of at most so many elements; the smallest if all are larger."""

        def elements(case: Case) -> int:
            letters = {**op.defaults, **case.attrs, **case.dims}
            return sum(math.prod(t.shape(letters)) for t in op.signature_of("forward", case.draw)[0])

        cases = [c for c in op.cases if self.suits({**op.defaults, **case_sizes(op, c), **c.attrs})]
        return replace(op, cases=tuple([c for c in cases if elements(c) <= large] or sorted(cases, key=elements)[:1]))


def changed(q: Drawn, /, **inputs: np.ndarray) -> Drawn:
    return replace(q, inputs={**q.inputs, **inputs})


def outputs_of(q: Drawn) -> tuple[Tensor, ...]:
    return q.op.signature_of(q.direction, q.inputs)[1]


def inputs_of(q: Drawn) -> tuple[Tensor, ...]:
    return q.op.signature_of(q.direction, q.inputs)[0]


def band(q: Drawn, got: Arrays) -> Band:
    """The band of these inputs, for the decision that was made where it can be made at all."""
    choice = None
    if q.op.choice and q.direction == "forward" and _is_index(q.op):
        choice = got[q.op.choice[0]]
        choice = choice if choosable(choice, Question(q.op, q.direction, q.inputs, q.attrs, q.precision)).all() else None
    return band_of(q.op, q.direction, q.inputs, q.attrs, q.precision, choice)


def settled(ask: Ask, q: Drawn, got: Arrays, expected: Arrays) -> np.ndarray | None:
    """[n]: rows whose decisions are held to one another; None for an op without one. Not where both decisions, though they differ, are
    ones that rounding (or a tie) leads to; in a backward that decides for itself, not where rounding could turn the decision."""
    if not q.op.choice or not _is_index(q.op):
        return None
    name = q.op.choice[0]
    question = Question(q.op, "forward", q.inputs, q.attrs, q.precision)
    if q.direction == "backward":
        return None if ask.handed_choice else ~unstable_rows(question)
    differs = np.any(np.sort(got[name], -1) != np.sort(expected[name], -1), axis=-1)
    if not differs.any():
        return None
    tensor = next(t for t in q.op.outputs if t.name == name)
    open_ = differs.copy()
    for choice in (got[name], expected[name]):
        if not choosable(choice, question).all():
            return None
        regret, noise = regrets(question, tensor, choice, differs)
        open_ &= np.isfinite(regret) & (regret <= SLACK * DEVIATIONS * noise)
    return ~open_


def _is_index(op: Op) -> bool:
    return op.choice is not None and next(t for t in op.outputs if t.name == op.choice[0]).kind == "index"


def in_order(q: Drawn, got: Arrays) -> Arrays:
    """A decision is a set: its members ascend, and what belongs to them follows."""
    if not q.op.choice or q.direction != "forward" or not _is_index(q.op):
        return got
    name = q.op.choice[0]
    dims = next(t.dims for t in q.op.outputs if t.name == name)
    order = np.argsort(got[name], axis=-1, kind="stable")
    return {t.name: np.take_along_axis(got[t.name], order, -1) if t.dims == dims else got[t.name] for t in q.op.outputs}


def compare(
    ask: Ask, q: Drawn, got: Arrays, expected: Arrays, what: str, keep: Mapping[str, np.ndarray] | None = None, of: Band | None = None
) -> None:
    """What was returned against what another call leads one to expect of this question. keep: by output, the elements that are compared."""
    of = of or band(q, expected)
    keep = {**kept_rows(q, settled(ask, q, got, expected)), **(keep or {})}
    for t in outputs_of(q):
        if t.name not in expected:
            continue
        a, b, truth = got[t.name], expected[t.name], of.truth[t.name]
        if a.shape != b.shape:
            raise PropertyError(f"{what}: {t.name} has shape {a.shape}; expected {b.shape}")
        if t.kind == "real":
            a, b = a.astype(np.float64), b.astype(np.float64)
            with np.errstate(invalid="ignore"):
                wrong = np.isfinite(truth) & ~((np.abs(a - b) <= 2 * SLACK * DEVIATIONS * of.sigma[t.name]) | (a == b))
        else:
            question = Question(q.op, q.direction, q.inputs, q.attrs, q.precision)
            wrong = differing(t, a, b, code_format(question))
        if t.name in keep:
            wrong = wrong & keep[t.name]
        if wrong.any():
            at = tuple(int(i) for i in np.argwhere(wrong)[0])
            room = f", room {2 * SLACK * DEVIATIONS * of.sigma[t.name][at]:.2g}" if t.kind == "real" else ""
            place = f"{t.name}[{', '.join(map(str, at))}]"
            raise PropertyError(f"{what}: {place} is {a[at]!r}; expected {b[at]!r}{room} [{int(wrong.sum())} of {wrong.size}]")


def kept_rows(q: Drawn, rows: np.ndarray | None) -> dict[str, np.ndarray]:
    """By output, the elements that no turning decision reaches: stable rows; of what gathers from all rows, none if one may turn."""
    if rows is None:
        return {}
    keep = {}
    for t in outputs_of(q):
        shape = [len(rows) if d == "n" else 1 for d in t.dims]
        keep[t.name] = rows.reshape(shape) if "n" in t.dims else np.all(rows).reshape([1] * len(t.dims))
    return keep
