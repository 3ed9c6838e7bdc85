"""Reports: a table for people, one JSON object a line for machines."""

import json
from collections.abc import Iterable
from importlib import metadata
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .judge import ERROR, FAIL, PASS, SKIPPED
from .verify import CaseResult, Report

STYLE = {PASS: "green", FAIL: "bold red", ERROR: "bold magenta", SKIPPED: "dim"}
SHOWN = 3  # failing cases that are told in full for each row of the table


def json_lines(reports: Iterable[Report]) -> Iterable[str]:
    """A line of provenance, a line a case, a line of totals."""
    versions = {name: _version(name) for name in ("leadline", "numpy", "numba", "torch", "transformers", "ml_dtypes", "gfloat")}
    reports = list(reports)
    yield json.dumps({"schema": "leadline.report/1", "versions": {k: v for k, v in versions.items() if v}})
    results = [r for report in reports for r in report.results]
    for result in results:
        fields = {**vars(result), "explanations": [vars(e) for e in result.explanations]}
        yield json.dumps(_finite(fields))
    counts = {v.lower(): sum(r.verdict == v for r in results) for v in (PASS, FAIL, ERROR, SKIPPED)}
    yield json.dumps({"total": counts, "ambiguous": sum(r.ambiguous for r in results)})


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become strings."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    return value


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def print_table(console: Console, reports: list[Report]) -> None:
    """One row for each subject, op, direction and precision; then what failed and why; then the totals."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    several = len({r.subject for report in reports for r in report.results}) > 1
    for name in (*(["subject"] if several else []), "op", "direction", "precision"):
        table.add_column(name, overflow="fold")
    for name in ("pass", "fail", "error", "skip", "ambiguous", "worst"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    for report in reports:
        for (subject, *rest), results in report.groups().items():
            part = Report(results)
            counts = [str(part.count(v) or "·") for v in (PASS, FAIL, ERROR, SKIPPED)]
            verdict = part.verdict
            table.add_row(
                *([escape(subject)] if several else []),
                *rest,
                *counts,
                str(part.ambiguous or "·"),
                worst(results),
                f"[{STYLE[verdict]}]{verdict}[/]",
            )
    console.print(table)
    for report in reports:
        for group, results in report.groups().items():
            _print_group(console, report, group, results)
    total = Report([r for report in reports for r in report.results])
    skipped = f", {total.count(SKIPPED)} skipped" if total.count(SKIPPED) else ""
    errors = f", {total.count(ERROR)} errors" if total.count(ERROR) else ""
    console.print(
        f"[{STYLE[total.verdict]}]{total.verdict}[/]  {total.count(PASS)} passed, {total.count(FAIL)} failed{errors}{skipped}"
        + (f", {total.ambiguous} ambiguous decisions accepted" if total.ambiguous else "")
    )


def worst(results: list[CaseResult]) -> str:
    """The largest statistic as a share of its limit: 1 and more fails."""
    shares = [
        value / r.limits[output][name] if r.limits[output][name] else float(value > 0)
        for r in results
        for output, found in r.statistics.items()
        for name, value in found.items()
        if name != "differ" or value
    ]
    exact = [r for r in results if any("differ" in found for found in r.statistics.values())]
    if not shares:
        return "exact" if exact else "·"
    return "differs" if exact and max(shares) == 1.0 else f"{max(shares):.2g}×"


def _print_group(console: Console, report: Report, group: tuple, results: list[CaseResult]) -> None:
    bad = [r for r in results if r.verdict in (FAIL, ERROR)]
    reasons = {r.reason for r in results if r.verdict == SKIPPED and r.case != "-"}
    if not bad and not reasons:
        return
    console.print(f"\n[bold]{escape(' '.join(group))}[/]")
    for r in bad[:SHOWN]:
        console.print(f"  [{STYLE[r.verdict]}]{r.verdict}[/] {escape(r.case)}: {escape(r.reason)}", soft_wrap=True)
    if len(bad) > SHOWN:
        console.print(f"  … and {len(bad) - SHOWN} more cases (--json has all)")
    for explanation, count in report.explanations(group):
        examined = sum(bool(r.explanations) for r in bad)
        console.print(f"  [yellow]known[/] {escape(explanation.id)}: {escape(str(explanation))} Explains {count} of {examined} cases examined.", soft_wrap=True)
    for reason in sorted(reasons):
        count = sum(r.reason == reason for r in results if r.verdict == SKIPPED)
        console.print(f"  [dim]SKIPPED {count}: {escape(reason)}[/]", soft_wrap=True)
