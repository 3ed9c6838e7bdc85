"""The wall at its full height: every correct variant, at every precision that it computes in, over many draws; false alarms are counted.

    python tests/wall.py --seeds 100 --jobs 2 --resume wall.jsonl

prints a JSON line for each op and direction as it is done, and at last, by precision, how many variants and cases were judged, how many of
them failed, and how many of them each metric of the field fails. What stands in the file of --resume is not done again.
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import numpy as np
from leadline.golden.errors import Misbehaved, Refused
from leadline.golden.field import METRICS, rejecting
from leadline.golden.judge import PASS, Question, as_returned, judge
from leadline.golden.precision import PRECISIONS as DECLARED
from leadline.golden.subject import load
from leadline.golden.vectors import Vector, make
from leadline.ref.op import OPS
from variants import ALL, FAST_EXP, VARIANTS, Variant

PRECISIONS = (*ALL, "bf16-eager")
ROUND_ONCE = ("linear", "moe.permute", "router.bias_update", "router.drop_tokens")  # one operation, so that rounding each is rounding once
EVERY = 20  # draws of which a slow variant meets one
STATISTICS = ("max", "rms", "row", "block", "mean", "gain")
COUNTED = ("draws", "cases", "refused", "ambiguous", "false_alarms")
Asked = tuple[str, str]  # op and direction


def precisions_of(variant: Variant) -> tuple[str, ...]:
    """Where every operation rounds, what has one operation or none that rounds is as right as where only outputs round."""
    eager = "bf16" in variant.precisions and (OPS[variant.op].exact or variant.op in ROUND_ONCE)
    return (*variant.precisions, "bf16-eager") if eager else variant.precisions


def everyone() -> list[Variant]:
    return [*VARIANTS, FAST_EXP]


def climb(op: str, direction: str, seeds: Iterable[int], precisions: Iterable[str] = PRECISIONS) -> list[dict[str, Any]]:
    """One op's variants over the draws: a record for each precision, with every complaint."""
    found = []
    for precision in precisions:
        variants = [v for v in everyone() if (v.op, v.direction) == (op, direction) and precision in precisions_of(v)]
        if not variants:
            continue
        record: dict[str, Any] = {"op": op, "direction": direction, "precision": precision, "variants": len(variants)}
        record |= {**dict.fromkeys(COUNTED, 0), "complaints": [], "largest": {}}
        alarms: Counter[str] = Counter()
        started = time.perf_counter()
        for seed in seeds:
            record["draws"] += 1
            for case in OPS[op].cases:
                vector = make(OPS[op], case, direction, DECLARED[precision], seed)
                for variant in variants:
                    if not variant.slow or seed % EVERY == 0:
                        _ask(variant, vector, seed, record, alarms)
        found.append({**record, "field": {name: alarms[name] for name in METRICS}, "seconds": round(time.perf_counter() - started, 1)})
    return found


def _ask(variant: Variant, v: Vector, seed: int, record: dict[str, Any], alarms: Counter[str]) -> None:
    subject = load(variant.at(v.precision.name), direction=v.direction)
    contract = subject.contract(v.op, v.direction)
    assert contract is not None
    question = Question(v.op, v.direction, v.inputs, v.case.attrs, v.precision, subject.any_tie, contract.takes_choice)
    where = f"{variant.id} {v.precision.name} {v.case.name} seed {seed}"
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
        found = judge(question, returned, v.band)
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
    """By precision: variants, the least draws that any of them met, cases, false alarms, and those of the field's metrics."""
    found: dict[str, dict[str, Any]] = {}
    for r in records:
        t = found.setdefault(r["precision"], {"variants": 0, **dict.fromkeys(COUNTED, 0), "draws": r["draws"]})
        t["draws"] = min(t["draws"], r["draws"])
        for name in ("variants", *COUNTED[1:]):
            t[name] += r[name]
        t["field"] = {name: t.get("field", {}).get(name, 0) + count for name, count in r["field"].items()}
    return found


def work(ops: Iterable[str], done: Iterable[Asked]) -> list[Asked]:
    """The ops and directions that have variants, cheap ones first."""
    chosen, left_out = set(ops), set(done)
    asked = dict.fromkeys((v.op, v.direction) for v in everyone() if not chosen or v.op in chosen)
    size = {name: sum(np.prod([float(d) for d in c.dims.values()]) for c in op.cases) for name, op in OPS.items()}
    return sorted((a for a in asked if a not in left_out), key=lambda a: size[a[0]])


@click.command()
@click.option("--seeds", default=100, show_default=True, help="Draws of every case.")
@click.option("--op", "ops", multiple=True, help="One op (repeat for more); all by default.")
@click.option("--precision", "precisions", multiple=True, help=f"One of {', '.join(PRECISIONS)} (repeat for more); all by default.")
@click.option("--jobs", default=1, show_default=True, help="Processes.")
@click.option("--resume", type=click.Path(path_type=Path, dir_okay=False), help="A file for each result; what it holds is not done again.")
def main(seeds: int, ops: tuple[str, ...], precisions: tuple[str, ...], jobs: int, resume: Path | None) -> None:
    """Judge every correct variant over many draws, and count false alarms."""
    records = [json.loads(line) for line in resume.read_text().splitlines()] if resume and resume.exists() else []
    left = work(ops, {(r["op"], r["direction"]) for r in records})

    def keep(found: list[dict[str, Any]]) -> None:
        records.extend(found)
        for record in found:
            click.echo(json.dumps(record))
        if resume and found:
            with resume.open("a") as file:
                file.write("".join(json.dumps(record) + "\n" for record in found))

    _run(left, range(seeds), precisions or PRECISIONS, jobs, keep)
    found = totals(records)
    click.echo(json.dumps({"total": found}))
    sys.exit(any(t["false_alarms"] for t in found.values()))


def _run(left: list[Asked], seeds: range, precisions: tuple[str, ...], jobs: int, keep: Callable[[list[dict[str, Any]]], None]) -> None:
    if jobs == 1:
        for op, direction in left:
            keep(climb(op, direction, seeds, precisions))
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(climb, op, direction, seeds, precisions) for op, direction in left]):
            keep(future.result())


if __name__ == "__main__":
    main()
