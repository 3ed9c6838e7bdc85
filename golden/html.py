"""One HTML page of a run, from its JSON lines: nothing is fetched, and whatever a subject printed is text.

The page's policy lets only its own style and script run, each by its hash. The script draws the error maps; all else stands without it.
"""

import base64
import hashlib
import json
import math
import re
from collections.abc import Collection, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from .explain import Explanation
from .judge import ERROR, FAIL, PASS, SKIPPED
from .maps import EDGE, STEP
from .report import worst
from .runs import Run, evidence, failing
from .summaries import named
from .verify import CaseResult, Report

TEMPLATES = Path(__file__).parent / "templates"
OPEN = 1  # cases of a group that stand open
SCALE = ("≥ 64", "16 to 64", "4 to 16", "2 to 4", "1 to 2")


def html(run: Run) -> str:
    style, script = ((TEMPLATES / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    maps: dict[str, Any] = {}
    groups = run.asked()
    parts = {
        "title": escape(f"Leadline: {run.verdict}, {run.totals()}"),
        "verdict": run.verdict,
        "totals": escape(run.totals()),
        "interrupted": "" if run.complete else '<p class="verdict ERROR">The run was interrupted; this is what it had found.</p>',
        "command": _code(str(run.header["command"])) if run.header.get("command") else "",
        "table": _verdicts(groups),
        "legend": _legend(),
        "groups": "\n".join(_group(run, i, group, results, maps) for i, (group, results) in enumerate(groups.items())),
        "unchecked": _list(run.not_checked()) or "<p>Everything that was asked was checked.</p>",
        "provenance": _provenance(run),
        "style": style,
        "script": script,
        "style_hash": _hash(style),
        "script_hash": _hash(script),
    }
    parts["maps"] = json.dumps(maps, separators=(",", ":")).replace("<", "\\u003c")  # nothing in it ends its element
    template = (TEMPLATES / "report.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda m: parts[m[1]], template)  # once: what was put in is not looked at again


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _code(text: str) -> str:
    return f'<pre tabindex="0"><code>{escape(text)}</code></pre>'


def _linked(text: str) -> str:
    """Text in which addresses (a known bug's sources) are links."""
    return re.sub(r"https?://[^\s<>\"'()]+", r'<a href="\g<0>" rel="noreferrer">\g<0></a>', escape(text, quote=False))


def _list(lines: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def _badge(verdict: str) -> str:
    return f'<span class="verdict {verdict}">{verdict}</span>'


def _table(label: str, columns: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Cells are HTML. The table scrolls in its own box, which the keyboard reaches."""
    head = "".join(f'<th scope="col"{" class=number" if i in numbers else ""}>{escape(c)}</th>' for i, c in enumerate(columns))
    body = "".join(
        "<tr>"
        + "".join(c if c.startswith("<td") else f"<td{' class=number' * (i in numbers)}>{c}</td>" for i, c in enumerate(row))
        + "</tr>"
        for row in rows
    )
    about = f'class="scroll" role="region" tabindex="0" aria-label="{escape(label)}"'
    return f"<div {about}><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _verdicts(groups: dict[tuple[str, str, str, str], list[CaseResult]]) -> str:
    rows = []
    for i, ((subject, op, direction, precision), results) in enumerate(groups.items()):
        part = Report(results)
        counts = [str(part.count(v) or "·") for v in (PASS, FAIL, ERROR, SKIPPED)] + [str(part.ambiguous or "·")]
        link = f'<a href="#group{i}">{escape(op)}</a>'
        rows.append([_badge(part.verdict), link, escape(direction), escape(precision), *counts, escape(worst(results)), escape(subject)])
    columns = ("verdict", "op", "direction", "precision", "pass", "fail", "err", "skip", "amb", "worst", "subject")
    return _table("Verdicts", columns, rows, range(4, 10))


def _legend() -> str:
    steps = [("none", "not judged"), ("infinite", "not finite, or no rounding leads there")]
    steps += [(f"n{5 - i}", f"−({text}) σ" if "to" in text else "≤ −64 σ") for i, text in enumerate(SCALE)] + [("s0", "within ±1 σ")]
    steps += [(f"p{i + 1}", f"{text} σ") for i, text in enumerate(SCALE[::-1])]
    items = "".join(f'<li><span class="swatch {name}"></span>{escape(text)}</li>' for name, text in steps)
    return (
        '<p class="note">Error maps show the error in σ, each cell the largest of what it covers, with its sign; for codes, scales and '
        "indices, where σ has no meaning, the colour of ≥ 64 σ is what differs. Arrow keys, or a tap, read a cell.</p>"
        f'<ul class="scale" aria-label="Scale of the error maps">{items}</ul>'
        "<noscript><p>The maps need a script; the worst elements are told in words all the same.</p></noscript>"
    )


def _group(run: Run, number: int, group: tuple[str, str, str, str], results: list[CaseResult], maps: dict[str, Any]) -> str:
    bad = failing(results)
    parts = [f'<section id="group{number}"><h3>{escape(" ".join(group))} {_badge(Report(results).verdict)}</h3>']
    examined = sum(bool(r.explanations) for r in bad)
    shared, hidden = run.report.explanations(group), run.report.hidden(group)
    parts += [_explained(e, e.id, f"Explains {count} of {examined} cases examined.") for e, count in shared]
    parts += [_explained(e, f"Below the tolerance, {e.id}") for e in hidden]
    told_already = {*(e for e, _ in shared), *hidden}
    parts += [_case(run, r, f"g{number}c{i}", i < OPEN, maps, told_already) for i, r in enumerate(bad)]
    rest = [r for r in results if r.verdict not in (FAIL, ERROR)]
    drawn = [r for r in rest if r.maps]
    parts += [_case(run, r, f"g{number}m{i}", False, maps, told_already) for i, r in enumerate(drawn)]
    if plain := [r for r in rest if not r.maps]:
        rows = [
            [escape(named(r)), _badge(r.verdict), escape(worst([r])), f"{r.seconds:.2f}", f'<td class="text">{escape(r.reason)}</td>']
            for r in plain
        ]
        table = _table("Other cases", ("case", "verdict", "worst", "seconds", "why"), rows, (2, 3))
        parts.append(f'<details><summary>{len(plain)} cases that did not fail</summary><div class="inside">{table}</div></details>')
    return "".join(parts) + "</section>"


def _case(run: Run, r: CaseResult, key: str, is_open: bool, maps: dict[str, Any], told_already: Collection[Explanation]) -> str:
    parts = [f"<p>{escape(r.reason)}</p>"] if r.reason else []
    parts += [_explained(e, e.id) for e in r.explanations if e not in told_already]
    parts.append(_statistics(r))
    for name, about in r.maps.items():
        parts.append(_output(f"{key}.{name}", str(name), about, maps))
    if r.attrs:
        parts.append(f"<p>Attributes: <code>{escape(', '.join(f'{k}={v}' for k, v in r.attrs.items()))}</code></p>")
    parts += [f"<p>Seed {r.seed}; {r.seconds:.2f} s. This case again:</p>", _code(run.reproduce(r))]
    summary = f"{_badge(r.verdict)} {escape(named(r))}"
    opened = " open" if is_open else ""
    return f'<details class="case" id="{key}"{opened}><summary>{summary}</summary><div class="inside">{"".join(parts)}</div></details>'


def _explained(e: Explanation, title: str, reach: str = "") -> str:
    told = " ".join(filter(None, (reach, f"Evidence: {evidence(e)}.")))
    return f'<div class="explained"><strong>{escape(title)}</strong>: {_linked(str(e))} <span class="dim">{escape(told)}</span></div>'


def _statistics(r: CaseResult) -> str:
    rows = []
    for output, found in r.statistics.items():
        for name, value in found.items():
            limit = r.limits.get(output, {}).get(name, math.nan)
            over = ' class="number over"' if value > limit else ' class="number"'
            rows.append(
                [escape(output), escape(name), f"<td{over}>{value:.4g}</td>", f"{limit:.4g}", "beyond" if value > limit else "within"]
            )
    return _table("Statistics", ("output", "statistic", "found", "limit", ""), rows, (2, 3)) if rows else ""


def _output(key: str, name: str, about: dict[str, Any], maps: dict[str, Any]) -> str:
    shape = " × ".join(map(str, about["shape"])) or "one number"
    judged = f"{about['judged']} judged" + (f", {about['wrong']} differ" if about.get("wrong") is not None else "")
    parts = [f"<h4>{escape(name)}[{escape(', '.join(about['dims']))}]: {escape(f'{shape}, {judged}')}</h4>"]
    if about.get("wrong") != 0:  # a map of nothing says no more than the line above it
        maps[key] = {"unit": about["unit"], "views": about["views"]}
        parts.append(f'<div data-map="{escape(key)}" data-name="{escape(name)}"></div>')
    rows = [
        [
            escape(f"{name}[{', '.join(map(str, w['at']))}]"),
            _error(w["error"], about["unit"]),
            escape(str(w["returned"])),
            escape(str(w["truth"])),
        ]
        for w in about["worst"]
    ]
    if rows:
        parts.append(_table(f"Worst elements of {name}", ("worst elements", "error", "returned", "truth"), rows, (1, 2, 3)))
    if about.get("histogram"):
        parts.append(_histogram(name, about["histogram"]))
    return "".join(parts)


def _error(value: Any, unit: str) -> str:
    if unit != "σ":
        return "differs"
    return escape(f"{value:+g} σ" if isinstance(value, (int, float)) else f"{value} σ")


def _histogram(name: str, counts: list[int]) -> str:
    """Bars as tall as the logarithm of their count; the two at the ends are all that lies beyond."""
    width, height, floor = 10, 90, 104
    tallest = max(math.log1p(max(counts)), 1e-9)
    bars = []
    for i, count in enumerate(counts):
        h = height * math.log1p(count) / tallest
        place = "beyond" if i in (0, len(counts) - 1) else ""
        low = -EDGE + STEP * (i - 1)
        where = f"{low:g} to {low + STEP:g} σ" if not place else (f"below −{EDGE:g} σ" if i == 0 else f"above {EDGE:g} σ")
        box = f'x="{i * width + 1}" y="{floor - h:.1f}" width="{width - 2}" height="{h:.1f}"'
        bars.append(f'<rect class="{place}" {box}><title>{where}: {count}</title></rect>')
    inner = (len(counts) - 2) * width
    marks = [
        (0, f"< −{EDGE:g}"),
        *((width + inner * k / 4, f"{-EDGE + 2 * EDGE * k / 4:g}") for k in range(1, 4)),
        (inner + 2 * width, f"> {EDGE:g} σ"),
    ]
    ends = ("start", *["middle"] * 3, "end")
    texts = "".join(f'<text x="{x:g}" y="118" text-anchor="{end}">{escape(t)}</text>' for (x, t), end in zip(marks, ends, strict=True))
    said = f"{name}: {counts[0]} elements below −{EDGE:g} σ, {sum(counts[1:-1])} between, {counts[-1]} above {EDGE:g} σ"
    return (
        f'<p class="note">{escape(said)}; bars are logarithmic, half a σ wide.</p>'
        f'<svg class="histogram" viewBox="0 0 {inner + 2 * width} 122" role="img" aria-label="{escape(said)}">{"".join(bars)}'
        f'<line x1="0" x2="{inner + 2 * width}" y1="{floor}" y2="{floor}"/>{texts}</svg>'
    )


def _provenance(run: Run) -> str:
    header = run.header
    about = {
        "started": header.get("started"),
        "python": header.get("python"),
        "machine": header.get("machine"),
        **(header.get("versions") or {}),
    }
    parts = [_table("Versions", ("what", "version"), [[escape(str(k)), escape(str(v))] for k, v in about.items() if v])]
    options = {k: v for k, v in (header.get("options") or {}).items() if v not in (None, [], {}, "")}
    if options:
        rows = [[escape(str(k)), f"<code>{escape(json.dumps(v, ensure_ascii=False))}</code>"] for k, v in options.items()]
        parts.append("<h3>Options</h3>" + _table("Options", ("option", "value"), rows))
    if digests := header.get("digests"):
        rows = [[escape(str(k)), f"<code>{escape(str(v))}</code>"] for k, v in digests.items()]
        table = _table("Digests", ("vectors", "SHA-256 of the index, which holds that of the arrays"), rows)
        parts.append(f'<details><summary>Digests of {len(rows)} vector files</summary><div class="inside">{table}</div></details>')
    return "".join(parts)


__all__ = ["html"]
