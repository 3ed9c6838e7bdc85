"""What the kill matrix comes to: a table for each precision, totals in percent, what survives, what is taken for something else."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .catalogue import entries
from .errors import UsageError
from .field import METRICS
from .power import CORRECT, SCHEMA, parts, run
from .vectors import Store

SAME = 1e-9  # relative: fingerprints that are no further apart are of one function
OURS, ROUNDED = "leadline", "rounded"
JUDGES = (OURS, ROUNDED, *METRICS)
SHOWN = dict(zip((OURS, *METRICS), ("ours", "allclose", "assert", "calc_diff", "cosine", "85%"), strict=True))
Record = Mapping[str, Any]
WANTED = {"fp32": 1.0, "bf16": 0.9}  # the share of bugs that fail
NAMED = 0.95  # the share of them that are named first, at fp32


@dataclass
class Count:
    """Bugs of an op at a precision, how many each judge kills, and the same by case; cases of the reference and false alarms on them."""

    bugs: int = 0
    killed: dict[str, int] = field(default_factory=lambda: dict.fromkeys(JUDGES, 0))
    cases: int = 0
    cases_killed: dict[str, int] = field(default_factory=lambda: dict.fromkeys(JUDGES, 0))
    asked: int = 0
    first: int = 0
    correct: int = 0
    alarms: dict[str, int] = field(default_factory=lambda: dict.fromkeys(JUDGES, 0))

    def add(self, other: "Count") -> None:
        for name in ("bugs", "cases", "asked", "first", "correct"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("killed", "cases_killed", "alarms"):
            for judge, count in getattr(other, name).items():
                getattr(self, name)[judge] += count


@dataclass
class Matrix:
    """The records, counted."""

    rows: dict[str, dict[str, Count]] = field(default_factory=dict)  # by precision and op
    survivors: list[Record] = field(default_factory=list)
    misnamed: list[tuple[Record, list[str]]] = field(default_factory=list)  # with the ids that would have been right
    errors: list[Record] = field(default_factory=list)

    def total(self, precision: str) -> Count:
        total = Count()
        for count in self.rows[precision].values():
            total.add(count)
        return total


def count(records: Iterable[Record]) -> Matrix:
    """Sums records up. A bug counts as named first if it, or one that is the same function on these cases, is."""
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        if "op" in record:
            groups.setdefault((record["precision"], record["op"], record["direction"]), []).append(record)
    matrix = Matrix()
    for (precision, op, _), group in groups.items():
        row = matrix.rows.setdefault(precision, {}).setdefault(op, Count())
        for record in group:
            if "id" in record:
                _count(matrix, row, record, group)
    return matrix


def _count(matrix: Matrix, row: Count, record: Record, group: list[Record]) -> None:
    failing = {OURS: record["computed"], ROUNDED: record["rounded"], **record["field"]}
    if record["errors"]:
        matrix.errors.append(record)
    if record["id"] == CORRECT:
        row.correct += record["cases"]
        for judge, cases in failing.items():
            row.alarms[judge] += len(cases)
        return
    alike = same(record, group)
    filtered = [case for case, ids in record["filtered"].items() if set(ids) & set(alike)]
    row.bugs += 1
    row.cases += len(record["differ"])
    for judge, cases in failing.items():
        row.killed[judge] += bool(cases) or (judge == OURS and bool(filtered))
        row.cases_killed[judge] += len(set(cases) & set(record["differ"]))
    if not (record["computed"] or filtered):
        matrix.survivors.append(record)
    if record["explained"]:
        row.asked += 1
        right = bool(record["named"]) and record["named"][0][0] in alike
        row.first += right
        if not right:
            matrix.misnamed.append((record, alike))


def same(record: Record, group: Iterable[Record]) -> list[str]:
    """The ids, and attributes' values, that are the same function as a bug on the cases of both; its own first."""
    found = [record["id"]]
    if record["id"] == "topk-tie-break":
        found.append("ties")
    entry = entries().get(record["id"])
    found += [f"{name}={value}" for bug in (entry.bugs if entry else ()) for name, value in bug.attrs.items()]
    for other in group:
        id = other.get("id") or other["other"]
        if id not in (*found, CORRECT) and _alike(record["print"], other["print"]):
            found.append(id)
    return found


def _alike(ours: Mapping[str, list[float] | None], theirs: Mapping[str, list[float] | None]) -> bool:
    """On the cases of both. Fingerprints are triples: a norm, a product with random numbers over it, a count."""
    common = ours.keys() & theirs.keys()
    for case in common:
        a, b = ours[case], theirs[case]
        if a is None or b is None or len(a) != len(b) or a[2::3] != b[2::3]:
            if a is b is None:
                continue
            return False
        norms, products = zip(a[::3], b[::3], strict=True), zip(a[1::3], b[1::3], strict=True)
        if any(abs(x - y) > SAME * max(x, y) for x, y in norms) or any(abs(x - y) > SAME for x, y in products):
            return False
    return bool(common)


def percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "·"


