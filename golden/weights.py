"""FP8 weights of a checkpoint: NAME of dtype F8_E4M3 [o,d] beside NAME_scale_inv [ceil(o/128), ceil(d/128)], which multiplies."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .safetensor_file import Reader, Writer
from .subject import load

BLOCK = 128
SUFFIX = "_scale_inv"
DTYPES = {"bf16": "BF16", "fp32": "F32"}
CARRIER = {"bf16": np.uint16, "fp32": np.float32}
CHUNK = 1 << 19  # elements of a weight on their way from one thread to the other: the cache holds a few
AHEAD = 2  # chunks that may wait to be written
STEP = 1 << 26  # bytes between two calls of progress within a tensor

Progress = Callable[[int, int, str], Any]
Array = NDArray[Any]


class Multiplying(np.ndarray):
    """An FP8 weight with a product of its own, which ref's linear asks for by __linear__."""

    product: Callable[[Array], Array] | None = None  # of a part of it there is none

    def __linear__(self, x: Array) -> Array:
        if self.product is None:
            raise TypeError("a part of an FP8 weight has no product of its own")
        return self.product(x)


@dataclass(frozen=True)
class Summary:
    """What dequantize_file did."""

    dequantized: int
    passed: int
    bytes_read: int
    bytes_written: int


