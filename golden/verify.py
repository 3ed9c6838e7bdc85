"""verify: a subject held to every case, and what came of it."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from ..ref.op import OPS, Case, Op, op_named
from . import vectors
from .band import Band, band_of, truth_of
from .errors import Misbehaved, Refused, UsageError
from .exec_subject import ExecSubject
from .explain import Cases, explain, hidden
from .judge import ERROR, FAIL, PASS, SKIPPED, Judgement, Question, Returned, judge_closely
from .maps import error_maps
from .precision import Precision, precision_named
from .results import CaseResult, Key, Report, VerdictError, labelled
from .tasks import Task, check_options, group_of, having, is_bare, parse_attr, size_of, subject_of, tasks_of, untaken
from .vectors import Store, Vector
from .worker import Died, IsolatedSubject

DEFAULT_PRECISIONS = ("fp32", "bf16")
TIMEOUT = 120.0  # seconds, of a case
EXPLAINED = 3  # failing cases of an op, direction and precision that are explained


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
    timeout: float = TIMEOUT,
    store: Store | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    on_result: Callable[[CaseResult], None] | None = None,
    explained: bool = True,
    maps: bool = False,
    done: Mapping[Key, CaseResult] | None = None,
) -> Report:
    """Holds a subject to the cases of one op, several, or all, and returns the report.

    subject: a callable; a module or object with attributes named after ops; or a string as on the command line. A string can be run in a
    process of its own (isolate=True; exec: and ctypes: always are): a crash then costs one case; one that runs already may be handed over,
    and stays open. Seed 0 is the stored vectors, every other seed draws new inputs.
    direction None means every direction that the subject has; a bare callable is a forward unless "backward" is said. cases are names or
    patterns of names, of any profile. maps=True makes an error map of every case; failing ones always have theirs.
    progress(done, total, what) is called before each case, on_result(result) after it; the cases of an earlier run (done) are neither
    asked again nor told.
    """
    check_options(direction, profile, ties, attrs)
    ops = list(OPS.values()) if op is None else [op_named(name) for name in ([op] if isinstance(op, str) else op)]
    precisions = [precision_named(p) for p in ([precision] if isinstance(precision, str) else precision or DEFAULT_PRECISIONS)]
    if cases is not None:
        ops = having(ops, cases)
    bare = is_bare(subject)
    if op is None and bare:
        raise UsageError(f"{getattr(subject, '__name__', subject)} is one callable; name what it computes (--op)")
    own = "backward" if direction == "backward" else "forward"
    direction = own if bare else direction
    asked = subject if isinstance(subject, IsolatedSubject | ExecSubject) else subject_of(subject, framework, ties, own, isolate, timeout)
    store = store or Store()
    report = Report()
    try:
        tasks = list(tasks_of(asked, ops, precisions, direction, dict(attrs or {}), profile, list(seeds), op is not None, cases))
        explained_of: dict[tuple[str, str, str, str], int] = {}
        cases_of: dict[tuple[str, str, str, str, int], Cases] = {}
        largest = {group_of(t): t for t in sorted((t for t in tasks if t.case), key=size_of)}  # the matched filter's best chance in a PASS
        for count, task in enumerate(tasks):
            if progress:
                progress(count, len(tasks), f"{task.op.name} {task.direction} {task.precision.name}")
            if earlier := (done or {}).get((*group_of(task), task.case.name if task.case else "-", task.seed)):
                explained_of[earlier.group] = explained_of.get(earlier.group, 0) + (earlier.verdict == FAIL)
                report.results.append(earlier)
                continue
            wanted = explained and explained_of.get(group_of(task), 0) < EXPLAINED
            key = (*group_of(task), task.seed)
            if key not in cases_of:
                cases_of[key] = cases_among([t for t in tasks if (*group_of(t), t.seed) == key], dict(attrs or {}), store)
            result = run_task(
                task, dict(attrs or {}), store, wanted, explained and largest.get(group_of(task)) is task, maps, cases_of[key]
            )
            explained_of[result.group] = explained_of.get(result.group, 0) + (result.verdict == FAIL)
            report.results.append(result)
            if on_result:
                on_result(result)
    finally:
        if asked is not subject:
            asked.close()
    return report


def run_task(
    task: Task, attrs: dict, store: Store, explained: bool, probed: bool = False, mapped: bool = False, cases: Cases | None = None
) -> CaseResult:
    """Asks and judges. Whatever the subject does becomes a verdict; nothing it does ends the run. cases are those of the task's group."""
    result = CaseResult(*group_of(task), task.case.name if task.case else "-", task.seed, SKIPPED, task.skip)
    if task.case is None or task.contract is None:
        return result
    started = time.perf_counter()
    case_attrs = attrs_of(task, attrs)
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
        result.explanations = explain(question, returned, vector.band, cases)
    elif probed and judgement.verdict == PASS and returned is not None:
        result.explanations = hidden(question, returned, vector.band)
    if returned is not None and (mapped or judgement.verdict == FAIL):
        result.maps = error_maps(question, returned, judgement)
    result.seconds = time.perf_counter() - started
    return result


def attrs_of(task: Task, attrs: Mapping[str, Any]) -> dict[str, Any]:
    """A case's attributes, those that the subject declares, those that were asked for."""
    assert task.case is not None
    declared = {**task.subject.declares.get(task.op.name, {}), **{k: v for k, v in attrs.items() if k in task.op.attrs}}
    return {**task.case.attrs, **declared}


def cases_among(tasks: Sequence[Task], attrs: Mapping[str, Any], store: Store) -> Cases:
    """What the tasks ask, when it is needed, by the names that results have. What does not suit a case's sizes is left out."""

    def asked() -> Iterator[tuple[str, Question, Band]]:
        for task in tasks:
            if task.case is None:
                continue
            own = attrs_of(task, attrs)
            with contextlib.suppress(ValueError):
                question, vector = _question(task, own, {**task.op.defaults, **own}, store)
                yield labelled(task.case.name, task.seed), question, vector.band

    return Cases(asked)


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
    return judge_closely(question, returned, vector.band), returned


__all__ = [
    "DEFAULT_PRECISIONS",
    "EXPLAINED",
    "CaseResult",
    "Key",
    "Report",
    "Task",
    "VerdictError",
    "check_options",
    "is_bare",
    "parse_attr",
    "run_task",
    "subject_of",
    "tasks_of",
    "untaken",
    "verify",
]
