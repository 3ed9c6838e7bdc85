"""Markdown for the summary of a CI job, and JUnit XML: made from a run's JSON lines; whatever a subject printed is text in them."""

import re
from xml.etree import ElementTree as ET

from .judge import ERROR, FAIL, PASS, SKIPPED
from .report import worst
from .runs import Run, failing
from .verify import CaseResult, Report

SHOWN = 3  # failing cases of a group that Markdown tells in full
GROUPS = 40  # failing groups that it tells: the summary of a GitHub job holds 1 MiB
ICON = {PASS: "✅", FAIL: "❌", ERROR: "💥", SKIPPED: "⏭️"}
NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
MARKS = re.compile(r"[\\`*_\[\]<>|~@&]")


def markdown(run: Run) -> str:
    """A table, what failed with its first explanation, totals, what was not checked."""
    lines = [f"## Leadline: {ICON[run.verdict]} {run.verdict}", "", run.totals() + ".", ""]
    lines += ["| subject | op | precision | pass | fail | err | skip | amb | worst | verdict |"]
    lines += ["| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |"]
    groups = run.asked()
    for (subject, op, direction, precision), results in groups.items():
        part = Report(results)
        counts = [str(part.count(v) or "·") for v in (PASS, FAIL, ERROR, SKIPPED)]
        title = op if direction == "forward" else f"{op} backward"
        cells = [_plain(subject), _plain(title), _plain(precision), *counts, str(part.ambiguous or "·"), worst(results)]
        lines.append(f"| {' | '.join(cells)} | {ICON[part.verdict]} {part.verdict} |")
    bad = [group for group, results in groups.items() if failing(results)]
    for group in bad[:GROUPS]:
        lines += _failures(run, group, groups[group])
    for group in groups:
        lines += ["", *[f"- {_plain(' '.join(group))}, below the tolerance: {_plain(f'{e} [{e.id}]')}" for e in run.report.hidden(group)]]
    if len(bad) > GROUPS:
        lines += ["", f"… and {len(bad) - GROUPS} more ops, directions and precisions with failures."]
    if unchecked := run.not_checked():
        lines += ["", "<details><summary>Not checked</summary>", "", *[f"- {_plain(line)}" for line in unchecked], "", "</details>"]
    versions = ", ".join(f"{name} {version}" for name, version in (run.header.get("versions") or {}).items())
    return "\n".join([*lines, "", _plain(f"Versions: {versions}."), ""])


def _failures(run: Run, group: tuple[str, str, str, str], results: list[CaseResult]) -> list[str]:
    bad = failing(results)
    lines = ["", f"### {_plain(' '.join(group))}", ""]
    for r in bad[:SHOWN]:
        lines.append(f"- {ICON[r.verdict]} **{_plain(named(r))}**: {_plain(r.reason)}")
    lines += [f"- … and {len(bad) - SHOWN} more cases"] * (len(bad) > SHOWN)
    examined = sum(bool(r.explanations) for r in bad)
    for explanation, count in run.report.explanations(group)[:1]:
        lines += ["", f"**{_plain(explanation.id)}**: {_plain(str(explanation))} Explains {count} of {examined} cases examined."]
    fence = "`" * (1 + max((len(m) for m in re.findall("`+", run.reproduce(bad[0]))), default=2))
    return [*lines, "", f"{fence}sh", run.reproduce(bad[0]), fence]


def _plain(text: str) -> str:
    """Text on one line in which nothing is markup."""
    return MARKS.sub(lambda m: f"&#{ord(m[0])};" if m[0] in "<>&|`@" else "\\" + m[0], " ".join(text.split()))


def named(result: CaseResult) -> str:
    return result.case + (f" (seed {result.seed})" if result.seed else "")


def junit(run: Run) -> str:
    """One testsuite for each subject, op, direction and precision that was asked; a testcase a case."""
    root = ET.Element("testsuites", name="leadline")
    for (subject, op, direction, precision), results in run.asked().items():
        suite = _counted(ET.SubElement(root, "testsuite", name=_legal(f"{subject} {op} {direction} {precision}")), results)
        properties = ET.SubElement(suite, "properties")
        for name, value in {**(run.header.get("versions") or {}), "command": run.header.get("command", "")}.items():
            ET.SubElement(properties, "property", name=_legal(str(name)), value=_legal(str(value)))
        for r in results:
            where = _legal(f"{subject}.{op}.{direction}.{precision}")
            case = ET.SubElement(suite, "testcase", classname=where, name=_legal(named(r)), time=f"{r.seconds:.3f}")
            if r.verdict == SKIPPED:
                ET.SubElement(case, "skipped", message=_legal(r.reason))
            elif r.verdict in (FAIL, ERROR):
                told = [r.reason, *(f"known: {e} [{e.id}]" for e in r.explanations), run.reproduce(r)]
                kind = "failure" if r.verdict == FAIL else "error"
                ET.SubElement(case, kind, message=_legal(r.reason), type=r.verdict).text = _legal("\n".join(told))
    _counted(root, [r for results in run.asked().values() for r in results])
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _counted(element: ET.Element, results: list[CaseResult]) -> ET.Element:
    part = Report(results)
    counts = {"tests": len(results), "failures": part.count(FAIL), "errors": part.count(ERROR)}
    if element.tag == "testsuite":
        counts["skipped"] = part.count(SKIPPED)
    for name, n in counts.items():
        element.set(name, str(n))
    element.set("time", f"{sum(r.seconds for r in results):.3f}")
    return element


def _legal(text: str) -> str:
    """XML 1.0 has no control characters, not even as references: they are shown as escapes."""
    return NO_XML.sub(lambda m: f"\\x{ord(m[0]):02x}", text)
