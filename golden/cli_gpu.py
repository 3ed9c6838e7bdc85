"""leadline probe: what an FP8 tensor core does inside, from its outputs alone."""

import importlib
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import click
from rich.console import Console

from . import hardware_runs
from .errors import UsageError
from .probe import Finding, Subject
from .probe import probe as find_out
from .probe_models import Match, match, simulated

PACKAGES = ("leadline", "numpy", "cupy-cuda13x", "nvidia-cuda-nvrtc")
INSTRUCTIONS = "leadline.kernels.gpu.cuda.accumulate"  # reached as any subject is, by its name


@click.group()
def probe() -> None:
    """What the hardware really does."""


@probe.command()
@click.option("--model", help="Probe a model of ours instead of a device: wgmma13, mma25, bits:F, fp32, exact.")
@click.option("--subject", help="Probe module:attr or file.py:attr, a callable (a_codes[m,k], b_codes[m,k], c[m]) -> d[m].")
@click.option("--instruction", help="Of the device's FP8 instructions, this one alone: mma.sync or wgmma.")
@click.option("--tiles", default=100_000, show_default=True, type=click.IntRange(1), help="Sums to compare with each model.")
@click.option("--k", "width", default=64, show_default=True, type=click.IntRange(8), help="Products in a sum: two instructions at least.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option("--keep", is_flag=True, help="Keep what a device showed, as a JSON file in golden/hardware.")
def accumulator(model: str | None, subject: str | None, instruction: str | None, tiles: int, width: int, seed: int, keep: bool) -> None:
    """Fraction bits, rounding, groups and order of an FP8 multiply-and-add, and which of our models it is bit for bit."""
    if keep and (model or subject):
        raise UsageError("--keep records a device; it goes with neither --model nor --subject")
    console = Console(highlight=False)
    probes = []
    for name, unit in subjects(model, subject, instruction).items():
        finding = find_out(unit, width)
        matches = match(unit, finding, tiles, seed)
        console.print(f"[bold]{name}[/]", soft_wrap=True)
        for line in (*finding.lines(), *verdict(matches)):
            console.print(line, soft_wrap=True, markup=False)
        probes.append(recorded(name, finding, matches))
    if keep:
        run = hardware_runs.Run(
            hardware_runs.device(), datetime.now(UTC).date().isoformat(), hardware_runs.versions(*PACKAGES), (), tuple(probes)
        )
        console.print(f"kept in {hardware_runs.write(run)}", soft_wrap=True, markup=False)


def subjects(model: str | None, subject: str | None, instruction: str | None) -> dict[str, Subject]:
    """What is asked, by name. UsageError: no such model, no callable, no GPU, no such instruction."""
    if sum(x is not None for x in (model, subject, instruction)) > 1:
        raise UsageError("--model, --subject and --instruction exclude each other")
    if model is not None:
        return {f"model {model}": simulated(model)}
    if subject is not None:
        from .subject import load

        source = load(subject).source
        if not callable(source):
            raise UsageError(f"--subject {subject} is no callable (a_codes[m,k], b_codes[m,k], c[m]) -> d[m]")
        unit: Any = source
        return {subject: unit}
    try:
        module = importlib.import_module(INSTRUCTIONS)
        found = module.instructions()
    except (ImportError, RuntimeError) as error:
        raise UsageError(f"probe accumulator: {error}; or name a model with --model wgmma13") from error
    if instruction is not None and instruction not in found:
        raise UsageError(f"--instruction is {instruction}; this device has {', '.join(found)}")
    return {name: unit for name, unit in found.items() if instruction in (None, name)}


def verdict(matches: list[Match]) -> list[str]:
    """Which model it is, and how far the others are off"""
    lines = [
        f"{'=' if m.everywhere else '≠'} {m.name:<12} {m.equal} of {m.of} sums bit for bit" + (f"; first: {m.first}" if m.first else "")
        for m in matches
    ]
    same = [m.name for m in matches if m.everywhere]
    return [*lines, f"this is {' = '.join(same)}" if same else "this is none of our models"]


def recorded(name: str, finding: Finding, matches: list[Match]) -> hardware_runs.Probe:
    """For the file"""
    return hardware_runs.Probe(name, asdict(finding), tuple({"name": m.name, "equal": m.equal, "of": m.of} for m in matches))
