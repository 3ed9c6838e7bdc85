"""What could stand in the reference's place: attributes' other values and known bugs, each with what it makes of a question's inputs."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args, get_origin

import numpy as np

from ..ref.op import Op
from .band import Arrays, Band, band_of, truth_of
from .bugs import Bug, bugs_of
from .judge import FAIL, PASS, Question, Returned, as_returned, judge


@dataclass(frozen=True)
class Candidate:
    """Another function, or other attributes: what it is called, the question whose answer it would be, and that answer in float64."""

    id: str
    text: str
    mend: str
    asked: Question
    bug: Bug | None = None
    change: Mapping[str, Any] = field(default_factory=dict)
    truth: Arrays = field(default_factory=dict)


def alternatives(op: Op, attrs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The other value of each attribute that has a fixed set of them."""
    own = {**op.defaults, **attrs}
    choices = {name: get_args(p.annotation) for name, p in op.attrs.items() if get_origin(p.annotation) is Literal}
    choices |= {name: (True, False) for name, p in op.attrs.items() if p.annotation is bool}
    return [{name: value} for name, values in choices.items() for value in values if value != own[name]]


def candidates(question: Question) -> Iterator[Candidate]:
    """Conventions and known bugs. What refuses these inputs or sizes is none."""
    for candidate in _posed(question):
        if (truth := _answer(candidate.asked)) is not None:
            yield replace(candidate, truth=truth)


def _posed(question: Question) -> Iterator[Candidate]:
    """A value that a known bug has takes its name: what is known goes before what might be. A backward is asked by itself, so that its own
    bugs go before those of a forward that it belongs to."""
    bugs = sorted(bugs_of(question.op, question.direction), key=lambda bug: question.direction == "backward" and bug.fwd is not None)
    own = {**question.op.defaults, **question.attrs}
    changes = [dict(b.attrs) for b in bugs if any(own[k] != v for k, v in b.attrs.items())]
    changes += [c for c in alternatives(question.op, question.attrs) if c not in changes]
    for change in changes:
        (name, value), *_ = change.items()
        known = next((b for b in bugs if dict(b.attrs) == change), None)
        text = known.what if known else f"The output is right for {name}={value}."
        mend = f"--attr {name}={value} if that is your contract"
        yield Candidate(known.id if known else f"{name}={value}", text, mend, posed(question, None, change), None, change)
    for bug in bugs:
        if not bug.attrs:
            yield Candidate(bug.id, bug.what, bug.sources, posed(question, bug, {}), bug)


def posed(question: Question, bug: Bug | None, change: Mapping[str, Any]) -> Question:
    """The question with a bug in its op, or with other attributes."""
    if bug is None:
        return replace(question, attrs={**question.attrs, **change})
    variant = bug.variant(question.op)
    return replace(question, op=replace(variant, choice=None) if question.direction == "forward" else variant)


def _answer(asked: Question) -> Arrays | None:
    try:
        return truth_of(asked.op, asked.direction, asked.inputs, asked.attrs)
    except ValueError:
        return None


class Cases:
    """The cases of an op that a subject is asked, by name: which of them a candidate would fail. Each is asked once."""

    def __init__(self, asked: Callable[[], Iterable[tuple[str, Question, Band]]]):
        self._asked = asked
        self._failed: dict[tuple[str, str], bool] = {}

    @functools.cached_property
    def questions(self) -> list[tuple[str, Question, Band]]:
        return list(self._asked())

    def failed_by(self, candidate: Candidate) -> tuple[str, ...]:
        for name, question, band in self.questions:
            if (candidate.id, name) not in self._failed:
                self._failed[candidate.id, name] = would_fail(candidate, question, band)
        return tuple(name for name, _, _ in self.questions if self._failed[candidate.id, name])


def would_fail(candidate: Candidate, question: Question, band: Band) -> bool:
    """Whether it fails a case. A subject built with an attribute that the case refuses would not have passed it; a variant that was not
    written for the case says nothing."""
    theirs = _answer(posed(question, candidate.bug, candidate.change))
    if theirs is None:
        return candidate.bug is None
    with np.errstate(all="ignore"):
        return judge(question, as_returned(question, theirs), band).verdict == FAIL


def worth_asking(candidate: Candidate, question: Question, returned: Mapping[str, Returned], truth: Arrays) -> bool:
    """What one run can say: whether it may be that the output is the candidate's. (Whether it is, its band says, which costs many.)"""
    if candidate.bug is None and all(_equal(candidate.truth[n], y) for n, y in truth.items()):
        return True  # an attribute that says where 16 bits are stored changes no truth
    with np.errstate(all="ignore"):
        return _decides_no_worse(question, returned, candidate.truth, truth)


