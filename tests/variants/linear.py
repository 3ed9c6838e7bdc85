"""The linear layer: other orders of summation and other tiles. All accumulate in their input's dtype, or in float64."""

import itertools
from collections.abc import Callable

import numpy as np

from .floats import Array, to_tf32
from .norm import folded, sequential, warp


def product(a: Array, b: Array) -> Array:
    """a[n,d] b[o,d]ᵀ as BLAS has it"""
    return a @ b.T


def product_sequential(a: Array, b: Array) -> Array:
    """Channel after channel."""
    return sequential(a[:, None, :] * b[None, :, :])


def product_steps(a: Array, b: Array) -> Array:
    """16 channels at a time onto an accumulator, the last step first."""
    total = np.zeros((len(a), len(b)), a.dtype)
    for stop in range(a.shape[1], 0, -16):
        step = slice(max(stop - 16, 0), stop)
        total = total + a[:, step] @ b[:, step].T
    return total


def product_split(a: Array, b: Array) -> Array:
    """Split-K: three partial products, added last."""
    bounds = np.linspace(0, a.shape[1], 4).astype(int)
    parts = [a[:, i:j] @ b[:, i:j].T for i, j in itertools.pairwise(bounds)]
    return parts[0] + (parts[1] + parts[2])


def product_warp(a: Array, b: Array) -> Array:
    """A warp to each output: 32 lanes and a butterfly."""
    return warp(a[:, None, :] * b[None, :, :])


def product_folded(a: Array, b: Array) -> Array:
    return folded(a[:, None, :] * b[None, :, :])


def product_double(a: Array, b: Array) -> Array:
    return (a.astype(np.float64) @ b.T.astype(np.float64)).astype(a.dtype)


def product_outer(a: Array, b: Array) -> Array:
    """A sum of outer products, even channels first."""
    total = np.zeros((len(a), len(b)), a.dtype)
    for j in (*range(0, a.shape[1], 2), *range(1, a.shape[1], 2)):
        total += np.multiply.outer(a[:, j], b[:, j])
    return total


def product_tf32(a: Array, b: Array) -> Array:
    """Operands as TF32, whose products float32 holds; 8 channels at a time onto a float32 accumulator."""
    a, b, total = to_tf32(a), to_tf32(b), np.zeros((len(a), len(b)), np.float32)
    for start in range(0, a.shape[1], 8):
        total = total + a[:, start : start + 8] @ b[:, start : start + 8].T
    return total


PRODUCTS = {
    "blas": product,
    "sequential": product_sequential,
    "steps": product_steps,
    "split-k": product_split,
    "warp": product_warp,
    "folded": product_folded,
    "double": product_double,
    "outer": product_outer,
}


def _forward(name: str, product: Callable) -> Callable:
    def forward(x: Array, weight: Array) -> Array:
        return product(x, weight)

    forward.__name__ = name
    return forward


def _backward(name: str, product: Callable) -> Callable:
    def backward(x: Array, weight: Array, dy: Array) -> tuple[Array, Array]:
        return product(dy, weight.T), product(dy.T, x.T)

    backward.__name__ = name
    return backward


FORWARD = tuple(_forward(*named) for named in PRODUCTS.items())
BACKWARD = tuple(_backward(*named) for named in PRODUCTS.items())
TF32, TF32_BACK = _forward("tf32", product_tf32), _backward("tf32", product_tf32)
