"""`leadline bench --subject kernels.gpu` without a GPU: its arithmetic with a clock that is told what to say, what it prints and keeps."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from leadline.golden import bench_gpu_run, hardware_runs
from leadline.golden.bench_gpu import COPY, Case, Ceiling, Held, Load, Peer, ceilings_of, floor_of, measure, measured
from leadline.golden.bench_gpu_data import Sizes
from leadline.kernels import cpu
from leadline.kernels.gpu.cuda.launch import Unfit
from leadline.ref import OPS


class Takes:
    """A call that says how long it takes, and counts"""

    def __init__(self, seconds: float, result: Any = None):
        self.takes, self.result, self.calls = seconds, result, 0

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        self.calls += 1
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result


class Told:
    """A clock that believes what it is told"""

    heading, method = "a made-up device", "no clock at all"

    def seconds(self, run: Any) -> float:
        run()
        return run.takes

    def release(self) -> None:
        pass


def peer(name: str, seconds: float, *, wrong: BaseException | None = None, **more: Any) -> Peer:
    return Peer(name, lambda: Takes(seconds, wrong), **{"needs": (), **more})


RIGHT = Held(cpu.rmsnorm, cases=("one",))
CEILINGS = {COPY: Ceiling("a copy", 3e12, "B/s"), "bf16 product": Ceiling("a product", 8e14, "FLOP/s")}


def records_of(case: Case, ceilings: dict[str, Ceiling] = CEILINGS) -> list[dict[str, Any]]:
    return list(measure(case, Told(), ceilings, {}))


def test_a_ceiling_is_work_over_time() -> None:
    def none() -> Takes:
        raise RuntimeError("no FP8 here\nand more of it")

    asked = {
        COPY: Load("a copy", 6 << 30, "B/s", lambda: Takes(2e-3)),
        "FP8 product": Load("an FP8 product", 1, "FLOP/s", none),
        "bf16 product": Load("a bf16 product", 1, "FLOP/s", none, ("no_such_package",)),
    }
    found, without = ceilings_of(Told(), asked)
    assert found == {COPY: Ceiling("a copy", (6 << 30) / 2e-3, "B/s")}
    assert without == {
        "FP8 product": "an FP8 product: RuntimeError: no FP8 here",
        "bf16 product": "a bf16 product: no_such_package is not installed",
    }


@pytest.mark.parametrize(
    ("moved", "flops", "binding", "share"),
    [
        (3 * 10**9, 0, COPY, 1e-3 / 2e-3),  # 3 GB at 3 TB/s are 1 ms
        (3 * 10**9, 16 * 10**11, "bf16 product", 1.0),  # 1.6 TFLOP at 800 TFLOP/s are 2 ms
        (3 * 10**9, 4 * 10**11, COPY, 0.5),  # 0.5 ms, less than the bytes take
    ],
)
def test_a_share_is_of_the_ceiling_that_binds(moved: int, flops: int, binding: str, share: float) -> None:
    records = records_of(Case("rmsnorm", "c", Takes(2e-3), RIGHT, moved, flops, "bf16 product", peers=[peer("other", 8e-3)]))
    assert [r["peer"] for r in records] == ["other", binding]
    for r in records:
        assert (r["seconds"], r["limit"]) == (2e-3, binding)
        assert r["limit_share"] == pytest.approx(share, rel=1e-12)
    assert records[0]["ratio"] == 0.25
    assert records[1]["peer_seconds"] == pytest.approx(2e-3 * share, rel=1e-12)
    assert f"{share:.1%} of {binding}" in bench_gpu_run.line_of(records)
    assert "4.00× other (8.000 ms)" in bench_gpu_run.line_of(records)


def test_a_share_of_what_was_not_measured_is_none() -> None:
    """Nor of the copy alone, which may not bind"""
    case = Case("rmsnorm", "c", Takes(2e-3), RIGHT, 10**9, 10**9, "FP8 product")
    assert floor_of(case, CEILINGS) is None
    (record,) = records_of(case)
    assert (record["seconds"], record["limit"], record["limit_share"], record["peer"]) == (2e-3, None, None, None)
    assert "no ceiling that was measured" in bench_gpu_run.line_of([record])


def test_a_peer_that_raises_costs_its_own_line() -> None:
    def unmade() -> Takes:
        raise MemoryError("too little\nof it")

    peers = [
        peer("a", 1e-3),
        Peer("b", unmade, ()),
        peer("c", 0, wrong=ValueError("no")),
        peer("d", 2e-3),
        peer("e", 1, needs=("no_such",)),
    ]
    records = records_of(Case("rmsnorm", "c", Takes(2e-3), RIGHT, 10**9, peers=peers))
    assert {r["peer"]: r["error"] for r in records if "error" in r} == {"b": "MemoryError: too little", "c": "ValueError: no"}
    assert [r["peer"] for r in records if "error" not in r] == ["a", "d", COPY]
    assert bench_gpu_run.line_of(records).splitlines()[1:] == ["    b: MemoryError: too little", "    c: ValueError: no"]


def wrong(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The weight forgotten"""
    return cpu.rmsnorm(x=x, weight=np.ones_like(weight))


