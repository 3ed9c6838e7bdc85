"""What the GPU benchmarks are made of: DeepSeek-V3's sizes, arrays on the device, their torch tensors, peers in torch's words."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import numpy as np

from ..kernels.gpu.cuda.launch import runner
from ..ref.cast import encode
from ..ref.formats import FORMATS, Format
from .bench_gpu import Peer, Timed
from .draw import Source

ROWS = 256  # that are done again, alone


@dataclass(frozen=True)
class Sizes:
    """DeepSeek-V3's, with V2's router."""

    elements: int = 1 << 26  # of a cast
    tokens: int = 8192
    hidden: int = 7168
    routed: int = 65536  # tokens that a router sees
    experts: int = 256
    v2_experts: int = 160
    slots: int = 32768  # rows of SwiGLU
    width: int = 2048  # of an expert
    heads: int = 128
    latent: int = 512
    nope: int = 128  # and the width of a value
    rope: int = 64
    products: tuple[tuple[int, int, int], ...] = (  # n, d, o of y[n,o] = Σ_d a b
        (4096, 7168, 4096),  # gate and up
        (4096, 7168, 1536),  # q_a
        (4096, 1536, 24576),  # q_b
        (4096, 512, 32768),  # kv_b
        (4096, 16384, 7168),  # o
        (4096, 2048, 7168),  # down
    )
    grouped: tuple[int, int, int, int] = (8, 4096, 7168, 4096)  # experts, rows of each, d, o
    batch: int = 128
    cached: tuple[int, ...] = (4096, 32768)  # tokens of a sequence in decoding
    parts: int = 8  # that attention.merge merges
    prefill: tuple[int, ...] = (4096, 16384)


@cache
def _normals() -> np.ndarray:
    return Source("leadline/1 bench gpu").normal((1 << 18,)).astype(np.float32)


def drawn(key: int) -> np.ndarray:
    """Normals; another key, others"""
    return np.roll(_normals(), 7919 * key)


def spread(block: np.ndarray, shape: tuple[int, ...]) -> Any:
    """The block over and over, on the device: what is timed does not depend on the values' being new, but zeros would be faster."""
    x, size = runner().empty(shape, block.dtype), prod(shape)
    flat, there = x.reshape(-1), min(block.size, size)
    flat[:there] = runner().array(block.reshape(-1)[:there])
    while there < size:
        more = min(there, size - there)
        flat[there : there + more] = flat[:more]
        there += more
    return x


def numbers(shape: tuple[int, ...], key: int = 0, kind: str = "float32") -> Any:
    """Normals, of kind float32, or bfloat16 as bits in uint16"""
    block = drawn(key)
    return spread(block if kind == "float32" else (block.view(np.uint32) >> 16).astype(np.uint16), shape)


def coded(shape: tuple[int, ...], key: int = 0, fmt: Format = FORMATS["e4m3fn"]) -> Any:
    """Codes of normals of standard deviation 64, or of their magnitudes"""
    x = drawn(key) * np.float32(64)
    return spread(encode(fmt, x if fmt.signed else abs(x), overflow="saturate"), shape)


def scales(shape: tuple[int, ...], key: int = 0) -> Any:
    return spread(np.exp2(Source(f"leadline/1 bench gpu scales {key}").uniform((1 << 12,), -9, -5)).astype(np.float32), shape)


def tensor(x: Any, dtype: str = "") -> Any:
    """A torch tensor of the same memory, its bits read as dtype"""
    import torch

    t = torch.from_dlpack(x.view(f"int{8 * x.dtype.itemsize}") if x.dtype.kind == "u" and x.dtype.itemsize > 1 else x)
    return t.view(getattr(torch, dtype)) if dtype else t


def of_kind(x: Any, kind: str) -> Any:
    return tensor(x, "bfloat16" if kind == "bfloat16" else "")


Words = Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]


def peers_of(name: str, words: Words, triton: bool = True) -> list[Peer]:
    """A function in torch's words and its tensors: as it stands, and as the Triton kernels that torch.compile makes of it"""

    def eager() -> Timed:
        f, args = words()
        return lambda: f(*args)

    def compiled() -> Timed:
        import torch

        f, args = words()
        kernel = torch.compile(f, dynamic=False)
        return lambda: kernel(*args)

    return [Peer(name, eager)] + [Peer(f"{name}, torch.compile (Triton)", compiled, ("torch", "triton"))] * triton


def gradients(f: Callable[..., Any], args: Callable[[], tuple[Any, ...]], dy: Callable[[], Any]) -> Peer:
    """torch's own backward of f with respect to all args; its forward was done before"""

    def make() -> Timed:
        import torch

        leaves, g = tuple(x.detach().requires_grad_() for x in args()), dy()
        y = f(*leaves)
        return lambda: torch.autograd.grad(y, leaves, g, retain_graph=True)

    return Peer("torch autograd", make)


def alone(kernel: Callable[..., Any], cut: tuple[Any, ...], *rest: Any, rows: int = ROWS, outputs: int | None = None) -> Any:
    """The last rows of what the kernel makes of all, and what it makes of the last rows alone"""
    results = kernel(*cut, *rest), kernel(*(x[-rows:] for x in cut), *rest)
    whole, part = (y if isinstance(y, tuple) else (y,) for y in results)
    return [(w[-len(p) :], p) for w, p in zip(whole, part, strict=True)][:outputs]
