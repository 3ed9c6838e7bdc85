"""The catalogue of bugs: what is known of each, whether it is written here, and which vectors catch it.

golden/bugs/registry.json holds what the field has met: kind, severity, evidence, the inputs that reveal it, the threads. What goes wrong
is said by the variants in golden/bugs; where there is none the registry says it, with the reason. Severity: high is wrong on ordinary
inputs or not finite, medium is wrong on some or by little, low is in the last bits or one of several conventions.
"""

import difflib
import functools
import importlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..ref.op import OPS, Op, op_named
from . import vectors
from .bugs import FILES, Bug
from .errors import UsageError

REGISTRY = Path(__file__).parent / "bugs" / "registry.json"
SCHEMA = "leadline.bugs/1"
THREAD = re.compile(r"(?:([\w.-]+/[\w.-]+))?#(\d+)")
EVIDENCE = {
    "reported": "reported in the field",
    "review": "found in code review",
    "plausible": "plausible; no report found",
    "adjacent": "an adjacent report only",
    "neighbour": "reported of a neighbouring model or op",
    "ours": "written for the vectors",
}


@dataclass(frozen=True)
class Entry:
    """One bug, variant or benign difference. With `reason` it is not written here; without, it is by `bugs` or is an attribute's value."""

    id: str
    kind: str
    severity: str
    evidence: str
    what: tuple[tuple[str, tuple[str, ...]], ...]  # sentences, each with the ops that it is said of
    directions: tuple[str, ...]
    inputs: str = ""
    sources: tuple[str, ...] = ()
    reason: str = ""
    bugs: tuple[Bug, ...] = field(default=(), repr=False)

    @property
    def ops(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(op for _, ops in self.what for op in ops))

    @property
    def declared(self) -> str:
        """The option that declares it, where it is a convention."""
        attrs = [b.attrs for b in self.bugs if b.attrs and (b.benign or self.kind != "bug")]
        return " ".join(f"--attr {name}={value}" for name, value in (attrs[0].items() if attrs else ()))


def written() -> list[Bug]:
    """Every variant in golden/bugs."""
    return [bug for name in FILES for bug in _module(name).BUGS]


def unwritten() -> dict[str, str]:
    """The entries that golden/bugs lists as not to be written for an op that is here, each with the reason."""
    found: dict[str, str] = {}
    for name in FILES:
        found.update(getattr(_module(name), "UNWRITTEN", ()))
    return found


def _module(name: str) -> Any:
    return importlib.import_module(f".bugs.{name}", __package__)


@functools.cache
def registry() -> dict[str, Any]:
    found = json.loads(REGISTRY.read_text())
    if found.get("schema") != SCHEMA:
        raise UsageError(f"{REGISTRY}: schema is {found.get('schema')!r}; expected {SCHEMA!r}")
    return found


@functools.cache
def entries() -> dict[str, Entry]:
    """All by id: what the field has met, then what was written for the vectors alone."""
    variants: dict[str, list[Bug]] = {}
    for bug in written():
        variants.setdefault(bug.id, []).append(bug)
    for bug in _conventions():
        variants.setdefault(bug.id, []).append(bug)
    reasons = unwritten()
    found = {e["id"]: _entry(e, variants.pop(e["id"], []), reasons) for e in registry()["bugs"]}
    rated = {id: severity for severity, ids in registry()["severity"].items() for id in ids}
    for id, bugs in variants.items():
        about = {"id": id, "kind": "variant" if any(b.benign for b in bugs) else "bug", "severity": rated.get(id, ""), "evidence": "ours"}
        found[id] = _entry({**about, "inputs": "", "sources": _threads(bugs)}, bugs, reasons)
    return found


def _entry(about: dict[str, Any], bugs: list[Bug], reasons: dict[str, str]) -> Entry:
    said: dict[str, list[str]] = {}
    for bug in bugs:
        said.setdefault(bug.what, []).extend(op for op in bug.ops if op not in said.get(bug.what, ()))
    if not bugs:
        said = {about.get("what", ""): [about.get("op", "")]}
    ways = [way for way in ("forward", "backward") if any(b.touches(way) for b in bugs)]
    return Entry(
        about["id"],
        about["kind"],
        about["severity"],
        about["evidence"],
        tuple((sentence, tuple(ops)) for sentence, ops in said.items()),
        tuple(ways) or (about.get("direction", ""),),
        about["inputs"],
        tuple(about["sources"]),
        "" if bugs else reasons.get(about["id"]) or about.get("reason", ""),
        tuple(bugs),
    )


def _threads(bugs: list[Bug]) -> list[str]:
    """owner/repo#number, each in full, and what is no thread (a paper, a name) as it stands."""
    found, repository = [], ""
    for part in (part.strip() for bug in bugs for part in re.split(r";|,\s*(?=#)", bug.sources)):
        thread = THREAD.fullmatch(part)
        if thread:
            repository = thread[1] or repository
        found.append(f"{repository}#{thread[2]}" if thread else part)
    return list(dict.fromkeys(part for part in found if part))


def _conventions(precision: str | None = None) -> list[Bug]:
    """Entries that are an attribute's other value and no variant in golden/bugs; of those, what a precision can tell apart."""
    found = [(e, e["attribute"]) for e in registry()["bugs"] if "attribute" in e]
    return [
        Bug(e["id"], (about["op"],), e["what"], attrs={about["name"]: about["value"]}, benign=True)
        for e, about in found
        if precision is None or precision in about["precisions"]
    ]


