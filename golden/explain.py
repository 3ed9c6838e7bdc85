"""Why a case fails: which other attribute or known bug, put in place of the reference, the subject's output agrees with."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args, get_origin

import numpy as np

from ..ref.op import Op
from .band import Arrays, Band, band_of, truth_of
from .bugs import Bug, bugs_of
from .fingerprints import fingerprints
from .judge import PASS, Question, Returned, as_returned, judge
from .matched import Filter, Found, difference, estimates, pairs
from .precision import PRECISIONS

KINDS = ("ties", "agrees", "estimate", "filter", "pair", "fingerprint", "precision")


@dataclass(frozen=True)
class Explanation:
    """What fits, in a sentence, the option that declares it where it is a convention, and the evidence.

    kind says how it was found: the output agrees with another function's ("agrees"), a number was estimated ("estimate"), a known
    difference is in the error ("filter", or two of them, "pair"), or by the error's look ("fingerprint"). coefficient and significance
    are the matched filter's (golden/matched.py), the coefficient of an estimate being the factor.
    """

    id: str
    text: str
    mend: str = ""
    kind: str = "agrees"
    coefficient: float | None = None
    significance: float | None = None

    def __str__(self) -> str:
        return self.text + (f" ({self.mend})" if self.mend else "")


def alternatives(op: Op, attrs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The other value of each attribute that has a fixed set of them."""
    own = {**op.defaults, **attrs}
    choices = {name: get_args(p.annotation) for name, p in op.attrs.items() if get_origin(p.annotation) is Literal}
    choices |= {name: (True, False) for name, p in op.attrs.items() if p.annotation is bool}
    return [{name: value} for name, values in choices.items() for value in values if value != own[name]]


def explain(question: Question, returned: Mapping[str, Returned], band: Band | None = None) -> list[Explanation]:
    """What explains this FAIL, the best first: ties; conventions (attributes) and known bugs that turn it into a PASS, the nearest first;
    else a number that differs; else two bugs at once; else what the error looks like. Last, coarser arithmetic."""
    found = []
    band = band or _band(question)
    if question.op.choice and not question.any_tie and question.op.outputs[0].kind == "index":
        relaxed = replace(question, any_tie=True)
        if _agrees(relaxed, returned, _band(relaxed)):
            text = "Only the winners of exact ties differ; the lowest index wins."
            found.append(Explanation("ties", text, "--ties any if yours are open", "ties"))
    if band is None or any(band.truth[name].shape != r.values.shape for name, r in returned.items()):
        return [Explanation(p.id, p.text, kind="fingerprint") for p in fingerprints(question, returned, band)] if band else []
    matched = Filter(question, returned, band)
    usable = matched if matched.usable else None
    agreeing = [
        (_distance(usable, asked), i, explanation, asked)
        for i, (explanation, asked) in enumerate(_agreeing(question, returned, band.truth))
    ]
    found += [_measured(explanation, usable, asked) for _, _, explanation, asked in sorted(agreeing, key=lambda a: a[:2])]
    if usable is not None and not found:
        found = _estimated(usable) or _paired(usable)
    if found:
        return found
    prints = [(np.isfinite(p.left), Explanation(p.id, p.text, kind="fingerprint")) for p in fingerprints(question, returned, band)]
    whole, place = ([e for telling, e in prints if telling == which] for which in (True, False))
    return [*whole, *_coarser(question, returned), *place]


def hidden(question: Question, returned: Mapping[str, Returned], band: Band) -> list[Explanation]:
    """What the matched filter is sure of in a PASS: a known difference whose whole amount is in the error, though no element is out of
    bounds; a number that differs from the reference's."""
    matched = Filter(question, returned, band)
    if not matched.usable:
        return []
    found = []
    for explanation, asked, _ in _candidates(question):
        apart = difference(question, asked, band)
        if apart is not None and (sure := matched.sure(apart)) is not None:
            found.append((matched.rms_to({n: band.truth[n] + d for n, d in apart.items()}), _with(explanation, "filter", sure)))
    return [e for _, e in sorted(found, key=lambda f: f[0])] or _estimated(matched)


