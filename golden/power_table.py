"""The kill matrix printed: a table for each precision, totals in percent, what survives, what is taken for something else."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .errors import UsageError
from .field import METRICS
from .power import SCHEMA, parts, run
from .power_count import NAMED, OURS, ROUNDED, SHOWN, WANTED, Count, Matrix, Record, count
from .vectors import Store


def percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "·"


def print_matrix(console: Console, matrix: Matrix) -> None:
    """A table a precision, then the FP8 recipes', the survivors and what was taken for something else, and the totals, a line each."""
    for precision in matrix.rows:
        console.print(_table(precision, matrix, precision, matrix.wall.get(precision)))
        console.print()
    for precision in matrix.recipes.rows if matrix.recipes else ():
        console.print(_table(f"FP8 {precision}", matrix.recipes, precision, None))
        console.print()
    for title, lines in lists(matrix).items():
        if lines:
            console.print(f"[bold]{title}[/]")
            for line in lines:
                console.print(f"  {escape(line)}", soft_wrap=True)
    for precision in matrix.rows:
        t, wall = matrix.total(precision), matrix.wall.get(precision)
        field = ", ".join(f"{name} {percent(t.killed[name], t.bugs)}" for name in METRICS)
        variants = f" and {wall.alarms[OURS]} in {wall.correct:,} of correct variants" if wall else ""
        console.print(
            f"[bold]{precision}[/]: {percent(t.killed[OURS], t.bugs)} of {t.bugs} bugs fail ({percent(t.killed[ROUNDED], t.bugs)} "
            f"without their own rounding noise), {percent(t.first, t.asked)} of {t.asked} named first, {t.alarms[OURS]} false alarms in "
            f"{t.correct} cases of the reference{variants}; {field}",
            soft_wrap=True,
        )


def _table(title: str, matrix: Matrix | None, precision: str, wall: Count | None) -> Table:
    assert matrix is not None
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for name in (title, "bugs", *SHOWN.values(), "first"):
        table.add_column(name, justify="left" if name == title else "right", no_wrap=True)
    for op, c in matrix.rows[precision].items():
        table.add_row(op, str(c.bugs), *(str(c.killed[j]) for j in SHOWN), f"{c.first}/{c.asked}" if c.asked else "·")
    t = matrix.total(precision)
    table.add_row("[bold]bugs[/]", str(t.bugs), *(percent(t.killed[j], t.bugs) for j in SHOWN), percent(t.first, t.asked))
    table.add_row("by case", str(t.cases), *(percent(t.cases_killed[j], t.cases) for j in SHOWN), "")
    table.add_row("false alarms", str(t.correct), *(str(t.alarms[j]) for j in SHOWN), "")
    if wall:
        table.add_row("of variants", f"{wall.correct:,}", *(f"{wall.alarms[j]:,}" for j in SHOWN), "")
    return table


def lists(matrix: Matrix) -> dict[str, list[str]]:
    """Survivors and misnamed bugs, a line each."""
    found: dict[str, list[str]] = {"survivors": [], "taken for something else": [], "not computed with noise": []}
    for part in (matrix, matrix.recipes):
        for r in part.survivors if part else ():
            seen = ("" if r["differ"] else " (no output differs)") + (" (fails if rounded once)" if r["rounded"] else "")
            found["survivors"].append(f"{_titled(r)}{seen}")
        for r, alike in part.misnamed if part else ():
            named = [id for id, _ in r["named"]]
            place = next((str(i + 1) for i, id in enumerate(named) if id in alike), "not at all")
            found["taken for something else"].append(f"{_titled(r)}: named {', '.join(named[:3]) or 'nothing'}; itself: {place}")
    found["not computed with noise"] = [f"{_titled(r)}: {r['errors'][0]}" for r in matrix.errors]
    return found


def _titled(record: Record) -> str:
    return f"{record['precision']} {record['op']} {record['direction']} {record['id']}"


def totals(matrix: Matrix) -> dict[str, Any]:
    """The last line of the JSON."""
    recipes = matrix.recipes.rows if matrix.recipes else {}
    return {
        "total": {precision: _counted(matrix.total(precision)) for precision in matrix.rows},
        "recipes": {precision: {name: _counted(c) for name, c in rows.items()} for precision, rows in recipes.items()},
        "variants": {precision: {"cases": c.correct, "false_alarms": c.alarms} for precision, c in matrix.wall.items()},
        **{title.replace(" ", "_"): lines for title, lines in lists(matrix).items()},
    }


def _counted(c: Count) -> dict[str, Any]:
    return {
        "bugs": c.bugs,
        "killed": c.killed,
        "cases": c.cases,
        "cases_killed": c.cases_killed,
        "named_first": c.first,
        "named_asked": c.asked,
        "correct_cases": c.correct,
        "false_alarms": c.alarms,
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
    for precision, c in matrix.wall.items():
        if c.alarms[OURS]:
            found.append(f"{precision}: correct variants fail {c.alarms[OURS]} of {c.correct} cases; expected none")
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
    wall: Path | None = None,
) -> bool:
    """Runs the matrix and prints it; whether nothing is missed. `wall` is what the wall of correct variants wrote (tests/wall.py)."""
    variants = read_wall(wall) if wall is not None else []
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
    matrix = count(records, variants)
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


def read_wall(path: Path) -> list[dict[str, Any]]:
    """The records of the wall of correct variants."""
    try:
        found = [json.loads(line) for line in path.read_text().splitlines()]
        for record in found:
            count([], [record])
    except OSError as error:
        raise UsageError(str(error)) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: {type(error).__name__} {error}; expected the JSON lines that tests/wall.py --resume writes") from error
    return found


def dumps(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False)
