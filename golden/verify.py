"""verify: a subject held to every case, and what came of it."""

import difflib
import fnmatch
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from ..ref.op import OPS, Case, Op, check_attr, op_named
from . import vectors
from .band import band_of, truth_of
from .errors import Misbehaved, Refused, UsageError
from .exec_subject import ExecSubject
from .explain import Explanation, consolidate, explain, hidden
from .judge import ERROR, FAIL, PASS, SKIPPED, Judgement, Question, Returned, judge
from .maps import error_maps
from .precision import Precision, precision_named
from .subject import Contract, load
from .vectors import Store, Vector, directions
from .worker import Died, IsolatedSubject

DEFAULT_PRECISIONS = ("fp32", "bf16")
EXPLAINED = 3  # failing cases of an op, direction and precision that are explained


Key = tuple[str, str, str, str, str, int]  # subject, op, direction, precision, case, seed


@dataclass
class CaseResult:
    """One case of one subject: the verdict, why, and the statistics behind it."""

    subject: str
    op: str
    direction: str
    precision: str
    case: str
    seed: int
    verdict: str
    reason: str = ""
    ambiguous: int = 0
    attrs: Mapping[str, Any] = field(default_factory=dict)
    statistics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    limits: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    explanations: list[Explanation] = field(default_factory=list)
    maps: Mapping[str, Any] = field(default_factory=dict)  # where it is wrong (golden/maps.py), if it FAILs or maps were asked for
    seconds: float = 0.0

    @property
    def group(self) -> tuple[str, str, str, str]:
        return self.subject, self.op, self.direction, self.precision

    @property
    def key(self) -> Key:
        return *self.group, self.case, self.seed


class VerdictError(AssertionError):
    """A report that is no PASS, raised for a test to fail with."""


@dataclass
class Report:
    """All results of a run. `verdict` is PASS only if nothing failed or erred and something ran."""

    results: list[CaseResult] = field(default_factory=list)

    def count(self, verdict: str) -> int:
        return sum(r.verdict == verdict for r in self.results)

    @property
    def ambiguous(self) -> int:
        return sum(r.ambiguous for r in self.results)

    @property
    def verdict(self) -> str:
        for verdict in (ERROR, FAIL, PASS):
            if self.count(verdict):
                return verdict
        return SKIPPED

    @property
    def exit_status(self) -> int:
        return 0 if self.verdict == PASS else 1

    def groups(self) -> dict[tuple[str, str, str, str], list[CaseResult]]:
        grouped: dict[tuple[str, str, str, str], list[CaseResult]] = {}
        for result in self.results:
            grouped.setdefault(result.group, []).append(result)
        return grouped

    def hidden(self, group: tuple[str, str, str, str]) -> list[Explanation]:
        """What the matched filter finds in a group's PASSes: known differences below the tolerance."""
        return [e for e, _ in consolidate(r.explanations for r in self.groups()[group] if r.verdict == PASS and r.explanations)]

    def explanations(self, group: tuple[str, str, str, str]) -> list[tuple[Explanation, int]]:
        """What explains most of a group's failing cases, with the number of cases it explains."""
        return consolidate(r.explanations for r in self.groups()[group] if r.verdict == FAIL and r.explanations)

    def __str__(self) -> str:
        lines = [
            f"{self.verdict}: {self.count(PASS)} passed, {self.count(FAIL)} failed, {self.count(ERROR)} errors, "
            f"{self.count(SKIPPED)} skipped, {self.ambiguous} ambiguous"
        ]
        for group, results in self.groups().items():
            bad = [r for r in results if r.verdict in (FAIL, ERROR)]
            lines += [f"  {r.op} {r.direction} {r.precision} {r.case}: {r.verdict}: {r.reason}" for r in bad[:5]]
            lines += [f"  … and {len(bad) - 5} more cases"] * (len(bad) > 5)
            lines += [f"  known: {explanation} [{explanation.id}]" for explanation, _ in self.explanations(group)]
            lines += [f"  below the tolerance: {explanation} [{explanation.id}]" for explanation in self.hidden(group)]
        return "\n".join(lines)

    def raise_for_verdict(self) -> "Report":
        """Raises VerdictError, with the reasons, unless the verdict is PASS."""
        if self.verdict != PASS:
            raise VerdictError(str(self))
        return self


