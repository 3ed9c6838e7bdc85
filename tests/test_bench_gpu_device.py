"""The device of `leadline bench --subject kernels.gpu`: its clock and ceilings on one that is made up, wrong use, and the run on a GPU."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import no_gpu
from cuda_shim import Host
from leadline.golden import bench_gpu_device, bench_gpu_run
from leadline.golden.bench_gpu import COPY
from leadline.golden.bench_gpu_device import loads
from leadline.kernels.gpu.cuda.launch import using


class Cupy:
    """Of CuPy what the clock uses: a device on which reading the buffer takes 0.1 ms and a call 5 ms"""

    nbytes, attributes = 4 << 26, {"L2CacheSize": 50 << 20}

    def __init__(self) -> None:
        self.now, self.readings, self.size = 0.0, 0, 0

    def synchronize(self) -> None:
        pass

    def ones(self, size: int, _: Any) -> Any:
        self.size = size
        return self

    def sum(self) -> None:
        self.readings += 1
        self.now += 1e-4


def test_the_clock_times_the_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the buffer that is read before it, which is larger than the cache and takes longer than the host needs for the call."""
    device = Cupy()

    def event() -> Any:
        marked = SimpleNamespace(at=0.0, synchronize=lambda: None)
        marked.record = lambda: setattr(marked, "at", device.now)
        return marked

    cuda = SimpleNamespace(Device=lambda: device, Event=event, get_elapsed_time=lambda a, b: (b.at - a.at) * 1e3)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda, ones=device.ones, float32=np.float32))
    monkeypatch.setattr(bench_gpu_device, "load", lambda _: SimpleNamespace(source=SimpleNamespace(heading=lambda: "a device")))
    clock = bench_gpu_device.Events()
    assert device.size * 4 >= 4 * (50 << 20)
    assert clock.reading == pytest.approx(1e-4)
    ticks = iter([0.0, 1.05e-3])  # the host hands a call over in 1.05 ms
    monkeypatch.setattr(bench_gpu_device, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    before, calls = device.readings, []

    def run() -> None:
        calls.append(device.readings - before)
        device.now += 5e-3

    assert clock.seconds(run) == pytest.approx(5e-3)
    timed = calls[bench_gpu_device.WARM_UP + 1 :]
    assert len(timed) == bench_gpu_device.REPEATS
    assert np.diff([0, *timed]).min() * 1e-4 >= 1.05e-3


@pytest.mark.peers("torch")
def test_ceilings_are_measured_with_what_they_say() -> None:
    """On the CPU: a copy that copies, products of the right shape and precision"""
    import torch

    with using(Host()):
        made = {name: load.make() for name, load in loads(1 << 24, side=64).items()}
        asked = loads(1 << 24, side=64)
    copy: Any = made[COPY]
    copy()
    source, target = (c.cell_contents for c in copy.__closure__ if isinstance(c.cell_contents, np.ndarray))
    assert source is not target
    assert source.tobytes() == target.tobytes()
    assert asked[COPY].amount == 2 * (1 << 20)
    dtypes = {"float32 product": torch.float32, "bf16 product": torch.bfloat16, "FP8 product": torch.bfloat16}
    for name, dtype in dtypes.items():
        y = made[name]()
        assert (y.shape, y.dtype, asked[name].amount) == ((64, 64), dtype, 2 * 64**3)


def leadline(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "from leadline.golden.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, "bench", *args], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--subject", "kernels.tpu"), "--subject is kernels.tpu; expected kernels.cpu or kernels.gpu"),
        (("--keep",), "--keep records a device; it goes with --subject kernels.gpu"),
        (("--subject", "kernels.gpu", "--op", "model"), "model has no GPU benchmark; these have: "),
        (("--subject", "kernels.gpu", "--op", "rmsnrm"), "did you mean rmsnorm"),
    ],
)
def test_wrong_use_is_one_line(args: tuple[str, ...], says: str) -> None:
    done = leadline(*args)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert says in done.stderr


def test_the_simulator_is_no_device() -> None:
    done = leadline("--subject", "kernels.gpu", NUMBA_ENABLE_CUDASIM="1")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "kernels.gpu: " in done.stderr
    assert "unset NUMBA_ENABLE_CUDASIM" in done.stderr or "not installed" in done.stderr


def test_without_a_gpu_it_says_what_verify_says() -> None:
    if no_gpu() is None:
        pytest.skip("there is a GPU")
    done = leadline("--subject", "kernels.gpu")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    code = "from leadline.golden.cli import main; main()"
    other = subprocess.run([sys.executable, "-c", code, "verify", "kernels.gpu"], capture_output=True, text=True, check=False)
    assert done.stderr == other.stderr


@pytest.mark.gpu
def test_the_whole_command_on_the_device() -> None:
    """Every kernel is right and timed; a share far above 1 would be a count or a clock that is wrong."""
    done = leadline("--subject", "kernels.gpu", "--json")
    records = [json.loads(line) for line in done.stdout.splitlines()]
    timed = [r for r in records if "limit_share" in r]
    assert {r["op"] for r in timed} == set(bench_gpu_run.BENCHES), done.stderr
    assert done.returncode == 0, [r for r in records if "error" in r and "peer" not in r]
    assert all(r["limit_share"] is None or 0 < r["limit_share"] < 1.5 for r in timed)
