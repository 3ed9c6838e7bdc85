"""What the variants share: the narrow formats as numbers, their values by pure Python, and one rounding to a 16-bit format."""

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Layout:
    """A narrow format with a sign: widths of its fields, its largest finite code, the code that overflow gets, its NaN."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    top: int
    beyond: int
    nan: int
    infinite: bool = True
    negative_zero: bool = True

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def dtype(self) -> type:
        return np.uint8 if self.bits <= 8 else np.uint16 if self.bits <= 16 else np.uint32

    @property
    def least(self) -> float:
        """The smallest subnormal."""
        return 2.0 ** (1 - self.bias - self.mantissa_bits)

    def value(self, code: int) -> float:
        """Of a code without its sign, as if the exponent went on above the largest."""
        field, mantissa = divmod(code, 1 << self.mantissa_bits)
        return mantissa * self.least if field == 0 else ((1 << self.mantissa_bits) + mantissa) * self.least * 2.0 ** (field - 1)

    @property
    def max(self) -> float:
        return self.value(self.top)

    def overflow(self, overflow: str | None) -> str:
        return overflow or ("saturate" if self.bits <= 8 else "nan")


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("e4m3fn", 4, 3, 7, 0x7E, 0x7F, 0x7F, infinite=False),
        Layout("e5m2", 5, 2, 15, 0x7B, 0x7C, 0x7E),
        Layout("e4m3fnuz", 4, 3, 8, 0x7F, 0x80, 0x80, infinite=False, negative_zero=False),
        Layout("e5m2fnuz", 5, 2, 16, 0x7F, 0x80, 0x80, infinite=False, negative_zero=False),
        Layout("e2m1", 2, 1, 1, 0x7, 0x8, -1, infinite=False),  # no NaN
        Layout("e5m6", 5, 6, 15, 0x7BF, 0x7C0, 0x7E0),
        Layout("bf16", 8, 7, 127, 0x7F7F, 0x7F80, 0x7FC0),
        Layout("fp16", 5, 10, 15, 0x7BFF, 0x7C00, 0x7E00),
        Layout("tf32", 8, 10, 127, 0x3FBFF, 0x3FC00, 0x3FE00),
    )
}


def to_bf16(x: Any) -> Array:
    """float32 (or float64 by way of it, for values that came from float32) to the nearest bfloat16, on float32."""
    u = np.asarray(x, dtype=np.float32).view(np.uint32)
    rounded = (u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(x), np.float32(np.nan), rounded.view(np.float32))


def to_tf32(x: Array) -> Array:
    """float32 to the nearest with 10 bits of mantissa, on float32."""
    u = np.asarray(x, dtype=np.float32).view(np.uint32)
    rounded = (u + np.uint32(0xFFF) + ((u >> np.uint32(13)) & np.uint32(1))) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(x), rounded.view(np.float32), np.asarray(x, dtype=np.float32))


def to_fp16(x: Array) -> Array:
    with np.errstate(over="ignore"):
        return np.asarray(x).astype(np.float16).astype(np.float32)


STORE = {"fp32": lambda x: x, "fp64": lambda x: x, "bf16": to_bf16, "bf16-eager": to_bf16, "fp16": to_fp16}
