"""One text, every array: the reference gives the same values on NumPy, array-api-strict and torch arrays, at any layout and size."""

import ast
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import array_api_strict
import leadline.ref
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from leadline.golden import strategies
from leadline.golden.band import DEVIATIONS, SLACK, band_of, reference_run, scatter
from leadline.golden.draw import draw_case
from leadline.golden.precision import PRECISIONS, precision_named
from leadline.ref import OPS, Op

Arrays = dict[str, np.ndarray]
PLACES = [(name, direction) for name, op in OPS.items() for direction in ("forward", "backward") if direction == "forward" or op.bwd]
REF = Path(leadline.ref.__file__).parent
FILES = sorted(REF.glob("*.py"))
INSTABILITY = 8.0  # a decision that eight times the rounding noise cannot turn is the same for everyone


def torch_array(x: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(x.copy())


FRAMEWORKS = [
    pytest.param(array_api_strict.asarray, id="strict"),
    pytest.param(torch_array, id="torch", marks=pytest.mark.peers("torch")),
]


def canonical(x: np.ndarray) -> bytes:
    """The bits of an array, all NaNs being one."""
    return (np.where(np.isnan(x), np.nan, x).astype(x.dtype) if x.dtype.kind == "f" else x).tobytes()


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return (a.shape, a.dtype) == (b.shape, b.dtype) and canonical(a) == canonical(b)


def run(op: Op, direction: str, inputs: Arrays, attrs: Any, to: Callable) -> Arrays:
    """The op on another framework's arrays, which must not have changed afterwards."""
    arrays = {name: to(x) for name, x in inputs.items()}
    with np.errstate(all="ignore"):
        # A NumPy scalar is what NumPy makes of an array without dimensions.
        outputs = {n: np.asarray(y) if np.isscalar(y) else np.from_dlpack(y) for n, y in op.run(direction, arrays, attrs).items()}
    for name, x in inputs.items():
        assert same(np.from_dlpack(arrays[name]), x), f"{op.name} changed its input {name}"
    return outputs


def settled(op: Op, inputs: Arrays, attrs: Any, precision: str, choice: np.ndarray) -> np.ndarray:
    """Where noise of INSTABILITY times the claimed precision's leaves the decision as it is, slot by slot."""
    name = op.choice[0]  # type: ignore[index]
    runs = scatter(reference_run(op, "forward", attrs), inputs, precision_named(precision), [name], INSTABILITY)[name]
    return np.all(runs == choice[None], axis=0)


def assert_portable(q: strategies.Drawn, inputs: Arrays, ours: Arrays, to: Callable) -> None:
    """Exact ops bit for bit. Else: the same decision wherever rounding cannot turn it; and for one decision, real outputs that differ by
    no more than two correct evaluations in that precision may, SLACK·6 σ."""
    op, given = q.op, dict(inputs)
    if op.choice and not op.exact and q.direction == "forward":
        theirs = run(op, q.direction, inputs, q.attrs, to)[op.choice[0]]
        choice = ours[op.choice[0]]
        assert theirs.dtype == choice.dtype
        assert np.all((theirs == choice) | ~settled(op, inputs, q.attrs, q.precision.name, choice))
        given[op.choice[0]] = choice
    theirs = run(op, q.direction, given, q.attrs, to)
    choice = given.get(op.choice[0]) if op.choice and not op.exact else None
    sigma = {} if op.exact else band_of(op, q.direction, inputs, q.attrs, q.precision, choice).sigma
    assert theirs.keys() == ours.keys()
    for name, y in ours.items():
        if name in sigma:
            assert (theirs[name].shape, theirs[name].dtype) == (y.shape, y.dtype)
            with np.errstate(invalid="ignore"):
                alike = (theirs[name] == y) | (np.isnan(theirs[name]) & np.isnan(y))  # infinities and NaN codes of FP8 too
                error = np.where(alike, 0.0, np.abs(theirs[name].astype(np.float64) - y.astype(np.float64)))
            assert np.all(error <= SLACK * DEVIATIONS * sigma[name]), f"{name}: {np.max(error)}"
        else:
            assert same(theirs[name], y), name


def asked(name: str, direction: str) -> st.SearchStrategy[strategies.Drawn]:
    """Questions on float32 and on float64 arrays; an op's smallest case is not too large for it."""
    large = max(20_000, min(int(np.prod(list(case.dims.values()))) for case in OPS[name].cases))
    precisions = st.sampled_from(("fp32", "fp64"))
    questions = precisions.flatmap(lambda p: strategies.questions(name, direction=direction, precision=p, large=large))
    return questions if OPS[name].exact else questions.filter(lambda q: not any(underflows(x) for x in q.inputs.values()))


def underflows(x: np.ndarray) -> bool:
    """Numbers so small that float64 holds neither their squares nor their units' (a few of them are drawn at fp64)"""
    return x.dtype.kind == "f" and bool(np.any((x != 0) & (np.abs(x) < 2.0**-400)))


@pytest.mark.parametrize("to", FRAMEWORKS)
@pytest.mark.parametrize(("name", "direction"), PLACES)
@given(data=st.data())
def test_every_framework_gives_the_same(name: str, direction: str, to: Callable, data: st.DataObject) -> None:
    """array-api-strict's and torch's arrays give NumPy's values, in float32 and float64, empty sizes included, and stay as they were."""
    q = data.draw(asked(name, direction))
    assert_portable(q, q.inputs, run(q.op, direction, q.inputs, q.attrs, np.copy), to)


def strided(x: np.ndarray) -> np.ndarray:
    """The same values, every second of a longer array, the axes laid out in reverse."""
    wide = np.zeros(tuple(2 * size for size in reversed(x.shape)), dtype=x.dtype).T
    view = wide[(*(slice(None, None, -2) for _ in x.shape), ...)]
    view[...] = x
    return view


@pytest.mark.parametrize(("name", "direction"), PLACES)
@given(data=st.data())
def test_layout_does_not_matter(name: str, direction: str, data: st.DataObject) -> None:
    """Strided, reversed and transposed views give what contiguous arrays give."""
    q = data.draw(asked(name, direction))
    assert_portable(q, q.inputs, run(q.op, direction, q.inputs, q.attrs, np.copy), strided)


@pytest.mark.parametrize(("name", "direction"), PLACES)
@given(data=st.data())
def test_the_dtype_is_kept(name: str, direction: str, data: st.DataObject) -> None:
    """Real and exact outputs have the dtype of the floating-point inputs, float32 where there are none; codes and indices have theirs."""
    q = data.draw(asked(name, direction))
    outputs = run(q.op, direction, q.inputs, q.attrs, np.copy)
    floats = {x.dtype for x in q.inputs.values() if x.dtype.kind == "f"} or {np.dtype("f4")}
    for t in q.op.signature_of(direction, q.inputs)[1]:
        dtype = outputs[t.name].dtype
        assert {"code": dtype.kind == "u", "index": dtype == np.int64}.get(t.kind, {dtype} == floats), f"{t.name} is {dtype}"


@pytest.mark.parametrize("to", [pytest.param(np.copy, id="numpy"), *FRAMEWORKS])
@pytest.mark.parametrize(("name", "direction"), PLACES)
def test_nothing_in_nothing_out(name: str, direction: str, to: Callable) -> None:
    """A letter that may vary may be 0: the outputs have the declared shapes, and no error is raised."""
    op = OPS[name]
    for letter in op.vary:
        case = next(c for c in op.cases if letter in c.dims)
        letters = {**op.defaults, **case.attrs, **case.dims, letter: 0}
        drawn = draw_case(op, case, direction, PRECISIONS["fp32"])
        tensors, results = op.signature_of(direction, drawn)
        inputs = {t.name: np.full(t.shape(letters), t.kind == "const", drawn[t.name].dtype) for t in tensors}  # a scale is not zero
        if op.choice and direction == "backward" and letter == "n":
            assert inputs[op.choice[0]].size == 0
        outputs = run(op, direction, inputs, case.attrs, to)
        assert {k: y.shape for k, y in outputs.items()} == {t.name: t.shape(letters) for t in results}


def mutated_input(x: Any, weight: Any, **attrs: Any) -> Any:
    x *= 2
    return OPS["rmsnorm"].fwd(x, weight, **attrs)


def layout_bound(x: Any, weight: Any, **attrs: Any) -> Any:
    """Trusts the memory order, as a kernel that takes a pointer does."""
    return OPS["rmsnorm"].fwd(np.ravel(x, order="K").reshape(x.shape), weight, **attrs)


def always_float64(x: Any, weight: Any, **attrs: Any) -> Any:
    return OPS["rmsnorm"].fwd(np.asarray(x, dtype=np.float64), weight, **attrs)


@pytest.mark.parametrize(("mutant", "to"), [(mutated_input, np.copy), (layout_bound, strided), (always_float64, np.copy)])
def test_portability_checks_kill(mutant: Callable, to: Callable) -> None:
    """An op that changes its input, trusts its input's layout or computes in another dtype is found by the checks above."""
    mutant.sig = OPS["rmsnorm"].sig  # type: ignore[attr-defined]
    inputs = {"x": np.linspace(-1, 2, 12, dtype=np.float32).reshape(3, 4), "weight": np.linspace(1, 2, 4, dtype=np.float32)}
    q = strategies.Drawn(replace(OPS["rmsnorm"], fwd=mutant), "forward", precision_named("fp32"), inputs, {}, OPS["rmsnorm"].cases[0], 0)
    ours = run(OPS["rmsnorm"], "forward", inputs, {}, np.copy)
    with pytest.raises(AssertionError):
        assert_portable(q, inputs, ours, to)


FRESH = """
import json, sys, time
start = time.perf_counter()
import leadline.ref
print(json.dumps([time.perf_counter() - start, sorted(sys.modules)]))
"""


def fresh_import() -> tuple[float, list[str]]:
    """Seconds and modules of `import leadline.ref` in an interpreter of its own"""
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, check=True, timeout=60)
    seconds, modules = json.loads(done.stdout)
    return seconds, modules