def _candidates(question: Question) -> Iterator[tuple[Explanation, Question, Bug | None]]:
    """Conventions and known bugs, each with the question whose answer it would be."""
    bugs = bugs_of(question.op, question.direction)
    own = {**question.op.defaults, **question.attrs}
    declared = [dict(b.attrs) for b in bugs if any(own[k] != v for k, v in b.attrs.items())]
    changes = alternatives(question.op, question.attrs)
    for change in changes + [c for c in declared if c not in changes]:
        (name, value), *_ = change.items()
        known = next((b for b in bugs if dict(b.attrs) == change), None)
        text = known.what if known else f"The output is right for {name}={value}."
        explanation = Explanation(known.id if known else f"{name}={value}", text, f"--attr {name}={value} if that is your contract")
        yield explanation, replace(question, attrs={**question.attrs, **change}), None
    for bug in bugs:
        if not bug.attrs:
            variant = bug.variant(question.op)
            asked = replace(question, op=replace(variant, choice=None) if question.direction == "forward" else variant)
            yield Explanation(bug.id, bug.what, bug.sources), asked, bug


def _agreeing(question: Question, returned: Mapping[str, Returned], truth: Arrays) -> Iterator[tuple[Explanation, Question]]:
    """The candidates that the output agrees with. Bands cost many runs, so those that one run rules out are not asked."""
    for explanation, asked, bug in _candidates(question):
        try:
            with np.errstate(all="ignore"):
                theirs = truth_of(asked.op, question.direction, question.inputs, asked.attrs)
                stores = bug is None and all(np.array_equal(theirs[n], y, equal_nan=y.dtype.kind == "f") for n, y in truth.items())
                if not stores and not _worth_asking(question, returned, theirs, truth):
                    continue  # (an attribute that says where 16 bits are stored changes no truth)
                fits = _agrees(asked, returned, _band(asked)) if bug is None else _fits(question, returned, bug, asked)
        except ValueError:  # it refuses these inputs or sizes
            continue
        if fits:
            yield explanation, asked


def _worth_asking(question: Question, returned: Mapping[str, Returned], theirs: Arrays, truth: Arrays) -> bool:
    """Whether a candidate decides no worse than the reference, and is nearer to the output where that can be compared."""
    op = question.op
    if op.choice and question.direction == "forward":
        name = op.choice[0]
        got, apart = returned[name].values, []
        for decided in (theirs[name], truth[name]):
            if decided.shape != got.shape:
                return False
            same = got == decided if got.dtype.kind != "f" else (got == decided) | (np.isnan(got) & np.isnan(decided))
            apart.append(float(np.mean(same)))
            sets = np.sort(got, -1) == np.sort(decided, -1) if got.dtype.kind != "f" and got.ndim else same
            apart.append(float(np.mean(sets)))
        if apart[1] < apart[3]:
            return False
        if apart[0] < 1:
            return True  # other outputs belong to other decisions
    return _nearer(returned, theirs, truth)


def _distance(matched: Filter | None, asked: Question) -> float:
    """How far the output is from a candidate's, in σ rms; 0 where that cannot be said (another decision)."""
    apart = difference(matched.question, asked, matched.band) if matched is not None else None
    if apart is None or matched is None:
        return 0.0
    return round(matched.rms_to({n: matched.band.truth[n] + d for n, d in apart.items()}), 3)


def _measured(explanation: Explanation, matched: Filter | None, asked: Question) -> Explanation:
    """With the matched filter's coefficient, where the difference has one."""
    apart = difference(matched.question, asked, matched.band) if matched is not None else None
    if matched is None or apart is None or not matched.project(apart)[1]:
        return explanation
    return _with(explanation, explanation.kind, Found(matched.project(apart)[0], matched.chance(apart)))


def _with(explanation: Explanation, kind: str, found: Found) -> Explanation:
    return replace(explanation, kind=kind, coefficient=found.coefficient, significance=found.significance)


