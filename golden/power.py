"""The kill matrix: every known bug against every judge, ours and the field's, on the stored vectors.

A bug meets our judge twice: computed in float64 and rounded once, and computed as its precision claims, every operation erring at random,
so that it can hide in rounding noise. The field's metrics are asked of the first, which has no noise to excuse them. A row of its own, the
reference itself computed as the precision claims, counts the false alarms of every judge. The bugs of FP8 ops are judged under every recipe
and accumulator that the cases have, and each of those is counted by itself.
"""

import functools
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from ..ref.op import OPS, Case, Op, op_named
from . import field as fields
from .band import Arrays, carrier
from .bugs import Bug, bugs_of
from .catalogue import conventions
from .draw import Source
from .explain import Cases, Explanation, alternatives, consolidate, explain, hidden
from .judge import FAIL, Question, as_returned, judge_closely
from .montecarlo import Noise, noisy_inputs
from .power_sample import CORRECT, chosen, drawn, elements, recipes_of
from .precision import Precision, precision_named
from .vectors import Store, Vector, directions, make

SCHEMA = "leadline.power/1"
PRECISIONS = ("fp32", "bf16", "bf16-eager")
SEED = 1000  # of the noise: none of the band's own runs
UNSURE = ("fingerprint", "precision", "intermediate")  # kinds of explanations that are no name
EXPLAINED = 3  # failing cases that are explained, as in verify, and one of every recipe
CHUNK = 6  # bugs that a process is handed at once


@dataclass(frozen=True)
class Part:
    """Some bugs of an op, a direction and a precision: what one process does at once."""

    op: str
    direction: str
    precision: str
    ids: tuple[str, ...]
    quick: bool = False
    named: bool = True


def mutants(op: Op, direction: str, precision: str) -> list[Bug]:
    """The bugs and conventions of an op, and the reference in a bug's place."""
    return [*bugs_of(op, direction), *conventions(op, direction, precision), Bug(CORRECT, (op.name,), "The reference itself.")]


def parts(
    ops: Iterable[str] | None = None, precisions: Iterable[str] | None = None, quick: bool = True, named: bool = True, chunk: int = CHUNK
) -> list[Part]:
    """The work, cheap ops first. The quick form takes a fixed sample of the bugs."""
    asked = [op_named(name) for name in ops] if ops else list(OPS.values())
    asked = sorted(asked, key=lambda op: sum(elements(op, c) for c in op.cases if c.quick))
    names = [precision_named(p).name for p in precisions or PRECISIONS]
    found = []
    for op in asked:
        for way, precision in itertools.product(directions(op), names):
            ids = list(dict.fromkeys(b.id for b in mutants(op, way, precision)))
            if quick:
                some = chosen(op, way, precision, [i for i in ids if i != CORRECT])
                ids = [*some, CORRECT] if some else []
            found += [Part(op.name, way, precision, tuple(ids[i : i + chunk]), quick, named) for i in range(0, len(ids), chunk)]
    return found


def run(
    work: Iterable[Part], store: Store, jobs: int = 1, done: Collection[tuple[str, str, str, str]] = ()
) -> Iterator[tuple[Part, list[dict[str, Any]]]]:
    """The parts as they are finished, each with its records. What `done` names is left out: (op, direction, precision, id)."""
    left = [Part(**{**vars(p), "ids": tuple(i for i in p.ids if (p.op, p.direction, p.precision, i) not in done)}) for p in work]
    left = [p for p in left if p.ids]
    if jobs == 1:
        for part in left:
            yield part, records(part, store)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(_records_from, part, store.directory): part for part in left}
        for future in as_completed(futures):
            yield futures[future], future.result()


