"""kernels.gpu in Numba's simulator, on any machine: every kernel held to the vectors and to sizes that Hypothesis finds, mutants that must
fail, arguments that must be refused. Each family runs in a process of its own, since the simulator is chosen where Numba is first imported.

What the simulator cannot show: a missing barrier, a race, arithmetic that a device would do in another precision (that is read off the
machine code in test_kernels_gpu_compile.py), and speed.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import simulated
from leadline.golden.cli import op_rows
from leadline.golden.subject import Subject
from leadline.golden.vectors import directions
from leadline.kernels import gpu
from leadline.ref import OPS

SIMULATOR = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1"}
HIDDEN = {k: v for k, v in os.environ.items() if k != "NUMBA_ENABLE_CUDASIM"} | {"CUDA_VISIBLE_DEVICES": ""}
SUBJECT = Subject("kernels.gpu", gpu)
HAVE = [op for op in OPS.values() if SUBJECT.contract(op, "forward") is not None]
needs_numba_cuda = pytest.mark.peers("numba_cuda")


def leadline(*words: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "leadline.golden.cli", *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)


@needs_numba_cuda
@pytest.mark.parametrize("family", [*simulated.FAMILIES, "arguments"])
def test_kernels_pass_and_mutants_fail(family: str) -> None:
    """Every op of a file passes its vectors and other sizes; each bug that is planted in the file makes the same verify FAIL."""
    script = Path(simulated.__file__)
    run = subprocess.run([sys.executable, str(script), family], env=SIMULATOR, capture_output=True, text=True, timeout=900, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    heading, *runs = map(json.loads, run.stdout.splitlines())
    assert "simulator" in heading["heading"]
    assert runs
    for told in runs:
        assert told["verdict"] == ("FAIL" if told["run"].startswith("mutant") else "PASS"), told


def test_no_kernel_is_left_out() -> None:
    """Every op of the package is asked, in each direction that it declares, and every file has mutants."""
    assert [op.name for op in HAVE if SUBJECT.contract(op, directions(op)[-1]) is None] == []
    assert {op.name for op in HAVE} == {name for family in simulated.FAMILIES.values() for name in family}
    mutants = Counter(m.file for m in simulated.MUTANTS)
    assert mutants.keys() == simulated.FAMILIES.keys()
    assert min(mutants.values()) >= 2


def test_the_op_table_says_what_no_gpu_has_run() -> None:
    """`leadline ops`: "gpu (simulated)" and "cuda (unrun)" until an op has run on a GPU."""
    rows = {row[0]: row[3] for row in op_rows()}
    assert {name for name, kernels in rows.items() if "gpu" in kernels} == {op.name for op in HAVE}
    for op in HAVE:
        assert ("gpu" if op.name in gpu.RUN else "gpu (simulated)") in rows[op.name].split(", ")
    assert rows["attention"] == "cpu, cuda (unrun)"  # CUDA C++ alone
    assert rows["attention.varlen"] == "cpu"


@needs_numba_cuda
def test_verify_says_that_it_is_the_simulator() -> None:
    """In the table's heading and in the JSON lines' header."""
    asked = ("verify", "kernels.gpu", "--op", "swiglu", "--case", "one", "--precision", "fp32")
    table = leadline(*asked, env=SIMULATOR)
    assert table.returncode == 0, table.stderr
    assert "simulator" in table.stdout.splitlines()[0]
    header = json.loads(leadline(*asked, "--json", env=SIMULATOR).stdout.splitlines()[0])
    assert "simulator" in header["devices"][0]


def test_without_a_gpu_nothing_else_steps_in() -> None:
    """`leadline verify kernels.gpu`: one line that says what is missing and what to use instead, exit status 2, no verdict."""
    run = leadline("verify", "kernels.gpu", env=HIDDEN)
    assert run.returncode == 2
    assert run.stdout == ""
    (line,) = run.stderr.splitlines()
    assert line.startswith("leadline: kernels.gpu: ")
    assert "use kernels.cpu" in line
