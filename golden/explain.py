"""Why a case fails: which other attribute or known bug, put in place of the reference, the subject's output agrees with."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args, get_origin

import numpy as np

from ..ref.op import Op
from .band import Band, band_of, truth_of
from .bugs import Bug, bugs_of
from .judge import PASS, Question, Returned, as_returned, judge
from .precision import PRECISIONS


@dataclass(frozen=True)
class Explanation:
    """What fits, in a sentence, and the option that declares it where it is a convention."""

    id: str
    text: str
    mend: str = ""

    def __str__(self) -> str:
        return self.text + (f" ({self.mend})" if self.mend else "")


def alternatives(op: Op, attrs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The other value of each attribute that has a fixed set of them."""
    own = {**op.defaults, **attrs}
    choices = {name: get_args(p.annotation) for name, p in op.attrs.items() if get_origin(p.annotation) is Literal}
    choices |= {name: (True, False) for name, p in op.attrs.items() if p.annotation is bool}
    return [{name: value} for name, values in choices.items() for value in values if value != own[name]]


def explain(question: Question, returned: Mapping[str, Returned]) -> list[Explanation]:
    """Every explanation that turns this FAIL into a PASS: ties, conventions (attributes), then known bugs."""
    found = []
    if question.op.choice and not question.any_tie and question.op.outputs[0].kind == "index":
        relaxed = replace(question, any_tie=True)
        if _agrees(relaxed, returned, _band(relaxed)):
            found.append(
                Explanation("ties", "Only the winners of exact ties differ; the lowest index wins.", "--ties any if yours are open")
            )
    bugs = bugs_of(question.op, question.direction)
    own = {**question.op.defaults, **question.attrs}
    declared = [dict(b.attrs) for b in bugs if any(own[k] != v for k, v in b.attrs.items())]
    changes = alternatives(question.op, question.attrs)
    for change in changes + [c for c in declared if c not in changes]:
        asked = replace(question, attrs={**question.attrs, **change})
        if _agrees(asked, returned, _band(asked)):
            (name, value), *_ = change.items()
            known = next((b for b in bugs if dict(b.attrs) == change), None)
            text = known.what if known else f"The output is right for {name}={value}."
            found.append(Explanation(known.id if known else f"{name}={value}", text, f"--attr {name}={value} if that is your contract"))
    for bug in bugs:
        if not bug.attrs and _fits(question, returned, bug):
            found.append(Explanation(bug.id, bug.what, bug.sources))
    return found + _coarser(question, returned)


COARSER = {"fp64": ("fp32", "bf16"), "fp32": ("bf16",), "bf16": ("bf16-eager",), "fp16": (), "bf16-eager": ()}


def _coarser(question: Question, returned: Mapping[str, Returned]) -> list[Explanation]:
    """Whether the output is right for arithmetic that is coarser than what is claimed."""
    if question.op.exact:
        return []
    for name in COARSER[question.precision.name]:
        asked = replace(question, precision=PRECISIONS[name])
        carried = {k: Returned(r.values, asked.precision.carrier) if r.values.dtype.kind == "f" else r for k, r in returned.items()}
        if _agrees(asked, carried, _band(asked)):
            text = f"The output is right for {name} ({asked.precision.meaning}): it computes in less than it claims."
            return [Explanation(f"precision={name}", text, f"--precision {name} if that is your claim")]
    return []


def _band(question: Question) -> Band | None:
    try:
        return band_of(question.op, question.direction, question.inputs, question.attrs, question.precision)
    except ValueError:  # these sizes do not allow the attribute
        return None


def _agrees(question: Question, returned: Mapping[str, Returned], band: Band | None) -> bool:
    if band is None or any(band.truth[name].shape != r.values.shape for name, r in returned.items()):
        return False
    return judge(question, returned, band).verdict == PASS


def _fits(question: Question, returned: Mapping[str, Returned], bug: Bug) -> bool:
    """Whether the subject agrees with the bug. A bug that cannot be told from the reference on these inputs explains nothing, nor does
    one that is no nearer to the output than the reference is."""
    variant = bug.variant(question.op)
    asked = replace(question, op=replace(variant, choice=None) if question.direction == "forward" else variant)
    with np.errstate(all="ignore"):
        if question.op.choice and question.direction == "forward":
            return _decides_alike(question, returned, bug)
        truth = truth_of(question.op, question.direction, question.inputs, question.attrs)
        if not _nearer(returned, truth_of(asked.op, question.direction, question.inputs, question.attrs), truth):
            return False
        band = _band(asked)
        return _agrees(asked, returned, band) and not _agrees(asked, as_returned(question, truth), band)


def _nearer(returned: Mapping[str, Returned], candidate: Mapping[str, np.ndarray], truth: Mapping[str, np.ndarray]) -> bool:
    """Whether some output is nearer to the candidate than to the truth. It costs one run, where a band costs many."""
    for name, r in returned.items():
        if r.values.dtype.kind not in "biuf":
            return False
        got, other, own = (np.asarray(y, dtype=np.float64) for y in (r.values, candidate[name], truth[name]))
        if got.shape != other.shape:
            continue
        gaps = [np.where((got == y) | (np.isnan(got) & np.isnan(y)), 0.0, np.abs(got - y)) for y in (other, own)]
        gaps = [np.where(np.isfinite(g), g, np.inf) for g in gaps]
        if np.any(gaps[0] < gaps[1]) and not np.sum(gaps[0] ** 2) > np.sum(gaps[1] ** 2):
            return True
    return False


def _decides_alike(question: Question, returned: Mapping[str, Returned], bug: Bug) -> bool:
    """For an op with a decision: the same sets as the bug's, and the bug's other outputs for the subject's order of them."""
    op = question.op
    assert op.choice is not None
    name = op.choice[0]
    variant = replace(bug.variant(op), choice=op.choice)
    plain = band_of(variant, "forward", question.inputs, question.attrs, question.precision)
    got, decided = returned[name].values, plain.truth[name]
    index = next(t for t in op.outputs if t.name == name).kind == "index"
    if not np.array_equal(np.sort(got, -1), np.sort(decided, -1)) if index else not np.array_equal(got, decided, equal_nan=True):
        return False
    band = band_of(variant, "forward", question.inputs, question.attrs, question.precision, got) if index else plain
    band.truth[name] = got
    return _agrees(replace(question, op=replace(variant, choice=None)), returned, band)


def consolidate(explained: Iterable[list[Explanation]]) -> list[tuple[Explanation, int]]:
    """The explanations of several failing cases of one op, those that explain most first, and of those the ones that explain all."""
    cases = [list(dict.fromkeys(e)) for e in explained]
    counted = Counter(e for case in cases for e in case)
    best = counted.most_common()
    return [(e, n) for e, n in best if n == best[0][1]] if best else []