def print_matrix(console: Console, matrix: Matrix) -> None:
    """A table a precision, then the totals, the survivors and what was taken for something else."""
    for precision, rows in matrix.rows.items():
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
        for name in (precision, "bugs", *SHOWN.values(), "first"):
            table.add_column(name, justify="left" if name == precision else "right", no_wrap=True)
        for op, c in rows.items():
            table.add_row(op, str(c.bugs), *(str(c.killed[j]) for j in SHOWN), f"{c.first}/{c.asked}" if c.asked else "·")
        t = matrix.total(precision)
        table.add_row("[bold]bugs[/]", str(t.bugs), *(percent(t.killed[j], t.bugs) for j in SHOWN), percent(t.first, t.asked))
        table.add_row("by case", str(t.cases), *(percent(t.cases_killed[j], t.cases) for j in SHOWN), "")
        table.add_row("false alarms", str(t.correct), *(str(t.alarms[j]) for j in SHOWN), "")
        console.print(table)
        console.print()
    for title, lines in lists(matrix).items():
        if lines:
            console.print(f"[bold]{title}[/]")
            for line in lines:
                console.print(f"  {escape(line)}", soft_wrap=True)
    for precision in matrix.rows:
        t = matrix.total(precision)
        field = ", ".join(f"{name} {percent(t.killed[name], t.bugs)}" for name in METRICS)
        console.print(
            f"[bold]{precision}[/]: {percent(t.killed[OURS], t.bugs)} of {t.bugs} bugs fail ({percent(t.killed[ROUNDED], t.bugs)} "
            f"without their own rounding noise), {percent(t.first, t.asked)} of {t.asked} named first, {t.alarms[OURS]} false alarms in "
            f"{t.correct} cases; {field}",
            soft_wrap=True,
        )


def lists(matrix: Matrix) -> dict[str, list[str]]:
    """Survivors and misnamed bugs, a line each."""
    survived = [
        f"{_titled(r)}" + ("" if r["differ"] else " (no output differs)") + (" (fails if rounded once)" if r["rounded"] else "")
        for r in matrix.survivors
    ]
    misnamed = []
    for record, alike in matrix.misnamed:
        named = [id for id, _ in record["named"]]
        place = next((str(i + 1) for i, id in enumerate(named) if id in alike), "not at all")
        misnamed.append(f"{_titled(record)}: named {', '.join(named[:3]) or 'nothing'}; itself: {place}")
    errors = [f"{_titled(r)}: {r['errors'][0]}" for r in matrix.errors]
    return {"survivors": survived, "taken for something else": misnamed, "not computed with noise": errors}


def _titled(record: Record) -> str:
    return f"{record['precision']} {record['op']} {record['direction']} {record['id']}"


def totals(matrix: Matrix) -> dict[str, Any]:
    """The last line of the JSON."""
    return {
        "total": {
            precision: {
                "bugs": t.bugs,
                "killed": t.killed,
                "cases": t.cases,
                "cases_killed": t.cases_killed,
                "named_first": t.first,
                "named_asked": t.asked,
                "correct_cases": t.correct,
                "false_alarms": t.alarms,
            }
            for precision in matrix.rows
            for t in [matrix.total(precision)]
        },
        **{title.replace(" ", "_"): lines for title, lines in lists(matrix).items()},
    }


def missed(matrix: Matrix) -> list[str]:
    """What is less than it has to be, a line each; empty if all is well."""
    found = []
    for precision in matrix.rows:
        t = matrix.total(precision)
        if precision in WANTED and t.killed[OURS] < WANTED[precision] * t.bugs:
            found.append(f"{precision}: {percent(t.killed[OURS], t.bugs)} of the bugs fail; expected {100 * WANTED[precision]:.0f}%")
        if precision == "fp32" and t.first < NAMED * t.asked:
            found.append(f"{precision}: {percent(t.first, t.asked)} are named first; expected {100 * NAMED:.0f}%")
        if t.alarms[OURS]:
            found.append(f"{precision}: the reference fails {t.alarms[OURS]} of {t.correct} cases; expected none")
    return found


def run_power(
    ops: Iterable[str] | None,
    precisions: Iterable[str] | None,
    full: bool,
    named: bool,
    jobs: int,
    resume: Path | None,
    as_json: bool,
    progress: Callable[[int, int, str], None],
    store: Store | None = None,
) -> bool:
    """Runs the matrix and prints it; whether nothing is missed."""
    records = read(resume) if resume is not None and resume.exists() else []
    done = {(r["op"], r["direction"], r["precision"], r["id"]) for r in records if "id" in r}
    work = parts(ops, precisions, not full, named)
    if as_json:
        for record in ({"schema": SCHEMA}, *records):
            click.echo(dumps(record))
    file = None
    if resume is not None:
        file = resume.open("a")
        if not records:
            file.write(dumps({"schema": SCHEMA}) + "\n")
    try:
        for count_done, (part, found) in enumerate(run(work, store or Store(), jobs, done)):
            progress(count_done, len(work), f"{part.op} {part.direction} {part.precision}")
            records += found
            for record in found:
                if file is not None:
                    file.write(dumps(record) + "\n")
                if as_json:
                    click.echo(dumps(record))
            if file is not None:
                file.flush()
    finally:
        if file is not None:
            file.close()
    matrix = count(records)
    lines = missed(matrix)
    if as_json:
        click.echo(dumps({**totals(matrix), "missed": lines}))
    else:
        print_matrix(Console(highlight=False), matrix)
        for line in lines:
            click.echo(f"MISSED {line}")
    return not lines


def read(path: Path) -> list[dict[str, Any]]:
    """The records of an earlier run; a last line that was cut off is left out."""
    found = []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise UsageError(f"{path}, line {number}: {error}; expected the JSON lines of an earlier run") from error
    if not found or found[0] != {"schema": SCHEMA}:
        raise UsageError(f"{path} is no run of the kill matrix: its first line is not {dumps({'schema': SCHEMA})}")
    return found[1:]


def dumps(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False)