@dataclass(frozen=True)
class Task:
    """One case to ask of one subject, or the reason that it is not asked."""

    subject: Any
    op: Op
    direction: str
    precision: Precision
    case: Case | None = None
    seed: int = 0
    contract: Contract | None = None
    skip: str = ""


def verify(
    subject: Any,
    op: str | Sequence[str] | None = None,
    *,
    precision: str | Sequence[str] | None = None,
    direction: str | None = None,
    attrs: Mapping[str, Any] | None = None,
    profile: Literal["quick", "full"] = "quick",
    seeds: Iterable[int] = (0,),
    cases: Sequence[str] | None = None,
    framework: str | None = None,
    ties: Literal["lowest", "any"] | None = None,
    isolate: bool = False,
    timeout: float = 120.0,
    store: Store | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    on_result: Callable[[CaseResult], None] | None = None,
    explained: bool = True,
    maps: bool = False,
    done: Mapping[Key, CaseResult] | None = None,
) -> Report:
    """Holds a subject to the cases of one op, several, or all, and returns the report.

    subject: a callable; a module or object with attributes named after ops; or a string as on the command line. A string can be run in a
    process of its own (isolate=True; exec: and ctypes: always are): a crash then costs one case. Seed 0 is the stored vectors, every other
    seed draws new inputs.
    direction None means every direction that the subject has; a bare callable is a forward unless "backward" is said. cases are names or
    patterns of names, of any profile. maps=True makes an error map of every case; failing ones always have theirs.
    progress(done, total, what) is called before each case, on_result(result) after it; the cases of an earlier run (done) are neither
    asked again nor told.
    """
    check_options(direction, profile, ties, attrs)
    ops = list(OPS.values()) if op is None else [op_named(name) for name in ([op] if isinstance(op, str) else op)]
    precisions = [precision_named(p) for p in ([precision] if isinstance(precision, str) else precision or DEFAULT_PRECISIONS)]
    if cases is not None:
        ops = _having(ops, cases)
    bare = is_bare(subject)
    if op is None and bare:
        raise UsageError(f"{getattr(subject, '__name__', subject)} is one callable; name what it computes (--op)")
    own = "backward" if direction == "backward" else "forward"
    direction = own if bare else direction
    asked = subject_of(subject, framework, ties, own, isolate, timeout)
    store = store or Store()
    report = Report()
    try:
        tasks = list(tasks_of(asked, ops, precisions, direction, dict(attrs or {}), profile, list(seeds), op is not None, cases))
        explained_of: dict[tuple[str, str, str, str], int] = {}
        largest = {_group(t): t for t in sorted((t for t in tasks if t.case), key=_size)}  # the matched filter's best chance in a PASS
        for count, task in enumerate(tasks):
            if progress:
                progress(count, len(tasks), f"{task.op.name} {task.direction} {task.precision.name}")
            if earlier := (done or {}).get((*_group(task), task.case.name if task.case else "-", task.seed)):
                explained_of[earlier.group] = explained_of.get(earlier.group, 0) + (earlier.verdict == FAIL)
                report.results.append(earlier)
                continue
            wanted = explained and explained_of.get(_group(task), 0) < EXPLAINED
            result = run_task(task, dict(attrs or {}), store, wanted, explained and largest.get(_group(task)) is task, maps)
            explained_of[result.group] = explained_of.get(result.group, 0) + (result.verdict == FAIL)
            report.results.append(result)
            if on_result:
                on_result(result)
    finally:
        asked.close()
    return report


def subject_of(subject: Any, framework: str | None, ties: str | None, direction: str, isolate: bool, timeout: float) -> Any:
    """What is asked: here, or in a process of its own."""
    if isinstance(subject, str) and subject.startswith("exec:"):
        return ExecSubject(subject, framework, ties, timeout)
    if isinstance(subject, str) and (isolate or subject.startswith("ctypes:")):
        return IsolatedSubject(subject, framework, ties, direction, timeout)
    return load(subject, framework, ties, direction)


