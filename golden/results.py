"""What came of a run: a result a case, and the report on all of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .explain import Explanation, consolidate
from .judge import ERROR, FAIL, PASS, SKIPPED

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
        results = self.groups()[group]
        passed, failed = ([labelled(r.case, r.seed) for r in results if r.verdict == verdict] for verdict in (PASS, FAIL))
        return consolidate((r.explanations for r in results if r.verdict == FAIL and r.explanations), passed, failed)

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


def labelled(case: str, seed: int) -> str:
    return case + f" (seed {seed})" * bool(seed)
