"""A run as its JSON lines tell it: what the first line says of it, and the lines read back. Every other report is made from these lines."""

import json
import math
import platform
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..ref.op import OPS, Op
from .errors import UsageError
from .explain import Explanation
from .judge import ERROR, FAIL, PASS, SKIPPED
from .precision import PRECISIONS
from .report import SCHEMA
from .vectors import DIRECTORY, STORED
from .verify import CaseResult, Key, Report

NEEDED = {"subject": str, "op": str, "direction": str, "precision": str, "case": str, "seed": int, "verdict": str}
VERDICTS = (PASS, FAIL, ERROR, SKIPPED)


def command_of(subjects: Sequence[str], options: Mapping[str, Any]) -> str:
    """The command line that has these options."""
    words = ["leadline", "verify", *subjects]
    for name, value in options.items():
        if isinstance(value, Mapping):
            values: Iterable[Any] = [f"{k}={str(v).lower() if v is None or isinstance(v, bool) else v}" for k, v in value.items()]
        else:
            values = value if isinstance(value, (list, tuple)) else [value]
        words += [word for v in values for word in (f"--{name}", str(v))]
    return shlex.join(words)


def provenance(subjects: Sequence[str], ops: Sequence[Op], precisions: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """What the first line says beside the versions: the command and the options that were given, the machine's kind, the digests of the
    vector files that were there, and what was not asked."""
    directory = Path(options.get("vectors") or DIRECTORY)
    stored = [(op.name, p) for op in ops for p in precisions if p in STORED and 0 in options.get("seed", (0,))]
    digests = {}
    for name, precision in stored:
        path = directory / name / f"{precision}.json"
        if path.is_file():  # the index; it holds the digest of its arrays
            digests[f"{name}/{precision}"] = sha256(path.read_bytes()).hexdigest()
    left = [] if options.get("profile") == "full" or options.get("case") else [c.name for op in ops for c in op.cases if not c.quick]
    return {
        "started": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": command_of(subjects, options),
        "subjects": list(subjects),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "options": dict(options),
        "digests": digests,
        "not_asked": {
            "ops": [name for name in OPS if name not in {op.name for op in ops}],
            "precisions": [p for p in PRECISIONS if p not in precisions],
            "directions": [d for d in ("forward", "backward") if options.get("direction") not in (None, d)],
            "cases_of_the_full_profile": len(left),
        },
    }


@dataclass
class Run:
    """One run. `complete` is false where the last line is missing: it was interrupted."""

    header: Mapping[str, Any]
    report: Report
    complete: bool

    @property
    def verdict(self) -> str:
        return self.report.verdict

    def totals(self) -> str:
        r = self.report
        counts = {"passed": r.count(PASS), "failed": r.count(FAIL), "errors": r.count(ERROR), "skipped": r.count(SKIPPED)}
        return ", ".join(f"{n} {name}" for name, n in counts.items()) + f", {r.ambiguous} ambiguous"

    def asked(self) -> dict[tuple[str, str, str, str], list[CaseResult]]:
        """The groups that the subject has, those that failed or erred first."""
        groups = {k: results for k, results in self.report.groups().items() if any(r.case != "-" for r in results)}
        return dict(sorted(groups.items(), key=lambda g: not failing(g[1])))

    def reproduce(self, result: CaseResult) -> str:
        """The command that asks this case again."""
        options = self.header.get("options") or {}
        own = {"op": [result.op], "direction": result.direction, "precision": [result.precision], "case": [result.case]}
        own |= {"seed": [result.seed]} if result.seed else {}
        kept = {name: options[name] for name in ("ties", "framework", "vectors") if options.get(name)}
        attrs = {k: v for k, v in (options.get("attr") or {}).items() if k in result.attrs}
        return command_of([result.subject], {**own, **kept, "attr": attrs})

    def not_checked(self) -> list[str]:
        """What nobody should take for passed, a line each."""
        lines = [] if self.complete else ["The run was interrupted: the cases after the last one told here were not asked."]
        absent: dict[str, list[str]] = {}
        for r in self.report.results:
            if r.case == "-":
                absent.setdefault(r.subject, []).append(r.op if r.direction == "forward" else f"{r.op} backward")
        lines += [f"Not in {subject}: {', '.join(dict.fromkeys(names))}." for subject, names in absent.items()]
        skipped = Counter((r.subject, r.op, r.reason) for r in self.report.results if r.verdict == SKIPPED and r.case != "-")
        lines += [f"{count} of {subject} {op} skipped: {reason}." for (subject, op, reason), count in skipped.items()]
        left = self.header.get("not_asked") or {}
        for name in ("ops", "precisions", "directions"):
            lines += [f"Not asked, {name}: {', '.join(map(str, left[name]))}."] if left.get(name) else []
        if n := left.get("cases_of_the_full_profile"):
            lines.append(f"Not asked: {n} cases that only the full profile has.")
        return lines


def read(path: str, text: str) -> Run:
    """The run that JSON lines tell, or a UsageError with the line that does not. A torn last line is an interrupted run's."""
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    header: Mapping[str, Any] | None = None
    results, total = [], None
    for number, line in lines:
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError(f"it is {type(value).__name__}")
        except ValueError as error:
            if header is not None and number == lines[-1][0]:
                break
            raise UsageError(f"{path}, line {number} is no JSON object: {error}") from error
        if header is None:
            if value.get("schema") != SCHEMA:
                raise UsageError(f"{path} does not begin with a report's header: schema is {value.get('schema')!r}; expected {SCHEMA!r}")
            header = value
        elif "total" in value:
            total = value
        else:
            results.append(_result(f"{path}, line {number}", value))
    if header is None:
        raise UsageError(f"{path} is empty; expected the lines of `leadline verify --json`")
    return Run(header, Report(results), total is not None)


def resumed(path: str, text: str, subjects: Sequence[str], options: Mapping[str, Any]) -> dict[Key, CaseResult]:
    """The finished cases of an earlier run of the same subjects with the same options; a UsageError if it was another."""
    run = read(path, text)
    for name, own, theirs in (
        ("subjects", list(subjects), run.header.get("subjects")),
        ("options", dict(options), run.header.get("options")),
    ):
        if json.dumps(own, default=str, sort_keys=True) != json.dumps(theirs, default=str, sort_keys=True):
            raise UsageError(f"{path} has other {name}: {theirs}; expected {own}")
    return {result.key: result for result in run.report.results}


def _result(where: str, value: dict[str, Any]) -> CaseResult:
    for name, kind in NEEDED.items():
        if not isinstance(value.get(name), kind):
            raise UsageError(f"{where}: {name} is {value.get(name)!r}; expected {kind.__name__}")
    if value["verdict"] not in VERDICTS:
        raise UsageError(f"{where}: verdict is {value['verdict']!r}; expected one of {', '.join(VERDICTS)}")
    try:
        known = {f.name: value[f.name] for f in fields(CaseResult) if f.name in value}
        known["explanations"] = [_explanation(e) for e in known.get("explanations", [])]
        for name in ("statistics", "limits"):
            known[name] = {out: {k: float(v) for k, v in of.items()} for out, of in known.get(name, {}).items()}
        known["ambiguous"], known["seconds"] = int(known.get("ambiguous", 0)), float(known.get("seconds", 0.0))
        known["maps"] = {str(out): _map(about) for out, about in known.get("maps", {}).items()}
        return CaseResult(**known)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise UsageError(f"{where} is no result: {error}") from error


def _map(about: Mapping[str, Any]) -> dict[str, Any]:
    """What the page needs of an error map is there."""
    histogram = [int(n) for n in about["histogram"]] if about.get("histogram") else None
    drawn = [{**v, "cells": [list(row) for row in v["cells"]], "axes": [str(a) for a in v["axes"]]} for v in about["views"]]
    drawn = [v for v in drawn if v["cells"] and v["cells"][0] and len(v["count"]) == len(v["cell"]) == len(v["axes"]) == 2]
    worst = [{name: w[name] for name in ("at", "error", "returned", "truth")} for w in about["worst"]]
    dims, shape = [str(d) for d in about["dims"]], [int(n) for n in about["shape"]]
    return {**about, "unit": str(about["unit"]), "dims": dims, "shape": shape, "histogram": histogram, "views": drawn, "worst": worst}


def _explanation(value: Mapping[str, Any]) -> Explanation:
    return Explanation(**{f.name: value[f.name] for f in fields(Explanation) if f.name in value})


def evidence(explanation: Explanation) -> str:
    """What else an explanation says of itself, beside its sentence and its mend."""
    said = {k: v for k, v in vars(explanation).items() if k not in ("id", "text", "mend", "fails") and v not in (None, "", [], {})}
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) and math.isfinite(v) else f"{k} {v}" for k, v in said.items())


def failing(results: Iterable[CaseResult]) -> list[CaseResult]:
    return [r for r in results if r.verdict in (FAIL, ERROR)]
