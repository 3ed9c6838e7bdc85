"""How a kernel is started: checks that need no device, the launch itself, and every error by the kernel's name."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, Protocol

import numpy as np

from .compile import MISSING, CompileError, Defines, compiled


class GPUError(RuntimeError):
    """One line: what is missing or what failed, and what to install or use instead."""


class Launch(NamedTuple):
    """One kernel, its compile-time constants, grid, block, dynamic shared memory in bytes, and arguments (arrays and NumPy scalars)."""

    file: str
    kernel: str
    defines: Defines
    grid: tuple[int, ...]
    block: int
    args: tuple[Any, ...]
    shared: int = 0
    least: int = 80  # compute capability that it needs


class Runner(Protocol):
    """Where kernels run: CuPy's current device; in tests, the CPU."""

    capability: int  # 80, 90, 100
    multiprocessors: int

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any: ...
    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Any: ...
    def array(self, x: Any) -> Any: ...
    def launch(self, what: Launch) -> None: ...


class Cupy:
    """The current CUDA device, through CuPy."""

    def __init__(self) -> None:
        cupy = _cupy()
        device = cupy.cuda.Device()
        self.xp = cupy
        self.capability = int(device.compute_capability)
        self.multiprocessors = int(device.attributes["MultiProcessorCount"])

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return self.xp.empty(shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return self.xp.zeros(shape, dtype)

    def array(self, x: Any) -> Any:
        return self.xp.ascontiguousarray(self.xp.asarray(x))

    def launch(self, what: Launch) -> None:
        if self.capability < what.least:
            raise GPUError(f"{what.kernel} needs compute capability {what.least / 10}; this device has {self.capability / 10}")
        try:
            function = _function(what.file, what.defines, architecture(self.capability), what.kernel, int(self.xp.cuda.Device().id))
            if what.shared > 48 << 10:
                function.max_dynamic_shared_size_bytes = what.shared
            grid = (*what.grid, 1, 1)[:3]
            args = tuple(np.uint64(0) if a is None else a for a in what.args)  # a null pointer
            function(grid, (what.block,), args, shared_mem=what.shared)
        except (CompileError, GPUError) as error:
            raise GPUError(f"{what.kernel}: {_first_line(error)}") from error
        except (self.xp.cuda.driver.CUDADriverError, self.xp.cuda.runtime.CUDARuntimeError) as error:
            raise GPUError(
                f"{what.kernel}: grid {what.grid}, block {what.block}, {what.shared} bytes shared: {_first_line(error)}"
            ) from error


def architecture(capability: int) -> str:
    """The code that a device runs best: wgmma exists in sm_90a alone."""
    return "sm_90a" if capability == 90 else f"sm_{capability}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise GPUError(MISSING) from error
    try:
        if cupy.cuda.runtime.getDeviceCount():
            return cupy
        raise GPUError("no CUDA device; use a machine with an NVIDIA GPU, or kernels.cpu")
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise GPUError(f"no CUDA device ({_first_line(error)}); install NVIDIA's driver, or use kernels.cpu") from error


@lru_cache
def _function(file: str, defines: Defines, arch: str, kernel: str, device: int) -> Any:
    """The kernel, loaded into this device's context."""
    del device  # a module belongs to one
    path = _directory() / f"{file}-{abs(hash((defines, arch)))}.cubin"
    path.write_bytes(compiled(file, defines, arch).cubin)
    return _cupy().RawModule(path=str(path)).get_function(kernel)


_kept: list[TemporaryDirectory[str]] = []


@lru_cache
def _directory() -> Path:
    """Of machine code, until this process ends"""
    _kept.append(TemporaryDirectory())
    return Path(_kept[-1].name)


_runner: ContextVar[Runner | None] = ContextVar("runner", default=None)


@contextmanager
def using(runner: Runner) -> Iterator[Runner]:
    """Everything inside runs there."""
    token = _runner.set(runner)
    try:
        yield runner
    finally:
        _runner.reset(token)


def runner() -> Runner:
    """Where kernels run now: what `using` says, else CuPy's device. GPUError where there is none."""
    return _runner.get() or _on_device(int(_cupy().cuda.Device().id))


@lru_cache
def _on_device(device: int) -> Cupy:
    del device  # the current one
    return Cupy()


_checked = ContextVar("checked", default=True)


@contextmanager
def unchecked() -> Iterator[None]:
    """Inside, nothing is read back from the device to look at values (NaNs, scales, page tables): for callers that know them."""
    token = _checked.set(False)
    try:
        yield
    finally:
        _checked.reset(token)


def checked() -> bool:
    """Whether values are looked at"""
    return _checked.get()


class Unfit(ValueError):
    """Right, but not among the sizes, dtypes or attributes that a kernel was written for."""


def fits(ok: bool, kernel: str, what: str, given: object, expected: str) -> None:
    """`need`, for what another kernel could do."""
    if not ok:
        raise Unfit(f"{kernel}: {what} is {given}; expected {expected}")


def need(ok: bool, kernel: str, what: str, given: object, expected: str) -> None:
    """ValueError that names argument, value and expectation."""
    if not ok:
        raise ValueError(f"{kernel}: {what} is {given}; expected {expected}")


def taken(kernel: str, name: str, x: Any, dtypes: tuple[Any, ...], ndim: int) -> Any:
    """x where it runs, contiguous; ValueError unless its dtype and rank are right."""
    shape, dtype = getattr(x, "shape", None), getattr(x, "dtype", None)
    names = " or ".join(np.dtype(d).name for d in dtypes)
    need(shape is not None and dtype in [np.dtype(d) for d in dtypes], kernel, name, dtype or type(x).__name__, f"an array of {names}")
    need(len(shape or ()) == ndim, kernel, name, f"of shape {shape}", f"{ndim} dimensions")
    return runner().array(x)


def aligned(*arrays: Any, to: int = 16) -> bool:
    """Whether each array's first element lies at a multiple of `to` bytes."""
    return all(_address(x) % to == 0 for x in arrays)


def _address(x: Any) -> int:
    return int(x.data.ptr) if hasattr(x.data, "ptr") else int(x.ctypes.data)
