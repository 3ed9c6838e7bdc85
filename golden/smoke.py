"""smoke: the shortest talk with an exec: program, step by step, for people who write one."""

import math
from collections.abc import Callable

from ..ref.op import OPS, Op
from .errors import UsageError
from .exec_subject import ExecSubject
from .judge import ERROR, FAIL, PASS, SKIPPED
from .precision import precision_named
from .vectors import Store
from .verify import CaseResult, Task, run_task


def smoke(spec: str, timeout: float, say: Callable[[str, str], None]) -> bool:
    """start, describe, the smallest case of each op and direction at the first precision it declares, stop. say(verdict, line) each step.
    False if a step failed."""
    if not spec.startswith("exec:"):
        raise UsageError(f"subject {spec!r} is no program; expected exec:PROGRAM [ARGS]")
    subject, fine = ExecSubject(spec, timeout=timeout), True
    try:
        say(PASS, f"start     {subject.title or 'it gives no name'}")
        say(PASS, f"describe  {', '.join(subject.ops)}")
        for name, about in subject.ops.items():
            for direction in about.directions:
                result = smallest(subject, OPS[name], direction, about.precisions[0])
                say(
                    result.verdict,
                    f"run       {name} {direction} {result.precision}, case {result.case}" + f": {result.reason}" * bool(result.reason),
                )
                fine = fine and result.verdict not in (FAIL, ERROR)
        ended = subject.stop()
        fine = fine and ended == 0
        say(PASS if ended == 0 else FAIL, f"stop      {'it had to be killed' if ended is None else f'it exited with status {ended}'}")
    finally:
        subject.close()
    return fine


def smallest(subject: ExecSubject, op: Op, direction: str, precision: str) -> CaseResult:
    """The smallest case that is not skipped, if there is one."""
    contract = subject.contract(op, direction)
    result, store = None, Store()
    for case in sorted(op.cases, key=lambda c: math.prod(c.dims.values())):
        result = run_task(Task(subject, op, direction, precision_named(precision), case, 0, contract), {}, store, explained=False)
        if result.verdict != SKIPPED:
            break
    assert result is not None
    return result
