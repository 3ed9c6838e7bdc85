"""The linear layer, forward and backward: one BLAS product each."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _pool
from ._declared import declared


def product(a: NDArray[Any], b: NDArray[Any], out: NDArray[Any] | None = None) -> NDArray[Any]:
    """a b of two matrices into `out`, or into memory that was used before"""
    return np.matmul(a, b, out=_pool.empty((a.shape[0], b.shape[1]), a.dtype) if out is None else out)


def transposed(weight: NDArray[Any], x: NDArray[Any]) -> NDArray[Any]:
    """yᵀ[o,n] = Σ_d weight[o,d] x[n,d]: with few tokens BLAS is faster so than in the other order, for it shares out the longer side"""
    return product(weight, x.T)


def linear(x: NDArray[Any], weight: NDArray[Any]) -> NDArray[Any]:
    """y[n,o] = sum_d x[n,d] weight[o,d].

    x[n,d] and weight[o,d] are float32 or float64 alike, and so is y; sums in that dtype. ValueError: dtypes or shapes do not fit.
    """
    arrays, _, _ = declared("linear", "forward", {"x": x, "weight": weight}, {})
    return product(arrays["x"], arrays["weight"].T)


def linear_bwd(x: NDArray[Any], weight: NDArray[Any], dy: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """dx[n,d] = sum_o dy[n,o] weight[o,d],   dweight[o,d] = sum_n dy[n,o] x[n,d]. Errors as linear."""
    arrays, _, _ = declared("linear", "backward", {"x": x, "weight": weight, "dy": dy}, {})
    x, weight, dy = (arrays[name] for name in ("x", "weight", "dy"))
    return product(dy, weight), product(dy.T, x)