def records(part: Part, store: Store) -> list[dict[str, Any]]:
    """What came of each bug of a part."""
    op, precision = op_named(part.op), precision_named(part.precision)
    whole = mutants(op, part.direction, part.precision)
    cases_of = {id(b): _cases(b, op, part, store) for b in whole if b.id in part.ids}
    cases = list({c.name: c for each in cases_of.values() for c in each}.values())
    stored = {c.name: _vector(None if part.quick else store, op, c, part.direction, precision) for c in cases}
    rivals = Cases(lambda: [(name, _question(v), v.band) for name, v in stored.items()])
    found = [_record(b, [stored[c.name] for c in cases_of[id(b)]], part, rivals) for b in whole if b.id in part.ids]
    if part.named and (CORRECT in part.ids or part.quick):  # what others do on these cases: once for an op, direction and precision
        others = {b.id: b for b in whole if part.quick and b.id not in part.ids}
        changes = {f"{name}={value}": {name: value} for c in cases for a in alternatives(op, c.attrs) for name, value in a.items()}
        others |= {title: Bug(title, (), "", attrs=change) for title, change in changes.items()}
        common = {"op": part.op, "direction": part.direction, "precision": part.precision}
        found += [{**common, "other": title, "print": _prints(bug, stored.values())} for title, bug in others.items()]
    return found


def _cases(bug: Bug, op: Op, part: Part, store: Store) -> list[Case]:
    if not part.quick:
        return [c for c in op.cases if c.quick]

    def differs(case: Case) -> bool:
        v = _vector(None, op, case, part.direction, precision_named(part.precision))
        y = outputs_of(bug, v)
        return y is not None and any(not np.array_equal(y[k], truth, equal_nan=y[k].dtype.kind == "f") for k, truth in v.band.truth.items())

    return drawn(bug, op, part.direction, part.precision, store, differs)


def _prints(bug: Bug, stored: Iterable[Vector]) -> dict[str, list[float] | None]:
    """By case the fingerprint of what a bug makes of it, none where it does not apply: to tell which are one function under two names."""
    outputs = ((v, outputs_of(bug, v)) for v in stored)
    return {v.case.name: None if y is None else fingerprint(v, y) for v, y in outputs}


@functools.cache
def _store(directory: Path) -> Store:
    return Store(directory)


def _records_from(part: Part, directory: Path) -> list[dict[str, Any]]:
    return records(part, _store(directory))


_made: dict[tuple[str, str, str, str], Vector] = {}


def _vector(store: Store | None, op: Op, case: Case, direction: str, precision: Precision) -> Vector:
    """The stored vector, kept for the other bugs of its op. Without a store it is made: a store makes its large ones first, all of them."""
    key = (op.name, case.name, direction, precision.name)
    if key not in _made:
        if any((op.name, direction, precision.name) != (k[0], k[2], k[3]) for k in _made):
            _made.clear()
        _made[key] = store.get(op, case, direction, precision) if store else make(op, case, direction, precision)
    return _made[key]


def _question(v: Vector) -> Question:
    return Question(v.op, v.direction, v.inputs, v.case.attrs, v.precision)


