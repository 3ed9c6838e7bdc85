"""Small codes in whole words: two E2M1 codes a byte, eight E5M6 codes in three 32-bit words; and back."""

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from ._common import array_of, need, output, run
from .cast import largest

FOUR, EIGHT, SIXTEEN, TWENTY, TWENTY_EIGHT = map(np.uint32, (4, 8, 16, 20, 28))
TWELVE, TWENTY_FOUR = np.uint32(12), np.uint32(24)
CODE = np.uint32(0xFFF)


# The arrays are flat: rows hold whole groups, so a group never spans two.
@njit(nogil=True, cache=True)
def _pack_e2m1(lo, hi, codes, packed):
    codes, packed = codes[2 * lo : 2 * hi], packed[lo:hi]
    for i in range(packed.size):
        packed[i] = codes[2 * i] | (codes[2 * i + 1] << np.uint8(4))


@njit(nogil=True, cache=True)
def _unpack_e2m1(lo, hi, packed, codes):
    packed, codes = packed[lo:hi], codes[2 * lo : 2 * hi]
    for i in range(packed.size):
        codes[2 * i] = packed[i] & np.uint8(15)
        codes[2 * i + 1] = packed[i] >> np.uint8(4)


@njit(nogil=True, cache=True)
def _pack_e5m6(lo, hi, codes, packed):
    codes, packed = codes[8 * lo : 8 * hi], packed[3 * lo : 3 * hi]
    for i in range(packed.size // 3):
        c = codes[8 * i : 8 * i + 8]
        c0, c1, c2, c3 = np.uint32(c[0]), np.uint32(c[1]), np.uint32(c[2]), np.uint32(c[3])
        c4, c5, c6, c7 = np.uint32(c[4]), np.uint32(c[5]), np.uint32(c[6]), np.uint32(c[7])
        packed[3 * i] = (c0 << TWENTY) | (c1 << EIGHT) | (c2 >> FOUR)
        packed[3 * i + 1] = (c2 << TWENTY_EIGHT) | (c3 << SIXTEEN) | (c4 << FOUR) | (c5 >> EIGHT)
        packed[3 * i + 2] = (c5 << TWENTY_FOUR) | (c6 << TWELVE) | c7


@njit(nogil=True, cache=True)
def _unpack_e5m6(lo, hi, packed, codes):
    packed, codes = packed[3 * lo : 3 * hi], codes[8 * lo : 8 * hi]
    for i in range(packed.size // 3):
        u, v, w = packed[3 * i], packed[3 * i + 1], packed[3 * i + 2]
        c = codes[8 * i : 8 * i + 8]
        c[0] = u >> TWENTY
        c[1] = (u >> EIGHT) & CODE
        c[2] = ((u << FOUR) | (v >> TWENTY_EIGHT)) & CODE
        c[3] = (v >> SIXTEEN) & CODE
        c[4] = (v >> FOUR) & CODE
        c[5] = ((v << EIGHT) | (w >> TWENTY_FOUR)) & CODE
        c[6] = (w >> TWELVE) & CODE
        c[7] = w & CODE


def _codes(op: str, codes: Any, dtype: type, multiple: int, count: int) -> NDArray[Any]:
    codes = array_of(op, "codes", codes, (dtype,), 2)
    need(codes.shape[1] % multiple == 0, op, "codes", f"of shape {codes.shape}", f"d a multiple of {multiple}")
    if largest(codes) >= count:
        i, j = np.argwhere(codes >= count)[0]
        raise ValueError(f"{op}: codes[{i}, {j}] is {codes[i, j]}; expected a code below {count}")
    return codes


def pack_e2m1(codes: NDArray[np.uint8], *, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
    """packed[n,i] = codes[n,2i] + 16 codes[n,2i+1], uint8. `out` receives the result.

    ValueError: codes are not two-dimensional uint8, d is odd, a code is not below 16 (the first is named).
    """
    codes = _codes("pack_e2m1", codes, np.uint8, 2, 16)
    n, d = codes.shape
    packed = output("pack_e2m1", "out", out, (n, d // 2), np.uint8, codes)
    run(_pack_e2m1, packed.size, 2, codes.reshape(-1), packed.reshape(-1))
    return packed


def unpack_e2m1(packed: NDArray[np.uint8], *, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
    """codes[n,2i] = packed[n,i] mod 16, codes[n,2i+1] = packed[n,i] div 16. `out` receives the result.

    ValueError: packed is not two-dimensional uint8.
    """
    packed = array_of("unpack_e2m1", "packed", packed, (np.uint8,), 2)
    n, b = packed.shape
    codes = output("unpack_e2m1", "out", out, (n, 2 * b), np.uint8, packed)
    run(_unpack_e2m1, packed.size, 2, packed.reshape(-1), codes.reshape(-1))
    return codes


def pack_e5m6(codes: NDArray[np.uint16], *, out: NDArray[np.uint32] | None = None) -> NDArray[np.uint32]:
    """packed[n,3d/8]: the 96 bits of eight codes one after the other, the first highest, as three uint32. `out` receives the result.

    ValueError: codes are not two-dimensional uint16, d is no multiple of 8, a code is not below 4096 (the first is named).
    """
    codes = _codes("pack_e5m6", codes, np.uint16, 8, 4096)
    n, d = codes.shape
    packed = output("pack_e5m6", "out", out, (n, d // 8 * 3), np.uint32, codes)
    run(_pack_e5m6, codes.size // 8, 8, codes.reshape(-1), packed.reshape(-1))
    return packed


def unpack_e5m6(packed: NDArray[np.uint32], *, out: NDArray[np.uint16] | None = None) -> NDArray[np.uint16]:
    """codes[n,8b/3], the inverse of pack_e5m6. `out` receives the result.

    ValueError: packed is not two-dimensional uint32, b is no multiple of 3.
    """
    packed = array_of("unpack_e5m6", "packed", packed, (np.uint32,), 2)
    n, b = packed.shape
    need(b % 3 == 0, "unpack_e5m6", "packed", f"of shape {packed.shape}", "b a multiple of 3")
    codes = output("unpack_e5m6", "out", out, (n, b // 3 * 8), np.uint16, packed)
    run(_unpack_e5m6, codes.size // 8, 8, packed.reshape(-1), codes.reshape(-1))
    return codes
