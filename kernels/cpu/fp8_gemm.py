"""Matrix products of FP8 codes with a scale a tile, as tensor cores add: bit for bit, at a fraction of a plain product's rate."""

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...ref.cast import decode
from ...ref.formats import FORMATS
from ...ref.fp8_accumulate import ZERO, Accumulator, accumulator_named, exponents
from ...ref.fp8_gemm import check_gemm
from ...ref.op import bind, check_attr, op_named
from . import cast
from ._align import WIDTH
from ._common import array_of, floats, need, run
from ._fp8_tiles import GROUP, NO_POWER, TALL, aligned_blocks, decode_panels, decode_rows, plain_blocks
from ._tile import ROWS, VECTORS, lanes

Array = NDArray[Any]
CODES = (np.uint8, np.uint16)
OP = "fp8.gemm"


@lru_cache
def tables(format: str) -> tuple[Array, Array]:
    """The value of every code (float32) and the exponent that aligns it (int8)."""
    fmt = FORMATS[format]
    values = decode(fmt, np.arange(1 << 8 * np.dtype(fmt.code_dtype).itemsize).astype(fmt.code_dtype))
    powers = exponents(values, fmt.emin)
    powers = np.where(powers == ZERO, NO_POWER, powers).astype(np.int8)
    for table in (values, powers):
        table.flags.writeable = False
    return values, powers


def _checked(arrays: dict[str, Any], attrs: dict[str, Any]) -> tuple[Array, Array, Array, Array, Accumulator | None]:
    """The arrays, contiguous, and the accumulator. All refusals are here."""
    record = op_named(OP)
    codes = {name: array_of(OP, name, arrays[name], CODES, 2) for name in ("a_codes", "b_codes")}
    scales = {name: floats(OP, name, arrays[name], 2) for name in ("a_scale", "b_scale")}
    bind(OP, record.inputs, {**codes, **scales})
    for key, value in attrs.items():
        check_attr(OP, record.attrs[key], value)
    a_codes, b_codes, a_scale, b_scale = *codes.values(), *scales.values()
    need(b_scale.dtype == a_scale.dtype, OP, "b_scale", f"a {b_scale.dtype} array", f"{a_scale.dtype} like a_scale")
    how = accumulator_named(OP, attrs["accumulator"])
    check_gemm(a_codes, a_scale, b_codes, b_scale, attrs["promote"], attrs["tile"], attrs["format"], how)
    return a_codes, a_scale, b_codes, b_scale, how


def fp8_gemm(
    a_codes: Array,
    a_scale: Array,
    b_codes: Array,
    b_scale: Array,
    *,
    accumulator: str = "fp32",
    promote: int = 128,
    tile: int = 128,
    scale_order: str = "one by one",
    format: str = "e4m3fn",
    out: str = "fp32",
) -> Array:
    """y[n,o] = sum_j (sum_{d in part j} a[n,d] b[o,d]) a_scale[n,d//tile] b_scale[r(o),d//tile],   a, b = decode(codes)

    Codes are uint8 (uint16 for e5m6), scales float32 or float64 alike, and y has their dtype. Attributes are those of the reference's
    fp8.gemm. r(o) = o//128 where b_scale has ceil(o/128) rows, o where it has o. A tensor core's accumulators ("wgmma13", "mma25",
    "bits:F") give the reference's bits. "fp32" sums each part in the scales' dtype, "exact" in float64; both in order of d.

    ValueError: dtypes or shapes do not fit, an attribute has no such value, a scale is not finite and > 0.
    """
    arrays = {"a_codes": a_codes, "a_scale": a_scale, "b_codes": b_codes, "b_scale": b_scale}
    attrs = {"accumulator": accumulator, "promote": promote, "tile": tile, "scale_order": scale_order, "format": format, "out": out}
    a_codes, a_scale, b_codes, b_scale, how = _checked(arrays, attrs)
    (n, d), o, part = a_codes.shape, b_codes.shape[0], int(promote or tile)
    y = np.empty((n, o), a_scale.dtype)
    if y.size == 0:
        return y
    carrier = np.float32 if how else np.float64 if accumulator == "exact" else y.dtype.type
    width = WIDTH if how else VECTORS * lanes(np.dtype(carrier).itemsize)
    a, b, special = _decoded(a_codes, b_codes, format, carrier, width, part, how is None)
    by_part = a_scale.T.copy(), _columns(b_scale, o, b[0].shape[0] * width)
    blocks = b[0].shape[0] * -(-n // TALL), min(n, TALL) * width * d
    common = (*by_part, y, part, int(tile), scale_order == "product first")
    if how is None:
        run(plain_blocks, *blocks, a[0], b[0], *common)
    else:
        found = any(s.any() for s in special)
        codes = [c.astype(np.uint16) if found else np.empty((0, 0), np.uint16) for c in (a_codes, b_codes)]  # one type to compile for
        run(aligned_blocks, *blocks, *a, *b, *common, *_kept(how), (*codes, tables(format)[0]), (found, *special))
    return cast.bf16(y) if out == "bf16" else y


def _decoded(a_codes: Array, b_codes: Array, format: str, carrier: type, width: int, part: int, keep: bool) -> tuple[Any, ...]:
    """(values, powers) of a as rows and of b as panels, filled up with zeros, and where each has a NaN or an infinity."""
    (n, d), o = a_codes.shape, b_codes.shape[0]
    padded, panels = -(-n // ROWS) * ROWS, -(-o // width)
    a = np.empty((padded, d), carrier), np.empty((padded, d), np.int8)
    b = np.empty((panels, d, width), carrier), np.empty((panels, d, width), np.int8)
    for array in (*a, *b):
        array[n if array.ndim == 2 else -1 :] = 0
    special = np.zeros((n, -(-d // part)), bool), np.zeros((o, -(-d // part)), bool)
    run(decode_rows, n, d, a_codes, *tables(format), *a, part, special[0], keep)
    run(decode_panels, panels, width * d, b_codes, *tables(format), *b, part, special[1], keep)
    return a, b, special


def _columns(b_scale: Array, o: int, padded: int) -> Array:
    """b_scale with a column for each output: [d/tile,padded]"""
    scale = b_scale if b_scale.shape[0] == o else np.repeat(b_scale, 128, axis=0)[:o]
    columns = np.zeros((b_scale.shape[1], padded), b_scale.dtype)
    columns[:, :o] = scale.T
    return columns


def _kept(how: Accumulator) -> tuple[Any, ...]:
    """fraction, how many products an int32 holds the sum of, and the mask of what the accumulator keeps of a group's total.

    A product is below 4 units times 2^fraction. With the accumulator's own part float32 holds totals exactly up to a fraction of 16.
    """
    assert how.group == GROUP
    at_once = GROUP if how.fraction <= 23 else GROUP // 2 if how.fraction <= 25 else 0
    narrow = how.fraction <= 16
    bits, places = (32, 23) if narrow else (64, 52)
    mask = (1 << bits) - (1 << places - how.kept)
    return np.uint32(how.fraction), at_once, (np.uint32 if narrow else np.uint64)(mask)
