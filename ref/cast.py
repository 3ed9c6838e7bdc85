"""cast, encode, decode: values to a narrow format's grid and to its bit patterns. Spec §4.1."""

from typing import Literal

from array_api_compat import device

from .formats import CASTS, FP32, FP64, Format
from .op import Case, Op, declare, signature
from .xp import Array, floor_log2, power_of_two, xp_of

Overflow = Literal["saturate", "nan"]


def quotient(fmt: Format, x: Array) -> tuple[Array, Array, Array]:
    """|x| in units of its last place, rounded to nearest even; the unit; the unit's exponent above the subnormals' own.

    unit = 2^(max(floor(log2|x|), emin) - mantissa_bits) is a power of two, so the division is exact and the rounding is the only one,
    from float32 and from float64 alike.
    """
    xp = xp_of(x)
    exponent = xp.clip(floor_log2(xp, xp.abs(x)), fmt.emin, None)
    unit = power_of_two(xp, exponent - fmt.mantissa_bits, x.dtype, device(x))
    return xp.round(xp.abs(x) / unit), unit, exponent - fmt.emin


def round_to(fmt: Format, x: Array, *, overflow: Overflow = "nan") -> Array:
    """The nearest value of the format, ties to even, on x's own dtype. What `overflow` does is said at `cast`."""
    xp = xp_of(x)
    if fmt is FP64 or (fmt is FP32 and x.dtype == xp.float32):
        return x  # the carrier's own grid
    q, unit, _ = quotient(fmt, x)
    y = q * unit
    limit = fmt.max if overflow == "saturate" else float("nan") if fmt.inf_code is None else float("inf")
    return xp.copysign(xp.where(y > fmt.max, xp.full_like(y, limit), y), x)


def encode(fmt: Format, x: Array, *, overflow: Overflow = "nan") -> Array:
    """The bit pattern of round_to(fmt, x). NaN becomes the positive quiet NaN."""
    xp = xp_of(x)
    finite = xp.where(xp.isnan(x), xp.zeros_like(x), xp.clip(x, -xp.finfo(x.dtype).max, xp.finfo(x.dtype).max))
    q, _, steps = quotient(fmt, finite)
    # q counts units from zero: a carry out of the mantissa moves into the exponent field by itself.
    code = steps * 2**fmt.mantissa_bits + xp.astype(q, xp.int64)
    beyond = fmt.max_code if overflow == "saturate" else fmt.max_code + 1  # infinity, or NaN where there is none
    code = xp.where((code > fmt.max_code) | xp.isinf(x), xp.full_like(code, beyond), code)
    code = code + xp.astype(xp.signbit(x), xp.int64) * 2 ** (fmt.bits - 1)
    if fmt.inf_code is None and overflow == "nan":
        code = xp.where(code % 2 ** (fmt.bits - 1) == beyond, xp.full_like(code, fmt.nan_code), code)
    code = xp.where(xp.isnan(x), xp.full_like(code, fmt.nan_code), code)
    return xp.astype(code, getattr(xp, fmt.code_dtype))


def decode(fmt: Format, codes: Array) -> Array:
    """The value of each bit pattern, in float32 (exact for every format of 16 bits and less)."""
    xp = xp_of(codes)
    code = xp.astype(codes, xp.int64)
    magnitude = code % 2 ** (fmt.bits - 1)
    field, mantissa = magnitude // 2**fmt.mantissa_bits, magnitude % 2**fmt.mantissa_bits
    units = mantissa + xp.where(field > 0, xp.full_like(field, 2**fmt.mantissa_bits), xp.zeros_like(field))
    unit = power_of_two(xp, xp.clip(field, 1, None) - 1 + fmt.emin - fmt.mantissa_bits, xp.float32, device(codes))
    x = xp.astype(xp.where(magnitude > fmt.max_code, xp.zeros_like(units), units), xp.float32) * unit
    special = xp.where(magnitude == (fmt.inf_code or -1), xp.full_like(x, float("inf")), xp.full_like(x, float("nan")))
    x = xp.where(magnitude > fmt.max_code, special, x)
    return xp.where(code >= 2 ** (fmt.bits - 1), -x, x)


SOURCE = "spec §4.1; OCP OFP8 1.0 (e4m3fn, e5m2); IEEE 754-2019 §4.3, §5.4 (rounding, conversion)"
DRAWS = {
    "boundary": ("boundary",),  # every value, every midpoint, their neighbours, the specials
    "normal": ("normal", 1.0),
    "wide": ("wide", -40, 20),
    "every-bf16": ("every_bf16",),
}


def _cases(dims: dict[str, int]) -> tuple[Case, ...]:
    return tuple(Case(name, {"n": n}, {"x": DRAWS[name]}) for name, n in dims.items())


def _declare(fmt: Format) -> None:
    default: Overflow = "saturate" if fmt.bits == 8 else "nan"
    cases = _cases({"boundary": 2048, "normal": 129, "wide": 1024, "every-bf16": 65536})
    beyond = "NaN, having no infinity" if fmt.inf_code is None else "±inf"

    @signature("x[n] -> y[n]:exact")
    def cast(x: Array, *, overflow: Overflow = default) -> tuple[Array, tuple]:
        return round_to(fmt, x, overflow=overflow), ()

    @signature("x[n] -> codes[n]:code")
    def encode_fwd(x: Array, *, overflow: Overflow = default) -> tuple[Array, tuple]:
        return encode(fmt, x, overflow=overflow), ()

    @signature("codes[n]:code -> x[n]:exact")
    def decode_fwd(codes: Array) -> tuple[Array, tuple]:
        if codes.dtype != getattr(xp_of(codes), fmt.code_dtype):
            raise ValueError(f"decode.{fmt.name}: codes are {codes.dtype}; expected {fmt.code_dtype}")
        return decode(fmt, codes), ()

    cast.__doc__ = f"""y[n] = the value of {fmt.name} nearest to x[n], ties to even

    Rounded once, from float32 and from float64. Subnormals and the sign of zero are kept, NaN stays NaN. What rounds beyond ±{fmt.max:g},
    infinities included, becomes ±{fmt.max:g} (overflow="saturate") or {beyond} (overflow="nan"). No backward: training passes the
    gradient straight through, which is a choice of the layer, not this op's derivative."""
    encode_fwd.__doc__ = f"""codes[n] = the {fmt.bits}-bit pattern of cast.{fmt.name}(x)[n]

    NaN encodes as {fmt.nan_code:#x}, whatever its sign was; from a subject any NaN pattern is accepted."""
    decode_fwd.__doc__ = f"""x[n] = (-1)^sign 2^(max(field,1)-{fmt.bias}) (mantissa/{2**fmt.mantissa_bits} + [field>0]) of codes[n]

    In float32, exact. codes must be {fmt.code_dtype}."""
    declare(Op(f"cast.{fmt.name}", cast, None, cases, "n", SOURCE))
    declare(Op(f"encode.{fmt.name}", encode_fwd, None, cases, "n", SOURCE))
    every = Case("every-code", {"n": 2**fmt.bits}, {"codes": ("codes",)})
    declare(Op(f"decode.{fmt.name}", decode_fwd, None, (every,), "n", SOURCE))


for _format in CASTS:
    _declare(_format)
