"""RMSNorm forward and backward: other orders of summation, other roots, other algebra. All compute in their input's dtype."""

from collections.abc import Callable

import numpy as np

from .floats import Array, to_bf16

# Sums along the last axis, in the array's dtype.


def sequential(a: Array) -> Array:
    """In index order."""
    total = np.zeros(a.shape[:-1], a.dtype)
    for j in range(a.shape[-1]):
        total += a[..., j]
    return total


def folded(a: Array) -> Array:
    """The upper half on the lower half, until one is left."""
    while a.shape[-1] > 1:
        half = -(-a.shape[-1] // 2)
        low = a[..., :half].copy()
        low[..., : a.shape[-1] - half] += a[..., half:]
        a = low
    return a[..., 0]


def warp(a: Array) -> Array:
    """32 lanes, each with a stride of 32, then a butterfly."""
    d = a.shape[-1]
    padded = np.zeros((*a.shape[:-1], -(-d // 32) * 32), a.dtype)
    padded[..., :d] = a
    lanes = np.zeros((*a.shape[:-1], 32), a.dtype)
    for start in range(0, padded.shape[-1], 32):
        lanes += padded[..., start : start + 32]
    for offset in (16, 8, 4, 2, 1):
        lanes = lanes + lanes[..., np.arange(32) ^ offset]
    return lanes[..., 0]


def double(a: Array) -> Array:
    """In float64, rounded at the end."""
    return np.sum(a, axis=-1, dtype=np.float64).astype(a.dtype)


def compensated(a: Array) -> Array:
    """Kahan's sum."""
    total, lost = np.zeros(a.shape[:-1], a.dtype), np.zeros(a.shape[:-1], a.dtype)
    for j in range(a.shape[-1]):
        term = a[..., j] - lost
        grown = total + term
        lost = (grown - total) - term
        total = grown
    return total


def backwards(a: Array) -> Array:
    """From the last to the first, 128 at a time."""
    total = np.zeros(a.shape[:-1], a.dtype)
    for stop in range(a.shape[-1], 0, -128):
        total = sequential(a[..., max(stop - 128, 0) : stop][..., ::-1]) + total
    return total


def newton(v: Array) -> Array:
    """1/√v: a guess with float16's accuracy for v = m 4^k, then two Newton steps."""
    m, e = np.frexp(v)
    odd = e % 2
    m, k = np.where(odd == 1, m * 2, m * 4).astype(v.dtype), np.where(odd == 1, e - 1, e - 2) // 2  # m in [1,4)
    r = (1 / np.sqrt(m)).astype(np.float16).astype(v.dtype)
    for _ in range(2):
        r = r * (v.dtype.type(1.5) - v.dtype.type(0.5) * m * r * r)
    return np.ldexp(r, -k)


def rstd_of(x: Array, eps: float, total: Callable[[Array], Array] = folded) -> Array:
    """[n,1]"""
    return (1 / np.sqrt(total(x * x) / x.dtype.type(x.shape[-1]) + x.dtype.type(eps)))[:, None]


# forward


def forward_sequential(x: Array, weight: Array, *, eps: float = 1e-6) -> Array:
    return x * rstd_of(x, eps, sequential) * weight


def forward_pairwise(x: Array, weight: Array, *, eps: float = 1e-6) -> Array:
    """The weight and rstd first."""
    return x * (rstd_of(x, eps, folded) * weight)


def forward_warp(x: Array, weight: Array, *, eps: float = 1e-6) -> Array:
    """The weight before rstd; the mean by multiplying with 1/d."""
    mean = warp(x * x) * x.dtype.type(1 / x.shape[-1])
    return (x * weight) * (1 / np.sqrt(mean + x.dtype.type(eps)))[:, None]


def forward_double(x: Array, weight: Array, *, eps: float = 1e-6) -> Array:
    wide = x.astype(np.float64)
    return (wide / np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + eps) * weight).astype(x.dtype)


def forward_newton(x: Array, weight: Array, *, eps: float = 1e-6) -> Array:
    mean = np.mean(x * x, axis=-1)
    return weight * (newton(mean + x.dtype.type(eps))[:, None] * x)


def forward_divided(x: Array, weight: Array, *, eps: float = 1e-6) -> Array:
    """Divided by the root, the sum compensated."""
    return x / np.sqrt(compensated(x * x) / x.dtype.type(x.shape[-1]) + x.dtype.type(eps))[:, None] * weight


def forward_scaled(x: Array, weight: Array, *, eps: float = 1e-6) -> Array:
    """The row is divided by its largest magnitude first, as a safe norm is."""
    a = np.max(np.abs(x), axis=-1, keepdims=True)
    a = np.where(a > 0, a, x.dtype.type(1))
    u = x / a
    return u / np.sqrt((backwards(u * u) / x.dtype.type(x.shape[-1]))[:, None] + x.dtype.type(eps) / (a * a)) * weight


def forward_dot(x: Array, weight: Array, *, eps: float = 1e-6) -> Array:
    """BLAS for the squares; √d/√(Σ + d·eps) instead of the mean."""
    d = x.dtype.type(x.shape[-1])
    total = np.array([row @ row for row in x], dtype=x.dtype)
    return (x * (np.sqrt(d) / np.sqrt(total + d * x.dtype.type(eps)))[:, None]) * weight


def forward_eager(x: Array, weight: Array, *, eps: float = 1e-6, cast_order: str = "weight_then_cast") -> Array:
    """Every operation rounds to bfloat16; the sum accumulates in float32."""
    mean = to_bf16(warp(to_bf16(x * x)) / np.float32(x.shape[-1]))
    rstd = to_bf16(1 / to_bf16(np.sqrt(to_bf16(mean + to_bf16(np.float32(eps))))))[:, None]
    return to_bf16(to_bf16(x * rstd) * weight)


def forward_eager_rsqrt(x: Array, weight: Array, *, eps: float = 1e-6) -> Array:
    """The same with one rounding for 1/√ and the weight joined to rstd's product last."""
    mean = to_bf16(np.mean(to_bf16(x * x), axis=-1, keepdims=True))
    rstd = to_bf16(1 / np.sqrt(to_bf16(mean + np.float32(eps))))
    return to_bf16(weight * to_bf16(x * rstd))


def forward_cast_first(x: Array, weight: Array, *, eps: float = 1e-6, cast_order: str = "cast_then_weight") -> Array:
    """As Hugging Face has it: float32 up to x·rstd, that rounded to bfloat16, then a product of bfloat16."""
    return to_bf16(to_bf16(x * rstd_of(x, eps, warp)) * weight)


# backward


def backward_textbook(x: Array, weight: Array, dy: Array, *, eps: float = 1e-6) -> tuple[Array, Array]:
    """dweight row after row."""
    rstd, d = rstd_of(x, eps, sequential), x.dtype.type(x.shape[-1])
    xhat, g = x * rstd, dy * weight
    dx = rstd * (g - xhat * (sequential(g * xhat) / d)[:, None])
    return dx, sequential((dy * xhat).T)


def backward_cubed(x: Array, weight: Array, dy: Array, *, eps: float = 1e-6) -> tuple[Array, Array]:
    """dx = rstd g - x (rstd³/d) Σ g x;   dweight in two partial buffers"""
    rstd, d = rstd_of(x, eps, folded), x.dtype.type(x.shape[-1])
    g = dy * weight
    dx = rstd * g - x * (rstd * rstd * rstd / d * folded(g * x)[:, None])
    even, odd = (sequential((dy[i::2] * (x[i::2] * rstd[i::2])).T) for i in (0, 1))
    return dx, even + odd


def backward_apex(x: Array, weight: Array, dy: Array, *, eps: float = 1e-6) -> tuple[Array, Array]:
    """dx = (rstd/d) (d g - xhat Σ g xhat);   dweight in float64"""
    rstd, d = rstd_of(x, eps, warp), x.dtype.type(x.shape[-1])
    xhat, g = x * rstd, dy * weight
    dx = (rstd / d) * (d * g - xhat * warp(g * xhat)[:, None])
    return dx, np.sum(dy.astype(np.float64) * xhat, axis=0).astype(x.dtype)


def backward_double(x: Array, weight: Array, dy: Array, *, eps: float = 1e-6) -> tuple[Array, Array]:
    wide, g = x.astype(np.float64), dy.astype(np.float64) * weight
    square = np.mean(wide * wide, axis=-1, keepdims=True) + eps
    dx = (g - wide * np.mean(g * wide, axis=-1, keepdims=True) / square) / np.sqrt(square)
    return dx.astype(x.dtype), np.sum(dy * wide / np.sqrt(square), axis=0).astype(x.dtype)


def backward_newton(x: Array, weight: Array, dy: Array, *, eps: float = 1e-6) -> tuple[Array, Array]:
    """rstd by Newton; dweight by a matrix product; the projection subtracted before anything is scaled."""
    mean = (backwards(x * x) / x.dtype.type(x.shape[-1])) + x.dtype.type(eps)
    rstd = newton(mean)[:, None]
    g = weight * dy
    share = np.array([a @ b for a, b in zip(g, x, strict=True)], dtype=x.dtype) * x.dtype.type(1 / x.shape[-1])
    dx = (g - x * ((share / mean)[:, None])) * rstd
    return dx, np.einsum("nd,nd,n->d", dy, x, rstd[:, 0])


def backward_late_weight(x: Array, weight: Array, dy: Array, *, eps: float = 1e-6) -> tuple[Array, Array]:
    """y/weight is not at hand: Σ dy·(x·weight), all terms scaled by rstd one by one; dweight folded."""
    rstd = rstd_of(x, eps, compensated)
    share = compensated(dy * (x * weight))[:, None] * rstd * rstd / x.dtype.type(x.shape[-1])
    dx = rstd * weight * dy - rstd * x * share
    return dx, folded(((x * rstd) * dy).T)


def backward_eager(x: Array, weight: Array, dy: Array, *, eps: float = 1e-6) -> tuple[Array, Array]:
    """Every operation rounds to bfloat16; sums accumulate in float32."""
    mean = to_bf16(np.mean(to_bf16(x * x), axis=-1, keepdims=True))
    rstd = to_bf16(1 / to_bf16(np.sqrt(to_bf16(mean + to_bf16(np.float32(eps))))))
    xhat, g = to_bf16(x * rstd), to_bf16(dy * weight)
    share = to_bf16(np.mean(to_bf16(g * xhat), axis=-1, keepdims=True))
    dx = to_bf16(rstd * to_bf16(g - to_bf16(xhat * share)))
    return dx, to_bf16(np.sum(to_bf16(dy * xhat), axis=0))


def backward_cast_first(x: Array, weight: Array, dy: Array, *, eps: float = 1e-6, cast_order: str = "cast_then_weight"):
    """The gradient of cast_then_weight: the product with the weight is one of bfloat16 arrays, and so are its gradients."""
    rstd, d = rstd_of(x, eps, warp), np.float32(x.shape[-1])
    xhat, g = x * rstd, to_bf16(dy * weight)
    dx = rstd * (g - xhat * (warp(g * xhat) / d)[:, None])
    return to_bf16(dx), to_bf16(sequential(to_bf16(dy * to_bf16(xhat)).T))


FORWARD = (
    forward_sequential,
    forward_pairwise,
    forward_warp,
    forward_double,
    forward_newton,
    forward_divided,
    forward_scaled,
    forward_dot,
)
BACKWARD = (backward_textbook, backward_cubed, backward_apex, backward_double, backward_newton, backward_late_weight)
SINGLE = {"forward_newton", "backward_newton"}  # float32's accuracy, no more
