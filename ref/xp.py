"""One text, every array: the namespace of an array, exact powers of two, and the places where an implementation rounds."""

from typing import Any

from array_api_compat import array_namespace, device

Array = Any  # a NumPy, CuPy, torch or JAX array; their common type has no name


def xp_of(*arrays: Array) -> Any:
    """The array-API namespace of the arrays (NumPy, CuPy, torch, JAX, array-api-strict)."""
    return array_namespace(*arrays)


def power_of_two(xp: Any, exponent: Array, dtype: Any, dev: Any) -> Array:
    """2^exponent, exact, for integer exponents that the dtype can hold. Gathered, since exp2 need not be exact."""
    low, high = exponent_range(xp, dtype)
    table = xp.asarray([2.0**k for k in range(low, high + 1)], dtype=dtype, device=dev)
    index = xp.clip(exponent - low, 0, high - low)
    return xp.reshape(xp.take(table, xp.reshape(index, (-1,))), exponent.shape)


def floor_log2(xp: Any, magnitude: Array) -> Array:
    """The integer e with 2^e <= magnitude < 2^(e+1), exact; one below the dtype's smallest exponent for zero, its largest for inf and NaN.

    A search in the table of powers: log2 in floating point is wrong next to a power of two.
    """
    low, high = exponent_range(xp, magnitude.dtype)
    table = xp.asarray([2.0**k for k in range(low, high + 1)], dtype=magnitude.dtype, device=device(magnitude))
    position = xp.searchsorted(table, xp.reshape(magnitude, (-1,)), side="right")
    return xp.reshape(xp.clip(xp.astype(position, xp.int64) - 1, -1, high - low) + low, magnitude.shape)


def exponent_range(xp: Any, dtype: Any) -> tuple[int, int]:
    """The smallest (subnormal) and the largest exponent of a binary32 or binary64 carrier."""
    if dtype == xp.float32:
        return -149, 127
    if dtype == xp.float64:
        return -1074, 1023
    raise ValueError(f"the carrier is {dtype}; expected float32 or float64 (low precision is simulated on these)")


def constant(x: Array, values: Any) -> Array:
    """Numbers beside x: in its dtype, on its device; where a claimed precision is simulated, in float32 arithmetic at least."""
    array = xp_of(x).asarray(values, dtype=x.dtype, device=device(x))
    hook = getattr(x, "__constant__", None)
    return array if hook is None else hook(array)


def exactly(x: Array) -> Array:
    """x as float32, for arithmetic that every implementation does bit for bit alike (quantisation): nothing of it is simulated noise."""
    hook = getattr(x, "__exactly__", None)
    x = x if hook is None else hook()
    return xp_of(x).astype(x, xp_of(x).float32)


def clip(x: Array, low: float | None = None, high: float | None = None) -> Array:
    """min(max(x, low), high), NaN kept. array-api-compat's own clip drops what an ndarray subclass carries."""
    xp = xp_of(x)
    if low is not None:
        x = xp.where(x < low, xp.full_like(x, low), x)
    return x if high is None else xp.where(x > high, xp.full_like(x, high), x)


def stored(x: Array, any_unit: bool = False) -> Array:
    """Marks a place where an implementation stores an intermediate in the activations' own format.

    The identity on plain arrays: the reference stays in the dtype it is given. On arrays that simulate a claimed
    precision (they have the method `__stored__`), one rounding to that precision's storage format. any_unit says that
    implementations store each row in a unit of their own, which divides out later: what is 1 here need not be there.
    """
    hook = getattr(x, "__stored__", None)
    return x if hook is None else hook(any_unit)
