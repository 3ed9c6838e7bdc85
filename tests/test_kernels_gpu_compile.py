"""Every kernel of kernels.gpu compiles for a real device, on any machine, with the types that its op launches it with."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CAPABILITIES = ((8, 0), (9, 0))
# Files whose kernels compute in the arrays' own dtype throughout. The others round in float64 on purpose (casts), or take angles in it.
OWN_DTYPE = ("norm.", "swiglu.", "moe_permute.", "mla_decode._attend")

pytestmark = pytest.mark.peers("numba_cuda")


@cache
def compiled(capability: tuple[int, int]) -> tuple[list[dict], set[str]]:
    """What tests/ptx.py says of each kernel, and the names of all that there are."""
    command = [sys.executable, str(HERE / "ptx.py"), *map(str, capability)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    *kernels, last = map(json.loads, run.stdout.splitlines())
    return kernels, set(last["all"])


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kernel_compiles(capability: tuple[int, int]) -> None:
    """To one entry of PTX for the chip that was asked, in float32 and float64; arithmetic as IEEE has it, in the dtype that it says."""
    kernels, every = compiled(capability)
    assert {k["kernel"] for k in kernels} == every
    for k in kernels:
        assert k["target"] == [f"sm_{capability[0]}{capability[1]}"], k
        assert k["entries"] == 1, k
        assert k["approximate"] == [], k
    single = [k for k in kernels if k["op"].endswith("fp32") and k["kernel"].startswith(OWN_DTYPE)]
    assert len(single) >= 10
    for k in single:
        assert k["double"] == 0, k  # a Python number among float32s would have widened them
    assert any(k["double"] for k in kernels if k["op"].endswith("fp64"))  # and where there is some, it is found
