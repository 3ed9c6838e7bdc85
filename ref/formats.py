"""Floating-point formats as data: a format is a value, the code that rounds is written once (cast.py)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """sign | exponent | mantissa, with gradual underflow. nan_code and inf_code are None where the format has no such value.

    Without a sign there is no zero either: all codes are powers of two and the exponent's field is the code (e8m0).
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    max: float
    nan_code: int | None
    inf_code: int | None
    signed: bool = True
    negative_zero: bool = True

    @property
    def bits(self) -> int:
        return self.signed + self.exponent_bits + self.mantissa_bits

    @property
    def emin(self) -> int:
        """Exponent of the smallest normal number, and of every subnormal's grid."""
        return self.signed - self.bias

    @property
    def max_code(self) -> int:
        """The largest finite code; codes of one sign count up with the value."""
        beyond = (c for c in (self.inf_code, self.nan_code) if c is not None)
        return next(beyond, 2 ** (self.bits - self.signed)) - 1

    @property
    def code_dtype(self) -> str:
        return f"uint{next(width for width in (8, 16, 32, 64) if self.bits <= width)}"


# OCP 8-bit Floating Point Specification (OFP8) 1.0; IEEE 754-2019; bfloat16 is binary32's upper half.
E4M3FN = Format("e4m3fn", 4, 3, 7, 448.0, 0x7F, None)
E5M2 = Format("e5m2", 5, 2, 15, 57344.0, 0x7E, 0x7C)
# Graphcore and AMD (MI300): one bias more, a single NaN where -0 would be.
E4M3FNUZ = Format("e4m3fnuz", 4, 3, 8, 240.0, 0x80, None, negative_zero=False)
E5M2FNUZ = Format("e5m2fnuz", 5, 2, 16, 57344.0, 0x80, None, negative_zero=False)
# OCP Microscaling Formats (MX) 1.0: elements of FP4, and the scales of all.
E2M1 = Format("e2m1", 2, 1, 1, 6.0, None, None)
E8M0 = Format("e8m0", 8, 0, 127, 2.0**127, 0xFF, None, signed=False)
# DeepSeek-V3's cache of the attention output: binary16 without its four lowest bits.
E5M6 = Format("e5m6", 5, 6, 15, 65024.0, 0x7E0, 0x7C0)
BF16 = Format("bf16", 8, 7, 127, (2 - 2.0**-7) * 2.0**127, 0x7FC0, 0x7F80)
FP16 = Format("fp16", 5, 10, 15, 65504.0, 0x7E00, 0x7C00)
TF32 = Format("tf32", 8, 10, 127, (2 - 2.0**-10) * 2.0**127, 0x3FE00, 0x3FC00)
FP32 = Format("fp32", 8, 23, 127, (2 - 2.0**-23) * 2.0**127, 0x7FC00000, 0x7F800000)
FP64 = Format("fp64", 11, 52, 1023, (2 - 2.0**-52) * 2.0**1023, 0x7FF8 << 48, 0x7FF0 << 48)

CASTS = (E4M3FN, E5M2, E4M3FNUZ, E5M2FNUZ, E2M1, E8M0, E5M6, BF16, FP16, TF32)
FORMATS = {f.name: f for f in (*CASTS, FP32, FP64)}
