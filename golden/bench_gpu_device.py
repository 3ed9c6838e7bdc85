"""The device that the GPU benchmarks run on: CUDA events, and the loads whose rates are the ceilings."""

import importlib
import math
import statistics
import sys
import time
from typing import Any

from ..kernels.gpu.cuda.compile import CompileError, nvrtc
from ..kernels.gpu.cuda.launch import GPUError, runner
from .bench_gpu import BF16, COPY, FLOAT32, FP8, Load, Timed
from .bench_gpu_data import numbers, tensor
from .errors import UsageError
from .subject import load

REPEATS, WARM_UP, SIDE = 15, 3, 8192
AHEAD = 200  # readings of the buffer before a call, at most


class Events:
    """Seconds between two CUDA events on CuPy's stream, the median of REPEATS.

    Before each call a buffer larger than the L2 cache is read: the call finds none of its data there, and no write is still under way. It
    is read so often that the host has handed over the whole call when the device begins it. A call that waits for the device in its midst
    (to read a number of rows back) is timed with its wait.
    """

    def __init__(self) -> None:
        cupy: Any = importlib.import_module("cupy")
        self.cupy, self.heading = cupy, load("kernels.gpu").source.heading()
        cache = int(cupy.cuda.Device().attributes["L2CacheSize"])
        self.buffer = cupy.ones(max(4 * cache, 1 << 28) // 4, cupy.float32)
        self.method = (
            f"CUDA events on the device, median of {REPEATS} after {WARM_UP} that warm up; "
            f"before each, {self.buffer.nbytes >> 20} MiB are read to empty the L2 cache of {cache >> 20} MiB"
        )
        self.start, self.stop = cupy.cuda.Event(), cupy.cuda.Event()
        self._read()
        self.reading = statistics.median(self._between(self._read) for _ in range(REPEATS))

    def _read(self) -> None:
        self.buffer.sum()

    def _between(self, run: Timed) -> float:
        self.start.record()
        run()
        self.stop.record()
        self.stop.synchronize()
        return self.cupy.cuda.get_elapsed_time(self.start, self.stop) / 1e3

    def _handed_over(self, run: Timed) -> float:
        """Seconds until the host is free again"""
        self.cupy.cuda.Device().synchronize()
        started = time.perf_counter()
        run()
        seconds = time.perf_counter() - started
        self.cupy.cuda.Device().synchronize()
        return seconds

    def seconds(self, run: Timed) -> float:
        for _ in range(WARM_UP):
            run()
        ahead = min(AHEAD, 1 + math.ceil(2 * self._handed_over(run) / self.reading))

        def once() -> float:
            for _ in range(ahead):
                self._read()
            return self._between(run)

        return statistics.median(once() for _ in range(REPEATS))

    def release(self) -> None:
        """Gives memory back that arrays no longer hold: CuPy and torch keep it each for itself."""
        self.cupy.get_default_memory_pool().free_all_blocks()
        if torch := sys.modules.get("torch"):
            torch.cuda.empty_cache()


def on_device() -> Events:
    """The current CUDA device; UsageError in one line, as `leadline verify kernels.gpu` says it, where there is none"""
    load("kernels.gpu")
    if importlib.import_module("..kernels.gpu._device", __package__).SIMULATED:
        raise UsageError("kernels.gpu: the simulator has no times; unset NUMBA_ENABLE_CUDASIM, or use kernels.cpu")
    try:
        nvrtc()
        runner()
    except (CompileError, GPUError) as error:
        raise UsageError(f"kernels.gpu: {error}") from error
    return Events()


def loads(memory_bytes: int, side: int = SIDE) -> dict[str, Load]:
    """What the ceilings are measured with"""
    size = min(2 << 30, memory_bytes // 16) // 4096 * 4096

    def copy() -> Timed:
        source, target = numbers((size // 4,)), runner().empty((size // 4,), "float32")
        copyto = importlib.import_module(type(source).__module__.partition(".")[0]).copyto  # of cupy, a copy from device to device
        return lambda: copyto(target, source)

    def product(dtype: str) -> Timed:
        import torch

        a, b = (tensor(numbers((side, side), key)).to(getattr(torch, dtype)) for key in (1, 2))
        torch.set_float32_matmul_precision("highest")
        return lambda: torch.mm(a, b.T)

    def fp8() -> Timed:
        torch: Any = importlib.import_module("torch")  # whose type stubs hide _scaled_mm

        a, b = (tensor(numbers((side, side), key)).to(torch.float8_e4m3fn) for key in (1, 2))
        one = torch.ones((), device=a.device)
        return lambda: torch._scaled_mm(a, b.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)

    def products(what: str, make: Any) -> Load:
        return Load(what, 2 * side**3, "FLOP/s", make, ("torch",))

    return {
        COPY: Load(f"copy of {size >> 20} MiB from device to device, read and written", 2 * size, "B/s", copy),
        FLOAT32: products(f"float32 product of {side}³, TF32 off", lambda: product("float32")),
        BF16: products(f"bf16 product of {side}³", lambda: product("bfloat16")),
        FP8: products(f"FP8 product of {side}³, one scale a matrix, fast accumulation, cuBLASLt", fp8),
    }
