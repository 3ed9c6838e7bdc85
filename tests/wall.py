"""The wall at its full height: every correct variant, at every precision that it computes in, over many draws; false alarms are counted.

    python tests/wall.py --seeds 100 --jobs 2 --resume wall.jsonl

asks the first draw of everything, then some draws of everything at a time, the precisions that the project promises first, so that a run
that is broken off has covered all ops. At last, and when it is broken off, it prints a table: by precision the ops, variants, draws and
cases that were judged, how many of them failed, and how many of them each metric of the field fails; then every complaint with its case
and seed. What stands in the file of --resume is not done again; --seeds 0 prints the table of what stands there.

    python tests/wall.py --quick --jobs 2 --resume wall.jsonl; leadline power --jobs 2 --wall wall.jsonl

is what CI has time for: what is stored whole, as it is stored.
"""

import functools
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import numpy as np
from leadline.golden.errors import Misbehaved, Refused
from leadline.golden.field import METRICS, rejecting
from leadline.golden.judge import PASS, Question, as_returned, judge_closely
from leadline.golden.power_sample import elements
from leadline.golden.precision import PRECISIONS as DECLARED
from leadline.golden.subject import load
from leadline.golden.vectors import LARGE, Store, Vector, directions, make
from leadline.ref.op import OPS, Case
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from variants import ALL, FAST_EXP, VARIANTS, Variant

PRECISIONS = (*ALL, "bf16-eager")
PROMISED = ("fp32", "bf16", "bf16-eager")  # no false alarm over 100 draws; the others are asked last
ROUND_ONCE = ("linear", "moe.permute", "router.bias_update", "router.drop_tokens")  # one operation, so that rounding each is rounding once
EVERY = 20  # draws of which a rare variant meets one
STATISTICS = ("max", "rms", "row", "block", "mean", "gain")
COUNTED = ("cases", "refused", "ambiguous", "false_alarms")
AT_ONCE = 5  # draws of an item of work
SHOWN = dict(zip(METRICS, ("allclose", "assert", "calc_diff", "cosine", "85%"), strict=True))
Asked = tuple[str, str, str, tuple[int, ...]]  # op, direction, precision, draws


def precisions_of(variant: Variant) -> tuple[str, ...]:
    """Its own, and bf16-eager beside bf16: what computes finer than it claims is right."""
    finer = "bf16" in variant.precisions and "bf16-eager" not in variant.precisions
    return (*variant.precisions, "bf16-eager") if finer else variant.precisions


def rare(variant: Variant, precision: str) -> bool:
    """Meets one draw in EVERY: what is slow, and what is finer than bf16-eager, unless there is but one operation or none that rounds."""
    finer = precision == "bf16-eager" and "bf16" in variant.precisions and not (OPS[variant.op].exact or variant.op in ROUND_ONCE)
    return variant.slow or finer


def everyone() -> list[Variant]:
    return [*VARIANTS, FAST_EXP]


def small(op: str) -> list[Case]:
    """Cases that are stored whole: the others' truth is made anew, which takes its time."""
    return [c for c in OPS[op].cases if elements(OPS[op], c) <= LARGE] or list(OPS[op].cases)


def climb(
    op: str,
    direction: str,
    seeds: Iterable[int],
    precisions: Iterable[str] = PRECISIONS,
    cases: Sequence[Case] | None = None,
    store: Store | None = None,
) -> list[dict[str, Any]]:
    """One op's variants over the draws: a record for each precision, with every complaint. The first draw is what is stored."""
    found, seeds = [], tuple(seeds)
    for precision in precisions:
        variants = [v for v in everyone() if (v.op, v.direction) == (op, direction) and precision in precisions_of(v)]
        if not variants:
            continue
        record: dict[str, Any] = {"op": op, "direction": direction, "precision": precision, "seeds": seeds, "variants": len(variants)}
        record |= {"rare": sum(rare(v, precision) for v in variants), **dict.fromkeys(COUNTED, 0), "complaints": [], "largest": {}}
        alarms: Counter[str] = Counter()
        started = time.process_time()
        for seed in seeds:
            asked = [v for v in variants if seed % EVERY == 0 or not rare(v, precision)]
            for case in (OPS[op].cases if cases is None else cases) if asked else ():
                what = OPS[op], case, direction, DECLARED[precision]
                vector = store.get(*what) if store and seed == 0 else make(*what, seed)
                for variant in asked:
                    _ask(variant, vector, f"{variant.id} {precision} {case.name} seed {seed}", record, alarms)
        found.append({**record, "field": {name: alarms[name] for name in METRICS}, "seconds": round(time.process_time() - started, 1)})
    return found


