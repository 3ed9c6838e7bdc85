"""Why a case fails: which other attribute or known bug, put in place of the reference, the subject's output agrees with."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .band import Band
from .candidates import Candidate, Cases, agrees, alternatives, band_for, candidates, within, worth_asking
from .fingerprints import fingerprints
from .intermediates import beside, first_wrong
from .judge import Question, Returned
from .matched import Filter, Found, apart_from, estimates, pairs
from .precision import PRECISIONS

FAR = 100.0  # a candidate so many times as far from the output as the nearest one is not asked; nor is one farther than the reference
KINDS = ("ties", "agrees", "estimate", "filter", "pair", "fingerprint", "precision", "intermediate")


@dataclass(frozen=True)
class Explanation:
    """What fits, in a sentence, the option that declares it where it is a convention, and the evidence.

    kind says how it was found: the output agrees with another function's ("agrees"), a number was estimated ("estimate"), a known
    difference is in the error ("filter", or two of them, "pair"), by the error's look ("fingerprint"), or by what the subject returned
    beside its outputs ("intermediate"). coefficient and significance are the matched filter's (golden/matched.py), the coefficient of an
    estimate being the factor. fails names the op's cases that it would fail, where there was a rival to be told from.
    """

    id: str
    text: str
    mend: str = ""
    kind: str = "agrees"
    coefficient: float | None = None
    significance: float | None = None
    fails: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.fails is not None:
            object.__setattr__(self, "fails", tuple(self.fails))

    def __str__(self) -> str:
        return self.text + (f" ({self.mend})" if self.mend else "")


def explain(
    question: Question, returned: Mapping[str, Returned], band: Band | None = None, cases: Cases | None = None
) -> list[Explanation]:
    """What explains this FAIL, the best first: ties; conventions (attributes) and known bugs that turn it into a PASS, the nearest first;
    else a number that differs; else two bugs at once; else what the error looks like. Then coarser arithmetic, and which intermediate is
    the first that is wrong. Of rivals that fit alike, each is told with the cases that it would fail."""
    band = band or band_for(question)
    if band is None:
        return []
    outputs, more = beside(question, returned)
    wrong = [Explanation(f"intermediate {name}", text, kind="intermediate") for name, text in first_wrong(question, outputs, more, band)]
    if any(band.truth[name].shape != r.values.shape for name, r in outputs.items()):
        return [Explanation(p.id, p.text, kind="fingerprint") for p in fingerprints(question, outputs, band)] + wrong
    ties = _ties(question, outputs, band)
    found = ties if question.direction == "forward" else []
    matched = Filter(question, outputs, band)
    usable = matched if matched.usable else None
    known = list(candidates(question))
    asked = sorted(((c, _distance(usable, c)) for c in known if worth_asking(c, question, outputs, band.truth)), key=lambda a: a[1])
    nearest = next((d for _, d in asked if d > 0), 0.0)
    far = min(FAR * max(nearest, 1.0), np.inf if usable is None else round(usable.rms_to(band.truth), 3))
    fitting = [c for c, d in asked if d <= far and agrees(c, question, outputs, band.truth)]
    told = [_measured(c, usable) for c in fitting]
    if cases is not None and len(told) > 1:
        told = [replace(e, fails=cases.failed_by(c)) for e, c in zip(told, fitting, strict=True)]
    found = found + told or ties  # a backward that need not follow an open tie may do anything there: what is known goes before
    if usable is not None and not found:
        found = _estimated(usable) or _paired(usable, known)
    if found:
        return found + wrong
    prints = [(np.isfinite(p.left), Explanation(p.id, p.text, kind="fingerprint")) for p in fingerprints(question, outputs, band)]
    whole, place = ([e for telling, e in prints if telling == which] for which in (True, False))
    return [*whole, *_coarser(question, outputs), *place, *wrong]


def _ties(question: Question, returned: Mapping[str, Returned], band: Band) -> list[Explanation]:
    """Whether it is right where the winners of exact ties are left open."""
    if not question.op.choice or question.any_tie or question.op.outputs[0].kind != "index":
        return []
    text = "Only the winners of exact ties differ; the lowest index wins."
    right = within(replace(question, any_tie=True), returned, band)
    return [Explanation("ties", text, "--ties any if yours are open", "ties")] if right else []


def hidden(question: Question, returned: Mapping[str, Returned], band: Band) -> list[Explanation]:
    """What the matched filter is sure of in a PASS: a known difference whose whole amount is in the error, though no element is out of
    bounds; a number that differs from the reference's."""
    matched = Filter(question, beside(question, returned)[0], band)
    if not matched.usable:
        return []
    found = []
    for candidate in candidates(question):
        apart = apart_from(candidate.truth, band)
        if apart is not None and (sure := matched.sure(apart)) is not None:
            found.append((matched.rms_to(candidate.truth), _explanation(candidate, "filter", sure)))
    return [e for _, e in sorted(found, key=lambda f: f[0])] or _estimated(matched)