def _record(bug: Bug, stored: list[Vector], part: Part, rivals: Cases) -> dict[str, Any]:
    """One bug: the cases on which each judge fails it, and what it is taken for."""
    found: dict[str, Any] = {
        "op": part.op,
        "direction": part.direction,
        "precision": part.precision,
        "id": bug.id,
        "benign": bug.benign,
        "cases": 0,
        "differ": [],
        "rounded": [],
        "computed": [],
        "field": {name: [] for name in fields.METRICS},
        "print": {},
        "errors": [],
        "filtered": {},
    }
    explained: dict[str, list[Explanation]] = {}  # by case
    covered: set[str] = set()  # recipes
    passed, passing = [], []  # what may hide in rounding noise; every case that is not failed
    for v in stored:
        recipes = recipes_of(v.op, v.case)
        question = _question(v)
        plain = outputs_of(bug, v)
        found["print"][v.case.name] = None if plain is None else fingerprint(v, plain)
        if plain is None:
            continue
        found["cases"] += 1
        with np.errstate(all="ignore"):
            returned, right = as_returned(question, plain), as_returned(question, v.band.truth)
            if any(not np.array_equal(_bits(returned[k].values), _bits(right[k].values)) for k in right):
                found["differ"].append(v.case.name)
            if judge_closely(question, returned, v.band).verdict == FAIL:
                found["rounded"].append(v.case.name)
            for name in [] if bug.id == CORRECT else fields.rejecting(question, returned, right):
                found["field"][name].append(v.case.name)
            if not v.op.exact:
                try:
                    noisy = outputs_of(bug, v, Noise(v.precision, SEED))
                except Exception as error:  # a variant that does not run on noisy arrays is told of, and is judged rounded alone
                    found["errors"].append(f"{v.case.name}: {type(error).__name__}: {error}"[:200])
                    noisy = plain
                if noisy is None:
                    continue
                returned = as_returned(question, noisy)
            for name in fields.rejecting(question, returned, right) if bug.id == CORRECT else []:  # false alarms, as of ours
                found["field"][name].append(v.case.name)
            if judge_closely(question, returned, v.band).verdict != FAIL:
                passing.append(v.case.name)
                passed += [(question, returned, v)] * (v.case.name in found["differ"] or bug.id == CORRECT)
                continue
            found["computed"].append(v.case.name)
            sure = [len(e) == 1 and e[0].kind not in UNSURE for e in explained.values()]
            settled = part.quick and (any(sure) or len(sure) > 1)  # a second one where there are rivals
            wanted = not settled and len(sure) < EXPLAINED
            another = bool(set(recipes) - covered) and (v.op.exact or not part.quick)  # cheap where nothing rounds
            if part.named and bug.id != CORRECT and (wanted or another):
                explained[v.case.name] = explain(question, returned, v.band, rivals)
                covered.update(recipes)
    found["named"] = [[e.id, n] for e, n in consolidate(explained.values(), passing, found["computed"])]
    found["explained"] = list(explained)
    found["by_recipe"] = _by_recipe(op_named(part.op), explained, passing, found["computed"])
    if part.named and not found["computed"] and not op_named(part.op).exact:  # a survivor: is it in the error all the same?
        with np.errstate(all="ignore"):
            seen = {v.case.name: [e.id for e in hidden(question, returned, v.band)] for question, returned, v in passed}
        found["filtered"] = {case: ids for case, ids in seen.items() if ids}
    return found


def _by_recipe(op: Op, explained: Mapping[str, list[Explanation]], passed: list[str], failed: list[str]) -> dict[str, list[str]]:
    """What a bug is taken for under each recipe, from that recipe's cases alone."""
    found = {}
    for recipe in dict.fromkeys(recipe for c in op.cases for recipe in recipes_of(op, c)):
        own = {c.name for c in op.cases if recipe in recipes_of(op, c)}
        if asked := [explained[name] for name in explained if name in own]:
            found[recipe] = [e.id for e, _ in consolidate(asked, own & {*passed}, own & {*failed})]
    return found


def outputs_of(bug: Bug, v: Vector, noise: Noise | None = None) -> Arrays | None:
    """A bug's outputs for a vector's inputs: in float64 (an exact op: in their own dtype), or with noise. None where it does not apply."""
    inputs = v.inputs if v.op.exact else noisy_inputs(v.inputs, noise) if noise else carrier(v.inputs, np.float64)
    op = bug.variant(v.op) if bug.fwd or bug.bwd else v.op
    try:
        with np.errstate(all="ignore"):
            return {k: np.asarray(y) for k, y in op.run(v.direction, inputs, {**v.case.attrs, **bug.attrs}).items()}
    except ValueError:
        return None


def fingerprint(v: Vector, outputs: Mapping[str, np.ndarray]) -> list[float]:
    """For each output its norm, its product with random numbers over that, and how much of it is not finite."""
    found: list[float] = []
    for name, y in outputs.items():
        finite = np.isfinite(y)
        x = np.where(finite, y, 0.0).astype(np.float64)
        top = float(np.max(np.abs(x), initial=0.0)) or 1.0
        length = float(np.sqrt(np.sum((x / top) ** 2))) or 1.0
        weights = Source(f"leadline/1 power {v.op.name} {v.id} {name}").uniform(x.shape, -1.0, 1.0)
        found += [top * length * bool(x.any()), float(np.sum(x / top * weights)) / length, float(np.sum(~finite))]
    return [float(f"{value:.12g}") for value in found]


def _bits(x: np.ndarray) -> np.ndarray:
    """Values with every NaN alike and zeros by their sign."""
    if x.dtype.kind != "f":
        return x
    x = np.ascontiguousarray(np.where(np.isnan(x), np.array(np.nan, x.dtype), x))
    return x.view(f"u{x.itemsize}")