def agrees(candidate: Candidate, question: Question, returned: Mapping[str, Returned], truth: Arrays) -> bool:
    """Whether the output is the candidate's and not the reference's."""
    theirs, asked = candidate.truth, candidate.asked
    try:
        with np.errstate(all="ignore"):
            if candidate.bug is None:
                return within(asked, returned, band_for(asked, theirs))
            if question.op.choice and question.direction == "forward":
                return _decides_alike(question, returned, candidate.bug, theirs)
            band = band_for(asked, theirs)  # what cannot be told from the reference on these inputs explains nothing
            return within(asked, returned, band) and not within(asked, as_returned(question, truth), band)
    except ValueError:
        return False


def band_for(question: Question, truth: Arrays | None = None) -> Band | None:
    try:
        return band_of(question.op, question.direction, question.inputs, question.attrs, question.precision, truth=truth)
    except ValueError:  # these sizes do not allow the attribute
        return None


def within(question: Question, returned: Mapping[str, Returned], band: Band | None) -> bool:
    if band is None or any(band.truth[name].shape != r.values.shape for name, r in returned.items()):
        return False
    return judge(question, returned, band).verdict == PASS


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a, b, equal_nan=b.dtype.kind == "f")


def _decides_no_worse(question: Question, returned: Mapping[str, Returned], theirs: Arrays, truth: Arrays) -> bool:
    """Whether a candidate decides no worse than the reference, and is nearer to the output where that can be compared."""
    op = question.op
    if op.choice and question.direction == "forward":
        name = op.choice[0]
        got, apart = returned[name].values, []
        for decided in (theirs[name], truth[name]):
            if decided.shape != got.shape:
                return False
            same = got == decided if got.dtype.kind != "f" else (got == decided) | (np.isnan(got) & np.isnan(decided))
            apart.append(float(np.mean(same)) if same.size else 1.0)
            sets = np.sort(got, -1) == np.sort(decided, -1) if got.dtype.kind != "f" and got.ndim else same
            apart.append(float(np.mean(sets)) if sets.size else 1.0)
        if apart[1] < apart[3]:
            return False
        if apart[0] < 1:
            return True  # other outputs belong to other decisions
    return _nearer(question, returned, theirs, truth)


def _nearer(question: Question, returned: Mapping[str, Returned], candidate: Arrays, truth: Arrays) -> bool:
    """Whether some output is nearer to the candidate than to the truth. It costs one run, where a band costs many."""
    kinds = {t.name: t.kind for t in question.op.signature_of(question.direction, question.inputs)[1]}
    for name, r in returned.items():
        if r.values.dtype.kind not in "biuf":
            return False
        got, other, own = (np.asarray(y, dtype=np.float64) for y in (r.values, candidate[name], truth[name]))
        if got.shape != other.shape:
            continue
        gaps = [np.where((got == y) | (np.isnan(got) & np.isnan(y)), 0.0, np.abs(got - y)) for y in (other, own)]
        if kinds[name] != "real":  # bit for bit: the sign of a zero counts
            zeros = [(got == 0) & (y == 0) & (np.signbit(got) != np.signbit(y)) for y in (other, own)]
            gaps = [np.where(z, np.finfo(np.float64).tiny, g) for g, z in zip(gaps, zeros, strict=True)]
        if r.values.dtype.kind == "u":  # bit patterns are no quantities
            gaps = [np.minimum(g, 1.0) for g in gaps]
        gaps = [np.where(np.isfinite(g), g, np.inf) for g in gaps]
        if np.any(gaps[0] < gaps[1]) and not np.sum(gaps[0] ** 2) > np.sum(gaps[1] ** 2):
            return True
    return False


def _decides_alike(question: Question, returned: Mapping[str, Returned], bug: Bug, theirs: Arrays) -> bool:
    """For an op with a decision: the same sets as the bug's, and the bug's other outputs for the subject's order of them."""
    op = question.op
    assert op.choice is not None
    name = op.choice[0]
    variant = replace(bug.variant(op), choice=op.choice)
    got, decided = returned[name].values, theirs[name]
    index = next(t for t in op.outputs if t.name == name).kind == "index"
    if not np.array_equal(np.sort(got, -1), np.sort(decided, -1)) if index else not np.array_equal(got, decided, equal_nan=True):
        return False
    own, known = (got, None) if index else (None, theirs)
    band = band_of(variant, "forward", question.inputs, question.attrs, question.precision, own, known)
    band = replace(band, truth={**band.truth, name: got})
    return within(replace(question, op=replace(variant, choice=None)), returned, band)