def conventions(op: Op, direction: str, precision: str) -> list[Bug]:
    """Such entries of an op."""
    return [bug for bug in _conventions(precision) if op.name in bug.ops and bug.touches(direction)]


def entry_named(id: str) -> Entry:
    """The entry of that id, or a UsageError with near ids."""
    known = entries()
    if id not in known:
        near = difflib.get_close_matches(id, known, n=3, cutoff=0.4)
        raise UsageError(f"unknown bug {id!r}; " + (f"did you mean {', '.join(near)}?" if near else "`leadline bugs` lists them"))
    return known[id]


def link(source: str) -> str:
    """The address of a thread; GitHub forwards an issue's address to the pull request or discussion of that number."""
    thread = THREAD.fullmatch(source)
    return f"https://github.com/{thread[1]}/issues/{thread[2]}" if thread and thread[1] else source


Caught = dict[str, dict[str, list[str]]]  # by precision and op: the ids of vectors


def caught(directory: Path = vectors.DIRECTORY) -> dict[str, Caught]:
    """By bug: the stored vectors that fail it."""
    found: dict[str, Caught] = {}
    for op in OPS.values():
        for precision in vectors.STORED:
            path = directory / op.name / f"{precision}.json"
            for vector in vectors.read_index(path)["vectors"] if path.exists() else ():
                for id in vector["flags"]:
                    found.setdefault(id, {}).setdefault(precision, {}).setdefault(op.name, []).append(vector["id"])
    return found


def rows(op: str | None = None, unwritten_only: bool = False) -> list[Entry]:
    """The entries of an op, or of all, or only those that are not written."""
    if op is not None:
        op_named(op)
    return [e for e in entries().values() if (op is None or op in e.ops) and (not unwritten_only or e.reason)]


def described(entry: Entry, found: Caught) -> dict[str, Any]:
    """An entry as JSON."""
    return {
        "id": entry.id,
        "kind": entry.kind,
        "severity": entry.severity,
        "evidence": entry.evidence,
        "what": [{"sentence": sentence, "ops": list(ops)} for sentence, ops in entry.what],
        "directions": list(entry.directions),
        "inputs": entry.inputs,
        "sources": [link(s) for s in entry.sources],
        "declared": entry.declared,
        "reason": entry.reason,
        "caught": found,
    }


STYLE = {"high": "bold red", "medium": "yellow", "low": "dim", "none": "dim"}


def print_catalogue(console: Console, op: str | None, unwritten_only: bool, as_json: bool) -> None:
    """A line a bug, and the counts."""
    chosen, found = rows(op, unwritten_only), caught()
    if as_json:
        for entry in chosen:
            click.echo(json.dumps(described(entry, found.get(entry.id, {})), ensure_ascii=False))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("id", "severity", "kind", "ops", *vectors.STORED):
        table.add_column(name, overflow="fold", no_wrap=name == "id", justify="right" if name in vectors.STORED else "left")
    for entry in chosen:
        counts = [str(sum(map(len, found.get(entry.id, {}).get(p, {}).values())) or "·") for p in vectors.STORED]
        severity = f"[{STYLE[entry.severity]}]{entry.severity}[/]" if entry.severity in STYLE else entry.severity
        table.add_row(entry.id, severity, entry.kind, " ".join(entry.ops), *counts)
    console.print(table)
    missing = [e for e in chosen if e.reason]
    if missing:
        console.print("\n[bold]not written[/]")
    for reason, ids in _by_reason(missing).items():
        console.print(f"  {escape(reason)} [dim]{escape(', '.join(ids))}[/]", soft_wrap=True)
    met = sum(e.evidence != "ours" for e in chosen)
    console.print(
        f"\n{len(chosen)} entries, {met} of them met in the field or plausible; {len(chosen) - len(missing)} written, {len(missing)} not. "
        f"{' and '.join(vectors.STORED)}: the stored vectors that catch it.",
        soft_wrap=True,
    )


def _by_reason(missing: list[Entry]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for entry in missing:
        found.setdefault(entry.reason, []).append(entry.id)
    return found


def print_entry(console: Console, id: str) -> None:
    """All that is known of one bug."""
    entry, found = entry_named(id), caught().get(id, {})
    console.print(f"[bold]{entry.id}[/]   {entry.kind}, severity {entry.severity}, {EVIDENCE[entry.evidence]}\n", soft_wrap=True)
    for sentence, ops in entry.what:
        console.print(f"{escape(sentence)} [dim]{', '.join(ops)}[/]", soft_wrap=True)
    lines = [("direction", ", ".join(entry.directions)), ("revealed by", entry.inputs), ("declared by", entry.declared)]
    lines.append(("not written", entry.reason))
    for precision, ops in found.items():
        lines += [(f"caught at {precision}", f"{op}: {', '.join(ids)}") for op, ids in ops.items()]
    lines += [("source", link(s)) for s in entry.sources]
    console.print()
    for title, text in lines:
        if text:
            console.print(f"[bold]{title:<15}[/] {escape(text)}", soft_wrap=True)
