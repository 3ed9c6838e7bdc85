"""What stands around every op: its arguments held to the reference's declaration, arrays taken to the device and results given back."""

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ...ref.op import Op, bind, check_attr, op_named
from ._device import SIMULATED, arrays, check_device

Array = Any
FLOATS = (np.float32, np.float64)


def kernel_of(op: str, direction: str = "forward", *, any_shape: bool = False) -> Callable[[Callable], Callable]:
    """Makes a function of device arrays the op that callers see: NumPy arrays in, NumPy arrays out; device arrays in, CuPy arrays out.

    The function is given C-contiguous arrays that fit the declaration, floating-point ones of one dtype (float32 or float64); any_shape:
    as vectors, its results take x's shape. What its values must be it checks itself.
    """

    def wrap(body: Callable) -> Callable:
        takes = inspect.signature(body)
        name = op if direction == "forward" else f"{op}_bwd"

        def answer(fast: Mapping[str, Callable], args: tuple, keywords: dict[str, Any]) -> Any:
            check_device()
            record = op_named(op)
            bound = takes.bind(*args, **keywords).arguments
            bound |= bound.pop("attrs", {})  # **attrs
            given = {t.name: bound.pop(t.name) for t in record.signature_of(direction)[0] if bound.get(t.name) is not None}
            home = all(isinstance(x, np.ndarray) for x in given.values())
            there = {k: _there(name, k, x) for k, x in given.items()}
            shape = next(iter(there.values())).shape if there else ()
            if any_shape:
                there = {k: x.reshape(-1) if x.shape == shape else x for k, x in there.items()}
            _held(name, record, direction, there, bound, alike=not any_shape)
            result = fast[name](**there, **bound) if name in fast else None
            if result is None:
                result = body(**there, **bound)
            many = result if isinstance(result, tuple) else (result,)
            many = tuple(y.get() if home and not SIMULATED else y for y in (y.reshape(shape) if any_shape else y for y in many))
            return many if isinstance(result, tuple) else many[0]

        @functools.wraps(body)
        def call(*args: Any, **keywords: Any) -> Any:
            return answer(fast_ones(), args, keywords)

        @functools.wraps(body)
        def readable(*args: Any, **keywords: Any) -> Any:
            return answer({}, args, keywords)

        call.readable = readable  # type: ignore[attr-defined]
        return call

    return wrap


@functools.cache
def fast_ones() -> Mapping[str, Callable[..., Any]]:
    """Faster kernels by op ("rmsnorm", "rmsnorm_bwd", ...), cuda.FAST: none in the simulator.

    Each is called with the arrays on the device and the attributes, after the checks of ranks, shapes, dtypes and attributes. What returns
    None does not do these sizes, dtypes or attributes, and the readable kernel does.
    """
    if SIMULATED or not importlib.util.find_spec(f"{__package__}.cuda"):
        return {}
    return getattr(importlib.import_module(".cuda", __package__), "FAST", {})


def _there(op: str, name: str, x: Any) -> Array:
    """x on the device, C-contiguous: CuPy arrays and whatever has __cuda_array_interface__ as they lie, NumPy arrays copied."""
    device = hasattr(x, "__cuda_array_interface__")
    expected = "a NumPy array; the simulator takes no other" if SIMULATED else "a NumPy array or one on the device"
    need(isinstance(x, np.ndarray) or (device and not SIMULATED), op, name, f"of type {type(x).__name__}", expected)
    y = arrays().asarray(x)
    y = arrays().ascontiguousarray(y).reshape(y.shape)
    # The simulator copies every argument back.
    return y.copy() if SIMULATED and not y.flags.writeable else y


def _held(op: str, record: Op, direction: str, given: Mapping[str, Array], attrs: Mapping[str, Any], alike: bool) -> None:
    tensors, _ = record.signature_of(direction, given)
    for tensor in tensors:
        need(tensor.name in given, op, tensor.name, "missing", f"an array [{','.join(tensor.dims)}]")
    bind(op, tensors, given)
    real = [t.name for t in tensors if t.kind not in ("index", "code")]
    for other in real:
        dtype = given[other].dtype
        need(dtype in FLOATS, op, other, f"a {dtype} array", "float32 or float64")
        need(not alike or dtype == given[real[0]].dtype, op, other, f"a {dtype} array", f"{given[real[0]].dtype} like {real[0]}")
    for key, value in attrs.items():
        need(key in record.attrs, op, key, "no attribute", f"one of {', '.join(record.attrs)}")
        check_attr(op, record.attrs[key], value)


def need(ok: Any, op: str, name: str, value: Any, expected: str) -> None:
    """ValueError "op: name is value; expected ..." unless ok."""
    if not ok:
        raise ValueError(f"{op}: {name} is {value}; expected {expected}")


def empty(shape: tuple[int, ...], dtype: Any) -> Array:
    return arrays().empty(shape, dtype)


def zeros(shape: tuple[int, ...], dtype: Any) -> Array:
    return arrays().zeros(shape, dtype)
