"""Bugs of casts and encodings."""

from typing import Any

from ...ref.cast import decode, encode, quotient, round_to
from ...ref.formats import BF16, CASTS, E4M3FN, E5M2, FORMATS, FP16, Format
from ...ref.xp import Array, xp_of
from . import Bug


def _names(*formats: Format) -> tuple[str, ...]:
    return tuple(f"{kind}.{f.name}" for kind in ("cast", "encode") for f in formats)


def _of(name: str, round_magnitude: Any, formats: tuple[Format, ...], **about: Any) -> list[Bug]:
    """One bug of the rounding, as a variant of cast and of encode: round_magnitude(fmt, x) is what is then rounded rightly."""
    bugs = []
    for op in _names(*formats):
        kind, fmt = op.split(".")[0], FORMATS[op.split(".")[1]]

        def fwd(x: Array, *, overflow: Any = None, kind: str = kind, fmt: Format = fmt) -> tuple[Array, tuple]:
            overflow = overflow or ("saturate" if fmt.bits == 8 else "nan")
            return (round_to if kind == "cast" else encode)(fmt, round_magnitude(fmt, x), overflow=overflow), ()

        bugs.append(Bug(name, (op,), fwd=fwd, **about))
    return bugs


def _half_away(fmt: Format, x: Array) -> Array:
    xp = xp_of(x)
    _, unit, _ = quotient(fmt, x)
    return xp.where(xp.isfinite(x), xp.copysign(xp.floor(xp.abs(x) / unit + 0.5) * unit, x), x)


def _truncated(fmt: Format, x: Array) -> Array:
    xp = xp_of(x)
    _, unit, _ = quotient(fmt, x)
    return xp.where(xp.isfinite(x), xp.copysign(xp.floor(xp.abs(x) / unit) * unit, x), x)


def _twice(fmt: Format, x: Array) -> Array:
    return round_to(FP16, x, overflow="nan")


def _flushed(fmt: Format, x: Array) -> Array:
    xp = xp_of(x)
    return xp.where(xp.abs(x) < 2.0**fmt.emin, xp.copysign(xp.zeros_like(x), x), x)


def _unsigned_zero(fmt: Format, x: Array) -> Array:
    xp = xp_of(x)
    return xp.where(x == 0, xp.zeros_like(x), x)


def _binade_too_small(codes: Array) -> tuple[Array, tuple]:
    """Subnormals read with the exponent of the field 0 instead of 1."""
    xp, fmt = xp_of(codes), E4M3FN
    x = decode(fmt, codes)
    return xp.where(xp.abs(x) < 2.0**fmt.emin, x / 2, x), ()


FP8 = (E4M3FN, E5M2)
BUGS = [
    *_of("e4m3-round-half-away", _half_away, CASTS, what="Ties are rounded away from zero instead of to even.", sources="bugs.json"),
    *_of("e4m3-truncate", _truncated, CASTS, what="Rounded toward zero instead of to nearest."),
    *_of("fp8-double-rounding", _twice, FP8, what="Rounded twice, through float16: just above a midpoint it falls to the even side."),
    *_of("fp8-subnormal-flush", _flushed, FP8, what="Subnormals of the format are flushed to zero."),
    *_of("subnormal-flush", _flushed, (BF16, FP16), what="Subnormals of the format are flushed to zero."),
    *_of("zero-sign-lost", _unsigned_zero, CASTS, what="The sign of a zero is lost."),
    Bug("fp8-subnormal-binade", ("decode.e4m3fn",), "Subnormal codes are read a binade too small.", fwd=_binade_too_small),
    Bug(
        "e4m3-overflow-nan",
        _names(E4M3FN),
        "Overflow is NaN, not saturated: what is above 464 (it would round beyond 448), and infinity, becomes NaN instead of 448.",
        "OCP OFP8 1.0 leaves both legal",
        attrs={"overflow": "nan"},
        benign=True,
    ),
    Bug(
        "overflow-infinity",
        _names(E5M2),
        "Overflow is infinity, not saturated: what rounds beyond the largest number becomes infinity.",
        "OCP OFP8 1.0 leaves both legal",
        attrs={"overflow": "nan"},
        benign=True,
    ),
    Bug(
        "overflow-saturates",
        _names(*(f for f in CASTS if f.bits == 16)),
        "Overflow saturates: what rounds beyond the largest number, and infinity, becomes the largest number.",
        "",
        attrs={"overflow": "saturate"},
        benign=True,
    ),
]