def _ask(variant: Variant, v: Vector, where: str, record: dict[str, Any], alarms: Counter[str]) -> None:
    subject = load(variant.at(v.precision.name), direction=v.direction)
    contract = subject.contract(v.op, v.direction)
    assert contract is not None
    question = Question(v.op, v.direction, v.inputs, v.case.attrs, v.precision, subject.any_tie, contract.takes_choice)
    try:
        returned = subject.ask(v.op, v.direction, v.inputs, {**v.op.defaults, **v.case.attrs}, v.precision)
    except Refused:
        record["refused"] += 1
        return
    except Misbehaved as error:
        record["complaints"].append(f"{where}: {error}")
        record["false_alarms"] += 1
        return
    record["cases"] += 1
    with np.errstate(all="ignore"):
        found = judge_closely(question, returned, v.band)
        alarms.update(rejecting(question, returned, as_returned(question, v.band.truth)))
    record["ambiguous"] += found.ambiguous
    if found.verdict != PASS:
        record["false_alarms"] += 1
        record["complaints"].append(f"{where}: {'; '.join(found.reasons)}")
    for output, statistics in found.statistics.items():
        for name in STATISTICS:
            if found.limits[output].get(name, 0) > 0:
                share = float(statistics[name] / found.limits[output][name])
                if share > record["largest"].get(name, (0.0, ""))[0]:
                    record["largest"][name] = (round(share, 3), f"{output} of {where}")


