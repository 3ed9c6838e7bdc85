"""cast, encode, decode: values to a narrow format's grid and to its bit patterns. Spec §4.1."""

from typing import Literal

from array_api_compat import device

from .formats import CASTS, FP32, FP64, Format
from .op import Case, Op, declare, signature
from .xp import Array, clip, floor_log2, power_of_two, xp_of

Overflow = Literal["saturate", "nan"]
Rounding = Literal["half-even", "half-away", "half-zero", "zero", "stochastic"]


def quotient(fmt: Format, x: Array, rounding: Rounding = "half-even", random: Array | None = None) -> tuple[Array, Array, Array]:
    """|x| in units of its last place, rounded; the unit; the unit's exponent above the subnormals' own.

    unit = 2^(max(floor(log2|x|), emin) - mantissa_bits) is a power of two, so the division is exact and the rounding is the only one,
    from float32 and from float64 alike.
    """
    xp = xp_of(x)
    exponent = clip(floor_log2(xp, xp.abs(x)), fmt.emin, None)
    unit = power_of_two(xp, exponent - fmt.mantissa_bits, x.dtype, device(x))
    q = rounded(xp.abs(x) / unit, rounding, random)
    return q if fmt.signed else clip(q, 1, None), unit, exponent - fmt.emin


def rounded(q: Array, rounding: Rounding, random: Array | None = None) -> Array:
    """q >= 0 to a whole number. "stochastic": up where random[n], uniform in [0,1), is below the fraction that is cut off."""
    xp = xp_of(q)
    if rounding == "half-even":
        return xp.round(q)
    down = xp.floor(q)
    fraction = q - down  # exact
    if rounding == "zero":
        return down
    up = {"half-away": fraction >= 0.5, "half-zero": fraction > 0.5}.get(rounding)
    return down + xp.astype(fraction > random if up is None else up, q.dtype)


def round_to(fmt: Format, x: Array, *, overflow: Overflow = "nan", rounding: Rounding = "half-even", random: Array | None = None) -> Array:
    """The nearest value of the format, ties to even, on x's own dtype. What the attributes do is said at `cast`."""
    xp = xp_of(x)
    if fmt is FP64 or (fmt is FP32 and x.dtype == xp.float32):
        return x  # the carrier's own grid
    q, unit, _ = quotient(fmt, x, rounding, random)
    y = q * unit
    beyond = xp.isinf(x) if rounding == "zero" else y > fmt.max
    limit = fmt.max if overflow == "saturate" else float("nan") if fmt.inf_code is None else float("inf")
    y = xp.where(beyond, xp.full_like(y, limit), xp.where(y > fmt.max, xp.full_like(y, fmt.max), y))
    if not fmt.signed:
        return xp.where(x > 0, y, xp.full_like(y, float("nan")))
    y = xp.copysign(y, x)
    return y if fmt.negative_zero else xp.where(y == 0, xp.zeros_like(y), y)


def encode(fmt: Format, x: Array, *, overflow: Overflow = "nan", rounding: Rounding = "half-even", random: Array | None = None) -> Array:
    """The bit pattern of round_to(fmt, x). NaN becomes the positive quiet NaN; a format without NaN has no place for it."""
    xp = xp_of(x)
    finite = xp.where(xp.isnan(x), xp.zeros_like(x), clip(x, -xp.finfo(x.dtype).max, xp.finfo(x.dtype).max))
    q, _, steps = quotient(fmt, finite, rounding, random)
    # q counts units from zero: a carry out of the mantissa moves into the exponent field by itself. Without a zero it counts from 1.
    code = steps * 2**fmt.mantissa_bits + xp.astype(q, xp.int64) - int(not fmt.signed)
    above = code > fmt.max_code
    beyond = xp.isinf(x) if rounding == "zero" else xp.isinf(x) | above
    limit = fmt.max_code if overflow == "saturate" else fmt.nan_code if fmt.inf_code is None else fmt.inf_code
    code = xp.where(beyond, xp.full_like(code, limit), xp.where(above, xp.full_like(code, fmt.max_code), code))
    if fmt.signed:
        negative = xp.signbit(x) if fmt.negative_zero else xp.signbit(x) & (code > 0)
        code = code + xp.astype(negative, xp.int64) * 2 ** (fmt.bits - 1)
    nan = xp.isnan(x) if fmt.signed else ~(x > 0)
    if fmt.inf_code is None and overflow == "nan":  # a NaN has no sign to keep
        nan = nan | beyond
    if fmt.nan_code is not None:
        code = xp.where(nan, xp.full_like(code, fmt.nan_code), code)
    return xp.astype(code, getattr(xp, fmt.code_dtype))