def _estimated(matched: Filter) -> list[Explanation]:
    """The number, or the numbers of equal standing, that leave an error such as a correct subject has."""
    own = {**matched.question.op.defaults, **matched.question.attrs}
    limit = max(limits["rms"] for limits in matched.band.limits.values())
    found = []
    for knob, factor, left in estimates(matched):
        if left > limit or (found and left > 1.5 * found[0][0]):
            break
        text = f"{knob.name} is {factor.coefficient:.8g} ± {factor.deviation:.1g} of the reference's"
        mend = ""
        if knob.name in own:
            value = own[knob.name] * factor.coefficient
            text, mend = f"{text}: {value:.6g} instead of {own[knob.name]:g}", f"--attr {knob.name}={value:.6g} if that is your contract"
        found.append((left, Explanation(knob.name, f"{text}.", mend, "estimate", factor.coefficient)))
        found[-1] = (left, replace(found[-1][1], significance=abs(factor.coefficient - 1) / factor.deviation))
    return [explanation for _, explanation in found]


def _paired(matched: Filter) -> list[Explanation]:
    """Two known differences at once."""
    templates = []
    for explanation, asked, _ in _candidates(matched.question):
        if (apart := difference(matched.question, asked, matched.band)) is not None:
            templates.append((explanation, apart))
    limit = 2 * max(limits["rms"] for limits in matched.band.limits.values())
    for a, b, ca, cb in pairs(matched, templates, limit)[:1]:
        weaker = min(ca, cb, key=lambda c: c.significance)
        return [
            Explanation(f"{a.id} + {b.id}", f"Two at once: {a.text} And: {b.text}", "", "pair", weaker.coefficient, weaker.significance)
        ]
    return []


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
            return [Explanation(f"precision={name}", text, f"--precision {name} if that is your claim", "precision")]
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


def _fits(question: Question, returned: Mapping[str, Returned], bug: Bug, asked: Question) -> bool:
    """Whether the subject agrees with the bug. A bug that cannot be told from the reference on these inputs explains nothing, nor does
    one that is no nearer to the output than the reference is, nor one that refuses them."""
    try:
        with np.errstate(all="ignore"):
            if question.op.choice and question.direction == "forward":
                return _decides_alike(question, returned, bug)
            truth = truth_of(question.op, question.direction, question.inputs, question.attrs)
            band = _band(asked)
            return _agrees(asked, returned, band) and not _agrees(asked, as_returned(question, truth), band)
    except ValueError:
        return False


def _nearer(returned: Mapping[str, Returned], candidate: Mapping[str, np.ndarray], truth: Mapping[str, np.ndarray]) -> bool:
    """Whether some output is nearer to the candidate than to the truth. It costs one run, where a band costs many."""
    for name, r in returned.items():
        if r.values.dtype.kind not in "biuf":
            return False
        got, other, own = (np.asarray(y, dtype=np.float64) for y in (r.values, candidate[name], truth[name]))
        if got.shape != other.shape:
            continue
        gaps = [np.where((got == y) | (np.isnan(got) & np.isnan(y)), 0.0, np.abs(got - y)) for y in (other, own)]
        if r.values.dtype.kind == "u":  # bit patterns are no quantities
            gaps = [np.minimum(g, 1.0) for g in gaps]
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
    """The explanations of several failing cases of one op: those that explain most cases, in the order in which the cases rank them; each
    with the evidence of the case where that is strongest."""
    cases = [{e.id: e for e in reversed(case)} for case in explained]  # the first of an id counts
    order = [list(reversed(case)) for case in cases]
    counted = Counter(id for case in cases for id in case)
    most = max(counted.values(), default=0)
    ranks = {id: sum(ids.index(id) if id in ids else len(ids) for ids in order) for id in counted}
    best = sorted((id for id, n in counted.items() if n == most), key=lambda id: ranks[id])
    return [(max((case[id] for case in cases if id in case), key=lambda e: e.significance or 0.0), most) for id in best]