def totals(records: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By precision: ops (with their directions), variants, the fewest and most draws that an op met, cases, false alarms, and those of the
    field's metrics."""
    found: dict[str, dict[str, Any]] = {}
    draws: dict[str, Counter[tuple[str, str]]] = {}
    for r in records:
        t = found.setdefault(r["precision"], {"ops": 0, "variants": 0, "rare": 0, **dict.fromkeys(COUNTED, 0), "seconds": 0.0})
        met = draws.setdefault(r["precision"], Counter())
        if (r["op"], r["direction"]) not in met:
            t["ops"], t["variants"], t["rare"] = t["ops"] + 1, t["variants"] + r["variants"], t["rare"] + r["rare"]
        met[r["op"], r["direction"]] += len(r["seeds"])
        for name in (*COUNTED, "seconds"):
            t[name] += r[name]
        t["field"] = {name: t.get("field", {}).get(name, 0) + count for name, count in r["field"].items()}
    for precision, met in draws.items():
        found[precision]["draws"] = [min(met.values()), max(met.values())]
    return {name: found[name] for name in sorted(found, key=PRECISIONS.index)}


def uncovered(records: Iterable[dict[str, Any]]) -> dict[str, list[str]]:
    """By promised precision the ops, with their directions, of which nothing has been asked."""
    met = {(r["op"], r["direction"], r["precision"]) for r in records if r["cases"]}
    return {p: [f"{op} {way}" for op in OPS for way in directions(OPS[op]) if (op, way, p) not in met] for p in PROMISED}


def work(
    ops: Iterable[str], precisions: Iterable[str], seeds: int, done: Iterable[dict[str, Any]] = (), at_once: int = AT_ONCE
) -> list[Asked]:
    """What is left: the first draw of everything, then some draws of everything at a time, cheap ops first; what is promised first."""
    chosen, left_out = set(ops), {(r["op"], r["direction"], r["precision"], seed) for r in done for seed in r["seeds"]}
    size = {name: sum(np.prod([float(d) for d in c.dims.values()]) for c in op.cases) for name, op in OPS.items()}
    asked = dict.fromkeys((v.op, v.direction) for v in everyone() if not chosen or v.op in chosen)
    starts = [*range(min(seeds, 1)), *range(1, seeds, at_once)]
    found = []
    for (op, way), precision, start in itertools.product(asked, precisions, starts):
        variants = [v for v in everyone() if (v.op, v.direction) == (op, way) and precision in precisions_of(v)]
        draws = range(start, min(start + at_once if start else 1, seeds))
        left = tuple(s for s in draws if (op, way, precision, s) not in left_out)
        if any(s % EVERY == 0 or not rare(v, precision) for v in variants for s in left):
            found.append((start > 0 and precision not in PROMISED, start, size[op], (op, way, precision, left)))
    return [asked for *_, asked in sorted(found)]


def print_totals(console: Console, records: list[dict[str, Any]]) -> None:
    """A table by precision, then what has not been asked, and the complaints."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for name in ("precision", "ops", "variants", "rare", "draws", "cases", "ambiguous", "false alarms", *SHOWN.values(), "CPU s"):
        table.add_column(name, justify="left" if name == "precision" else "right", no_wrap=True)
    for precision, t in totals(records).items():
        draws = "–".join(map(str, dict.fromkeys(t["draws"])))
        counts = (t["ops"], t["variants"], t["rare"], draws, f"{t['cases']:,}", t["ambiguous"], f"[bold]{t['false_alarms']}[/]")
        table.add_row(precision, *map(str, counts), *(f"{t['field'][name]:,}" for name in SHOWN), f"{t['seconds']:.0f}")
    console.print(table)
    console.print(
        f"Rare variants (slow ones, and what is finer than bf16-eager) meet one draw in {EVERY}. Right of our false alarms are the field's."
    )
    for precision, missing in uncovered(records).items():
        if missing:
            shown = f"{', '.join(missing[:12])}{' and others' if len(missing) > 12 else ''}"
            console.print(f"NOT ASKED at {precision}: {len(missing)} ({shown})", soft_wrap=True)
    for record in records:
        for complaint in record["complaints"]:
            console.print(f"FALSE ALARM {escape(complaint)}", soft_wrap=True)


@click.command()
@click.option("--seeds", default=100, show_default=True, help="Draws of every case.")
@click.option("--op", "ops", multiple=True, help="One op (repeat for more); all by default.")
@click.option("--precision", "precisions", multiple=True, help=f"One of {', '.join(PRECISIONS)} (repeat for more); all by default.")
@click.option("--quick", is_flag=True, help="Only the first draw of cases that are stored whole, at the promised precisions.")
@click.option("--jobs", default=1, show_default=True, help="Processes.")
@click.option("--resume", type=click.Path(path_type=Path, dir_okay=False), help="A file for each result; what it holds is not done again.")
def main(seeds: int, ops: tuple[str, ...], precisions: tuple[str, ...], quick: bool, jobs: int, resume: Path | None) -> None:
    """Judge every correct variant over many draws, and count false alarms."""
    records = [json.loads(line) for line in resume.read_text().splitlines()] if resume and resume.exists() else []
    left = work(ops, precisions or (PROMISED if quick else PRECISIONS), min(seeds, 1) if quick else seeds, records)

    def keep(found: list[dict[str, Any]]) -> None:
        records.extend(found)
        for r in found:
            click.echo(f"{len(records)}: {r['op']} {r['direction']} {r['precision']}: {r['cases']} cases, {r['false_alarms']} false alarms")
            for complaint in r["complaints"]:
                click.echo(f"  {complaint}")
        if resume and found:
            with resume.open("a") as file:
                file.write("".join(json.dumps(record) + "\n" for record in found))

    try:
        _run(left, quick, jobs, keep)
    finally:
        print_totals(Console(highlight=False, width=150), records)
    sys.exit(any(t["false_alarms"] for t in totals(records).values()))


def _run(left: list[Asked], quick: bool, jobs: int, keep: Callable[[list[dict[str, Any]]], None]) -> None:
    if jobs == 1:
        for asked in left:
            keep(_climb(asked, quick))
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(_climb, asked, quick) for asked in left]):
            keep(future.result())


def _climb(asked: Asked, quick: bool) -> list[dict[str, Any]]:
    op, direction, precision, seeds = asked
    return climb(op, direction, seeds, (precision,), small(op) if quick else None, _store() if quick else None)


@functools.cache
def _store() -> Store:
    return Store()


if __name__ == "__main__":
    main()
