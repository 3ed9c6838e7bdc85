"""What every CPU kernel shares: the thread driver, bit casts for Numba code, and the checks of arguments."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numba import config, types
from numba.extending import intrinsic
from numpy.typing import NDArray

# Kernels are serial functions kernel(lo, hi, *args) that release the GIL; `run` spreads [0, n) over threads. Numba's own
# parallel=True takes several times as long to compile, and its default pool forbids two concurrent callers.
THREADS = config.NUMBA_NUM_THREADS
# Elements that a thread takes at a time: enough to be worth waking one, and few enough that a busy core does not hold up the rest.
SMALLEST, CHUNK = 1 << 17, 1 << 20

_pool: ThreadPoolExecutor | None = None


def _forget_pool() -> None:
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)  # a forked child inherits the object but not its threads


def run(kernel: Callable[..., Any], n: int, width: int, *args: Any, largest: int = CHUNK) -> list[Any]:
    """[kernel(lo, hi, *args) for consecutive ranges that cover [0, n)]; an index stands for `width` elements of work.

    The ranges depend on n, width and largest only, never on the number of threads, so neither does any result.
    """
    global _pool
    chunk = min(max(n * width // 8, SMALLEST), largest)
    step = max(1, chunk // max(1, width))
    ranges = [(lo, min(lo + step, n)) for lo in range(0, n, step)]
    results: list[Any] = [None] * len(ranges)
    todo = iter(enumerate(ranges))  # next() on it is atomic: each range goes to exactly one thread

    def work() -> None:
        for i, (lo, hi) in todo:
            results[i] = kernel(lo, hi, *args)

    helpers = []
    if THREADS > 1 and len(ranges) > 1:
        _pool = _pool or ThreadPoolExecutor(THREADS - 1, thread_name_prefix="leadline")
        helpers = [_pool.submit(work) for _ in range(min(THREADS, len(ranges)) - 1)]
    try:
        work()
    finally:
        for helper in helpers:
            if not helper.cancel():  # one that has not started has nothing left to do
                helper.result()
    return results


_SAME_WIDTH = {types.float32: types.uint32, types.float64: types.uint64, types.uint32: types.float32, types.uint64: types.float64}


def _flip(typingctx, v):
    """The bits of a float as an unsigned integer, or the float that an unsigned integer's bits spell."""
    if v not in _SAME_WIDTH:
        return None
    return _SAME_WIDTH[v](v), lambda context, builder, sig, args: builder.bitcast(args[0], context.get_value_type(sig.return_type))


def _shr(typingctx, u, count):
    """u >> count in u's own type. (Numba's >> widens uint32 to 64 bits, which halves the vector width.)"""
    return u(u, u), lambda context, builder, sig, args: builder.lshr(args[0], args[1])


# Not decorated: a type checker would see the typing context as a parameter.
flip: Any = intrinsic(_flip)
shr: Any = intrinsic(_shr)


def need(ok: Any, op: str, name: str, value: Any, expected: str) -> None:
    """ValueError "op: name is value; expected ..." unless ok."""
    if not ok:
        raise ValueError(f"{op}: {name} is {value}; expected {expected}")


def describe(x: Any) -> str:
    """How a message speaks of an array."""
    return f"a {x.dtype} array of shape {x.shape}" if isinstance(x, np.ndarray) else f"of type {type(x).__name__}"


def array_of(op: str, name: str, x: Any, dtypes: tuple[type, ...], ndim: int | None = None, as_it_lies: bool = False) -> NDArray[Any]:
    """x as an aligned C-contiguous view (a copy where it has to be; never if as_it_lies), after checks of type, dtype and ndim.

    Always read-only: Numba compiles read-only and writable arrays separately, and one is enough.
    """
    dims = "" if ndim is None else f" of {ndim} dimension{'s' * (ndim > 1)}"
    ok = isinstance(x, np.ndarray) and any(x.dtype == t for t in dtypes) and ndim in (None, x.ndim)
    need(ok, op, name, describe(x), f"a NumPy array of {' or '.join(t.__name__ for t in dtypes)}{dims}")
    view = x.view() if as_it_lies else np.require(np.asarray(x), requirements=["C", "A"]).view()
    view.flags.writeable = False
    return view


def floats(op: str, name: str, x: Any, ndim: int | None = None, as_it_lies: bool = False) -> NDArray[Any]:
    """`array_of` for a carrier: float32 or float64."""
    return array_of(op, name, x, (np.float32, np.float64), ndim, as_it_lies)


def output(op: str, name: str, out: NDArray[Any] | None, shape: tuple[int, ...], dtype: Any, *inputs: NDArray[Any]) -> NDArray[Any]:
    """A new array, or the caller's `out` if it fits."""
    if out is None:
        return np.empty(shape, dtype)
    ok = isinstance(out, np.ndarray) and out.shape == shape and out.dtype == dtype and out.flags.carray
    need(ok, op, name, describe(out), f"a writable C-contiguous {np.dtype(dtype)} array of shape {shape}")
    for x in inputs:
        need(not np.may_share_memory(out, x), op, name, "an array that overlaps an input", "memory of its own")
    return out


def choice(op: str, name: str, value: Any, allowed: Any) -> None:
    """ValueError unless value is one of `allowed`."""
    need(isinstance(value, str) and value in allowed, op, name, repr(value), "one of " + ", ".join(map(repr, allowed)))


def integer(op: str, name: str, value: Any, low: int = 1) -> int:
    """value as an int; ValueError unless it is an integer >= low."""
    ok = isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.bool_)) and value >= low
    need(ok, op, name, repr(value), f"an integer >= {low}")
    return int(value)