def test_import_is_light() -> None:
    """`import leadline.ref` takes less than 0.3 s (best of 3) and brings in none of the heavy packages, nor the other folders."""
    runs = [fresh_import() for _ in range(3)]
    assert min(seconds for seconds, _ in runs) < 0.3
    tops = {".".join(m.split(".")[: 2 if m.startswith("leadline") else 1]) for m in runs[0][1]}
    assert not tops & {"numba", "torch", "matplotlib", "jax", "cupy", "scipy", "leadline.golden", "leadline.kernels"}
    assert "leadline.ref" in tops


def imported(source: str) -> Iterator[str]:
    """Every module that a text imports, anywhere in it; relative ones with their dots."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (f"{module}.{alias.name}" if set(module) <= {"."} else module for alias in node.names)


STANDARD = {
    "contextlib",
    "contextvars",
    "collections.abc",
    "dataclasses",
    "difflib",
    "functools",
    "inspect",
    "itertools",
    "json",
    "math",
    "numbers",
    "pathlib",
    "re",
    "typing",
    "decimal",
    "types",
}
ALLOWED = {"array_api_compat", *STANDARD}


def foreign(source: str) -> list[str]:
    """What a file of ref may not import: anything but its siblings, array-api-compat's front door and a little of the standard library.
    That leaves out numpy, cupy, torch, leadline.golden and leadline.kernels."""
    modules = list(imported(source))
    return [m for m in modules if m not in ALLOWED and (m.startswith("..") or not m.startswith("."))]


@pytest.mark.parametrize("path", FILES, ids=[p.name for p in FILES])
def test_ref_imports_nothing_foreign(path: Path) -> None:
    """No file of ref/ imports numpy, cupy, another framework, golden or kernels."""
    assert foreign(path.read_text()) == []


@pytest.mark.parametrize(
    "line",
    ["import numpy as np", "from cupy import asarray", "from ..golden import draw", "from .. import kernels", "import leadline.golden"],
)
def test_import_check_kills(line: str) -> None:
    """A forbidden import is found, inside a function too."""
    assert foreign(f"def f():\n    {line}\n")