def is_bare(subject: Any) -> bool:
    """Whether a subject is one callable, which computes one op in one direction."""
    if isinstance(subject, str):
        return ":" in subject and not subject.startswith(("exec:", "ctypes:"))
    return callable(subject) and not isinstance(subject, type)


def named_by(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _having(ops: list[Op], cases: Sequence[str]) -> list[Op]:
    """The ops that have some of the cases. Each name must be a case's."""
    known = {c.name for op in ops for c in op.cases}
    for name in cases:
        if not any(named_by(k, [name]) for k in known):
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
            raise UsageError(f"unknown case {name!r}" + (f"; did you mean {' or '.join(near)}?" if near else ""))
    return [op for op in ops if any(named_by(c.name, cases) for c in op.cases)]


def _group(task: Task) -> tuple[str, str, str, str]:
    return task.subject.name, task.op.name, task.direction, task.precision.name


def _size(task: Task) -> int:
    return math.prod(task.case.dims.values()) if task.case else 0


def check_options(direction: str | None, profile: str, ties: str | None, attrs: Mapping[str, Any] | None) -> None:
    for name, value, allowed in (
        ("direction", direction, (None, "forward", "backward")),
        ("profile", profile, ("quick", "full")),
        ("ties", ties, (None, "lowest", "any")),
    ):
        if value not in allowed:
            raise UsageError(f"unknown {name} {value!r}; expected one of {', '.join(a for a in allowed if a)}")
    known = {a for op in OPS.values() for a in op.attrs}
    for name in attrs or {}:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=2, cutoff=0.4)
            raise UsageError(f"unknown attribute {name!r}" + (f"; did you mean {' or '.join(near)}?" if near else ""))


def tasks_of(
    subject: Any,
    ops: list[Op],
    precisions: list[Precision],
    direction: str | None,
    attrs: dict,
    profile: str,
    seeds: list[int],
    named: bool,
    cases: Sequence[str] | None,
) -> Iterator[Task]:
    for op in ops:
        for name in [n for n in attrs if n in op.attrs]:
            check_attr(op.name, op.attrs[name], attrs[name])
        if named and (foreign := [n for n in attrs if n not in op.attrs]):
            raise UsageError(f"{op.name} has no attribute {foreign[0]!r}; it has {', '.join(op.attrs) or 'none'}")
        for way in directions(op) if direction is None else (direction,):
            if way not in directions(op):
                if named:
                    raise UsageError(f"{op.name} has no backward; expected --direction forward")
                continue
            contract = subject.contract(op, way)
            for precision in precisions:
                if contract is None:
                    yield Task(subject, op, way, precision, skip="the subject does not have it")
                    continue
                for case in op.cases:
                    if named_by(case.name, cases) if cases is not None else case.quick or profile == "full":
                        yield from (Task(subject, op, way, precision, case, seed, contract) for seed in seeds)


def untaken(op: Op, case: Case, contract: Contract, own: Mapping[str, Any]) -> list[str]:
    """What a case needs and the subject has no parameter for."""
    left = [f"{k}={v}" for k, v in own.items() if k not in contract.attrs and k in case.attrs and v != op.defaults[k]]
    needed = {t.name for t in op.inputs if t.kind != "like"}
    return left + [name for name in contract.left_out if name in case.draw and name in needed]


def run_task(task: Task, attrs: dict, store: Store, explained: bool, probed: bool = False, mapped: bool = False) -> CaseResult:
    """Asks and judges. Whatever the subject does becomes a verdict; nothing it does ends the run."""
    result = CaseResult(*_group(task), task.case.name if task.case else "-", task.seed, SKIPPED, task.skip)
    if task.case is None or task.contract is None:
        return result
    started = time.perf_counter()
    declared = {**task.subject.declares.get(task.op.name, {}), **{k: v for k, v in attrs.items() if k in task.op.attrs}}
    case_attrs = {**task.case.attrs, **declared}
    result.attrs = case_attrs
    own = {**task.op.defaults, **case_attrs}
    if left := untaken(task.op, task.case, task.contract, own):
        result.reason = f"the subject does not take {', '.join(left)}"
        return result
    try:
        question, vector = _question(task, case_attrs, own, store)
    except UsageError:
        raise
    except ValueError as error:  # an attribute that was asked for does not suit this case's sizes
        result.reason = str(error)
        return result
    judgement, returned = _ask(task, question, own, vector)
    result.verdict, result.ambiguous = judgement.verdict, judgement.ambiguous
    result.reason = "; ".join(judgement.reasons)
    result.statistics, result.limits = judgement.statistics, judgement.limits
    if explained and judgement.verdict == FAIL and returned is not None:
        result.explanations = explain(question, returned, vector.band)
    elif probed and judgement.verdict == PASS and returned is not None:
        result.explanations = hidden(question, returned, vector.band)
    if returned is not None and (mapped or judgement.verdict == FAIL):
        result.maps = error_maps(question, returned, judgement)
    result.seconds = time.perf_counter() - started
    return result


