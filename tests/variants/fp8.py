"""FP8 in blocks, and packed codes, otherwise than the reference writes them."""

import functools
import itertools

import numpy as np

from .decodes import shifted, table, viewed
from .floats import LAYOUTS, Array
from .quantize import MAX, codes_of, encoded, repeated, scale_and_factor, up_by_bits

# blocks


def by_loops(w: Array, *, recipe: str = "v3", block: int = 128, format: str = "e4m3fn", rounding: str = "half-even"):
    """Block after block."""
    p, q = -(-w.shape[0] // block), -(-w.shape[1] // block)
    scale, v = np.empty((p, q), w.dtype), np.empty_like(w)
    with np.errstate(all="ignore"):
        for i, j in itertools.product(range(p), range(q)):
            here = slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)
            s, f, multiply = scale_and_factor(np.abs(w[here]).max(keepdims=True), recipe, MAX[format])
            scale[i, j], v[here] = s[0, 0], w[here] * f if multiply else w[here] / f
        return encoded(v, format, "midpoints", rounding), scale


def by_padding(w: Array, *, recipe: str = "v3", block: int = 128, format: str = "e4m3fn", rounding: str = "half-even"):
    """Filled up with zeros to whole blocks."""
    o, d = w.shape
    grid = np.pad(w, ((0, -o % block), (0, -d % block))).reshape(-(-o // block), block, -1, block)
    with np.errstate(all="ignore"):
        s, f, multiply = scale_and_factor(np.abs(grid).max(axis=(1, 3)), recipe, MAX[format])
        codes = codes_of(grid, f[:, None, :, None], multiply, format, "frexp", rounding)
    return codes.reshape(grid.shape[0] * block, -1)[:o, :d], s


def by_reduction(w: Array, *, recipe: str = "v3", block: int = 128, format: str = "e4m3fn", rounding: str = "half-even"):
    """Columns first, then rows; the factors by two gathers."""
    down, across = np.arange(0, w.shape[0], block), np.arange(0, w.shape[1], block)
    with np.errstate(all="ignore"):
        a = np.maximum(np.maximum.reduceat(w, down, 0), -np.minimum.reduceat(w, down, 0))
        s, f, multiply = scale_and_factor(np.abs(np.maximum.reduceat(a, across, 1)), recipe, MAX[format])
        each = f[np.arange(w.shape[0]) // block][:, np.arange(w.shape[1]) // block]
        return codes_of(w, each, multiply, format, "split", rounding), s


def by_patterns(w: Array, *, recipe: str = "v3", block: int = 128, format: str = "e4m3fn", rounding: str = "half-even"):
    """float32 only: the maximum of bit patterns, a carry into the exponent, codes by integers."""
    bits = w.view(np.uint32) & np.uint32(0x7FFFFFFF)
    a = np.zeros((-(-w.shape[0] // block), -(-w.shape[1] // block)), np.uint32)
    index = np.divmod(np.arange(w.size), w.shape[1])
    np.maximum.at(a, (index[0] // block, index[1] // block), bits.ravel())
    with np.errstate(all="ignore"):
        s, f, multiply = scale_and_factor(a.view(np.float32), recipe, MAX[format], bits=up_by_bits)
        each = np.kron(f, np.ones((block, block), np.float32))[: w.shape[0], : w.shape[1]]
        return codes_of(w, each, multiply, format, "integer", rounding), s


QUANTIZE_BLOCK = {"loops": by_loops, "padding": by_padding, "reduction": by_reduction, "patterns": by_patterns}


def kronecker(codes: Array, scale: Array, *, block: int = 128, format: str = "e4m3fn") -> Array:
    each = np.kron(scale, np.ones((block, block), scale.dtype))[: codes.shape[0], : codes.shape[1]]
    return table(LAYOUTS[format], codes).astype(scale.dtype) * each


def gathered(codes: Array, scale: Array, *, block: int = 128, format: str = "e4m3fn") -> Array:
    """The scale by index arithmetic, on flat arrays."""
    i, j = np.divmod(np.arange(codes.size), codes.shape[1])
    return (scale.ravel()[i // block * scale.shape[1] + j // block] * shifted(LAYOUTS[format], codes.ravel())).reshape(codes.shape)


def in_place(codes: Array, scale: Array, *, block: int = 128, format: str = "e4m3fn") -> Array:
    w = viewed(LAYOUTS[format], codes).astype(scale.dtype)
    for i, j in np.ndindex(scale.shape):
        w[i * block : (i + 1) * block, j * block : (j + 1) * block] *= scale[i, j]
    return w


def by_rows(codes: Array, scale: Array, *, block: int = 128, format: str = "e4m3fn") -> Array:
    """A row has 1×block tiles; the product in float64, rounded once."""
    rows = scale[np.arange(codes.shape[0]) // block].astype(np.float64)
    wide = repeated(codes, rows, tile=block, axis=1, format=format)
    return wide.astype(scale.dtype)


DEQUANTIZE_BLOCK = {"kronecker": kronecker, "gathered": gathered, "in-place": in_place, "rows": by_rows}

# packed codes


def nibbles(codes: Array) -> Array:
    return codes[:, ::2] | (codes[:, 1::2] << np.uint8(4))


def by_words(codes: Array) -> Array:
    """Two codes are a 16-bit word, little end first; its upper byte is moved onto the lower."""
    words = np.ascontiguousarray(codes).view("<u2")
    return (words | (words >> np.uint16(4))).astype(np.uint8)


def by_hand(codes: Array) -> Array:
    return np.array([[int(f"{row[i + 1]:x}{row[i]:x}", 16) for i in range(0, len(row), 2)] for row in codes.tolist()], np.uint8)


def split_nibbles(packed: Array) -> Array:
    out = np.empty((len(packed), 2 * packed.shape[1]), np.uint8)
    out[:, ::2], out[:, 1::2] = packed & np.uint8(15), packed >> np.uint8(4)
    return out


def unpacked_bits(packed: Array) -> Array:
    """Four bits at a time, the lowest first"""
    bits = np.unpackbits(packed, axis=1, bitorder="little").reshape(len(packed), -1, 4)
    return (bits @ np.array([1, 2, 4, 8], np.uint8)).astype(np.uint8)


def stream(codes: Array) -> Array:
    """Sixteen bits of each code, the upper four left out, as a stream of bits"""
    bits = np.unpackbits(codes.astype(">u2").view(np.uint8).reshape(*codes.shape, 2), axis=-1)[..., 4:]
    return np.packbits(bits.reshape(len(codes), -1), axis=1).view(">u4").astype(np.uint32)


def big_numbers(codes: Array) -> Array:
    """Eight codes are a number of 96 bits in Python."""
    rows = []
    for row in codes.tolist():
        text = b"".join(
            functools.reduce(lambda total, c: total << 12 | c, row[i : i + 8], 0).to_bytes(12, "big") for i in range(0, len(row), 8)
        )
        rows.append(np.frombuffer(text, ">u4"))
    return np.array(rows).astype(np.uint32).reshape(len(codes), -1)


def streamed(packed: Array) -> Array:
    bits = np.unpackbits(packed.astype(">u4").view(np.uint8), axis=1).reshape(len(packed), -1, 12)
    return (bits.astype(np.int64) @ (1 << np.arange(11, -1, -1))).astype(np.uint16)


def big_numbers_read(packed: Array) -> Array:
    rows = []
    for row in packed.tolist():
        triples = [row[i] << 64 | row[i + 1] << 32 | row[i + 2] for i in range(0, len(row), 3)]
        rows.append([number >> 12 * place & 0xFFF for number in triples for place in range(7, -1, -1)])
    return np.array(rows, np.uint16).reshape(len(packed), -1)


PACK_E2M1 = {"nibbles": nibbles, "words": by_words, "hand": by_hand}
UNPACK_E2M1 = {"nibbles": split_nibbles, "bits": unpacked_bits}
PACK_E5M6 = {"stream": stream, "big-numbers": big_numbers}
UNPACK_E5M6 = {"stream": streamed, "big-numbers": big_numbers_read}
