"""The .cu files of kernels/gpu/cuda compiled with g++ and run on the CPU, fibers for threads: a Runner for kernels.gpu.cuda.launch."""

import ctypes
import hashlib
import re
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from leadline.kernels.gpu.cuda.compile import HERE as KERNELS
from leadline.kernels.gpu.cuda.compile import Defines
from leadline.kernels.gpu.cuda.launch import Launch

HERE = Path(__file__).parent
FLAGS = ("-std=c++20", "-O2", "-fPIC", "-shared", "-ffp-contract=off", "-fno-strict-aliasing", "-w", "-DLEADLINE_HOST")
GUARD = 256  # bytes before and after each array that no kernel may write
BUILT = Path(tempfile.gettempdir()) / "leadline-cuda-shim"


def missing() -> str | None:
    """Why kernels cannot run here, or None."""
    return None if shutil.which("g++") else "g++ is not installed"


@lru_cache
def library(file: str, defines: Defines, kernels_at: Path = KERNELS) -> ctypes.CDLL:
    """The kernels of file.cu, each as leadline_<kernel>(grid, block, shared, seed, args)."""
    text = (kernels_at / f"{file}.cu").read_text()
    kernels = re.findall(r'extern "C" __global__ void(?: __launch_bounds__\([^\n]*\))?\s+(\w+)\(', text)
    calls = "".join(
        f'extern "C" const char* leadline_{k}(const unsigned* g, const unsigned* b, size_t shared, unsigned seed, void** args) '
        f"{{ return host::call({k}, g, b, shared, seed, args); }}\n"
        for k in kernels
    )
    source = f'#include "mma_host.h"\n#include "{file}.cu"\n{calls}'
    flags = (*FLAGS, *(f"-D{k}={v}" for k, v in defines), f"-I{HERE}", f"-I{kernels_at}")
    texts = [p.read_bytes() for p in sorted([*HERE.glob("*.h"), *kernels_at.glob("*.cuh")])]
    key = hashlib.sha256(b"".join([*texts, text.encode(), " ".join(flags).encode(), source.encode()])).hexdigest()[:24]
    BUILT.mkdir(exist_ok=True)
    path = BUILT / f"{file}-{key}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory() as directory:
            cpp, out = Path(directory) / "kernel.cpp", Path(directory) / "kernel.so"
            cpp.write_text(source)
            done = subprocess.run(["g++", *flags, str(cpp), "-o", str(out)], capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{file}.cu does not compile on the CPU: {done.stderr[:3000]}")
            shutil.copy(out, f"{path}.{id(directory)}")
            Path(f"{path}.{id(directory)}").rename(path)  # other workers find all of it or nothing
    return ctypes.CDLL(str(path))


class Host:
    """Runs launches on NumPy arrays. `seed` orders threads, blocks and asynchronous copies; see host.h."""

    def __init__(self, capability: int = 90, seed: int = 0, multiprocessors: int = 2, kernels: Path = KERNELS) -> None:
        self.capability, self.seed, self.multiprocessors, self.kernels = capability, seed, multiprocessors, kernels
        self.launched: list[Launch] = []
        self.guarded: dict[int, np.ndarray] = {}

    def _new(self, shape: tuple[int, ...], dtype: Any, fill: int) -> np.ndarray:
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        raw = np.full(size + 2 * GUARD + 16, 0xA5, np.uint8)
        start = GUARD + (-(raw.ctypes.data + GUARD)) % 16
        raw[start : start + size] = fill
        x = raw[start : start + size].view(dtype).reshape(shape)
        self.guarded[x.ctypes.data] = raw
        return x

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        return self._new(shape, dtype, 0x7F)  # whatever was there before

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        return self._new(shape, dtype, 0)

    def array(self, x: Any) -> np.ndarray:
        x = np.ascontiguousarray(x)
        if x.ctypes.data in self.guarded:
            return x
        copy = self._new(x.shape, x.dtype, 0)
        copy[...] = x
        return copy

    def launch(self, what: Launch) -> None:
        assert self.capability >= what.least, f"{what.kernel} needs capability {what.least}"
        self.launched.append(what)
        function = getattr(library(what.file, what.defines, self.kernels), f"leadline_{what.kernel}")
        function.restype = ctypes.c_char_p
        held = [np.array([a.ctypes.data if a.size else 0], np.uint64) if isinstance(a, np.ndarray) else _scalar(a) for a in what.args]
        args = (ctypes.c_void_p * len(held))(*(h.ctypes.data for h in held))
        grid = (ctypes.c_uint * 3)(*(*what.grid, 1, 1)[:3])
        block = (ctypes.c_uint * 3)(what.block, 1, 1)
        wrong = function(grid, block, ctypes.c_size_t(what.shared), ctypes.c_uint(self.seed), args)
        if wrong:
            raise RuntimeError(f"{what.kernel}: {wrong.decode()}")
        for a in what.args:
            if isinstance(a, np.ndarray) and a.ctypes.data in self.guarded:
                raw = self.guarded[a.ctypes.data]
                start = a.ctypes.data - raw.ctypes.data
                beyond = (raw[:start] != 0xA5).any() or (raw[start + a.nbytes :] != 0xA5).any()
                assert not beyond, f"{what.kernel} wrote beyond an array"


def _scalar(x: Any) -> np.ndarray:
    if x is None:
        return np.zeros(1, np.uint64)
    assert isinstance(x, np.generic), f"kernel arguments are NumPy scalars or arrays, not {type(x).__name__}"
    return np.array([x])
