"""Reports: a table for people, one JSON object a line for machines."""

import json
from collections import Counter
from importlib import metadata
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .explain import Explanation
from .judge import ERROR, FAIL, PASS, SKIPPED
from .verify import CaseResult, Report

STYLE = {PASS: "green", FAIL: "bold red", ERROR: "bold magenta", SKIPPED: "dim"}
SHOWN = 3  # failing cases that are told in full for each row of the table


SCHEMA = "leadline.report/1"
PACKAGES = ("leadline", "numpy", "numba", "torch", "transformers", "ml_dtypes", "gfloat")


def json_header(**about: Any) -> str:
    """The first line: in which versions it was run, and what else is known of the run (golden/outputs.py)."""
    versions = {name: _version(name) for name in PACKAGES}
    return json.dumps({"schema": SCHEMA, "versions": {k: v for k, v in versions.items() if v}, **_finite(about)})


def json_result(result: CaseResult) -> str:
    """A line a case, written as it comes."""
    return json.dumps(_finite({**vars(result), "explanations": [vars(e) for e in result.explanations]}))


def json_total(reports: list[Report]) -> str:
    """The last line; where it is missing, the run was interrupted."""
    total = Report([r for report in reports for r in report.results])
    counts = {v.lower(): total.count(v) for v in (PASS, FAIL, ERROR, SKIPPED)}
    return json.dumps({"total": counts, "ambiguous": total.ambiguous})


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become strings."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    return value


def shown(text: str) -> str:
    """Text for the terminal: no markup, and of what a subject prints nothing that could steer the terminal."""
    return escape("".join(c if c.isprintable() else repr(c)[1:-1] for c in text))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def print_table(console: Console, reports: list[Report]) -> None:
    """One row for each subject, op and direction (precisions that came out alike share it); then what failed and why; then the totals."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("op", "precision"):
        table.add_column(name, overflow="fold", min_width=9)
    for name in ("pass", "fail", "err", "skip", "amb", "worst"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    several = len({r.subject for report in reports for r in report.results}) > 1
    absent: dict[str, list[str]] = {}
    for report in reports:
        rows: dict[tuple[str, str, str], list[Report]] = {}
        for (subject, op, direction, _), results in report.groups().items():
            part = Report(results)
            if all(r.case == "-" for r in results):
                absent.setdefault(subject, []).append(_titled(op, direction))
            else:
                rows.setdefault((_titled(op, direction), part.verdict, subject), []).append(part)
        if several and rows:
            table.add_row(f"[bold]{shown(report.results[0].subject)}[/]")
        for (title, verdict, _), parts in rows.items():
            whole = Report([r for part in parts for r in part.results])
            counts = [str(whole.count(v) or "·") for v in (PASS, FAIL, ERROR, SKIPPED)]
            precisions = " ".join(part.results[0].precision for part in parts)
            table.add_row(title, precisions, *counts, str(whole.ambiguous or "·"), worst(whole.results), f"[{STYLE[verdict]}]{verdict}[/]")
    console.print(table)
    for report in reports:
        for group, results in report.groups().items():
            _print_group(console, report, group, results)
    skipped = Counter((r.subject, r.op, r.reason) for report in reports for r in report.results if r.verdict == SKIPPED and r.case != "-")
    for (subject, op, reason), count in skipped.items():
        console.print(f"[dim]SKIPPED {count} of {shown(subject)} {op}: {shown(reason)}[/]", soft_wrap=True)
    for subject, ops in absent.items():
        names = list(dict.fromkeys(ops))
        console.print(f"[dim]SKIPPED, not in {shown(subject)}: {', '.join(names)}[/]", soft_wrap=True)
    total = Report([r for report in reports for r in report.results])
    parts = [f"{total.count(PASS)} passed", f"{total.count(FAIL)} failed"]
    parts += [f"{total.count(ERROR)} errors"] * bool(total.count(ERROR)) + [f"{total.count(SKIPPED)} skipped"] * bool(total.count(SKIPPED))
    parts += [f"{total.ambiguous} ambiguous decisions accepted"] * bool(total.ambiguous)
    console.print(f"[{STYLE[total.verdict]}]{total.verdict}[/]  {', '.join(parts)}")


def _titled(op: str, direction: str) -> str:
    return op if direction == "forward" else f"{op} backward"


def worst(results: list[CaseResult]) -> str:
    """The largest statistic as a share of its limit (1× and more fails); for discrete outputs, whether all bits agree."""
    found = [(name, v, r.limits[out][name]) for r in results for out, stats in r.statistics.items() for name, v in stats.items()]
    if any(name == "differ" and value for name, value, _ in found):
        return "differs"
    shares = [value / limit for name, value, limit in found if name != "differ" and limit > 0]
    if not shares:
        return "exact" if found else "·"
    if max(shares) <= 1 and any(r.verdict == FAIL for r in results):
        return "·"  # a decision fails, or a shape, and no statistic
    return f"{max(shares):.2g}×" if max(shares) >= 0.01 else "<0.01×"


LABELS = {"estimate": "measured", "fingerprint": "looks like", "pair": "known", "precision": "coarser", "intermediate": "on the way"}
MANY = 9999  # deviations; more say no more


def evidence(explanation: Explanation) -> str:
    """The matched filter's coefficient and how sure it is, where there is one."""
    if explanation.coefficient is None or explanation.significance is None or explanation.kind == "estimate":
        return ""
    deviations = f"{explanation.significance:.0f}" if explanation.significance <= MANY else f"over {MANY}"
    return f"[{explanation.coefficient:#.3g} of its difference is there, {deviations} deviations from chance.] "


def _print_group(console: Console, report: Report, group: tuple, results: list[CaseResult]) -> None:
    bad = [r for r in results if r.verdict in (FAIL, ERROR)]
    below = report.hidden(group)
    if not bad and not below:
        return
    console.print(f"\n[bold]{shown(' '.join(group))}[/]")
    for explanation in below:
        text = f"{shown(str(explanation))} {evidence(explanation)}".strip()
        console.print(f"  [yellow]below the tolerance[/] {shown(explanation.id)}: {text}", soft_wrap=True)
    for r in bad[:SHOWN]:
        console.print(f"  [{STYLE[r.verdict]}]{r.verdict}[/] {shown(r.case)}: {shown(r.reason)}", soft_wrap=True)
    if len(bad) > SHOWN:
        console.print(f"  … and {len(bad) - SHOWN} more cases (--json has all)")
    for explanation, count in report.explanations(group):
        examined = sum(bool(r.explanations) for r in bad)
        console.print(
            f"  [yellow]{LABELS.get(explanation.kind, 'known')}[/] {shown(explanation.id)}: {shown(str(explanation))} "
            f"{evidence(explanation)}Explains {count} of {examined} cases examined.",
            soft_wrap=True,
        )
