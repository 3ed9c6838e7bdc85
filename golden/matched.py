"""The matched filter: how much of a known difference is in a subject's error, and how sure that is.

With e the subject's error, d the difference that a known bug would make and σ the band's deviations, the least-squares coefficient is
c = Σ e d/σ² / Σ d²/σ². A subject with the bug has c near 1, one without it c near 0, although no single element need be out of bounds. How
sure it is, the Monte-Carlo runs say: their errors are those of correct subjects, and s = √mean(c²) over them is what chance, correlations
included, makes of the coefficient. The coefficient decides, the significance c/s guards it.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..ref.cast import round_to
from .band import DEVIATIONS, SLACK, Arrays, Band, reference_run, scatter, truth_of
from .judge import Question, Returned

CERTAIN = DEVIATIONS * SLACK  # significances below it say nothing
NEAR_ONE = 0.2  # how far a coefficient may be from 1 to name a bug: bugs are not quite linear
STEP = 2.0**-10  # relative, of a continuous attribute
LEAST = 16  # units of the arithmetic: a constant that is no further off may have been rounded
TURNS = 8  # of Gauss and Newton


@dataclass(frozen=True)
class Found:
    """A coefficient, and the deviation that chance gives it."""

    coefficient: float
    deviation: float

    @property
    def significance(self) -> float:
        return abs(self.coefficient) / self.deviation if self.deviation else float("inf")


class Filter:
    """One question's errors, and what the Monte-Carlo runs make of any difference (run once, when first needed)."""

    def __init__(self, question: Question, returned: Mapping[str, Returned], band: Band):
        self.question, self.band = question, band
        choice = question.op.choice[0] if question.op.choice and question.direction == "forward" else None
        self.same_decision = choice is None or np.array_equal(returned[choice].values, band.truth[choice], equal_nan=True)
        self.names = [name for name in band.sigma if returned[name].values.shape == band.truth[name].shape]
        with np.errstate(invalid="ignore"):
            self.errors = {name: returned[name].values.astype(np.float64) - band.truth[name] for name in self.names}
        self._runs: dict[str, np.ndarray] | None = None

    @property
    def usable(self) -> bool:
        """Whether the errors are of the same decision as the truth, and most of them numbers."""
        return self.same_decision and bool(self.names) and all(np.mean(np.isfinite(e)) > 0.5 for e in self.errors.values() if e.size)

    def project(self, difference: Arrays, errors: Mapping[str, np.ndarray] | None = None) -> tuple[float, float]:
        """c and Σ d²/σ²; (0, 0) where there is no difference."""
        errors, above, below = errors or self.errors, 0.0, 0.0
        for name in self.names:
            e, d, sigma = errors[name], difference[name], self.band.sigma[name]
            use = np.isfinite(e) & np.isfinite(d) & (sigma > 0)
            e, d = e[use] / sigma[use], d[use] / sigma[use]
            above, below = above + float(np.sum(e * d)), below + float(np.sum(d * d))
        return (above / below if below > 0 else 0.0), below

    def chance(self, difference: Arrays) -> float:
        """√mean(c²) over the runs, no less than independent errors of size σ would give: 1/√Σ d²/σ²."""
        if self._runs is None:
            q = self.question
            given = {q.op.choice[0]: self.band.truth[q.op.choice[0]]} if q.op.choice and q.op.choice[0] in self.band.truth else {}
            self._runs = scatter(reference_run(q.op, q.direction, q.attrs), {**q.inputs, **given}, q.precision, self.names)
            for name, runs in self._runs.items():
                with np.errstate(invalid="ignore"):
                    self._runs[name] = round_to(q.precision.io, runs, overflow="nan") - self.band.truth[name]
        count = len(next(iter(self._runs.values())))
        each = [self.project(difference, {name: runs[i] for name, runs in self._runs.items()}) for i in range(count)]
        return max(float(np.sqrt(np.mean([c * c for c, _ in each]))), each[0][1] ** -0.5 if each[0][1] else np.inf)

    def rms_to(self, outputs: Arrays) -> float:
        """rms over all elements of (returned - outputs)/σ: how near the subject is to other outputs than the truth"""
        total, count = 0.0, 0
        for name in self.names:
            sigma = self.band.sigma[name]
            z = (self.errors[name] - (outputs[name] - self.band.truth[name])) / np.where(sigma > 0, sigma, 1.0)
            z = np.where(sigma > 0, np.where(np.isfinite(z), z, 1e30), 0.0)
            total, count = total + float(np.sum(z * z)), count + z.size
        return float(np.sqrt(total / max(count, 1)))

    def less(self, left: Mapping[str, np.ndarray]) -> "Filter":
        """The same with what is left of the errors."""
        other = copy.copy(self)
        other.errors = dict(left)
        return other

    def sure(self, difference: Arrays) -> Found | None:
        """The coefficient if it is near 1 and chance cannot have made it."""
        c, power = self.project(difference)
        if abs(c - 1) > NEAR_ONE or power < CERTAIN**2:
            return None
        found = Found(c, self.chance(difference))
        return found if found.significance >= CERTAIN else None


def apart_from(theirs: Arrays, band: Band) -> Arrays | None:
    """Other outputs less the truth; None where they have other shapes or decisions."""
    apart: Arrays = {}
    for name, truth in band.truth.items():
        if name not in theirs or theirs[name].shape != truth.shape:
            return None
        if name in band.sigma:
            with np.errstate(invalid="ignore"):
                apart[name] = theirs[name] - truth
        elif not np.array_equal(theirs[name], truth, equal_nan=truth.dtype.kind == "f"):
            return None
    return apart


# Numbers that a subject may have slightly wrong