def _question(task: Task, attrs: Mapping[str, Any], own: Mapping[str, Any], store: Store) -> tuple[Question, Vector]:
    op, case = task.op, task.case
    assert case is not None
    assert task.contract is not None
    vector = (
        _stored(store, op, case, task.direction, task.precision)
        if task.seed == 0
        else _drawn(op.name, case.name, task.direction, task.precision.name, task.seed)
    )
    if {**op.defaults, **case.attrs} != own:
        inputs = vector.inputs
        if op.choice and op.choice[0] in inputs:  # the decision that belongs to these attributes
            forward = {t.name: inputs[t.name] for t in op.signature_of("forward", inputs)[0]}
            inputs = {**inputs, op.choice[0]: truth_of(op, "forward", forward, attrs)[op.choice[0]]}
        band = band_of(op, task.direction, inputs, attrs, task.precision)
        vector = Vector(op, case, task.direction, task.precision, inputs, band)
    return Question(op, task.direction, vector.inputs, attrs, task.precision, task.subject.any_tie, task.contract.takes_choice), vector


def _stored(store: Store, op: Op, case: Case, direction: str, precision: Precision) -> Vector:
    if precision.name in vectors.STORED:
        return store.get(op, case, direction, precision)
    return _drawn(op.name, case.name, direction, precision.name, 0)


@functools.lru_cache(maxsize=256)
def _drawn(op: str, case: str, direction: str, precision: str, seed: int) -> Vector:
    """Subjects that are judged one after the other share what is costly."""
    declared = op_named(op)
    return vectors.make(declared, next(c for c in declared.cases if c.name == case), direction, precision_named(precision), seed)


def _ask(task: Task, question: Question, own: Mapping[str, Any], vector: Vector) -> tuple[Judgement, dict[str, Returned] | None]:
    try:
        returned = task.subject.ask(task.op, task.direction, question.inputs, own, task.precision)
    except Refused as error:
        return Judgement(SKIPPED, [str(error)]), None
    except Misbehaved as error:
        return Judgement(FAIL, [str(error)]), None
    except Died as error:
        return Judgement(ERROR, [str(error)]), None
    except (Exception, SystemExit) as error:
        text = str(error) if type(error) is RuntimeError else f"{type(error).__name__}: {error}"
        return Judgement(ERROR, [f"raised {text}"[:500]]), None
    return judge(question, returned, vector.band), returned


def parse_attr(text: str, ops: Iterable[Op]) -> tuple[str, Any]:
    """name=value, the value read as the attribute's type."""
    name, sign, value = text.partition("=")
    if not sign:
        raise UsageError(f"--attr {text!r}; expected name=value")
    parameter = next((op.attrs[name] for op in ops if name in op.attrs), None)
    if parameter is None:
        known = sorted({a for op in ops for a in op.attrs})
        near = difflib.get_close_matches(name, known, n=2, cutoff=0.4)
        raise UsageError(
            f"unknown attribute {name!r}; " + (f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(known)}")
        )
    expected = parameter.annotation
    if get_origin(expected) is UnionType:
        if value.lower() == "none":
            return name, None
        expected = get_args(expected)[0]
    try:
        if expected is bool:
            return name, {"true": True, "false": False}[value.lower()]
        if get_origin(expected) is Literal:
            return name, next((a for a in get_args(expected) if str(a) == value), value)
        return name, expected(value)
    except (ValueError, KeyError) as error:
        raise UsageError(f"--attr {text!r}: {value!r} is no {expected.__name__}") from error
