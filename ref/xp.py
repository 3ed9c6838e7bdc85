"""One text, every array: the namespace of an array, exact powers of two, and the places where an implementation rounds."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

from array_api_compat import array_namespace, device, is_numpy_namespace

Array = Any  # a NumPy, CuPy, torch or JAX array; their common type has no name


_numpy: dict[type, Any] = {}  # NumPy's namespace by the types of its arrays: simulated noise asks for it a million times


def xp_of(*arrays: Array) -> Any:
    """The array-API namespace of the arrays (NumPy, CuPy, torch, JAX, array-api-strict)."""
    if len(arrays) == 1 and (known := _numpy.get(type(arrays[0]))) is not None:
        return known
    xp = array_namespace(*arrays)
    if len(arrays) == 1 and is_numpy_namespace(xp):
        _numpy[type(arrays[0])] = xp
    return xp


@cache
def powers(low: int, high: int) -> list[float]:
    return [2.0**k for k in range(low, high + 1)]


@cache
def kept_powers(xp: Any, dtype: Any) -> Array:
    return xp.asarray(powers(*exponent_range(xp, dtype)), dtype=dtype)


def table_of(xp: Any, dtype: Any, dev: Any) -> Array:
    """All powers of two of the dtype, ascending. NumPy's are made once; what is made while a framework traces must not be kept."""
    if is_numpy_namespace(xp):
        return kept_powers(xp, dtype)
    return xp.asarray(powers(*exponent_range(xp, dtype)), dtype=dtype, device=dev)


def power_of_two(xp: Any, exponent: Array, dtype: Any, dev: Any) -> Array:
    """2^exponent, exact, for integer exponents that the dtype can hold. Gathered, since exp2 need not be exact."""
    low, high = exponent_range(xp, dtype)
    index = clip(exponent - low, 0, high - low)
    return xp.reshape(xp.take(table_of(xp, dtype, dev), xp.reshape(index, (-1,))), exponent.shape)


def floor_log2(xp: Any, magnitude: Array) -> Array:
    """The integer e with 2^e <= magnitude < 2^(e+1), exact; one below the dtype's smallest exponent for zero, its largest for inf and NaN.

    A search in the table of powers: log2 in floating point is wrong next to a power of two.
    """
    low, _ = exponent_range(xp, magnitude.dtype)
    table = table_of(xp, magnitude.dtype, device(magnitude))
    position = xp.searchsorted(table, xp.reshape(magnitude, (-1,)), side="right")
    return xp.reshape(xp.astype(position, xp.int64) - 1 + low, magnitude.shape)


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


def rescaled(x: Array) -> Array:
    """Marks what implementations hold in a unit or a base of their own, in float32 at least: a log-sum-exp in base 2, or one that runs.

    The identity on plain arrays. On arrays that simulate a precision, one rounding to its accumulation's format, in any unit.
    """
    hook = getattr(x, "__rescaled__", None)
    return x if hook is None else hook()


def wide(x: Array) -> Array:
    """x for arithmetic in float32 at least, even where every operation is claimed to round to 16 bits: what rows are normalised by."""
    hook = getattr(x, "__wide__", None)
    return x if hook is None else hook()


def once(x: Array) -> Array:
    """Marks what a backward computes again only to save memory: an implementation that rounds every operation has kept it.

    The identity on plain arrays, and where float32 operations err alone (a fused backward does compute it anew, in another order). On
    arrays that simulate a precision of 16-bit operations, what is computed of it rounds the same each time.
    """
    hook = getattr(x, "__once__", None)
    return x if hook is None else hook()


_record: ContextVar[dict[str, Array] | None] = ContextVar("record", default=None)


def named(name: str, x: Array) -> Array:
    """x: an intermediate that an implementation may show under this name. Nothing happens to it; recording() sees it."""
    record = _record.get()
    if record is not None:
        record[name] = x if name not in record else None  # one name for two arrays says nothing
    return x


@contextmanager
def recording() -> Iterator[dict[str, Array]]:
    """The named intermediates of what is computed in it, in their order."""
    record: dict[str, Array] = {}
    token = _record.set(record)
    try:
        yield record
    finally:
        _record.reset(token)
        for name in [name for name, x in record.items() if x is None]:
            del record[name]
