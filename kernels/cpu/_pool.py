"""Memory for large gradients, used again once nobody holds them: a training step writes gigabytes whose first touch costs as much as sums.

A first write to new memory takes the system three to fourteen times as long as a write to memory that was written before. A block that is
let go of stays ours, marked as free: the system takes its pages when it needs them, and then the next use touches new ones again.
"""

import ctypes
import mmap
import threading
import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEAST = 1 << 24  # bytes; smaller ones are the allocator's
LAZY = getattr(mmap, "MADV_FREE", None)

_free: dict[int, list[mmap.mmap]] = {}
_live = _most = _kept = 0  # bytes in use, the most there were at once, bytes kept free
_lock = threading.RLock()  # a collection may end arrays at any point, in the thread that holds it


def empty(shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """np.empty, of a size that may have been used and let go of before. Its views hold it, as of any array."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    if size < LEAST or LAZY is None:
        return np.empty(shape, dtype)
    block = _take(size)
    owner = (ctypes.c_ubyte * size).from_buffer(block)
    weakref.finalize(owner, _give_back, block, size).atexit = False
    return np.frombuffer(memoryview(owner), dtype).reshape(shape)


def _take(size: int) -> mmap.mmap:
    global _live, _most, _kept
    with _lock:
        waiting = _free.get(size)
        block = waiting.pop() if waiting else None
        _kept -= size if block is not None else 0
        _live += size
        _most = max(_most, _live)
    if block is None:
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


def _give_back(block: mmap.mmap, size: int) -> None:
    """Kept while all that is held, free or not, is no more than was in use at once."""
    global _live, _kept
    with _lock:
        _live -= size
        if _live + _kept + size > _most:
            return  # the map goes with its last name
        _kept += size
        block.madvise(LAZY)  # type: ignore[arg-type]
        _free.setdefault(size, []).append(block)


def clear() -> None:
    """Lets go of all that is kept."""
    global _kept, _most
    with _lock:
        _free.clear()
        _kept, _most = 0, _live
