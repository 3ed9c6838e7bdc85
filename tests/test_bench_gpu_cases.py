"""The cases of `leadline bench --subject kernels.gpu` on the CPU shim: what is counted and launched, and that peers do the same work."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_shim import Host, missing
from leadline.golden import bench_gpu_run
from leadline.golden.bench_gpu import CUDA, NUMBA, Case, unlike
from leadline.golden.bench_gpu_data import Sizes, spread
from leadline.kernels import cpu, gpu
from leadline.kernels.gpu import cuda
from leadline.kernels.gpu.cuda.launch import Launch, unchecked, using
from leadline.kernels.gpu.cuda.variants import VARIANTS
from leadline.ref import OPS
from leadline.ref.cast import decode
from leadline.ref.formats import E4M3FN

HERE = Path(__file__).parent
SMALL = Sizes(
    elements=8192,
    tokens=384,  # more than the rows that are done again, alone
    hidden=256,
    routed=320,
    experts=64,
    v2_experts=32,
    slots=40,
    width=64,
    heads=2,
    latent=128,
    nope=64,
    rope=64,
    products=((256, 384, 128),),
    grouped=(2, 128, 256, 128),
    batch=3,
    cached=(128,),
    parts=3,
    prefill=(160,),
)


class Recorder(Host):
    """Launches are written down; only those of permute.cu, which says how many rows there are, are run."""

    def launch(self, what: Launch) -> None:
        if what.file == "permute":
            super().launch(what)
        else:
            self.launched.append(what)


@cache
def small_cases() -> list[Case]:
    with using(Recorder(multiprocessors=1)):
        return [case for make in bench_gpu_run.BENCHES.values() for case in make(SMALL)]


def of_op(op: str, kernel: str = CUDA) -> list[Case]:
    return [case for case in small_cases() if case.op == op and case.kernel == kernel]


def many(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


def taken(case: Case) -> list[np.ndarray]:
    assert isinstance(case.ours, partial)
    return [x for x in (*case.ours.args, *case.ours.keywords.values()) if isinstance(x, np.ndarray)]


def test_every_kernel_has_a_benchmark() -> None:
    """Each op of FAST, and each that only a readable kernel has, forward and backward; each .cu file but the probe's is launched."""
    have = {(case.op, case.direction, case.kernel) for case in small_cases()}
    fast = {(name.removesuffix("_bwd"), "backward" if name.endswith("_bwd") else "forward", CUDA) for name in cuda.FAST}
    assert fast <= have
    readable = {
        (op, direction)
        for op in OPS
        for direction, end in (("forward", ""), ("backward", "_bwd"))
        if callable(found := getattr(gpu, op.replace(".", "_") + end, None) or attribute(gpu, op + end)) and hasattr(found, "readable")
    }
    assert len(readable) > 40
    assert {(op, direction) for op, direction, _ in have} >= readable
    for case in small_cases():
        for name in case.held.cases or ():
            assert name in [c.name for c in OPS[case.op].cases], name
    if why := missing():
        pytest.skip(f"CUDA kernels on the CPU: {why}")
    with using(Recorder(multiprocessors=3)) as recorder, unchecked():
        for case in small_cases():
            if case.kernel == CUDA:
                case.ours()
    assert {launch.file for launch in recorder.launched} == set(VARIANTS) - {"accumulate"}


def attribute(source: Any, name: str) -> Any:
    for part in name.split("."):
        source = getattr(source, part, None)
    return source


@pytest.mark.skipif(missing() is not None, reason=f"CUDA kernels on the CPU: {missing()}")
def test_bytes_are_those_of_what_goes_in_and_comes_out() -> None:
    """Each array once; but what a backward is handed and does not need (the tokens of moe.permute) is not among them."""
    with using(Recorder(multiprocessors=1)), unchecked():
        for case in small_cases():
            if case.kernel == CUDA:
                arrays = taken(case)
                if (case.op, case.direction) == ("moe.permute", "backward"):
                    del arrays[1]
                moved = sum(x.nbytes for x in (*arrays, *many(case.ours())))
                assert case.moved == moved, (case.op, case.direction, case.case)


