"""Tests of a user's own implementation, for pytest to collect: one a case, and properties that need no vectors.

test_router = leadline.golden.conforms(my_router, op="router.noaux_tc", precision="bf16")
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import CodeType, FrameType, FunctionType
from typing import Any, Literal

import pytest

from ..ref.op import OPS, Op, op_named
from .errors import Refused, UsageError
from .judge import ERROR, FAIL, SKIPPED
from .precision import Precision, precision_named
from .subject import Contract
from .vectors import Store
from .verify import DEFAULT_PRECISIONS, EXPLAINED, CaseResult, Task, check_options, is_bare, run_task, subject_of, tasks_of, untaken

EXAMPLES = 20  # inputs that a property is tried on


def conforms(
    subject: Any,
    op: str | Sequence[str] | None = None,
    *,
    precision: str | Sequence[str] | None = None,
    direction: Literal["forward", "backward"] | None = None,
    attrs: Mapping[str, Any] | None = None,
    profile: Literal["quick", "full"] | None = None,
    seeds: Sequence[int] = (0,),
    framework: str | None = None,
    ties: Literal["lowest", "any"] | None = None,
    properties: bool | Sequence[str] = True,
    examples: int = EXAMPLES,
) -> type:
    """A class of tests, for a module-level name that begins with test (or any other name).

    The arguments are verify's. properties: all that apply, those named, or none; each is tried on `examples` inputs, which Hypothesis
    draws from the seed that pytest's header shows. --leadline-precision and --leadline-profile take the place of what is said here.
    """
    check_options(direction, profile or "quick", ties, attrs)
    ops = tuple(OPS.values()) if op is None else tuple(op_named(name) for name in ([op] if isinstance(op, str) else op))
    names = [precision] if isinstance(precision, str) else list(precision or DEFAULT_PRECISIONS)
    if op is None and is_bare(subject):
        raise UsageError(f"{getattr(subject, '__name__', subject)} is one callable; name what it computes (op=…)")
    own = "backward" if direction == "backward" else "forward"
    plan = Plan(
        subject_of(subject, framework, ties, own, False, 120.0),
        ops,
        op is not None,
        tuple(precision_named(name).name for name in names),
        own if is_bare(subject) else direction,
        dict(attrs or {}),
        profile or "quick",
        tuple(seeds),
        properties,
        examples,
    )
    caller = sys._getframe(1)
    body = {name: _standing_at(caller, fn) for name, fn in (("test_case", _case), ("test_property", _property))}
    return type("Conforms", (Conforms,), {**body, "leadline": plan, "__test__": True, "__module__": caller.f_globals.get("__name__", "")})


def _standing_at(caller: FrameType, fn: FunctionType) -> FunctionType:
    """The function, as if it stood where conforms was called: that is the place that pytest names."""
    code: CodeType = fn.__code__.replace(co_filename=caller.f_code.co_filename, co_firstlineno=caller.f_lineno)
    return FunctionType(code, fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)


@dataclass
class Plan:
    """What one call of conforms asks for."""

    subject: Any
    ops: tuple[Op, ...]
    named: bool
    precisions: tuple[str, ...]
    direction: str | None
    attrs: dict[str, Any]
    profile: str
    seeds: tuple[int, ...]
    properties: bool | Sequence[str]
    examples: int
    store: Store = field(default_factory=Store)
    explained: dict[tuple[str, ...], int] = field(default_factory=dict)

    def tasks(self, precisions: Sequence[str], profile: str) -> list[Task]:
        asked = [precision_named(p) for p in precisions]
        return list(tasks_of(self.subject, list(self.ops), asked, self.direction, self.attrs, profile, list(self.seeds), self.named, None))

    def trials(self, tasks: Sequence[Task]) -> Iterator["Trial"]:
        """The properties of every op, direction and precision that there are tasks for."""
        from .properties import PROPERTIES, properties_of

        if not isinstance(self.properties, bool) and (unknown := set(self.properties) - {p.name for p in PROPERTIES}):
            raise UsageError(f"unknown property {min(unknown)!r}; there are {', '.join(p.name for p in PROPERTIES)}")
        for op, direction, precision in dict.fromkeys((t.op.name, t.direction, t.precision.name) for t in tasks if t.case):
            contract = self.subject.contract(op_named(op), direction)
            for p in properties_of(op_named(op), direction):
                if contract is not None and (self.properties is True or (self.properties and p.name in self.properties)):
                    yield Trial(op_named(op), direction, precision_named(precision), p, contract)

    def run(self, task: Task) -> CaseResult:
        group = (task.op.name, task.direction, task.precision.name)
        result = run_task(task, self.attrs, self.store, self.explained.get(group, 0) < EXPLAINED)
        self.explained[group] = self.explained.get(group, 0) + (result.verdict == FAIL)
        return result


@dataclass(frozen=True)
class Trial:
    """One property of one op, direction and precision."""

    op: Op
    direction: str
    precision: Precision
    property: Any
    contract: Contract


class Conforms:
    """What the classes that conforms makes have in common. pytest calls pytest_generate_tests of a class."""

    __test__ = False
    leadline: Plan

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        plan, config = self.leadline, metafunc.config
        precisions = config.getoption("leadline_precision", None) or plan.precisions
        profile = config.getoption("leadline_profile", None) or plan.profile
        try:
            tasks = plan.tasks(precisions, profile)
            if "leadline_task" in metafunc.fixturenames:
                metafunc.parametrize("leadline_task", tasks, ids=[_id(t, t.case.name if t.case else "absent", t.seed) for t in tasks])
            elif plan.properties:
                trials = list(plan.trials(tasks))
                metafunc.parametrize("leadline_trial", trials, ids=[_id(t, t.property.name) for t in trials])
            else:
                metafunc.parametrize("leadline_trial", [])
        except (UsageError, ValueError) as error:
            raise pytest.Collector.CollectError(f"leadline: {error}") from error


def _id(asked: Task | Trial, what: str, seed: int = 0) -> str:
    return "-".join([asked.op.name, asked.direction, asked.precision.name, what] + [f"seed{seed}"] * bool(seed))


def _case(self: Conforms, leadline_task: Task) -> None:
    result = self.leadline.run(leadline_task)
    if result.verdict == SKIPPED:
        pytest.skip(result.reason)
    if result.verdict in (FAIL, ERROR):
        known = [f"known: {e} [{e.id}]" for e in result.explanations]
        what = f"{result.op} {result.direction} {result.precision} {result.case}"
        seed = f" (seed {result.seed})" * bool(result.seed)
        pytest.fail("\n".join([f"{what}{seed}: {result.verdict}: {result.reason}", *known]), pytrace=False)


def _property(self: Conforms, leadline_trial: Trial, request: pytest.FixtureRequest) -> None:
    hypothesis = pytest.importorskip("hypothesis", reason="the properties need hypothesis")
    from .plugin import seed_of

    _try(self.leadline, leadline_trial, hypothesis, seed_of(request.config))


def _try(plan: Plan, trial: Trial, hypothesis: Any, seed: int) -> None:
    from .metamorphic import Ask, Inapplicable, PropertyError
    from .strategies import Drawn, questions

    declared = {**plan.subject.declares.get(trial.op.name, {}), **{k: v for k, v in plan.attrs.items() if k in trial.op.attrs}}
    op = trial.property.narrowed(_within(trial, declared))
    if not op.cases:
        pytest.skip("no declared case that the subject takes says anything about this property")

    def answer(q: Drawn) -> dict[str, Any]:
        try:
            returned = plan.subject.ask(q.op, q.direction, q.inputs, q.attrs, q.precision)
        except (Refused, PropertyError):
            raise
        except Exception as error:
            raise PropertyError(f"raised {type(error).__name__}: {error}") from error
        tensors = q.op.signature_of(q.direction, q.inputs)[1]
        if odd := [t.name for t in tensors if returned[t.name].values.ndim != len(t.dims)]:
            raise PropertyError(f"{odd[0]} has shape {returned[odd[0]].values.shape}")
        return {name: r.values for name, r in returned.items()}

    asked = Ask(answer, trial.contract.takes_choice)
    refused: list[str] = []

    def holds(question: Drawn) -> None:
        try:
            trial.property.check(asked, question)
        except Inapplicable:
            hypothesis.reject()
        except Refused as error:
            refused.append(str(error))
            hypothesis.reject()

    drawn = questions(op, direction=trial.direction, precision=trial.precision.name, empty=False, large=sys.maxsize)
    phases = (hypothesis.Phase.generate, hypothesis.Phase.shrink)
    quiet = {"deadline": None, "database": None, "report_multiple_bugs": False, "suppress_health_check": list(hypothesis.HealthCheck)}
    settings = hypothesis.settings(max_examples=plan.examples, phases=phases, print_blob=False, derandomize=False, **quiet)
    said: list[str] = []
    try:
        hypothesis.seed(seed)(settings(hypothesis.given(drawn)(holds)))()
    except PropertyError as error:
        head = f"{trial.op.name} {trial.direction} {trial.precision.name}: not so: {trial.property.what}"
        said = [head, str(error), *getattr(error, "__notes__", []), f"replay: --leadline-seed {seed}"]
    except hypothesis.errors.Unsatisfiable:
        pytest.skip(refused[0] if refused else "no inputs that were drawn say anything about this property")
    if said:
        pytest.fail("\n".join(said), pytrace=False)


def _within(trial: Trial, declared: Mapping[str, Any]) -> Op:
    """The op with the cases that the subject takes, as it is built."""
    cases = []
    for case in trial.op.cases:
        attrs = {**case.attrs, **declared}
        if not untaken(trial.op, case, trial.contract, {**trial.op.defaults, **attrs}):
            cases.append(replace(case, attrs=attrs))
    return replace(trial.op, cases=tuple(cases))