def decode(fmt: Format, codes: Array) -> Array:
    """The value of each bit pattern, in float32 (exact for every format of 19 bits and less)."""
    xp = xp_of(codes)
    code = xp.astype(codes, xp.int64)
    magnitude = code % 2 ** (fmt.bits - fmt.signed)
    field, mantissa = magnitude // 2**fmt.mantissa_bits, magnitude % 2**fmt.mantissa_bits
    hidden = field > 0 if fmt.signed else field >= 0
    units = mantissa + xp.where(hidden, xp.full_like(field, 2**fmt.mantissa_bits), xp.zeros_like(field))
    steps = clip(field, 1, None) - 1 if fmt.signed else field
    unit = power_of_two(xp, steps + fmt.emin - fmt.mantissa_bits, xp.float32, device(codes))
    x = xp.astype(xp.where(magnitude > fmt.max_code, xp.zeros_like(units), units), xp.float32) * unit
    special = xp.where(magnitude == (fmt.inf_code or -1), xp.full_like(x, float("inf")), xp.full_like(x, float("nan")))
    x = xp.where(magnitude > fmt.max_code, special, x)
    if not fmt.signed:
        return x
    x = xp.where(code >= 2 ** (fmt.bits - 1), -x, x)
    return x if fmt.negative_zero else xp.where(code == fmt.nan_code, xp.full_like(x, float("nan")), x)


SOURCE = "spec §4.1; OCP OFP8 1.0 (e4m3fn, e5m2), MX 1.0 (e2m1, e8m0); ml_dtypes (fnuz); IEEE 754-2019 §4.3, §5.4 (rounding, conversion)"
DRAWS = {
    "boundary": ("boundary",),  # every value, every midpoint, their neighbours, the specials
    "normal": ("normal", 1.0),
    "wide": ("wide", -40, 20),
    "every-bf16": ("every_bf16",),
}
ROUNDINGS: tuple[Rounding, ...] = ("half-away", "half-zero", "zero")


def _cases(fmt: Format) -> tuple[Case, ...]:
    dims = {"boundary": 2048, "normal": 129, "wide": 1024, "every-bf16": 65536}
    if fmt.nan_code is None:
        del dims["every-bf16"]  # has NaNs in it
    cases = [Case(name, {"n": n}, {"x": DRAWS[name]}) for name, n in dims.items()]
    cases += [Case(f"boundary.{r}", {"n": 2048}, {"x": ("boundary",)}, {"rounding": r}) for r in ROUNDINGS]
    random = Case("stochastic", {"n": 2048}, {"x": ("boundary",), "random": ("uniform", 0.0, 0.999)}, {"rounding": "stochastic"})
    return (*cases, random)


def _check(op: str, fmt: Format, x: Array, overflow: Overflow, rounding: Rounding, random: Array | None) -> None:
    xp = xp_of(x)
    if (rounding == "stochastic") != (random is not None):
        raise ValueError(f"{op}: random is {'missing' if random is None else 'given'}; rounding='stochastic' takes it, no other does")
    if random is not None and not bool(xp.all((random >= 0) & (random < 1))):
        raise ValueError(f"{op}: random has values outside [0, 1); expected uniform random numbers")
    if fmt.nan_code is None and bool(xp.any(xp.isnan(x))):
        raise ValueError(f"{op}: x[{int(xp.nonzero(xp.isnan(x))[0][0])}] is NaN; {fmt.name} has none")
    if fmt.nan_code is None and overflow == "nan":
        raise ValueError(f"{op}: overflow is 'nan'; {fmt.name} has none: expected 'saturate'")


