"""`leadline probe accumulator` finds what our own models do inside from their outputs alone, and tells what is none of them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import absent, no_gpu
from leadline.golden import hardware_runs
from leadline.golden.errors import UsageError
from leadline.golden.hardware_runs import Device, Figure, Probe, Run
from leadline.golden.probe import Bench, Finding, Subject, factors, probe
from leadline.golden.probe_models import draws, match, simulated
from leadline.ref.cast import decode
from leadline.ref.formats import E4M3FN
from leadline.ref.fp8_accumulate import Accumulator, accumulator_named, fused_dot


@pytest.mark.parametrize("name", ["wgmma13", "mma25", "bits:1", "bits:7", "bits:24", "bits:30"])
def test_each_model_is_recovered(name: str) -> None:
    """Bits, rounding, group and order, and then every random sum bit for bit."""
    finding = probe(simulated(name))
    assert finding.accumulator == accumulator_named("test", name)
    assert finding.in_sequence
    best = match(simulated(name), finding, 2000)[0]
    assert best.everywhere
    assert name in [m.name for m in match(simulated(name), finding, 2000) if m.everywhere]


@pytest.mark.parametrize("how", [Accumulator(13, 13, 16), Accumulator(20, 15, 8), Accumulator(25, 23, 64)])
def test_other_sizes_are_recovered(how: Accumulator) -> None:
    """Groups of another size than ours, fewer bits kept than aligned: named by their numbers and matched; no model of ours is."""
    finding = probe(simulated(how), 128 if how.group == 64 else 64)
    assert finding.accumulator == how
    same = [m.name for m in match(simulated(how), finding, 2000) if m.everywhere]
    assert same == [f"{how.fraction} bits, {how.kept} kept, groups of {how.group}"]


def test_float32_in_order_is_recovered() -> None:
    finding = probe(simulated("fp32"))
    assert (finding.fraction, finding.kept, finding.group, finding.in_sequence) == (23, 23, 1, True)
    assert finding.term_rounding == "to nearest, ties to even"
    assert [m.name for m in match(simulated("fp32"), finding, 2000) if m.everywhere] == ["fp32"]


def test_an_exact_sum_loses_nothing() -> None:
    finding = probe(simulated("exact"))
    assert finding == Finding(64, None, None, None, None, None, None, None, None)
    assert [m.name for m in match(simulated("exact"), finding, 2000) if m.everywhere] == ["exact"]


def varied(rounds, group: int = 16, fraction: int = 12, backwards: bool = False) -> Subject:
    """Groups aligned as ours and rounded by another rule, added first to last or last to first; shares nothing with ref/."""

    def subject(a_codes, b_codes, c):
        a, b = (np.asarray(decode(E4M3FN, x), np.float64) for x in (a_codes, b_codes))
        e = [np.where(x == 0, -500, np.maximum(np.floor(np.log2(np.abs(np.where(x == 0, 1, x)))), -6)) for x in (a, b)]
        starts = range(0, a.shape[1], group)
        total = np.asarray(c, np.float64)
        for k in reversed(starts) if backwards else starts:
            part = slice(k, k + group)
            own = np.where(total == 0, -500, np.floor(np.log2(np.abs(np.where(total == 0, 1, total)))))
            unit = np.exp2(np.maximum(np.maximum((e[0] + e[1])[:, part].max(axis=1), own), -200) - fraction)
            total = (rounds((a * b)[:, part] / unit[:, None]).sum(axis=1) + rounds(total / unit)) * unit
        return total.astype(np.float32)

    return subject


@pytest.mark.parametrize(
    ("rounds", "name"), [(np.trunc, "toward zero"), (np.round, "to nearest, ties to even"), (np.floor, "down"), (np.ceil, "up")]
)
def test_roundings_are_told_apart(rounds, name: str) -> None:
    finding = probe(varied(rounds), 32)
    assert (finding.fraction, finding.term_rounding, finding.group) == (12, name, 16)


def test_another_order_is_seen() -> None:
    finding = probe(varied(np.trunc, backwards=True), 48)
    assert finding.groups == (16, 16, 16)
    assert finding.order == (-1, *range(32, 48), *range(16, 32), *range(16))
    assert finding.accumulator is None


def test_a_tree_is_no_sequence() -> None:
    def pairwise(a_codes, b_codes, c):
        x = np.asarray(decode(E4M3FN, a_codes) * decode(E4M3FN, b_codes), np.float32)
        while x.shape[1] > 1:
            x = x[:, ::2] + x[:, 1::2]
        return x[:, 0] + c

    finding = probe(pairwise, 16)
    assert finding.groups is None
    assert not any(m.everywhere for m in match(pairwise, finding, 500))


def test_a_model_off_by_one_bit_in_the_last_group_is_no_match() -> None:
    """The comparison can fail: 14 bits are not 13."""
    finding = probe(simulated("wgmma13"))
    ours = [m for m in match(simulated("bits:14"), finding, 500) if m.name == "wgmma13"]
    assert ours[0].equal < ours[0].of
    assert "where the model has" in ours[0].first


def test_simulated_sums_are_the_references() -> None:
    """Row by row here, matrices there."""
    a, b, c = draws(np.random.default_rng(0), 40, 64)
    x, y = decode(E4M3FN, a), decode(E4M3FN, b)
    for name in ("wgmma13", "mma25", "bits:5"):
        how = accumulator_named("test", name)
        assert how is not None
        whole = fused_dot(x, y, E4M3FN, how, start=np.repeat(c.astype(np.float64)[:, None], 40, axis=1))
        np.testing.assert_array_equal(simulated(name)(a, b, c), np.diagonal(whole).astype(np.float32))


def test_codes_make_the_numbers_that_are_asked() -> None:
    values = decode(E4M3FN, np.arange(256, dtype=np.uint8))
    assert all(float(values[a]) * float(values[b]) == x for x, (a, b) in factors().items())
    sums = Bench(simulated("exact"), 8).ask([{-1: 3.0, 2: -2.5, 7: 0.75}, {0: (0x3C, 0x3C)}])
    np.testing.assert_array_equal(sums, [1.25, 2.25])


@pytest.mark.parametrize(("kind", "name"), [("wgmma", "wgmma13"), ("mma", "mma25")])
def test_mma_sim_is_our_model(kind: str, name: str) -> None:
    """MMA-Sim (arXiv:2511.10909), probed as a chip would be; its wheel has no licence to be a dependency: put it on PYTHONPATH."""
    ptx = pytest.importorskip("mmasim.nv_ptx", reason="mmasim, the third party for tensor cores, is not installed")
    torch = pytest.importorskip("torch", reason="torch, which mmasim needs, is not installed")
    shape = "f32.e4m3.e4m3"
    unit = ptx.WGMMA("Hopper", f"m64n8k32.{shape}") if kind == "wgmma" else ptx.MMA("RTX Blackwell", f"m16n8k32.{shape}.f32")

    def subject(a_codes, b_codes, c):
        a, b = (torch.from_numpy(np.ascontiguousarray(x)).view(torch.float8_e4m3fn) for x in (a_codes, b_codes))
        return unit.dpa(a, b, torch.from_numpy(np.ascontiguousarray(c))).numpy()  # 32 products at a time

    finding = probe(subject)
    assert finding.accumulator == accumulator_named("test", name)
    assert {m.name: m.everywhere for m in match(subject, finding, 1000)}[name]


def leadline(*args: str) -> subprocess.CompletedProcess[str]:
    code = "from leadline.golden.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=False)


def test_command_on_a_model() -> None:
    done = leadline("probe", "accumulator", "--model", "wgmma13", "--tiles", "500")
    assert done.returncode == 0, done.stderr
    for line in (
        "fraction bits  13 below",
        "32 products and the accumulator at a time",
        "= wgmma13      500 of 500 sums",
        "this is wgmma13",
    ):
        assert line in done.stdout


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--model", "wgmma99"), "expected fp32, exact, wgmma13, mma25 or bits:F"),
        (("--model", "wgmma13", "--instruction", "wgmma"), "exclude each other"),
        (("--model", "wgmma13", "--keep"), "--keep records a device"),
        (("--subject", "math:pi"), "is no callable"),
    ],
)
def test_wrong_use_is_one_line(args: tuple[str, ...], says: str) -> None:
    done = leadline("probe", "accumulator", *args)
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


def test_without_a_gpu_one_line_and_status_2() -> None:
    if absent(("cupy",)) == [] and no_gpu() is None:
        pytest.skip("there is a GPU")
    done = leadline("probe", "accumulator")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "--model wgmma13" in done.stderr


DEVICE = Device("NVIDIA H100 80GB HBM3", "9.0", 85 << 30, "12.8", "13.0")
RUN = Run(
    DEVICE,
    "2026-11-22",
    {"cupy-cuda13x": "14.2.0"},
    (Figure("copy bandwidth", 3.1, "TB/s"), Figure("rmsnorm 4096x7168", 2.8, "TB/s", "copy bandwidth", 0.9)),
    (Probe("wgmma", {"fraction": 13, "groups": [32, 32]}, ({"name": "wgmma13", "equal": 10, "of": 10},)),),
)


def test_a_hardware_run_is_kept_and_read_back(tmp_path: Path) -> None:
    """The device and numbers here are made up, and go nowhere but into a temporary folder."""
    path = hardware_runs.write(RUN, tmp_path)
    assert path.name == "nvidia-h100-80gb-hbm3-2026-11-22.json"
    assert hardware_runs.read(path) == RUN
    assert hardware_runs.write(RUN, tmp_path).name == "nvidia-h100-80gb-hbm3-2026-11-22-2.json"
    assert [run for _, run in hardware_runs.stored(tmp_path)] == [RUN, RUN]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 2}, "has version 2; expected 1"),
        ({"date": "yesterday"}, "expected a day"),
        ({"device": {**DEVICE.__dict__, "driver": ""}}, "device driver is missing"),
        ({"figures": [{"what": "x", "value": -1.0, "unit": "s"}]}, "x is -1.0; expected a number that was measured"),
        ({"figures": [{"what": "x", "value": 1.0, "unit": "s", "share": 0.5}]}, "a share of no ceiling"),
        ({"surprise": 1}, "is no hardware run"),
    ],
)
def test_what_is_no_hardware_run_is_refused(change: dict, says: str, tmp_path: Path) -> None:
    path = hardware_runs.write(RUN, tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UsageError, match=says):
        hardware_runs.read(path)


def test_every_kept_run_reads() -> None:
    """What lies in golden/hardware was written by this code; an empty folder means that nothing was measured."""
    for path, run in hardware_runs.stored():
        assert run.device.name, path
