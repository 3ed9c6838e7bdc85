"""`leadline golden generate`: writes the vectors, or proves that the stored ones are what the code makes.

A vector is written only if two ways agree: the reference, and an oracle (tests/oracles) that shares no code with it.
"""

import hashlib
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from ..ref.op import OPS, Op
from .band import DEVIATIONS, SLACK, band_of
from .bugs import bugs_of
from .errors import UsageError
from .judge import FAIL, Question, as_returned, judge
from .precision import PRECISIONS, Precision
from .vectors import LARGE, SCHEMA, STORED, Vector, digest, make, plan, projection, read_arrays, read_index

SAME = 1e-4  # of σ: what the truth may differ by from that of another machine, whose float64 exp has other last bits
SIGMA_SHARE = 1e-3  # of the elements: σ may differ where another machine's exp turns a random rounding

Oracle = Callable[[dict[str, np.ndarray], dict[str, Any]], dict[str, np.ndarray]]


def load_oracles(root: Path) -> dict[tuple[str, str], Oracle]:
    """tests/oracles of a source checkout."""
    folder = root / "tests"
    if not (folder / "oracles" / "__init__.py").is_file():
        raise UsageError(f"there are no oracles at {folder / 'oracles'}; vectors are generated in a source checkout (cd to it)")
    sys.path.append(str(folder))
    return importlib.import_module("oracles").ORACLES


def build(op: Op, precision: Precision, oracles: dict[tuple[str, str], Oracle] | None) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The index and the arrays of one file, blessed by the oracle where it is at hand."""
    arrays: dict[str, np.ndarray] = {}
    entries = []
    for case, direction in plan(op, precision):
        vector = make(op, case, direction, precision)
        if oracles is not None:
            bless(vector, oracles[op.name, direction])
        entries.append(_entry(vector, arrays))
    index = {
        "schema": SCHEMA,
        "op": op.name,
        "precision": precision.name,
        "signature": op.sig,
        "source": op.source,
        "generator": "leadline/1: Philox4x64-10 keyed by SHA-256 of 'leadline/1 op case input format seed'",
        "blessed": "the reference in float64 (discrete ops: in float32) agrees with tests/oracles",
        "vectors": entries,
    }
    return index, arrays


def one(name: str, precision_name: str, checkout: Path | None, directory: Path, check: bool) -> tuple[int, list[str]]:
    """One file made, and compared or written: how many vectors, and what differs"""
    op, precision = OPS[name], PRECISIONS[precision_name]
    index, arrays = build(op, precision, load_oracles(checkout) if checkout else None)
    if check:
        return len(index["vectors"]), differences(directory, op, precision, index, arrays)
    write(directory, op, precision, index, arrays)
    return len(index["vectors"]), []


def bless(vector: Vector, oracle: Oracle) -> None:
    """Raises if the oracle disagrees with the reference by more than float64's rounding explains (SLACK·6 σ at fp64), or in any bit."""
    attrs = {**vector.op.defaults, **vector.case.attrs}
    expected = oracle(vector.inputs, attrs)
    noise = band_of(vector.op, vector.direction, vector.inputs, vector.case.attrs, PRECISIONS["fp64"]).sigma
    for tensor in vector.op.signature_of(vector.direction, vector.inputs)[1]:
        got, want = vector.band.truth[tensor.name], np.asarray(expected[tensor.name])
        if tensor.kind == "real":
            agrees = got.shape == want.shape and near(got, want, SLACK * DEVIATIONS * noise[tensor.name])
        else:
            agrees = got.shape == want.shape and np.array_equal(got, want, equal_nan=got.dtype.kind == "f")
            agrees = agrees and (got.dtype.kind != "f" or bool(np.all((np.signbit(got) == np.signbit(want)) | np.isnan(got))))
        if not agrees:
            raise UsageError(
                f"{vector.op.name} {vector.id} {vector.precision.name}: reference and oracle disagree on {tensor.name}; nothing is written"
            )


def near(a: np.ndarray, b: np.ndarray, tolerance: np.ndarray) -> bool:
    """Equal (infinities and NaN too), or no further apart than the tolerance."""
    with np.errstate(invalid="ignore"):
        return bool(np.all((a == b) | (np.isnan(a) & np.isnan(b)) | (np.abs(a - b) <= tolerance)))


def caught(vector: Vector) -> list[str]:
    """The known bugs that this vector makes FAIL."""
    op, ids = vector.op, []
    for bug in bugs_of(op, vector.direction):
        attrs = {**vector.case.attrs, **bug.attrs}
        question = Question(op, vector.direction, vector.inputs, vector.case.attrs, vector.precision)
        inputs = vector.inputs if op.exact else {k: x.astype(np.float64) if x.dtype.kind == "f" else x for k, x in vector.inputs.items()}
        try:
            with np.errstate(all="ignore"):
                outputs = {k: np.asarray(v) for k, v in bug.variant(op).run(vector.direction, inputs, attrs).items()}
        except ValueError:
            continue
        if judge(question, as_returned(question, outputs), vector.band).verdict == FAIL:
            ids.append(bug.id)
    return sorted(set(ids))


