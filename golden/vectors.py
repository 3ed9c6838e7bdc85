"""The golden vectors on disk: one JSON and one safetensors file an op and precision. Read by verify, made by `leadline golden generate`."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ..ref.op import OPS, Case, Op, op_named
from .band import Arrays, Band, band_of
from .draw import Source, draw_case
from .errors import UsageError
from .precision import Precision

SCHEMA = "leadline.vectors/1"
STORED = ("fp32", "bf16")  # the other precisions' vectors are made when they are asked for
DIRECTORY = Path(__file__).parent / "vectors"
LARGE = 20_000  # elements; above, a case is stored as its seed and digests


@dataclass
class Vector:
    """One case at one precision: inputs, and the band that outputs are held to."""

    op: Op
    case: Case
    direction: str
    precision: Precision
    inputs: Arrays
    band: Band
    flags: tuple[str, ...] = ()  # the known bugs that it catches

    @property
    def id(self) -> str:
        return f"{self.case.name}/{self.direction}"


def make(op: Op, case: Case, direction: str, precision: Precision, seed: int = 0) -> Vector:
    """The vector of a case, from its name alone."""
    inputs = draw_case(op, case, direction, precision, seed)
    return Vector(op, case, direction, precision, inputs, band_of(op, direction, inputs, case.attrs, precision))


def directions(op: Op) -> tuple[str, ...]:
    return ("forward", "backward") if op.bwd else ("forward",)


def digest(x: np.ndarray) -> str:
    """SHA-256 of shape, dtype and little-endian bytes; every NaN counts as one."""
    if x.dtype.kind == "f":
        x = np.where(np.isnan(x), np.array(np.nan, dtype=x.dtype), x)
    data = np.ascontiguousarray(x, dtype=x.dtype.newbyteorder("<"))
    return hashlib.sha256(f"{x.dtype.name}{x.shape}".encode() + data.tobytes()).hexdigest()


def projection(x: np.ndarray, key: str) -> list[float]:
    """A real array's norm and its product with random signs: a digest that the last bits of another machine's exp do not change."""
    finite = np.where(np.isfinite(x), x, 0.0).ravel()
    signs = 1.0 - 2.0 * Source(f"leadline/1 projection {key}").integers(finite.shape, 0, 2)
    return [float(np.sqrt(np.sum(finite * finite))), float(np.sum(finite * signs))]


class Store:
    """The vectors in a directory, read once an op and precision."""

    def __init__(self, directory: Path | str = DIRECTORY):
        self.directory = Path(directory)
        self._read: dict[tuple[str, str], dict[str, Vector]] = {}

    def get(self, op: Op, case: Case, direction: str, precision: Precision) -> Vector:
        """The stored vector; made anew where none is stored for this precision."""
        if precision.name not in STORED:
            return make(op, case, direction, precision)
        key = (op.name, precision.name)
        if key not in self._read:
            self._read[key] = read(self.directory / op.name / f"{precision.name}.json", op, precision)
        vector = self._read[key].get(f"{case.name}/{direction}")
        if vector is None:
            path = self.directory / op.name / f"{precision.name}.json"
            raise UsageError(f"{path} has no vector {case.name}/{direction}; `leadline golden generate` makes it")
        return vector


def read(path: Path, op: Op, precision: Precision) -> dict[str, Vector]:
    """Every vector of an op at a precision, or a UsageError that names the file, what was found and what was expected."""
    entries = read_index(path)
    for key, expected in (("op", op.name), ("precision", precision.name)):
        if entries.get(key) != expected:
            raise UsageError(f"{path}: {key} is {entries.get(key)!r}; expected {expected!r}")
    arrays_path = path.with_suffix(".safetensors")
    arrays = read_arrays(arrays_path, entries.get("sha256"))
    cases = {c.name: c for c in op.cases}
    vectors = {}
    try:
        for entry in entries["vectors"]:
            case = cases.get(entry["case"])
            if case is None:
                raise UsageError(f"{path}: case {entry['case']!r} is not declared by {op.name}; the file is of another version")
            vectors[entry["id"]] = _vector(entry, case, op, precision, arrays, path)
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is damaged: {type(error).__name__} {error}; restore it, or run `leadline golden generate`") from error
    return vectors


def read_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UsageError(f"there is no vector file {path}; `leadline golden generate` makes it") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is damaged: {error}; restore it, or run `leadline golden generate`") from error
    schema = index.get("schema") if isinstance(index, dict) else None
    family, _, version = str(schema).partition("/")
    if family != SCHEMA.partition("/")[0]:
        raise UsageError(f"{path} is no vector file: its schema is {schema!r}; expected {SCHEMA!r}")
    if schema != SCHEMA:
        newer = version.isdigit() and int(version) > int(SCHEMA.partition("/")[2])
        raise UsageError(f"{path} has schema {schema!r}; this leadline reads {SCHEMA!r}" + ("; install a newer leadline" if newer else ""))
    return index


def read_arrays(path: Path, sha256: str | None) -> Arrays:
    try:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise UsageError(f"{path} is damaged: its SHA-256 is not the one in {path.with_suffix('.json').name}; restore it")
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError as error:
        raise UsageError(f"there is no {path}; restore it, or run `leadline golden generate`") from error
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} is damaged: {error}; restore it, or run `leadline golden generate`") from error


def _vector(entry: dict, case: Case, op: Op, precision: Precision, arrays: Arrays, path: Path) -> Vector:
    direction = entry["direction"]
    if not entry["stored"]:
        vector = make(op, case, direction, precision)
        vector.flags = tuple(entry["flags"])
        for name, x in vector.inputs.items():
            if digest(x) != entry["inputs"][name]["sha256"]:
                expected = entry["inputs"][name]["sha256"]
                raise UsageError(f"{path}: input {name} of {entry['id']} is not what its seed makes here; expected SHA-256 {expected}")
        return vector
    inputs = {name: arrays[f"{entry['id']}/{name}"] for name in entry["inputs"]}
    band = Band(
        {name: arrays[f"{entry['id']}/{name}"] for name in entry["outputs"]},
        {name: arrays[f"{entry['id']}/{name}/sigma"].astype(np.float64) for name, about in entry["outputs"].items() if "limits" in about},
        {name: about["limits"] for name, about in entry["outputs"].items() if "limits" in about},
    )
    return Vector(op, case, direction, precision, inputs, band, tuple(entry["flags"]))


def counted(directory: Path | str = DIRECTORY) -> dict[str, int]:
    """How many vectors are stored for each op."""
    counts = dict.fromkeys(OPS, 0)
    for path in sorted(Path(directory).glob("*/*.json")):
        counts[op_named(path.parent.name).name] += len(read_index(path)["vectors"])
    return counts


def plan(op: Op, precision: Precision) -> Iterator[tuple[Case, str]]:
    """The cases and directions that are stored for an op."""
    for case in op.cases:
        for direction in directions(op):
            yield case, direction