def _declare(fmt: Format) -> None:
    default: Overflow = "saturate" if fmt.bits <= 8 else "nan"
    beyond = "NaN, having no infinity" if fmt.inf_code is None else "±inf"
    kept = "Subnormals and the sign of zero are kept" if fmt.negative_zero else "Subnormals are kept, there is no -0"
    kept, nan = (
        (kept, "NaN stays NaN") if fmt.signed else ("There is no zero: what is below 2^-127 becomes 2^-127", "NaN and x <= 0 are NaN")
    )
    nan = nan if fmt.nan_code is not None else "NaN is refused"

    @signature("x[n] random?[n]:const -> y[n]:exact")
    def cast(
        x: Array, random: Array | None = None, *, overflow: Overflow = default, rounding: Rounding = "half-even"
    ) -> tuple[Array, tuple]:
        _check(f"cast.{fmt.name}", fmt, x, overflow, rounding, random)
        return round_to(fmt, x, overflow=overflow, rounding=rounding, random=random), ()

    @signature("x[n] random?[n]:const -> codes[n]:code")
    def encode_fwd(
        x: Array, random: Array | None = None, *, overflow: Overflow = default, rounding: Rounding = "half-even"
    ) -> tuple[Array, tuple]:
        _check(f"encode.{fmt.name}", fmt, x, overflow, rounding, random)
        return encode(fmt, x, overflow=overflow, rounding=rounding, random=random), ()

    @signature("codes[n]:code -> x[n]:exact")
    def decode_fwd(codes: Array) -> tuple[Array, tuple]:
        xp, what = xp_of(codes), f"decode.{fmt.name}"
        if codes.dtype != getattr(xp, fmt.code_dtype):
            raise ValueError(f"{what}: codes are {codes.dtype}; expected {fmt.code_dtype}")
        if fmt.bits % 8 and bool(xp.any(xp.astype(codes, xp.int64) >= 2**fmt.bits)):
            raise ValueError(
                f"{what}: codes reach {int(xp.max(xp.astype(codes, xp.int64)))}; expected {fmt.bits} bits, below {2**fmt.bits}"
            )
        return decode(fmt, codes), ()

    cast.__doc__ = f"""y[n] = the value of {fmt.name} nearest to x[n], ties to even

    Rounded once, from float32 and from float64. {kept}, {nan}. What rounds beyond ±{fmt.max:g}, infinities included, becomes
    ±{fmt.max:g} (overflow="saturate") or {beyond} (overflow="nan"). rounding="half-away" and "half-zero" break ties by magnitude, "zero"
    truncates (finite values never overflow), "stochastic" rounds up where random[n], uniform in [0,1), is below the fraction cut off.
    No backward: training passes the gradient straight through, which is a choice of the layer, not this op's derivative."""
    encode_fwd.__doc__ = f"""codes[n] = the {fmt.bits}-bit pattern of cast.{fmt.name}(x)[n], in the low bits of a {fmt.code_dtype}

    {f"NaN encodes as {fmt.nan_code:#x}, whatever its sign was; from a subject any NaN pattern is accepted" if fmt.nan_code else nan}."""
    sign = "(-1)^sign " if fmt.signed else ""
    field, hidden = ("max(field,1)", "[field>0]") if fmt.signed else ("field", "1")
    decode_fwd.__doc__ = f"""x[n] = {sign}2^({field}-{fmt.bias}) (mantissa/{2**fmt.mantissa_bits} + {hidden}) of codes[n]

    In float32, exact. codes must be {fmt.code_dtype}{f" below {2**fmt.bits}" if fmt.bits % 8 else ""}."""
    declare(Op(f"cast.{fmt.name}", cast, None, _cases(fmt), "n", SOURCE))
    if fmt.bits > 16:
        return  # tf32 is stored as float32
    declare(Op(f"encode.{fmt.name}", encode_fwd, None, _cases(fmt), "n", SOURCE))
    every = Case("every-code", {"n": 2**fmt.bits}, {"codes": ("codes",)})
    declare(Op(f"decode.{fmt.name}", decode_fwd, None, (every,), "n", SOURCE))


for _format in CASTS:
    _declare(_format)