def _entry(vector: Vector, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """The JSON of a vector; its arrays are added to the file's."""
    stored = sum(x.size for x in (*vector.inputs.values(), *vector.band.truth.values())) <= LARGE
    entry: dict[str, Any] = {
        "id": vector.id,
        "case": vector.case.name,
        "direction": vector.direction,
        "comment": vector.case.note,
        "flags": caught(vector),
        "attrs": {**vector.op.defaults, **vector.case.attrs},
        "stored": stored,
        "inputs": {name: {**_about(x), "sha256": digest(x)} for name, x in vector.inputs.items()},
        "outputs": {},
    }
    for name, x in vector.band.truth.items():
        about = _about(x)
        if name in vector.band.limits:
            about["projection"] = projection(x, f"{vector.op.name} {vector.id} {name}")
            about["limits"] = {k: float(f"{v:.6g}") for k, v in vector.band.limits[name].items()}
        else:
            about["sha256"] = digest(x)
        entry["outputs"][name] = about
    if stored:
        for name, x in (*vector.inputs.items(), *vector.band.truth.items()):
            arrays[f"{vector.id}/{name}"] = np.asarray(x, order="C")
        for name, sigma in vector.band.sigma.items():
            arrays[f"{vector.id}/{name}/sigma"] = np.asarray(sigma, dtype=np.float32, order="C")
    return entry


def _about(x: np.ndarray) -> dict[str, Any]:
    return {"dtype": str(x.dtype), "shape": list(x.shape)}


def files() -> Iterator[tuple[Op, Precision]]:
    return ((op, PRECISIONS[name]) for op in OPS.values() for name in STORED)


def write(directory: Path, op: Op, precision: Precision, index: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Both files, each put in place whole."""
    folder = directory / op.name
    folder.mkdir(parents=True, exist_ok=True)
    data = save(arrays)
    index["sha256"] = hashlib.sha256(data).hexdigest()
    _replace(folder / f"{precision.name}.safetensors", data)
    _replace(folder / f"{precision.name}.json", (json.dumps(index, indent=1, ensure_ascii=False) + "\n").encode())


def _replace(path: Path, data: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as part:
        part.write(data)
    os.chmod(part.name, 0o644)
    os.replace(part.name, path)


def differences(directory: Path, op: Op, precision: Precision, index: dict[str, Any], arrays: dict[str, np.ndarray]) -> list[str]:
    """How the stored file differs from what the code makes; empty if it does not."""
    path = directory / op.name / f"{precision.name}.json"
    stored = read_index(path)
    stored_arrays = read_arrays(path.with_suffix(".safetensors"), stored.get("sha256"))
    found = [
        f"{path.name}: {key} differs" for key in ("op", "precision", "signature", "source", "generator") if stored.get(key) != index[key]
    ]
    ours, theirs = ({e["id"]: e for e in i["vectors"]} for i in (index, stored))
    found += [f"{id}: not stored" for id in ours.keys() - theirs.keys()] + [f"{id}: stored, not made" for id in theirs.keys() - ours.keys()]
    for id in ours.keys() & theirs.keys():
        found += [f"{id}: {problem}" for problem in _entry_differences(ours[id], theirs[id])]
    found += [f"{name}: not stored or not made" for name in arrays.keys() ^ stored_arrays.keys()]
    for name in arrays.keys() & stored_arrays.keys():
        if problem := _array_difference(name, arrays[name], stored_arrays[name], arrays.get(f"{name}/sigma")):
            found.append(f"{name}: {problem}")
    return [f"{op.name} {precision.name} {f}" for f in sorted(found)]


def _entry_differences(made: dict[str, Any], stored: dict[str, Any]) -> Iterator[str]:
    for key in ("case", "direction", "comment", "flags", "attrs", "stored", "inputs"):
        if made[key] != stored.get(key):
            yield f"{key} is {stored.get(key)!r}; the code makes {made[key]!r}"
    for name, about in made["outputs"].items():
        other = stored.get("outputs", {}).get(name, {})
        for key, value in about.items():
            if key in ("limits", "projection"):
                flat, theirs = (np.array(list(v.values()) if isinstance(v, dict) else v, dtype=float) for v in (value, other.get(key, [])))
                tolerance = 0.02 * np.abs(flat) if key == "limits" else 1e-9 * np.abs(flat).max()
                if flat.shape != theirs.shape or bool(np.any(np.abs(flat - theirs) > tolerance + 1e-300)):
                    yield f"{key} of {name} differ"
            elif other.get(key) != value:
                yield f"{key} of {name} is {other.get(key)!r}; the code makes {value!r}"


def _array_difference(name: str, made: np.ndarray, stored: np.ndarray, sigma: np.ndarray | None) -> str | None:
    if made.shape != stored.shape or made.dtype != stored.dtype:
        return f"is {stored.dtype}{stored.shape}; the code makes {made.dtype}{made.shape}"
    if name.endswith("/sigma"):
        off = np.abs(made - stored) > 1e-6 * np.abs(made)
        return None if off.mean() <= SIGMA_SHARE or off.sum() <= 1 else f"{int(off.sum())} deviations differ"
    if sigma is not None:
        return None if near(made, stored, SAME * sigma) else "values differ"
    return None if np.array_equal(made, stored, equal_nan=made.dtype.kind == "f") else "values differ"
