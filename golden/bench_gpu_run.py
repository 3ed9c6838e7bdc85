"""What `leadline bench --subject kernels.gpu` prints and keeps."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Console

from ..ref.op import Op
from . import bench_gpu_cases, bench_gpu_moe, bench_gpu_products, hardware_runs
from .bench_gpu import Case, Ceiling, Held, absent, ceilings_of, measured
from .bench_gpu_data import Sizes
from .bench_gpu_device import loads, on_device
from .errors import UsageError
from .hardware_runs import Figure

PACKAGES = ("leadline", "numpy", "cupy-cuda13x", "nvidia-cuda-nvrtc", "numba-cuda", "torch", "triton")
BENCHES: dict[str, Callable[[Sizes], Iterator[Case]]] = {**bench_gpu_cases.BENCHES, **bench_gpu_moe.BENCHES, **bench_gpu_products.BENCHES}


def line_of(records: Sequence[Mapping[str, Any]]) -> str:
    """All of one case: time, share of its ceiling, and how many times a peer's rate ours is"""
    r = records[-1]
    name = f"{r['op']:<20} {r['case']}{' backward' * (r['direction'] == 'backward')} [{r['kernel']}]"
    if "seconds" not in r:
        return f"{name:<90} not timed: {r['error']}"
    share = f"{r['limit_share']:6.1%} of {r['limit']}" if r["limit"] else "of no ceiling that was measured"
    timed = [x for x in records if "error" not in x and x["peer"] not in (None, r["limit"])]
    peers = [f"{1 / x['ratio']:.2f}× {x['peer']} ({x['peer_seconds'] * 1e3:.3f} ms)" for x in timed]
    lost = [f"\n    {x['peer']}: {x['error']}" for x in records if "error" in x]
    return f"{name:<90} {r['seconds'] * 1e3:9.3f} ms  {share:<26} {', '.join(peers)}".rstrip() + "".join(lost)


def figures_of(ceilings: Mapping[str, Ceiling], records: Iterable[Mapping[str, Any]]) -> list[Figure]:
    """What --keep writes: the ceilings in 10^12 a second, then kernels and peers in seconds"""
    figures = [Figure(c.what, c.rate / 1e12, f"T{c.unit}") for c in ceilings.values()]
    told = set()
    for r in (r for r in records if "seconds" in r and "error" not in r):
        what = f"{r['op']} {r['direction']}, {r['case']} [{r['kernel']}]"
        if what not in told:
            told.add(what)
            figures.append(Figure(what, r["seconds"], "s", ceilings[r["limit"]].what if r["limit"] else "", r["limit_share"]))
        if r["peer"] not in (None, r["limit"]):
            figures.append(Figure(f"{what}: {r['peer']}", r["peer_seconds"], "s"))
    return figures


def run(ops: list[Op], as_json: bool, keep: bool) -> bool:
    """Prints every benchmark of the ops (of all, if none is named) as it comes; whether all kernels were right and ran."""
    if missing := [op.name for op in ops if op.name not in BENCHES]:
        raise UsageError(f"{missing[0]} has no GPU benchmark; these have: {', '.join(BENCHES)}")
    clock = on_device()
    device = hardware_runs.device()
    console = Console(highlight=False)

    def say(text: str) -> None:
        if not as_json:
            console.print(text, soft_wrap=True, markup=False)

    def record(data: Mapping[str, Any]) -> None:
        if as_json:
            print(json.dumps(data), flush=True)

    day, packages = datetime.now(UTC).date().isoformat(), hardware_runs.versions(*PACKAGES)
    say(f"{clock.heading}\n{', '.join(f'{name} {version}' for name, version in packages.items())}\n{clock.method}")
    record({"device": vars(device), "date": day, "versions": packages})
    for package in absent(("torch", "triton")):
        say(f"{package} is not installed: its peers are left out")
    ceilings, without = ceilings_of(clock, loads(device.memory_bytes))
    for c in ceilings.values():
        say(f"{c.rate / 1e12:9.2f} T{c.unit:<7} {c.what}")
        record({"ceiling": c.what, "value": c.rate, "unit": c.unit})
    for why in without.values():
        say(f"no ceiling: {why}")
        record({"ceiling": why.split(":")[0], "error": why})
    found: list[dict[str, Any]] = []
    faults: dict[tuple[str, str, Held], str | None] = {}
    try:
        for name in [op.name for op in ops] or BENCHES:
            for of_case in measured(name, BENCHES[name](Sizes()), clock, ceilings, faults):
                for r in of_case:
                    record(r)
                say(line_of(of_case))
                found += of_case
    finally:  # what was measured is kept, whatever ended the run
        if keep:
            kept = hardware_runs.Run(device, day, packages, tuple(figures_of(ceilings, found)))
            Console(stderr=as_json, highlight=False).print(f"kept in {hardware_runs.write(kept)}", soft_wrap=True, markup=False)
    say("share: of the time that the binding ceiling allows at least; n× peer: our rate over the peer's.")
    return not any("error" in r and "peer" not in r for r in found)
