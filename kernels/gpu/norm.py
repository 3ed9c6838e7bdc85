"""RMSNorm, forward and backward. A block of threads takes a row, a thread every 64th element of it."""

import math
from typing import Any

from ...ref.norm import CastOrder
from ._call import empty, kernel_of, need
from ._device import THREADS, block_each, cuda, device_function, each, kernel

Array = Any


@device_function
def total(part):
    """The sum of what the threads of a block have put there: every thread adds all, so that every thread has it."""
    s = part[0]
    for k in range(1, THREADS):
        s += part[k]
    return s


@kernel
def _forward(x, weight, eps, y):
    part = cuda.shared.array(THREADS, x.dtype)
    F, (n, d) = x.dtype.type, x.shape
    for i in range(cuda.blockIdx.x, n, cuda.gridDim.x):
        own = F(0)
        for j in range(cuda.threadIdx.x, d, THREADS):
            own += x[i, j] * x[i, j]
        part[cuda.threadIdx.x] = own
        cuda.syncthreads()
        rstd = F(1) / F(math.sqrt(total(part) / F(d) + eps))
        for j in range(cuda.threadIdx.x, d, THREADS):
            y[i, j] = x[i, j] * rstd * weight[j]
        cuda.syncthreads()  # part is written again in the next round


@kernel
def _backward(x, weight, dy, eps, dx, rstds):
    """dx, and each row's rstd for dweight."""
    squares = cuda.shared.array(THREADS, x.dtype)
    products = cuda.shared.array(THREADS, x.dtype)
    F, (n, d) = x.dtype.type, x.shape
    for i in range(cuda.blockIdx.x, n, cuda.gridDim.x):
        square, product = F(0), F(0)
        for j in range(cuda.threadIdx.x, d, THREADS):
            square += x[i, j] * x[i, j]
            product += dy[i, j] * weight[j] * x[i, j]
        squares[cuda.threadIdx.x] = square
        products[cuda.threadIdx.x] = product
        cuda.syncthreads()
        rstd = F(1) / F(math.sqrt(total(squares) / F(d) + eps))
        mean = rstd * total(products) / F(d)  # of g xhat
        for j in range(cuda.threadIdx.x, d, THREADS):
            dx[i, j] = rstd * (dy[i, j] * weight[j] - x[i, j] * rstd * mean)
        if cuda.threadIdx.x == 0:
            rstds[i] = rstd
        cuda.syncthreads()


@kernel
def _backward_weight(x, dy, rstds, dweight):
    """A thread for each column: neighbouring threads read neighbouring elements of a row."""
    n, d = x.shape
    for j in range(cuda.grid(1), d, cuda.gridsize(1)):
        own = x.dtype.type(0)
        for i in range(n):
            own += dy[i, j] * (x[i, j] * rstds[i])
        dweight[j] = own


@kernel_of("rmsnorm")
def rmsnorm(x: Array, weight: Array, *, eps: float = 1e-6, cast_order: CastOrder = "weight_then_cast") -> Array:
    """y[n,d] = x[n,d] rstd[n] weight[d],   rstd[n] = (mean_d x[n,d]^2 + eps)^(-1/2).

    x, weight and y are float32 or float64 alike, and so are the sums. cast_order says where a bf16 implementation rounds; it changes
    nothing here. ValueError: dtypes or shapes do not fit, eps is negative or not finite, another cast_order.
    """
    need(eps >= 0, "rmsnorm", "eps", eps, "eps >= 0")
    y = empty(x.shape, x.dtype)
    block_each(_forward, x.shape[0], x, weight, x.dtype.type(eps), y)
    return y


@kernel_of("rmsnorm", "backward")
def rmsnorm_bwd(
    x: Array, weight: Array, dy: Array, *, eps: float = 1e-6, cast_order: CastOrder = "weight_then_cast"
) -> tuple[Array, Array]:
    """xhat = x rstd, g = dy weight:   dx[n,d] = rstd[n] (g - xhat mean_d(g xhat)),   dweight[d] = sum_n dy xhat. Errors as rmsnorm."""
    need(eps >= 0, "rmsnorm_bwd", "eps", eps, "eps >= 0")
    dx, dweight, rstds = empty(x.shape, x.dtype), empty(weight.shape, x.dtype), empty(x.shape[:1], x.dtype)
    block_each(_backward, x.shape[0], x, weight, dy, x.dtype.type(eps), dx, rstds)
    each(_backward_weight, x.shape[1], x, dy, rstds, dweight)
    return dx, dweight
