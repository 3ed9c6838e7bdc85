"""Packing of 4-bit and 12-bit codes, by strings of bits; shares nothing with `ref`.

Equation: a row is one string of bits. e2m1: a byte is the odd code's four bits before the even one's. e5m6: the codes' twelve bits one
after the other, cut every 32.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from .edges import cast_format, code_list, fill

Arrays = dict[str, np.ndarray]


def _cut(bits: str, width: int) -> list[int]:
    return [int(bits[i : i + width], 2) for i in range(0, len(bits), width)]


def _by_rows(
    array: np.ndarray, bits_of: Callable[[list[int]], str], width: int, columns: int, dtype: type[np.unsignedinteger]
) -> np.ndarray:
    """Each row's bits, cut into `columns` words of `width`."""
    return np.array([_cut(bits_of(row), width) for row in array.tolist()], dtype).reshape(len(array), columns)


def _divisible(count: int, by: int, letter: str) -> None:
    if count % by:
        raise ValueError(f"{letter} is {count}, not a multiple of {by}")


def _words(packed: np.ndarray, dtype: type[np.unsignedinteger]) -> None:
    if packed.dtype != dtype:
        raise ValueError(f"packed must be {np.dtype(dtype)}, got {packed.dtype}")


def _pairs(row: list[int]) -> str:
    return "".join(f"{odd:04b}{even:04b}" for even, odd in zip(row[::2], row[1::2], strict=True))


def _halves(row: list[int]) -> str:
    return "".join(f"{byte:08b}"[4:] + f"{byte:08b}"[:4] for byte in row)


def pack_e2m1(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """pack.e2m1: codes -> packed."""
    fill({}, attrs)
    codes = inputs["codes"]
    code_list(codes, cast_format("e2m1"))
    _divisible(codes.shape[1], 2, "d")
    return {"packed": _by_rows(codes, _pairs, 8, codes.shape[1] // 2, np.uint8)}


def unpack_e2m1(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """unpack.e2m1: packed -> codes."""
    fill({}, attrs)
    packed = inputs["packed"]
    _words(packed, np.uint8)
    return {"codes": _by_rows(packed, _halves, 4, packed.shape[1] * 2, np.uint8)}


def pack_e5m6(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """pack.e5m6: codes -> packed."""
    fill({}, attrs)
    codes = inputs["codes"]
    code_list(codes, cast_format("e5m6"))
    _divisible(codes.shape[1], 8, "d")
    return {"packed": _by_rows(codes, lambda row: "".join(f"{code:012b}" for code in row), 32, codes.shape[1] * 3 // 8, np.uint32)}


def unpack_e5m6(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """unpack.e5m6: packed -> codes."""
    fill({}, attrs)
    packed = inputs["packed"]
    _words(packed, np.uint32)
    _divisible(packed.shape[1], 3, "b")
    return {"codes": _by_rows(packed, lambda row: "".join(f"{word:032b}" for word in row), 12, packed.shape[1] * 8 // 3, np.uint16)}
