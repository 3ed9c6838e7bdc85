"""Floating-point rounding on exact integers; shares nothing with `ref`.

Equation: round(N/D) = m * 2^q with q = max(floor(log2(N/D)) - mantissa_bits, quantum) and m the integer nearest N/D * 2^-q, ties to even,
or another neighbour of N/D * 2^-q, as `ROUNDINGS` has it.
A float operation is its exact rational result put through that once. Values travel as Python floats, which hold every format here exactly.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class FloatFormat:
    """A binary format; `max_code`, `inf_code` are bit patterns without the sign, None where the format has no such value.

    One that is not `signed` is e8m0: powers of two alone, no zero, the code is the biased exponent. Without `negative_zero` the pattern of
    the sign alone is NaN.
    """

    exponent_bits: int
    mantissa_bits: int
    bias: int
    max_code: int
    inf_code: int | None
    nan_code: int | None
    signed: bool = True
    negative_zero: bool = True

    @property
    def quantum(self) -> int:
        """Exponent of the smallest positive value."""
        return (1 if self.signed else 0) - self.bias - self.mantissa_bits

    @property
    def sign_bit(self) -> int:
        return 1 << (self.exponent_bits + self.mantissa_bits) if self.signed else 0

    @property
    def bits(self) -> int:
        return self.signed + self.exponent_bits + self.mantissa_bits


CAST_FORMATS: dict[str, FloatFormat] = {
    "e4m3fn": FloatFormat(4, 3, 7, max_code=0x7E, inf_code=None, nan_code=0x7F),
    "e5m2": FloatFormat(5, 2, 15, max_code=0x7B, inf_code=0x7C, nan_code=0x7E),
    "e4m3fnuz": FloatFormat(4, 3, 8, max_code=0x7F, inf_code=None, nan_code=0x80, negative_zero=False),
    "e5m2fnuz": FloatFormat(5, 2, 16, max_code=0x7F, inf_code=None, nan_code=0x80, negative_zero=False),
    "e2m1": FloatFormat(2, 1, 1, max_code=0x7, inf_code=None, nan_code=None),
    "e8m0": FloatFormat(8, 0, 127, max_code=0xFE, inf_code=None, nan_code=0xFF, signed=False),
    "e5m6": FloatFormat(5, 6, 15, max_code=0x7BF, inf_code=0x7C0, nan_code=0x7E0),
    "bf16": FloatFormat(8, 7, 127, max_code=0x7F7F, inf_code=0x7F80, nan_code=0x7FC0),
    "fp16": FloatFormat(5, 10, 15, max_code=0x7BFF, inf_code=0x7C00, nan_code=0x7E00),
    "tf32": FloatFormat(8, 10, 127, max_code=0x3FBFF, inf_code=0x3FC00, nan_code=0x3FE00),  # 19 bits; nothing stores them as such
}
BINARY32 = FloatFormat(8, 23, 127, max_code=0x7F7F_FFFF, inf_code=0x7F80_0000, nan_code=0x7FC0_0000)
BINARY64 = FloatFormat(11, 52, 1023, max_code=0x7FEF << 48 | 0xFFFF_FFFF_FFFF, inf_code=0x7FF0 << 48, nan_code=0x7FF8 << 48)


Up = Callable[[int, int, int], bool]  # (m, rest, den): is m + rest/den, 0 <= rest < den, rounded to m + 1?


def half_even(m: int, rest: int, den: int) -> bool:
    return 2 * rest > den or (2 * rest == den and m % 2 == 1)


def half_away(m: int, rest: int, den: int) -> bool:
    return 2 * rest >= den


def half_zero(m: int, rest: int, den: int) -> bool:
    return 2 * rest > den


def toward_zero(m: int, rest: int, den: int) -> bool:
    return False


def stochastic(random: float) -> Up:
    """Up where `random` is less than what is cut off, in units of the last place."""
    num, scale = random.as_integer_ratio()
    return lambda m, rest, den: num * den < rest * scale


ROUNDINGS: dict[str, Up] = {"half-even": half_even, "half-away": half_away, "half-zero": half_zero, "zero": toward_zero}


def round_code(num: int, den: int, fmt: FloatFormat, up: Up = half_even) -> int:
    """Sign-less code of num/den (num >= 0, den > 0) rounded once, as if the exponent were unbounded: above `max_code` means overflow."""
    if num == 0:
        return 0
    quantum, bits = fmt.quantum, fmt.mantissa_bits
    exponent = num.bit_length() - den.bit_length()  # floor(log2(num/den)), or one too many
    if (num << -exponent if exponent < 0 else num) < (den << exponent if exponent > 0 else den):
        exponent -= 1
    q = max(exponent - bits, quantum)
    if q < 0:
        num <<= -q
    else:
        den <<= q
    m, rest = divmod(num, den)
    m += up(m, rest, den)
    if not fmt.signed:  # m is 1, or 2 if rounded up; 0 or 1 below the smallest value, which is what all of that becomes
        return max(q - quantum + m - 1, 0)
    # The leading bit of a normal m counts as one exponent step, and so does the carry of m = 2^(bits + 1): one formula serves all.
    return ((q - quantum) << bits) + m


def significand(code: int, fmt: FloatFormat) -> tuple[int, int]:
    """(m, q) with value m * 2^q of a sign-less code, read as if the exponent field had no reserved values."""
    if not fmt.signed:
        return 1, fmt.quantum + code
    field, fraction = code >> fmt.mantissa_bits, code & ((1 << fmt.mantissa_bits) - 1)
    return (fraction, fmt.quantum) if field == 0 else (fraction | 1 << fmt.mantissa_bits, fmt.quantum + field - 1)


def code_fraction(code: int, fmt: FloatFormat) -> Fraction:
    """Exact value of a sign-less code, read as `significand` does."""
    m, q = significand(code, fmt)
    return Fraction(m) * Fraction(2) ** q


def decode(code: int, fmt: FloatFormat) -> float:
    """Exact value of a code, sign bit and special values included."""
    if code == fmt.nan_code:
        return math.nan
    magnitude = code & ~fmt.sign_bit
    if magnitude == fmt.inf_code:
        value = math.inf
    elif magnitude > fmt.max_code:
        return math.nan
    else:
        value = math.ldexp(*significand(magnitude, fmt))
    return -value if code & fmt.sign_bit else value


def round_ratio(sign: float, num: int, den: int, fmt: FloatFormat) -> float:
    """sign * (num/den) rounded once to `fmt`; overflow gives an infinity, as IEEE 754 does."""
    code = round_code(num, den, fmt)
    return math.copysign(math.inf if code > fmt.max_code else math.ldexp(*significand(code, fmt)), sign)


def round_fraction(value: Fraction, fmt: FloatFormat) -> float:
    """`value` rounded once to `fmt`; zero comes out positive."""
    return round_ratio(-1.0 if value < 0 else 1.0, abs(value.numerator), value.denominator, fmt)


def _sign_of_product(a: float, b: float) -> float:
    return math.copysign(1.0, a) * math.copysign(1.0, b)


def multiply(a: float, b: float, fmt: FloatFormat) -> float:
    """IEEE 754 a * b in `fmt` (BINARY32 or BINARY64), a and b being values of `fmt`."""
    sign = _sign_of_product(a, b)
    if math.isnan(a) or math.isnan(b):
        return math.nan
    if math.isinf(a) or math.isinf(b):
        return math.nan if a == 0 or b == 0 else math.copysign(math.inf, sign)
    (an, ad), (bn, bd) = abs(a).as_integer_ratio(), abs(b).as_integer_ratio()
    return round_ratio(sign, an * bn, ad * bd, fmt)


def divide(a: float, b: float, fmt: FloatFormat) -> float:
    """IEEE 754 a / b in `fmt` (BINARY32 or BINARY64), a and b being values of `fmt`."""
    sign = _sign_of_product(a, b)
    if math.isnan(a) or math.isnan(b) or (math.isinf(a) and math.isinf(b)) or (a == 0 and b == 0):
        return math.nan
    if math.isinf(a) or b == 0:
        return math.copysign(math.inf, sign)
    if math.isinf(b):
        return math.copysign(0.0, sign)
    (an, ad), (bn, bd) = abs(a).as_integer_ratio(), abs(b).as_integer_ratio()
    return round_ratio(sign, an * bd, ad * bn, fmt)


def add(a: float, b: float, fmt: FloatFormat) -> float:
    """IEEE 754 a + b in `fmt` (BINARY32 or BINARY64), a and b being values of `fmt`. A sum of zero is -0 only of two of them."""
    if not (math.isfinite(a) and math.isfinite(b)):
        return a + b  # nothing is rounded
    total = Fraction(a) + Fraction(b)
    return round_fraction(total, fmt) if total else (-0.0 if math.copysign(1.0, a) < 0 and math.copysign(1.0, b) < 0 and a == 0 else 0.0)