def test_bytes_of_readable_kernels() -> None:
    """By hand: swiglu 40×64 in float32, three arrays and five; codes of 384×256 and 2 scales a row, or 6 in all; the router's logits."""
    moved = {(case.op, case.direction): case.moved for case in small_cases() if case.kernel == NUMBA}
    assert moved == {
        ("swiglu", "forward"): 3 * 40 * 64 * 4,
        ("swiglu", "backward"): 5 * 40 * 64 * 4,
        ("fp8.dequantize_tile", "forward"): 98304 + 98304 * 4 + 384 * 2 * 4,
        ("fp8.dequantize_block", "forward"): 98304 + 98304 * 4 + 6 * 4,
        ("rope", "forward"): 2 * 384 * 2 * 64 * 4 + 384 * 8,
        ("rope", "backward"): 2 * 384 * 2 * 64 * 4 + 384 * 8,
        ("router.noaux_tc", "backward"): 320 * (2 * 64 * 4 + 8 * 8 + 8 * 4),  # experts chosen in int64, their weights' gradients
        ("router.softmax", "backward"): 320 * (2 * 32 * 4 + 6 * 8 + 6 * 4),
    }


def test_operations_counted_one_by_one() -> None:
    """A multiply and an add for each product that the op's equation has"""
    seen = sum(key <= query for query in range(160) for key in range(160))  # causal
    flops = {(case.op, case.direction): case.flops for case in small_cases() if case.flops}
    assert flops[("attention", "forward")] == 2 * seen * 2 * (128 + 64)  # heads of 64 + 64 and 64
    assert flops[("attention", "backward")] == 2 * seen * 2 * (3 * 128 + 2 * 64)  # q k, do v; dq, dk, dv
    keys = 3 * 128  # sequences of as many tokens
    assert flops[("mla.decode", "forward")] == flops[("mla.decode_fp8", "forward")] == keys * 2 * 2 * (192 + 128)
    assert {(c.case.split(",")[0], c.flops) for c in of_op("fp8.gemm")} == {
        ("256×384×128", 2 * 256 * 384 * 128),
        ("2 experts of 128×256×128", 2 * (2 * 128) * 256 * 128),
    }
    assert {c.product for c in of_op("fp8.gemm")} == {"FP8 product"}


def test_a_block_is_spread_over_the_whole_array() -> None:
    """Smaller than the array, of no size that divides it, and larger"""
    for block in (np.arange(1, 6), np.arange(1, 40)):
        with using(Host()):
            np.testing.assert_array_equal(spread(block, (3, 7)), np.resize(block, (3, 7)))


def test_paths_are_those_of_the_chip() -> None:
    make = bench_gpu_run.BENCHES["fp8.gemm"]
    for capability, names in ((80, {"bf16 mma.sync"}), (89, {"mma.sync"}), (90, {"wgmma", "mma.sync"}), (100, {"mma.sync"})):
        with using(Host(capability=capability)):
            cases = list(make(SMALL))
        assert {case.case.split(", ")[1] for case in cases} == names
        assert {case.product for case in cases} == {"bf16 product" if capability == 80 else "FP8 product"}


LARGE = [op for op in bench_gpu_run.BENCHES if "." not in op or op.split(".")[0] not in ("cast", "encode", "decode")]
SOME = [*LARGE, "cast.e8m0", "encode.bf16", "decode.e5m6"]


def values(x: Any) -> np.ndarray:
    """bfloat16 bits and torch's types as numbers, FP8 as codes"""
    if hasattr(x, "detach"):
        import torch

        x = x.detach()
        x = x.view(torch.uint8) if x.dtype.itemsize == 1 and x.dtype.is_floating_point else x
        return (x.float() if x.dtype == torch.bfloat16 else x).numpy()
    x = np.asarray(x)
    return (x.astype(np.uint32) << 16).view(np.float32) if x.dtype == np.uint16 else x


