"""Arguments held to an op's declaration: what the reference says an op takes is what its kernel takes."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...ref.op import bind, check_attr, op_named
from ._common import array_of, floats, need

INTEGERS = tuple(np.dtype(f"{sign}int{bits}").type for sign in ("", "u") for bits in (8, 16, 32, 64))


def declared(
    op: str, direction: str, arrays: Mapping[str, Any], attrs: Mapping[str, Any], as_they_lie: Collection[str] = ()
) -> tuple[dict[str, Any], dict[str, Any], dict[str, int]]:
    """The arrays as contiguous views (None where an optional one is not given), all attributes, and the value of every letter.

    Arrays named in as_they_lie are views with the strides that they have.
    ValueError: one is missing, unknown, of another rank, size, dtype or range; the floating-point arrays are not of one dtype.
    """
    record = op_named(op)
    name = op.replace(".", "_") + ("" if direction == "forward" else "_bwd")
    given = {k: v for k, v in arrays.items() if v is not None}
    tensors, _ = record.signature_of(direction, given)
    checked: dict[str, NDArray[Any]] = {}
    for tensor in tensors:
        need(tensor.name in given, name, tensor.name, "missing", f"an array [{','.join(tensor.dims)}]")
        array, ndim = given[tensor.name], len(tensor.dims)
        checked[tensor.name] = (
            array_of(name, tensor.name, array, INTEGERS, ndim)
            if tensor.kind == "index"
            else floats(name, tensor.name, array, ndim, tensor.name in as_they_lie)
        )
    letters = bind(name, tensors, checked)
    real = [t.name for t in tensors if t.kind != "index"]
    for other in real[1:]:
        a, b = checked[other].dtype, checked[real[0]].dtype
        need(a == b, name, other, f"a {a} array", f"{b} like {real[0]}")
    for key, value in attrs.items():
        need(key in record.attrs, name, key, "no attribute", f"one of {', '.join(record.attrs)}")
        check_attr(name, record.attrs[key], value)
    return {k: checked.get(k) for k in arrays}, {**record.defaults, **attrs}, letters


def split(op: str, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The op's arrays (None where one is not given) and the rest, its attributes"""
    names = [t.name for t in op_named(op).inputs]
    return {name: given.get(name) for name in names}, {name: value for name, value in given.items() if name not in names}
