"""What a checked trace looks like: on the terminal, as JSON lines, drawn (PNG) and as one page (HTML)."""

import json
import math
from collections.abc import Iterator
from html import escape as html_escape
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .explain import Explanation
from .judge import FAIL, PASS
from .plot import figure_for
from .report import STYLE, shown
from .trace_check import Checked, Judged, layers_of
from .trace_names import BY_NAME, IN_LAYER, short_name

SCHEMA = "leadline.trace-report/1"
WIDTH = 24  # of a bar, in characters
CURVE = ("embed", "output", "norm", "logits")  # what is drawn


def verdict_line(report: Checked) -> str:
    passed, wrong = sum(r.verdict == PASS for r in report.results), len(report.wrong)
    skipped = len(report.results) - passed - wrong
    counts = f"{passed} tensors right for their own inputs, {wrong} wrong" + (f", {skipped} not judged" if skipped else "")
    return f"{report.verdict}: {counts}; {report.engine}, {report.precision}, {report.tokens} tokens"


def said(explanation: Explanation) -> str:
    """A known bug with its id, or what was measured"""
    mend = "" if explanation.mend.startswith("--") else explanation.mend  # an option of another command
    return f"{explanation.text}{f' ({mend})' if mend else ''} [{explanation.id}]"


def where(r: Judged) -> str:
    """Where the engines have a tensor"""
    about = BY_NAME[short_name(r.name)[1]]
    home = IN_LAYER.replace("{i}", str(r.layer)) if r.layer is not None else ""
    return f"transformers: {about.hugging_face}{f' (in {home[:-1]})' if home else ''}; vLLM and SGLang: {about.engines}"


def made_of(r: Judged) -> str:
    return f"It is {BY_NAME[short_name(r.name)[1]].what}."


def show(report: Checked, console: Console, everything: bool = False) -> None:
    """The first wrong tensor, then the table of drift."""
    head, _, rest = verdict_line(report).partition(":")
    console.print(f"[{STYLE[report.verdict]}]{head}[/]:{shown(rest)}", soft_wrap=True)
    explained = [r for r in report.wrong if r.explanations] or report.wrong[:1]
    for r in explained:
        console.print(f"\n[bold red]{shown(r.name)}[/] is wrong for its own inputs. {shown(made_of(r))}", soft_wrap=True)
        console.print(f"  {shown(r.reason)}", soft_wrap=True)
        for e in r.explanations[:3]:
            known = "known bug" if e.kind in ("agrees", "filter", "pair", "ties") else "measured" if e.kind == "estimate" else "it looks so"
            console.print(f"  [bold]{known}[/]: {shown(said(e))}", soft_wrap=True)
        if not r.explanations:
            console.print("  No known bug explains it.", soft_wrap=True)
        console.print(f"  look at: {shown(where(r))}", soft_wrap=True)
    if others := [r.name for r in report.wrong if r not in explained]:
        more = f", … ({len(others)} in all)" if len(others) > 6 else ""
        console.print(f"\nalso wrong for their own inputs: {', '.join(map(shown, others[:6]))}{more}", soft_wrap=True)
    for convention, first in report.conventions.items():
        console.print(f"convention, not a failure: {shown(convention)} (first at {shown(first)})", soft_wrap=True)
    for name, reason in {r.name: r.reason for r in report.results if r.verdict not in (PASS, FAIL)}.items():
        console.print(f"[dim]not judged: {shown(name)}: {shown(reason)}[/]", soft_wrap=True)
    ambiguous = sum(r.ambiguous for r in report.results)
    if ambiguous:
        console.print(f"{ambiguous} choices of experts are near ties that went the other way: accepted", soft_wrap=True)
    console.print()
    console.print(drift_table(report, everything))
    console.print(f"\n{LEGEND}\n{report.seconds:.1f} s", soft_wrap=True)


LEGEND = (
    "step: the largest statistic of a tensor given the engine's own inputs, over its limit; above 1 is wrong. drift: rms error over rms, "
    "from the ids on; correct: what Monte-Carlo arithmetic of this precision drifts; ━ from there to the limit, ● the engine."
)


