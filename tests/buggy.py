"""What the tests of known bugs share: the bugs of an area, vectors made when they are asked for, and what a failing subject is told."""

import importlib
from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Any

import numpy as np
from leadline.golden.band import truth_of
from leadline.golden.bugs import FILES, bugs_of
from leadline.golden.explain import explain
from leadline.golden.judge import FAIL, PASS, Question, Returned, as_returned, judge
from leadline.golden.precision import PRECISIONS
from leadline.golden.vectors import Store, Vector, directions, make
from leadline.golden.verify import verify
from leadline.ref.op import OPS, Case, Op

MODULES = [importlib.import_module(f"leadline.golden.bugs.{name}") for name in FILES]
Known = tuple[str, str, str]  # op, direction, a bug's id


@cache
def vector(op: str, case: str, way: str, precision: str) -> Vector:
    return make(OPS[op], next(c for c in OPS[op].cases if c.name == case), way, PRECISIONS[precision])


class Made(Store):
    """Vectors made when they are asked for."""

    def get(self, op: Op, case: Case, direction: str, precision: Any) -> Vector:
        return vector(op.name, case.name, direction, precision.name)


def question_of(v: Vector) -> Question:
    return Question(v.op, v.direction, v.inputs, v.case.attrs, v.precision)


def known(area: Collection[str]) -> list[Known]:
    """The bugs of the ops whose names begin with one of these, each once."""
    return [
        (op.name, way, bug)
        for op in OPS.values()
        if op.name.split(".")[0] in area
        for way in directions(op)
        for bug in dict.fromkeys(b.id for b in bugs_of(op, way))
    ]


def check_registry(registry: Collection[str]) -> dict[str, str]:
    """Every id is a variant, or is listed with the reason why it is none; never both. The reasons."""
    written = {bug.id for module in MODULES for bug in module.BUGS}
    reasons = dict(pair for module in MODULES for pair in getattr(module, "UNWRITTEN", ()))
    assert set(registry) <= written | reasons.keys(), set(registry) - written - reasons.keys()
    assert not written & reasons.keys(), written & reasons.keys()
    assert all(len(reason) > 40 for reason in reasons.values()), reasons
    return reasons


def check_reference(area: Collection[str], cases: int) -> None:
    """The reference's own outputs, rounded once, pass the first cases of every op that has bugs."""
    for op, way in dict.fromkeys((op, way) for op, way, _ in known(area)):
        for case in OPS[op].cases[:cases]:
            v = vector(op, case.name, way, "bf16")
            question = question_of(v)
            found = judge(question, as_returned(question, truth_of(v.op, way, v.inputs, v.case.attrs)), v.band)
            assert found.verdict == PASS, (op, way, case.name, found.reasons)


def check_told(bug: str, op: str, way: str, subject: Callable) -> None:
    """The subject fails, and this bug is the first that is named."""
    with np.errstate(all="ignore"):
        report = verify(subject, op=op, direction=way, precision="fp32", store=Made())
    assert report.verdict == FAIL, str(report)
    (group,) = report.groups()
    assert [e.id for e, _ in report.explanations(group) if "=" not in e.id][:1] == [bug], str(report)


def named(v: Vector, returned: Mapping[str, Returned]) -> list[str]:
    """The bugs that explain these outputs, which fail the case."""
    question = question_of(v)
    found = judge(question, returned, v.band)
    assert found.verdict == FAIL, found.verdict
    with np.errstate(all="ignore"):
        return [e.id for e in explain(question, returned) if "=" not in e.id]
