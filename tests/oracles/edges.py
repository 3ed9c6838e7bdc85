"""The only place where numpy meets the oracles: arrays in, attributes filled, arrays out. No arithmetic; shares nothing with `ref`."""

import math
from typing import Any

import numpy as np

from .floats import BINARY32, BINARY64, CAST_FORMATS, FloatFormat

CARRIERS: dict[str, FloatFormat] = {"float32": BINARY32, "float64": BINARY64}


def carrier(array: np.ndarray) -> FloatFormat:
    """The arithmetic an array's dtype stands for."""
    if array.dtype.name not in CARRIERS:
        raise TypeError(f"carrier dtype must be float32 or float64, got {array.dtype}")
    return CARRIERS[array.dtype.name]


def fill(defaults: dict[str, Any], attrs: dict[str, Any]) -> dict[str, Any]:
    """Partial attributes completed; a name that the contract does not know is an error, lest a typo test the default."""
    unknown = set(attrs) - set(defaults)
    if unknown:
        raise TypeError(f"unknown attributes {sorted(unknown)}")
    return {**defaults, **attrs}


def choose(name: str, value: Any, options: Any) -> Any:
    """`value`, if it is one of `options`."""
    if value not in options:
        raise ValueError(f"{name} must be one of {list(options)}, got {value!r}")
    return value


def positive(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name} must be positive, got {value}")
    return value


def code_dtype(fmt: FloatFormat) -> type[np.unsignedinteger]:
    return np.uint8 if fmt.bits <= 8 else np.uint16 if fmt.bits <= 16 else np.uint32


def cast_format(name: str) -> FloatFormat:
    return CAST_FORMATS[choose("format", name, CAST_FORMATS)]


def refuse(array: np.ndarray, name: str, infinite: bool) -> None:
    """ValueError naming the first NaN (with `infinite`: the first NaN or infinity) in row-major order."""
    for place, value in zip(np.ndindex(array.shape), array.ravel().tolist(), strict=True):
        if math.isnan(value) or (infinite and math.isinf(value)):
            raise ValueError(f"{name}{list(place)} is {value}")


def code_list(codes: np.ndarray, fmt: FloatFormat, name: str = "codes") -> list[int]:
    """The codes in row-major order; ValueError for another dtype or bits that the format has not."""
    if codes.dtype != code_dtype(fmt):
        raise ValueError(f"{name} must be {np.dtype(code_dtype(fmt))}, got {codes.dtype}")
    values = codes.ravel().tolist()
    for place, code in zip(np.ndindex(codes.shape), values, strict=True):
        if code >= 1 << fmt.bits:
            raise ValueError(f"{name}{list(place)} is {code}, more than {fmt.bits} bits")
    return values