def grid(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the scales of a weight."""
    return tuple(-(-n // BLOCK) for n in shape)


def pairs(file: Reader) -> list[str]:
    """The names of the FP8 weights, after checks of dtypes, shapes and that each weight has scales and all scales have a weight."""
    found = []
    for name in file.entries:
        if name.endswith(SUFFIX) and name.removesuffix(SUFFIX) not in file:
            file.refuse("scales nothing", f"{name.removesuffix(SUFFIX)!r} in the same file", name)
        if name + SUFFIX in file or file.entry(name).dtype == "F8_E4M3":
            _check_pair(file, name)
            found.append(name)
    return found


def _check_pair(file: Reader, name: str) -> None:
    codes = file.entry(name)
    if codes.dtype != "F8_E4M3":
        file.refuse(f"has dtype {codes.dtype}", f"F8_E4M3, as there is {name + SUFFIX!r}", name)
    if len(codes.shape) != 2:
        file.refuse(f"has shape {list(codes.shape)}", "two dimensions, as an FP8 weight has", name)
    if name + SUFFIX not in file:
        file.refuse(f"has no {name + SUFFIX!r}", "scales in the same file as the FP8 weight (in the next shard?)", name)
    scale = file.entry(name + SUFFIX)
    if scale.dtype not in ("F32", "F8_E8M0"):
        file.refuse(f"has dtype {scale.dtype}", "F32 or F8_E8M0", name + SUFFIX)
    if scale.shape != grid(codes.shape):
        wanted = f"{list(grid(codes.shape))}, a scale for each {BLOCK} x {BLOCK} block of {name!r} {list(codes.shape)}"
        file.refuse(f"has shape {list(scale.shape)}", wanted, name + SUFFIX)


def scales_of(where: Any, name: str, scale: NDArray[Any]) -> NDArray[np.float32]:
    """Scales as float32: themselves, or 2^(code - 127) of E8M0 codes (255 is NaN); ValueError names the first that is no scale."""
    if scale.dtype == np.uint8:
        powers = np.ldexp(np.float32(1), np.minimum(scale, 254).astype(np.int32) - 127)
        values = np.where(scale == 255, np.float32(np.nan), powers)
    else:
        values = np.require(scale, np.float32, ["C", "A"])
    bad = ~((values > 0) & np.isfinite(values))
    if bad.any():
        first = tuple(map(int, np.argwhere(bad)[0]))
        raise ValueError(f"{where}: {name!r} is {values[first]} at {list(first)}; expected finite scales above zero")
    return values


def read_weight(file: Reader, name: str) -> NDArray[np.float32]:
    """A weight as float32 values: w[i,j] = decode(codes[i,j]) * scale[i // 128, j // 128] if it is FP8; else F32, BF16 or F16 as it is.

    ValueError names what is wrong with the weight or its scales, or says that the dtype is none of these.
    """
    entry = file.entry(name)
    if entry.dtype == "F8_E4M3" or name + SUFFIX in file:
        _check_pair(file, name)
        scale = scales_of(file.path, name + SUFFIX, file.array(name + SUFFIX))
        return _kernels().dequantize_weight(file.array(name), scale, block=BLOCK)
    if entry.dtype == "BF16":
        return (file.array(name).astype(np.uint32) << np.uint32(16)).view(np.float32)
    if entry.dtype not in ("F32", "F16"):
        file.refuse(f"has dtype {entry.dtype}", "F8_E4M3, BF16, F16 or F32", name)
    return file.array(name).astype(np.float32)


def pair_entries(name: str, shape: tuple[int, int], scale_dtype: str = "F32") -> list[tuple[str, str, tuple[int, ...]]]:
    """What a Writer must be told of an FP8 weight and its scales."""
    return [(name, "F8_E4M3", shape), (name + SUFFIX, scale_dtype, grid(shape))]


def write_pair(file: Writer, name: str, codes: NDArray[np.uint8], scale: NDArray[Any]) -> None:
    """Writes an FP8 weight and its scales (float32 values, or uint8 codes of E8M0); ValueError if they are no pair."""
    scales_of(file.path, name + SUFFIX, scale)
    file.write(name, codes)
    file.write(name + SUFFIX, scale)


def dequantize_file(
    source: str | os.PathLike[str], target: str | os.PathLike[str], *, dtype: str = "bf16", progress: Progress | None = None
) -> Summary:
    """Writes `target`: the FP8 weights of `source` as dtype "bf16" (float32 products, rounded to nearest, ties to even) or "fp32", no
    scales, all else byte for byte.

    Both files are streamed. progress(bytes of the target written, of how many, tensor) is called now and then. `target` appears whole
    when all is done; an exception (one that progress raises, too) leaves what was there before. ValueError: `source` is damaged, a
    weight or its scales do not fit or hold a scale that is none, both are the same file.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dequantize: dtype is {dtype!r}; expected {' or '.join(DTYPES)}")
    with suppress(FileNotFoundError):
        if os.path.samefile(source, target):
            raise ValueError(f"{target}: is the file to be read; expected another")
    with Reader(source) as file:
        scales = {name: scales_of(file.path, name + SUFFIX, file.array(name + SUFFIX)) for name in pairs(file)}
        names = [name for name in file.entries if not name.endswith(SUFFIX)]
        tensors = [(n, DTYPES[dtype] if n in scales else file.entry(n).dtype, file.entry(n).shape) for n in names]
        widest = max((file.entry(n).shape[1] for n in scales), default=0)
        space = np.empty((AHEAD + 1, max(widest, CHUNK)), CARRIER[dtype])
        with Writer(target, tensors, file.metadata) as out, ThreadPoolExecutor(1) as helper:
            total = sum(e.end - e.start for e in out.entries.values())
            done = told = 0
            for name in names:
                if progress:
                    progress(done, total, name)
                if name in scales:
                    parts = _dequantized(file.array(name), scales[name], dtype, space, helper)
                else:
                    parts = pieces(file.raw(name))
                for written in out.stream(name, parts):
                    done += written
                    if progress and done - told >= STEP:
                        progress(done, total, name)
                        told = done
                file.release(name)
            if progress:
                progress(done, total, "")
        return Summary(len(scales), len(names) - len(scales), file.size, out.size)


def pieces(data: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    """Views of STEP bytes, one after the other."""
    return (data[i : i + STEP] for i in range(0, len(data), STEP))


def _dequantized(codes: Any, scale: Any, dtype: str, space: NDArray[Any], helper: ThreadPoolExecutor) -> Iterator[NDArray[Any]]:
    """The weight by chunks of rows. `helper` makes the next ones while the caller writes; a chunk is overwritten after AHEAD others."""
    kernels = _kernels()
    o, d = codes.shape
    rows = max(1, CHUNK // max(1, d))
    scale.flags.writeable = False  # Numba compiles for read-only arrays, as the codes are

    def make(k: int) -> NDArray[Any]:
        lo = k * rows
        hi = min(lo + rows, o)
        chunk = space[k % len(space), : (hi - lo) * d].reshape(hi - lo, d)
        kernels.ROWS[dtype](lo, hi, codes, scale, chunk, lo, BLOCK, kernels.E4M3FN)
        return chunk

    count = -(-o // rows)
    if count == 1:  # not worth waking the helper
        yield make(0)
        return
    waiting = [helper.submit(make, k) for k in range(min(AHEAD, count))]
    for k in range(count):
        chunk = waiting.pop(0).result()
        if k + AHEAD < count:
            waiting.append(helper.submit(make, k + AHEAD))
        yield chunk


def _kernels() -> Any:
    return load("leadline.kernels.cpu._weights").source
