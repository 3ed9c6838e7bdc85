"""What was measured on real devices, kept in golden/hardware as JSON: one file a run, with device, driver and date."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

from .errors import UsageError

DIRECTORY = Path(__file__).parent / "hardware"
VERSION = 1


@dataclass(frozen=True)
class Device:
    """What it ran on."""

    name: str  # as the driver names it
    capability: str  # "9.0"
    memory_bytes: int
    driver: str
    cuda: str


@dataclass(frozen=True)
class Figure:
    """One number that was measured: of what, in which unit, and of which ceiling measured in the same run it is a share."""

    what: str  # an op and its sizes, or a ceiling
    value: float
    unit: str
    ceiling: str = ""
    share: float | None = None


@dataclass(frozen=True)
class Probe:
    """What `leadline probe accumulator` found of one instruction."""

    instruction: str
    finding: Mapping[str, Any]
    matches: tuple[Mapping[str, Any], ...]  # name, equal, of


@dataclass(frozen=True)
class Run:
    """All of one run."""

    device: Device
    date: str  # ISO, the day
    versions: Mapping[str, str] = field(default_factory=dict)
    figures: tuple[Figure, ...] = ()
    probes: tuple[Probe, ...] = ()


def write(run: Run, directory: Path = DIRECTORY) -> Path:
    """Puts the run into a file of its own; an earlier one of the same device and day is never overwritten."""
    _check(run, "the run")
    slug = re.sub(r"[^a-z0-9]+", "-", run.device.name.lower()).strip("-")
    names = (f"{slug}-{run.date}{suffix}.json" for suffix in ("", *(f"-{i}" for i in range(2, 1000))))
    path = next(p for p in (directory / n for n in names) if not p.exists())
    directory.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"version": VERSION, **asdict(run)}, indent=1, allow_nan=False) + "\n")
    return path


def read(path: Path) -> Run:
    """UsageError, in one line, for a file that is no such run."""
    try:
        data = json.loads(path.read_text())
        version = data.pop("version")
        if version != VERSION:
            raise UsageError(f"{path.name} has version {version}; expected {VERSION}")
        probes = tuple(Probe(p["instruction"], p["finding"], tuple(p["matches"])) for p in data.pop("probes"))
        figures = tuple(Figure(**f) for f in data.pop("figures"))
        run = Run(Device(**data.pop("device")), **data, figures=figures, probes=probes)
    except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise UsageError(f"{path.name} is no hardware run: {type(error).__name__}: {error}") from error
    _check(run, path.name)
    return run


def stored(directory: Path = DIRECTORY) -> Iterator[tuple[Path, Run]]:
    """Every run that is kept"""
    for path in sorted(directory.glob("*.json")):
        yield path, read(path)


def _check(run: Run, name: str) -> None:
    try:
        date.fromisoformat(run.date)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name}: date is {run.date!r}; expected a day as 2026-01-31") from error
    for key, value in asdict(run.device).items():
        if not value:
            raise UsageError(f"{name}: device {key} is missing")
    for f in run.figures:
        if not (isinstance(f.value, int | float) and 0 <= f.value < float("inf")):
            raise UsageError(f"{name}: {f.what} is {f.value!r}; expected a number that was measured")
        if (f.share is None) != (not f.ceiling):
            raise UsageError(f"{name}: {f.what} has {'a ceiling and no share' if f.ceiling else 'a share of no ceiling'}")


def device() -> Device:
    """The current CUDA device; UsageError where there is none."""
    try:
        import cupy
    except ImportError as error:
        raise UsageError("a hardware run needs CuPy; install it with: python3 -m pip install 'leadline[gpu]'") from error
    runtime = cupy.cuda.runtime
    try:
        properties = runtime.getDeviceProperties(cupy.cuda.Device().id)
    except runtime.CUDARuntimeError as error:
        raise UsageError(f"no CUDA device ({str(error).splitlines()[0]}); use a machine with an NVIDIA GPU and its driver") from error
    return Device(
        properties["name"].decode(),
        f"{properties['major']}.{properties['minor']}",
        int(properties["totalGlobalMem"]),
        _version(runtime.driverGetVersion()),
        _version(runtime.runtimeGetVersion()),
    )


def versions(*packages: str) -> dict[str, str]:
    """Of those that are installed"""
    found = {}
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
