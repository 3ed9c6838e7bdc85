"""Floating-point formats as data: a format is a value, the code that rounds is written once (cast.py)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """sign | exponent | mantissa, with gradual underflow. `inf_code` is None where the format has no infinity."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    max: float
    nan_code: int
    inf_code: int | None

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def emin(self) -> int:
        """Exponent of the smallest normal number, and of every subnormal's grid."""
        return 1 - self.bias

    @property
    def max_code(self) -> int:
        """The largest finite code; codes of one sign count up with the value."""
        return (self.inf_code if self.inf_code is not None else self.nan_code) - 1

    @property
    def code_dtype(self) -> str:
        return f"uint{next(width for width in (8, 16, 32, 64) if self.bits <= width)}"


# OCP 8-bit Floating Point Specification (OFP8) 1.0; IEEE 754-2019; bfloat16 is binary32's upper half.
E4M3FN = Format("e4m3fn", 4, 3, 7, 448.0, 0x7F, None)
E5M2 = Format("e5m2", 5, 2, 15, 57344.0, 0x7E, 0x7C)
BF16 = Format("bf16", 8, 7, 127, (2 - 2.0**-7) * 2.0**127, 0x7FC0, 0x7F80)
FP16 = Format("fp16", 5, 10, 15, 65504.0, 0x7E00, 0x7C00)
FP32 = Format("fp32", 8, 23, 127, (2 - 2.0**-23) * 2.0**127, 0x7FC00000, 0x7F800000)
FP64 = Format("fp64", 11, 52, 1023, (2 - 2.0**-52) * 2.0**1023, 0x7FF8 << 48, 0x7FF0 << 48)

FORMATS = {f.name: f for f in (E4M3FN, E5M2, BF16, FP16, FP32, FP64)}
CASTS = (E4M3FN, E5M2, BF16, FP16)