@dataclass(frozen=True)
class Knob:
    """A number inside an op, and the question with that number times a factor."""

    name: str
    turned: Callable[[Question, float], Question]
    output: str = ""  # the output that is multiplied too: the gradient of an input that stands for the number


def _input(name: str) -> Callable[[Question, float], Question]:
    return lambda q, factor: replace(q, inputs={**q.inputs, name: q.inputs[name].astype(np.float64) * factor})


def _attr(name: str, value: float) -> Callable[[Question, float], Question]:
    return lambda q, factor: replace(q, attrs={**q.attrs, name: value * factor})


SCALE, SHARED = "softmax scale", "weight of the shared experts"
STANDS_FOR = {  # inputs that enter an op only times a number that people get wrong
    "attention": {"q": SCALE},
    "attention.varlen": {"q": SCALE},
    "mla.prefill": {"q_b_proj": SCALE, "q_proj": SCALE},
    "mla.absorb": {"q_b_proj": SCALE, "q_proj": SCALE},
    "mla.decode": {"q": SCALE},
    "mla.decode_fp8": {"q": SCALE},
    "moe.layer": {"shared_down": SHARED},
}


def knobs(question: Question) -> Iterator[Knob]:
    """The numbers that an input stands for, and the continuous attributes that are not 0."""
    op, own = question.op, {**question.op.defaults, **question.attrs}
    for name, what in STANDS_FOR.get(op.name, {}).items():
        if name in question.inputs:
            yield Knob(what, _input(name), f"d{name}")
    for name, parameter in op.attrs.items():
        if "float" in str(parameter.annotation) and isinstance(own[name], float) and own[name] != 0:
            yield Knob(name, _attr(name, own[name]))


def _value(question: Question, knob: Knob, factor: float) -> Arrays | None:
    try:
        with np.errstate(all="ignore"):
            turned = knob.turned(question, factor)
            outputs = truth_of(turned.op, question.direction, turned.inputs, turned.attrs)
    except ValueError:
        return None
    return {name: y * factor if name == knob.output else y for name, y in outputs.items()}


def estimate(found: Filter, knob: Knob) -> Found | None:
    """The factor by which the subject's number differs from the reference's: Gauss and Newton from 1 on; None where it does not settle, or
    at 1 but for chance and for the rounding of a constant.

    The deviation is that of the factor, by chance. It is no less than 1/√Σ d²/σ², which costs no runs: most numbers are told to be right
    by that alone, and by half of it after the first turn.
    """
    question, band, factor = found.question, found.band, 1.0
    least = LEAST * 2.0 ** -(question.precision.accumulate.mantissa_bits + 1)
    slope, power = {}, 0.0
    for turn in range(TURNS):
        here = band.truth if turn == 0 else _value(question, knob, factor)
        up, down = (_value(question, knob, factor * (1 + s)) for s in (STEP, -STEP))
        if here is None or up is None or down is None or any(here[n].shape != band.truth[n].shape for n in found.names):
            return None
        with np.errstate(invalid="ignore"):
            slope = {n: (up[n] - down[n]) / (2 * STEP) for n in found.names}
            left = {n: found.errors[n] - (here[n] - band.truth[n]) for n in found.names}
        step, power = found.project(slope, left)
        if not power or not np.isfinite(step):
            return None
        if turn == 0 and abs(step) <= CERTAIN / 2 * power**-0.5:
            return None
        factor *= 1 + float(np.clip(step, -0.5, 1.0))
        if abs(step) < 1e-9 or abs(step) < 0.01 * power**-0.5:
            break
    else:
        return None
    if abs(factor - 1) <= max(CERTAIN * abs(factor) * power**-0.5, least):
        return None
    estimated = Found(factor, abs(factor) * found.chance(slope))
    return estimated if abs(factor - 1) > CERTAIN * estimated.deviation else None


def estimates(found: Filter) -> Iterator[tuple[Knob, Found, float]]:
    """The numbers that differ from the reference's beyond chance and beyond the rounding of a constant, with the rms of the error that is
    left then, in σ: the best first."""
    kept = []
    for knob in knobs(found.question):
        factor = estimate(found, knob)
        turned = _value(found.question, knob, factor.coefficient) if factor is not None else None
        if factor is not None and turned is not None:
            kept.append((knob, factor, found.rms_to(turned)))
    yield from sorted(kept, key=lambda k: k[2])


Template = tuple[Any, Arrays]


def pairs(found: Filter, templates: list[Template], limit: float) -> list[tuple[Any, Any, Found, Found]]:
    """Two differences that together leave an error of no more than `limit` σ rms, both coefficients near 1 and sure."""
    best = []
    norms = [found.project(d)[1] for _, d in templates]
    strong = [(a, d, n) for (a, d), n in zip(templates, norms, strict=True) if n >= CERTAIN**2][:40]
    for i, (a, da, na) in enumerate(strong):
        for b, db, nb in strong[i + 1 :]:
            cross = found.project(da, db)[0] * na  # Σ da db/σ²
            ea, eb = found.project(da)[0] * na, found.project(db)[0] * nb
            det = na * nb - cross * cross
            if det <= 1e-6 * na * nb:
                continue
            ca, cb = (ea * nb - eb * cross) / det, (eb * na - ea * cross) / det
            if max(abs(ca - 1), abs(cb - 1)) > NEAR_ONE:
                continue
            left = {n: found.errors[n] - ca * da[n] - cb * db[n] for n in found.names}
            rms = found.less(left).rms_to(found.band.truth)
            if rms <= limit:
                best.append((rms, a, b, Found(ca, found.chance(da)), Found(cb, found.chance(db))))
    best.sort(key=lambda p: p[0])
    return [(a, b, ca, cb) for _, a, b, ca, cb in best if min(ca.significance, cb.significance) >= CERTAIN]
