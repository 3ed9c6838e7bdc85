"""Where the kernels run: on a CUDA GPU, or thread by thread in Numba's simulator (NUMBA_ENABLE_CUDASIM=1); never on one for the other."""

import importlib
import importlib.util
from functools import cache
from typing import Any

import numpy as np
from numba import config

try:
    cuda: Any = importlib.import_module("numba.cuda")  # whose type stubs know nothing of kernels
except ImportError:  # a Numba that has left CUDA to numba-cuda, which is not there: `check_device` says so, and the ops keep their names
    cuda = None

SIMULATED = bool(config.ENABLE_CUDASIM)
THREADS = 64  # of a block, on either: 32 such blocks fill a multiprocessor, and ten are what the simulator bears
BLOCKS = 10 if SIMULATED else 1 << 16  # at most; every kernel strides over what is left
BEARABLE = 1024  # blocks whose threads wait for each other, at 50 ms each
INSTALL = "install it with: python3 -m pip install 'leadline[gpu]'"
ELSE = "or use kernels.cpu; NUMBA_ENABLE_CUDASIM=1 runs these kernels in Numba's simulator"

kernel: Any = cuda.jit if cuda else lambda fn: fn
device_function: Any = cuda.jit(device=True) if cuda else lambda fn: fn


@cache
def why_not() -> str | None:
    """Why no kernel can be launched, and what to install or use instead; None if one can."""
    if cuda is None or importlib.util.find_spec("numba_cuda") is None:
        return f"numba-cuda is not installed; {INSTALL}, or use kernels.cpu"
    if SIMULATED:
        return None
    if importlib.util.find_spec("cupy") is None:
        return f"CuPy is not installed; {INSTALL}, {ELSE}"
    import cupy

    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        if "InsufficientDriver" in str(error):  # what the runtime says where there is none at all, too
            return f"there is no NVIDIA driver, or it is older than CuPy's CUDA; install a newer one, {ELSE}"
        return f"there is no CUDA GPU ({error}); {ELSE.removeprefix('or ')}"
    return None if count else f"there is no CUDA GPU; {ELSE.removeprefix('or ')}"


def check_device() -> None:
    """ValueError, in one line, unless kernels can be launched."""
    if why := why_not():
        raise ValueError(f"kernels.gpu: {why}")


def heading() -> str:
    """What the kernels run on, for the head of a report."""
    check_device()
    if SIMULATED:
        return f"kernels.gpu in the simulator of numba-cuda {_version('numba-cuda')}: no GPU takes part, arithmetic and indices only"
    import cupy

    about, driver = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id), cupy.cuda.runtime.driverGetVersion()
    chip = f"{about['name'].decode()}, sm_{about['major']}{about['minor']}, {about['totalGlobalMem'] / 2**30:.0f} GiB"
    versions = f"CuPy {cupy.__version__}, numba-cuda {_version('numba-cuda')}"
    return f"kernels.gpu on {chip}, driver for CUDA {driver // 1000}.{driver % 1000 // 10}, {versions}"


def _version(package: str) -> str:
    return importlib.import_module("importlib.metadata").version(package)


def arrays() -> Any:
    """The module of the kernels' arrays: cupy, or in the simulator numpy."""
    return np if SIMULATED else importlib.import_module("cupy")


def each(kernel: Any, n: int, *args: Any) -> None:
    """Launches a kernel with a thread for each of n elements."""
    _launch(kernel, -(-n // THREADS), args)


def block_each(kernel: Any, n: int, *args: Any) -> None:
    """Launches a kernel with a block for each of n rows or tiles."""
    if SIMULATED and n > BEARABLE:
        raise NotImplementedError(f"{n:,} blocks with barriers take the simulator minutes; this needs a GPU")
    _launch(kernel, n, args)


def _launch(kernel: Any, blocks: int, args: tuple[Any, ...]) -> None:
    if not blocks:
        return
    try:
        kernel[(min(blocks, BLOCKS), THREADS, *_stream())](*args)
    except Exception as error:  # of whatever kind: the driver's, Numba's, or the simulator's, which raises what the kernel does
        raise RuntimeError(f"{kernel.py_func.__module__}.{kernel.py_func.__name__}: {error}") from error


def _stream() -> tuple[Any, ...]:
    """CuPy's current stream, so that its own work and the kernels' keep their order."""
    if SIMULATED:
        return ()
    pointer = arrays().cuda.get_current_stream().ptr
    return (cuda.external_stream(pointer),) if pointer else ()
