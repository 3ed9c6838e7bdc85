"""Launchers of accumulate.cu: one tensor-core instruction after another, for `leadline probe accumulator`."""

from collections.abc import Callable
from typing import Any

import numpy as np

from .launch import GPUError, Launch, need, runner, taken

STEP, SHARED = 32, (64 + 128) * 128


def _sums(kernel: str, rows: int, threads: int, shared: int, least: int, a_codes: Any, b_codes: Any, c: Any) -> Any:
    on = runner()
    a, b = taken(kernel, "a_codes", a_codes, (np.uint8,), 2), taken(kernel, "b_codes", b_codes, (np.uint8,), 2)
    c = taken(kernel, "c", c, (np.float32,), 1)
    m, k = a.shape
    need(b.shape == (m, k) and c.shape == (m,), kernel, "b_codes and c", f"of shapes {b.shape} and {c.shape}", f"{(m, k)} and {(m,)}")
    need(k > 0 and k % STEP == 0, kernel, "k", k, f"a multiple of {STEP}")
    d = on.empty((m,), np.float32)
    if m:
        args = a, b, c, d, np.int32(m), np.int32(k)
        on.launch(Launch("accumulate", kernel, (), (-(-m // rows),), threads, args, shared, least))
    return d.get() if hasattr(d, "get") else d


def mma(a_codes: Any, b_codes: Any, c: Any) -> Any:
    """d[m] = c[m] + Σ_k a[m,k] b[m,k] as mma.sync.m16n8k32 adds; compute capability 8.9 or later"""
    return _sums("accumulate_mma", 8, 32, 0, 89, a_codes, b_codes, c)


def wgmma(a_codes: Any, b_codes: Any, c: Any) -> Any:
    """The same as wgmma.m64n128k32 adds; Hopper alone"""
    return _sums("accumulate_wgmma", 64, 128, SHARED, 90, a_codes, b_codes, c)


def instructions() -> dict[str, Callable[[Any, Any, Any], Any]]:
    """The FP8 instructions of this device by name; GPUError where there is no device or it has none"""
    capability = runner().capability
    found = {"mma.sync": mma} if capability >= 89 else {}
    found |= {"wgmma": wgmma} if capability == 90 else {}
    if not found:
        raise GPUError(f"compute capability {capability / 10} has no FP8 tensor cores; use a device of 8.9 or later")
    return found