def drift_table(report: Checked, everything: bool) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("tensor", "step", "drift", "correct", "limit"):
        table.add_column(name, justify="left" if name == "tensor" else "right", no_wrap=True)
    drawn = any(r.drift is not None for r in report.results)
    table.add_column("" if not drawn else "drift from the start", no_wrap=True)
    low, high = span(report)
    for row, worst in rows(report, everything):
        style = "bold red" if worst.verdict == FAIL else ""
        cells = [number(row.drift), number(row.expected), number(row.limit)]
        table.add_row(shown(row.name), ratio(worst), *cells, bar(row, low, high), style=style)
    return table


def rows(report: Checked, everything: bool) -> Iterator[tuple[Judged, Judged]]:
    """What stands in each line, and the tensor whose step is worst there"""
    for layer, block in layers_of(report):
        if everything or layer is None:
            yield from ((r, r) for r in block)
        else:
            last = block[-1]
            yield last, next((r for r in block if r.verdict == FAIL), max(block, key=lambda r: r.worst))


def number(value: float | None) -> str:
    return "·" if value is None else "0" if value == 0 else f"{value:.1e}"


def ratio(r: Judged) -> str:
    if r.verdict not in (PASS, FAIL):
        return "·"
    return (f"{r.worst:.2f}" if r.worst < 100 else f"{r.worst:.0e}") if r.statistics else "wrong" if r.verdict == FAIL else "0"


def span(report: Checked) -> tuple[float, float]:
    """The decades that hold every drift"""
    values = [v for r in report.results for v in (r.drift, r.expected, r.limit) if v and math.isfinite(v)]
    low, high = (min(values), max(values)) if values else (1e-8, 1.0)
    return math.floor(math.log10(low)), max(math.ceil(math.log10(high)), math.floor(math.log10(low)) + 1)


def bar(r: Judged, low: float, high: float) -> str:
    """Logarithmic: the band of correct arithmetic, and where the engine is"""
    if r.drift is None:
        return ""

    def place(value: float) -> int:
        value = math.log10(value) if value > 0 else low
        return round((WIDTH - 1) * min(max((value - low) / (high - low), 0.0), 1.0))

    cells = [" "] * WIDTH
    if r.expected and r.limit:
        for i in range(place(r.expected), place(r.limit) + 1):
            cells[i] = "━"
    cells[place(r.drift)] = "[bold red]●[/]" if r.beyond else "●"
    return "".join(cells)


def lines(report: Checked) -> Iterator[str]:
    """JSON lines: what was checked, a line a tensor, the total."""

    def put(value: dict[str, Any]) -> str:
        plain = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in value.items()}
        return json.dumps(plain, ensure_ascii=False, default=lambda v: {k: w for k, w in vars(v).items() if w not in (None, "")})

    yield put({"schema": SCHEMA, "engine": report.engine, "precision": report.precision, "tokens": report.tokens})
    for r in report.results:
        yield put({**vars(r), "beyond": r.beyond, "worst": r.worst})
    yield put({"verdict": report.verdict, "first": report.wrong[0].name if report.wrong else None, "conventions": report.conventions})


def curve(report: Checked) -> list[Judged]:
    return [r for r in report.results if short_name(r.name)[1] in CURVE and r.drift is not None]


def label(r: Judged) -> str:
    return r.name if r.layer is None else str(r.layer)


def png(report: Checked, path: Path) -> None:
    """Drift over layers beside the band of correct arithmetic; a layer with a wrong step is red."""
    figure = figure_for(path)
    points = [r for r in curve(report) if r.drift]
    axis, at = figure.subplots(), range(len(points))
    axis.fill_between(at, [r.expected for r in points], [r.limit for r in points], alpha=0.3, label="correct arithmetic: mean to limit")
    axis.plot(at, [r.drift for r in points], color="black", marker=".", label=report.engine)
    bad = {r.layer for r in report.wrong}
    marked = [i for i, r in enumerate(points) if (r.layer in bad and r.layer is not None) or r.verdict == FAIL]
    if marked:
        axis.plot(marked, [points[i].drift for i in marked], "o", color="red", label="a step is wrong for its own inputs")
    axis.set(yscale="log", xlabel="layer", ylabel="rms error / rms, from the ids on")
    axis.set_xticks(list(at), [label(r) for r in points])
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    figure.suptitle(verdict_line(report), fontsize="medium", wrap=True)
    figure.savefig(path)


