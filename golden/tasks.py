"""What a run asks: which cases of which ops, of a subject that is here or in a process of its own; and what of that is wrong use."""

import difflib
import fnmatch
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from ..ref.op import OPS, Case, Op, check_attr
from .errors import UsageError
from .exec_subject import ExecSubject
from .precision import Precision
from .subject import Contract, load
from .vectors import directions
from .worker import IsolatedSubject


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


def having(ops: list[Op], cases: Sequence[str]) -> list[Op]:
    """The ops that have some of the cases. Each name must be a case's."""
    known = {c.name for op in ops for c in op.cases}
    for name in cases:
        if not any(named_by(k, [name]) for k in known):
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
            raise UsageError(f"unknown case {name!r}" + (f"; did you mean {' or '.join(near)}?" if near else ""))
    return [op for op in ops if any(named_by(c.name, cases) for c in op.cases)]


def group_of(task: Task) -> tuple[str, str, str, str]:
    return task.subject.name, task.op.name, task.direction, task.precision.name


def size_of(task: Task) -> int:
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
