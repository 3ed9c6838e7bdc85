"""The reference's named intermediates, where a subject returns them beside its outputs: which is the first that is wrong."""

import functools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from ..ref.op import OPS, Tensor
from ..ref.xp import recording
from .band import Band, carrier, scatter, spread_of
from .draw import draw_case
from .errors import Misbehaved
from .judge import FAIL, Judgement, Question, Returned, judge, judge_array
from .precision import PRECISIONS
from .wire import plain

Two = tuple[dict[str, Returned], dict[str, Returned]]


@functools.cache
def names_of(op: str) -> tuple[str, ...]:
    """What a subject may return beside the outputs of an op, in the order in which the reference comes by it (in some quick case)."""
    declared, precision = OPS[op], PRECISIONS["fp32"]
    seen: list[list[str]] = []
    for case in sorted((c for c in declared.cases if c.quick), key=lambda c: math.prod(c.dims.values())):
        inputs = draw_case(declared, case, "forward", precision)
        seen.append(list(_recorded(Question(declared, "forward", inputs, case.attrs, precision), inputs)))
        if not seen[0]:  # what shows nothing in its smallest case has nothing to show
            break
    outputs = {t.name for t in declared.outputs}
    return tuple(dict.fromkeys(name for names in sorted(seen, key=len, reverse=True) for name in names if name not in outputs))


def more_of(op: str, names: Iterable[str], outputs: Collection[str]) -> list[str]:
    """Of what a subject returned, the intermediates, in its order; Misbehaved if there is what the reference does not name."""
    more = [name for name in names if name not in outputs]
    known = names_of(op) if more else ()  # runs the reference
    if unknown := [str(name) for name in more if name not in known]:
        also = f" and, if it likes, {', '.join(known)}" if known else " alone"
        raise Misbehaved(f"returned {plain(', '.join(unknown), 100)}; expected {', '.join(outputs)}{also}")
    return more


def beside(question: Question, returned: Mapping[str, Returned]) -> Two:
    """The outputs, and what was returned beside them."""
    names = [t.name for t in question.op.signature_of(question.direction, question.inputs)[1]]
    return {n: returned[n] for n in names}, {n: r for n, r in returned.items() if n not in names}


def _recorded(question: Question, arrays: Mapping[str, Any]) -> dict[str, Any]:
    with recording() as record, np.errstate(all="ignore"):
        question.op.run(question.direction, arrays, question.attrs)
    return record


def first_wrong(question: Question, outputs: Mapping[str, Returned], more: Mapping[str, Returned], band: Band) -> Iterator[tuple[str, str]]:
    """The first intermediate that is wrong, and a sentence about it; nothing if none was returned. Bands are of the runs that the
    outputs' have, for the subject's own decision where that may be."""
    if not more:
        return
    given = {}
    if question.op.choice and question.direction == "forward":
        name = question.op.choice[0]
        given = {name: (judge(question, outputs, band).band or band).truth[name]}
    truth = {n: np.asarray(x) for n, x in _recorded(question, carrier({**question.inputs, **given}, np.float64)).items()}
    asked = [n for n in truth if n in more or n in outputs]
    runs = scatter(lambda arrays: _recorded(question, arrays), {**question.inputs, **given}, question.precision, asked)
    right = []
    for name in asked:
        exact, returned = truth[name], more.get(name) or outputs[name]
        if returned.values.size != exact.size:
            yield name, f"{_are_right(right)}{name} has shape {returned.values.shape}; expected {exact.shape}."
            return
        found = _judged(name, returned.values.reshape(exact.shape), exact, runs[name], question)
        if found.verdict == FAIL:
            yield name, f"{_are_right(right)}{name} is the first that is wrong: {_much(name, found)}."
            return
        right.append(name)
    yield right[-1], f"{_are_right(right)[:-2]}: look at what comes after {right[-1]}."


def _judged(name: str, got: np.ndarray, exact: np.ndarray, runs: np.ndarray, question: Question) -> Judgement:
    tensor = Tensor(name, (), "real" if exact.dtype.kind == "f" else "exact")
    band = Band({name: exact})
    if tensor.kind == "real":
        band.sigma[name], band.limits[name] = spread_of(exact, runs, question.precision)
    judgement = Judgement()
    judge_array(tensor, got, band, np.ones(exact.shape, dtype=bool), question, judgement)
    return judgement


def _are_right(names: list[str]) -> str:
    return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} right, " if names else ""


def _much(name: str, found: Judgement) -> str:
    statistics = found.statistics.get(name, {})
    if "rms" in statistics:
        return f"{statistics['rms']:,.3g} σ rms" if statistics["rms"] < 1000 else f"{statistics['rms']:,.0f} σ rms"
    return found.reasons[0]


__all__ = ["beside", "first_wrong", "names_of"]