def html(report: Checked) -> str:
    """One page, nothing fetched, no script."""
    from .html import TEMPLATES, _badge, _hash, _linked, _list, _table

    e = html_escape
    style = (TEMPLATES / "report.css").read_text(encoding="utf-8") + DRAWING
    parts = []
    for r in [r for r in report.wrong if r.explanations] or report.wrong[:1]:
        parts.append(f"<h2>{e(r.name)} is wrong for its own inputs</h2><p>{e(made_of(r))} {e(r.reason)}</p>")
        parts += [f'<div class="explained"><strong>{e(x.id)}</strong>: {_linked(said(x))}</div>' for x in r.explanations[:3]]
        parts.append(f"<p>Look at {e(where(r))}.</p>")
    parts.append(_list(f"convention, not a failure: {text} (first at {first})" for text, first in report.conventions.items()))
    parts.append(f"<h2>Drift from the start</h2>{svg(report)}<p class=note>{e(LEGEND)}</p><h2>Tensors</h2>")
    columns = ("tensor", "verdict", "step", "drift", "correct", "limit", "tokens", "near ties", "why")
    cells = [
        [
            e(r.name),
            _badge(r.verdict),
            ratio(r),
            f'<td class="number{" over" if r.beyond else ""}">{number(r.drift)}</td>',
            number(r.expected),
            number(r.limit),
            str(r.tokens),
            str(r.ambiguous or "·"),
            f'<td class="text">{e(r.reason or r.convention)}</td>',
        ]
        for r in report.results
    ]
    parts.append(_table("Tensors", columns, cells, range(2, 8)))
    policy = f"default-src 'none'; base-uri 'none'; form-action 'none'; style-src 'sha256-{_hash(style)}'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<title>{e("Leadline trace: " + verdict_line(report))}</title>\n'
        f"<style>{style}</style>\n</head>\n<body>\n<header><h1>Leadline trace {_badge(report.verdict)}</h1>"
        f'<p class="totals">{e(verdict_line(report))}</p></header>\n<main>{"".join(parts)}</main>\n</body>\n</html>\n'
    )


DRAWING = """
svg.drift { display: block; width: 100%; height: auto; }
svg.drift text { fill: var(--dim); font-size: 11px; font-family: system-ui, sans-serif; }
svg.drift .band { fill: var(--link); opacity: .25; }
svg.drift .engine { fill: none; stroke: var(--text); }
svg.drift circle { fill: var(--text); } svg.drift circle.wrong { fill: var(--fail); }
svg.drift line { stroke: var(--line); }
"""


def svg(report: Checked) -> str:
    """The same picture as png draws"""
    points = [r for r in curve(report) if r.drift and math.isfinite(r.drift) and r.expected and r.limit]
    if not points:
        return "<p>Nothing has drifted.</p>"
    low, high = span(report)
    width, height, left = 60 * max(len(points), 6), 260, 60
    bad = {r.layer for r in report.wrong} - {None}

    def at(i: int, value: float) -> str:
        return f"{left + 60 * i + 30},{height - (height - 20) * (math.log10(value) - low) / (high - low):.1f}"

    band = [at(i, r.limit or 1) for i, r in enumerate(points)] + [at(i, points[i].expected or 1) for i in reversed(range(len(points)))]
    grid = "".join(
        f'<line x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">1e{d}</text>'
        for d in range(int(low), int(high) + 1)
        for y in (height - (height - 20) * (d - low) / (high - low),)
    )
    marks = "".join(
        f'<circle class="{"wrong" if r.layer in bad or r.verdict == FAIL else ""}" cx="{x}" cy="{y}" r="4">'
        f"<title>{r.name}: {r.drift:.3g}</title></circle>"
        f'<text x="{x}" y="{height + 18}" text-anchor="middle">{html_escape(label(r))}</text>'
        for i, r in enumerate(points)
        for x, y in (at(i, r.drift or 1).split(","),)
    )
    about = f"Drift of {len(points)} tensors, from {points[0].drift:.2g} to {points[-1].drift:.2g}"
    return (
        f'<svg class="drift" viewBox="0 0 {left + width} {height + 30}" role="img" aria-label="{about}">{grid}'
        f'<polygon class="band" points="{" ".join(band)}"/>'
        f'<polyline class="engine" points="{" ".join(at(i, r.drift or 1) for i, r in enumerate(points))}"/>{marks}</svg>'
    )