def _explanation(c: Candidate, kind: str = "agrees", found: Found | None = None) -> Explanation:
    evidence = (found.coefficient, found.significance) if found else (None, None)
    return Explanation(c.id, c.text, c.mend, kind, *evidence)


def _distance(matched: Filter | None, candidate: Candidate) -> float:
    """How far the output is from a candidate's, in σ rms; 0 where that cannot be said (another decision)."""
    if matched is None or apart_from(candidate.truth, matched.band) is None:
        return 0.0
    return round(matched.rms_to(candidate.truth), 3)


def _measured(candidate: Candidate, matched: Filter | None) -> Explanation:
    """With the matched filter's coefficient, where the difference has one."""
    apart = apart_from(candidate.truth, matched.band) if matched is not None else None
    if matched is None or apart is None:
        return _explanation(candidate)
    coefficient, power = matched.project(apart)
    return _explanation(candidate, found=Found(coefficient, matched.chance(apart)) if power else None)


def _estimated(matched: Filter) -> list[Explanation]:
    """The number, or the numbers of equal standing, that leave an error such as a correct subject has."""
    own = {**matched.question.op.defaults, **matched.question.attrs}
    limit = max(limits["rms"] for limits in matched.band.limits.values())
    found: list[tuple[float, Explanation]] = []
    for knob, factor, left in estimates(matched):
        if left > limit or (found and left > 1.5 * found[0][0]):
            break
        text = f"{knob.name} is {factor.coefficient:.8g} ± {factor.deviation:.1g} of the reference's"
        mend = ""
        if knob.name in own:
            value = own[knob.name] * factor.coefficient
            text, mend = f"{text}: {value:.6g} instead of {own[knob.name]:g}", f"--attr {knob.name}={value:.6g} if that is your contract"
        significance = abs(factor.coefficient - 1) / factor.deviation
        found.append((left, Explanation(knob.name, f"{text}.", mend, "estimate", factor.coefficient, significance)))
    return [explanation for _, explanation in found]


def _paired(matched: Filter, known: list[Candidate]) -> list[Explanation]:
    """Two known differences at once."""
    templates = [(c, apart) for c in known if (apart := apart_from(c.truth, matched.band)) is not None]
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
        if within(asked, carried, band_for(asked)):
            text = f"The output is right for {name} ({asked.precision.meaning}): it computes in less than it claims."
            return [Explanation(f"precision={name}", text, f"--precision {name} if that is your claim", "precision")]
    return []


def consolidate(
    explained: Iterable[list[Explanation]], passed: Collection[str] = (), failed: Collection[str] = ()
) -> list[tuple[Explanation, int]]:
    """The explanations of several failing cases of one op: those that explain most cases, less the passed cases that they would have
    failed; of equals first what would have failed the other failing cases too, then in the order in which the cases rank them. Each with
    the evidence of the case where that is strongest, and the number of cases that it explains. Where an error lies counts if nothing else
    does; the first wrong intermediate is told beside the rest."""
    cases = [{e.id: e for e in reversed(case)} for case in explained]  # the first of an id counts
    order = [list(reversed(case)) for case in cases]
    of = {id: [case[id] for case in cases if id in case] for id in dict.fromkeys(id for ids in order for id in ids)}
    traced = {id for id, es in of.items() if es[0].kind == "intermediate"}
    named = of.keys() - traced
    named = {id for id in named if of[id][0].id != "place"} or named
    fails = {id: {name for e in es for name in e.fails or ()} for id, es in of.items()}
    net = Counter({id: len(of[id]) - len(fails[id] & set(passed)) for id in named})
    rank = {id: sum(ids.index(id) if id in ids else len(ids) for ids in order) for id in of}
    missed = {id: len(set(failed) - fails[id]) if any(e.fails is not None for e in es) else 0 for id, es in of.items()}
    best = sorted((id for id in named if net[id] == max(net.values())), key=lambda id: (missed[id], rank[id]))
    best += sorted((id for id in traced if len(of[id]) == max(len(of[i]) for i in traced)), key=lambda id: rank[id])
    return [(max(of[id], key=lambda e: e.significance or 0.0), len(of[id])) for id in best]


__all__ = ["Cases", "Explanation", "alternatives", "consolidate", "explain", "hidden"]