@pytest.mark.peers("torch")
@pytest.mark.skipif(missing() is not None, reason=f"CUDA kernels on the CPU: {missing()}")
@pytest.mark.parametrize("op", SOME)
def test_what_is_timed_is_the_same_work(op: str) -> None:
    """Rows alone are rows of the whole, bit for bit; every peer runs, and gives what ours does, or kernels.cpu where ours is readable.

    Within 2^-6 of the whole's norm in bfloat16, where each side rounds its result and its weights to 2^-9, and 1e-5 in float32.
    """
    with using(Host(multiprocessors=1)), unchecked():
        for case in [c for c in small_cases() if c.op == op]:
            assert unlike(case) is None
            ours = case.ours if case.kernel == CUDA else on_cpu(case)
            wanted = [values(y) for y in many(ours())]
            if op == "fp8.gemm":
                wanted = unscaled(case)
            for p in [p for p in case.peers if "triton" not in p.needs]:
                if p.name == "cuBLASLt, 1×128 and 128×128":
                    continue  # on Hopper alone
                for want, got in zip(wanted, map(values, many(p.make()())), strict=False):
                    if op == "moe.permute" and want.dtype.kind == "i":
                        continue  # counts here, the order there
                    compare(want, got.reshape(want.shape), f"{case.case} {case.direction}: {p.name}")


def on_cpu(case: Case) -> Callable[[], Any]:
    assert isinstance(case.ours, partial)
    name = case.op + ("_bwd" if case.direction == "backward" else "")
    kernel = getattr(cpu, name.replace(".", "_"), None) or attribute(cpu, name)
    return partial(kernel, *case.ours.args, **case.ours.keywords)


def unscaled(case: Case) -> list[np.ndarray]:
    """The peers' products have no scales, or one that is 1."""
    a, _, b, _ = taken(case)[:4]
    x, w = np.asarray(decode(E4M3FN, a), np.float64), np.asarray(decode(E4M3FN, b), np.float64)
    return [x @ w.T if b.ndim == 2 else np.concatenate([x[i * 128 : (i + 1) * 128] @ w[i].T for i in range(len(w))])]


def compare(want: np.ndarray, got: np.ndarray, name: str) -> None:
    if want.dtype.kind == "u":
        assert (want == got).mean() > 0.999, name
    elif want.dtype.kind == "i":
        np.testing.assert_array_equal(np.sort(want, -1), np.sort(got, -1), name)
    else:
        both = np.isfinite(want) & np.isfinite(got)
        assert (both | (np.isnan(want) & np.isnan(got))).all(), name
        off = np.linalg.norm(np.where(both, want - got, 0)) / np.linalg.norm(np.where(both, want, 0))
        assert off <= (2.0**-6 if "bfloat16" in name or "×128, " in name else 1e-5), (name, off)


SIMULATED = """
import numpy as np
import test_bench_gpu_cases as t
tiny = t.Sizes(tokens=2, hidden=128, routed=3, experts=16, v2_experts=16, slots=2, width=8, heads=1, rope=8)
names = ("swiglu", "rope", "router.noaux_tc", "router.softmax", "fp8.dequantize_tile", "fp8.dequantize_block")
with t.using(t.Host()):
    for case in [c for name in names for c in t.bench_gpu_run.BENCHES[name](tiny) if c.kernel == t.NUMBA]:
        for one, other in zip(t.many(case.ours()), t.many(t.on_cpu(case)()), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6, err_msg=case.op)
        print(case.op, case.direction)
"""


@pytest.mark.peers("numba_cuda")
def test_readable_kernels_take_what_they_are_timed_with() -> None:
    """In the simulator, in a process of its own, where Numba is told so before it is imported"""
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", SIMULATED], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.splitlines()) == {f"{case.op} {case.direction}" for case in small_cases() if case.kernel == NUMBA}