ONES = np.ones(3, np.float32)
BAD: dict[str, tuple[Case, str]] = {
    "wrong": (Case("rmsnorm", "c", Takes(1.0), Held(wrong, cases=("small",)), 1), "FAIL on vector small: y is off by"),
    "at this size": (Case("rmsnorm", "c", Takes(1.0), RIGHT, 1, alike=lambda: [(ONES, ONES), (ONES, -ONES)]), "result 2 is not"),
    "a zero's sign": (Case("rmsnorm", "c", Takes(1.0), RIGHT, 1, alike=lambda: [(0 * ONES, -0.0 * ONES)]), "result 1 is not"),
    "does none": (
        Case("attention.merge", "c", Takes(1.0), Held(lambda **_: Takes(0, Unfit("not this"))()), 1),
        "none of the vectors",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_kernel_that_is_wrong_is_named_and_not_timed(name: str) -> None:
    case, why = BAD[name]
    (record,) = records_of(case)
    assert why in record["error"]
    assert "seconds" not in record
    assert isinstance(case.ours, Takes)
    assert case.ours.calls == 0
    assert f"not timed: {record['error']}" in bench_gpu_run.line_of([record])


def test_what_raises_does_not_end_the_run() -> None:
    def cases() -> Iterator[Case]:
        yield Case("rmsnorm", "first", Takes(1.0, RuntimeError("launch failed\nhere")), RIGHT, 1)
        yield Case("rmsnorm", "second", Takes(1.0), RIGHT, 3 * 10**12)
        raise MemoryError("arrays too large")

    first, second, third = measured("rmsnorm", cases(), Told(), CEILINGS, {})
    assert [r.get("error") for r in first] == ["RuntimeError: launch failed"]
    assert second[0]["limit_share"] == 1.0
    assert [r["error"] for r in third] == ["MemoryError: arrays too large"]


def test_a_kernel_is_held_to_the_vectors_once() -> None:
    asked = []

    def counting(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        asked.append(x.shape)
        return cpu.rmsnorm(x=x, weight=weight)

    held, faults = Held(counting, cases=("one",)), {}
    for _ in range(3):
        assert "error" not in next(measure(Case("rmsnorm", "c", Takes(1.0), held, 1), Told(), CEILINGS, faults))
    assert len(asked) == 1


DEVICE = hardware_runs.Device("Made-up GPU", "9.0", 80 << 30, "13.0", "13.0")


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A device that is made up, in a folder that is thrown away"""
    write = hardware_runs.write

    def good(_: Sizes) -> Iterator[Case]:
        yield Case("rmsnorm", "8×8", Takes(2e-3), RIGHT, 3 * 10**9, peers=[peer("other", 1e-3), peer("lost", 1, wrong=ValueError("no"))])

    def bad(_: Sizes) -> Iterator[Case]:
        yield BAD["wrong"][0]

    def ends(_: Sizes) -> Iterator[Case]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(bench_gpu_run, "BENCHES", {"rmsnorm": good, "swiglu": bad, "rope": ends})
    monkeypatch.setattr(bench_gpu_run, "on_device", Told)
    monkeypatch.setattr(bench_gpu_run, "loads", lambda _: {COPY: Load("a copy", 3 * 10**9, "B/s", lambda: Takes(1e-3))})
    monkeypatch.setattr(hardware_runs, "device", lambda: DEVICE)
    monkeypatch.setattr(hardware_runs, "write", lambda run: write(run, tmp_path))
    return tmp_path


def test_kept_runs_are_read_back(pretended: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_gpu_run.run([OPS["rmsnorm"]], as_json=True, keep=True)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0]["device"]["name"] == "Made-up GPU"
    assert lines[1] == {"ceiling": "a copy", "value": 3e12, "unit": "B/s"}
    assert [line["peer"] for line in lines[2:]] == ["lost", "other", COPY]
    ((path, kept),) = hardware_runs.stored(pretended)
    assert path.name.startswith("made-up-gpu-")
    assert kept.device == DEVICE
    assert kept.versions["numpy"] == np.__version__
    what = "rmsnorm forward, 8×8 [CUDA C++]"
    assert kept.figures == (
        hardware_runs.Figure("a copy", 3.0, "TB/s"),
        hardware_runs.Figure(what, 2e-3, "s", "a copy", 0.5),
        hardware_runs.Figure(f"{what}: other", 1e-3, "s"),
    )


def test_a_run_with_a_wrong_kernel_says_so_and_keeps_no_figure_of_it(pretended: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not bench_gpu_run.run([OPS["swiglu"], OPS["rmsnorm"]], as_json=False, keep=True)
    out = capsys.readouterr().out
    assert "not timed: FAIL on vector small" in out
    for said in (
        "a made-up device",
        "3.00 TB/s     a copy",
        "50.0% of copy",
        "0.50× other (1.000 ms)",
        "    lost: ValueError: no",
        "kept in",
    ):
        assert said in out
    ((_, kept),) = hardware_runs.stored(pretended)
    assert len(kept.figures) == 3


def test_an_interrupted_run_keeps_what_it_measured(pretended: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        bench_gpu_run.run([OPS["rmsnorm"], OPS["rope"]], as_json=False, keep=True)
    ((_, kept),) = hardware_runs.stored(pretended)
    assert len(kept.figures) == 3
