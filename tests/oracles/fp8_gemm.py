"""Products of FP8 codes as tensor cores accumulate them, in integers until the result; shares nothing with `ref`.

Equation: y[n,o] = sum over the parts p of d of part_p[n,o] * a_scale * b_scale. A part of an exact accumulator is the sum of its products.
In a tensor core, group after group of 32 products, with u = 2^(E - fraction), E the largest exponent among them and the accumulator c,
c := keep(u * (sum of trunc(product / u) + trunc(c / u))), where keep truncates to `kept` bits after the leading one.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from operator import mul
from typing import Any

import numpy as np

from .edges import carrier, choose, code_list, fill, positive
from .floats import BINARY32, BINARY64, CAST_FORMATS, FloatFormat, add, decode, multiply, round_fraction, significand
from .quantize import FORMATS

Arrays = dict[str, np.ndarray]
Number = Fraction | float  # a float only if it is an infinity or NaN
GROUP = 32
FLOAT32_EMIN = -126
DEFAULTS = {
    "accumulator": "fp32",
    "promote": 128,
    "tile": 128,
    "scale_order": "one by one",
    "format": "e4m3fn",
    "out": "fp32",
}


def hardware(accumulator: str) -> tuple[int, int] | None:
    """(fraction, kept) of a tensor core's accumulator; None for one that loses nothing that is modelled here."""
    if accumulator in ("fp32", "exact"):
        return None
    bits = re.fullmatch("bits:([0-9]+)", {"wgmma13": "bits:13", "mma25": "bits:25"}.get(accumulator, accumulator))
    if bits is None or not 1 <= int(bits[1]) <= 30:
        raise ValueError(f"accumulator must be fp32, exact, wgmma13, mma25 or bits:1 to bits:30, got {accumulator!r}")
    return int(bits[1]), min(int(bits[1]), 23)


def _toward_zero(m: int, shift: int) -> int:
    """m * 2^shift, truncated"""
    if shift >= 0:
        return m << shift
    return m >> -shift if m >= 0 else -(-m >> -shift)


def _exponent(m: int, q: int) -> int:
    """Of the leading bit of m * 2^q as a float32 has it: its subnormals share one."""
    return max(abs(m).bit_length() - 1 + q, FLOAT32_EMIN)


def step(c: tuple[int, int], terms: list[tuple[int, int, int]], fraction: int, kept: int) -> tuple[int, int]:
    """The accumulator (m, q) after one group of products (m, q, exponent that aligns it)."""
    terms = [t for t in terms if t[0]]
    if c[0]:
        terms.append((*c, _exponent(*c)))
    if not terms:
        return 0, 0
    unit = max(t[2] for t in terms) - fraction
    total = sum(_toward_zero(m, q - unit) for m, q, _ in terms)
    if not total:
        return 0, 0
    last = max(_exponent(total, unit) - kept, unit)  # exponents of the last place kept; float32's largest is out of reach
    return _toward_zero(total, unit - last), last


def _special(a: list[int], b: list[int], fmt: FloatFormat) -> float:
    """The sum of products of which some is no number: NaN or an infinity."""
    return sum(decode(x, fmt) * decode(y, fmt) for x, y in zip(a, b, strict=True))  # none is out of float64's range


class Engine:
    """Sums of products of codes of one format."""

    def __init__(self, fmt: FloatFormat, model: tuple[int, int] | None) -> None:
        self.fmt, self.model = fmt, model
        self.pairs: list[tuple[int, int]] = []  # by code: (m, q), the value being m * 2^q; 0 for what is no number
        self.finite: list[bool] = []
        for code in range(1 << fmt.bits):
            self.finite.append(math.isfinite(decode(code, fmt)))
            m, q = significand(code & ~fmt.sign_bit, fmt) if self.finite[-1] else (0, 0)
            self.pairs.append((-m if code & fmt.sign_bit else m, q))
        self.fixed = [m << (q - fmt.quantum) if m else 0 for m, q in self.pairs]  # on the grid of the smallest value

    def part(self, a: list[int], b: list[int]) -> Number:
        """sum of a * b, as the accumulator has it."""
        if not (all(map(self.finite.__getitem__, a)) and all(map(self.finite.__getitem__, b))):
            return _special(a, b, self.fmt)
        if self.model is None:
            total = sum(map(mul, map(self.fixed.__getitem__, a), map(self.fixed.__getitem__, b)))
            return Fraction(total) * Fraction(2) ** (2 * self.fmt.quantum)
        c = (0, 0)
        two = 2 * self.fmt.mantissa_bits  # the leading bit's exponent is that of the last place and mantissa_bits; also a subnormal's emin
        for start in range(0, len(a), GROUP):
            terms = []
            for x, y in zip(a[start : start + GROUP], b[start : start + GROUP], strict=True):
                (m, q), (k, r) = self.pairs[x], self.pairs[y]
                terms.append((m * k, q + r, q + r + two))
            c = step(c, terms, *self.model)
        return Fraction(c[0]) * Fraction(2) ** c[1]


def total(numbers: list[Number]) -> Number:
    """Exact, or as IEEE 754 adds infinities and NaN."""
    special = [x for x in numbers if isinstance(x, float)]
    return sum(special) if special else sum(numbers, start=Fraction(0))


def scaled(part: Number, *scales: float) -> Number:
    """Exact; scales are positive and finite, so they change neither an infinity nor NaN."""
    return part if isinstance(part, float) else math.prod(map(Fraction, scales), start=part)


Sums = list[tuple[Number, float, float]]  # part, a's scale, b's scale


@dataclass(frozen=True)
class Operand:
    """Rows of codes, and the scales of a row's tiles."""

    codes: list[list[int]]
    scales: list[list[float]]


def rows_of(codes: np.ndarray, scale: np.ndarray) -> Operand:
    """An operand; where there are fewer rows of scales than of codes, each belongs to 128 rows."""
    count = len(codes)
    scales = scale.tolist()
    return Operand(codes.tolist(), scales if len(scales) == count else [scales[o // 128] for o in range(count)])


def dots(a: Operand, b: Operand, depth: int, at: dict[str, Any]) -> Iterator[Sums]:
    """For each output in row-major order its parts and their scales."""
    tile, promote = at["tile"], at["promote"] or at["tile"]
    engine = Engine(CAST_FORMATS[at["format"]], hardware(at["accumulator"]))
    starts = range(0, depth, promote)
    cut = [[row[s : s + promote] for s in starts] for row in b.codes]
    for row, own in zip(a.codes, a.scales, strict=True):
        mine = [row[s : s + promote] for s in starts]
        for parts, theirs in zip(cut, b.scales, strict=True):
            yield [(engine.part(x, y), own[s // tile], theirs[s // tile]) for s, x, y in zip(starts, mine, parts, strict=True)]


def _rounded(value: Number, fmt: FloatFormat) -> float:
    return round_fraction(value, fmt) if isinstance(value, Fraction) else value


def in_truth(a: Operand, b: Operand, depth: int, at: dict[str, Any]) -> np.ndarray:
    """Parts times scales summed exactly and rounded once, to bf16 if the output is that: float64 [n,o]."""
    fmt = CAST_FORMATS["bf16"] if at["out"] == "bf16" else BINARY64
    values = [_rounded(total([scaled(*each) for each in sums]), fmt) for sums in dots(a, b, depth, at)]
    return np.array(values, np.float64).reshape(len(a.codes), len(b.codes))


def in_float32(a: Operand, b: Operand, depth: int, at: dict[str, Any]) -> np.ndarray:
    """The same, every operation after a part's own rounded to float32 in the order of the contract."""
    values = []
    for sums in dots(a, b, depth, at):
        y = 0.0
        for part, s, t in sums:
            p = _rounded(part, BINARY32)
            if at["scale_order"] == "one by one":
                p = multiply(multiply(p, s, BINARY32), t, BINARY32)
            else:
                p = multiply(p, multiply(s, t, BINARY32), BINARY32)
            y = add(y, p, BINARY32)
        narrow = at["out"] == "bf16" and math.isfinite(y)
        values.append(round_fraction(Fraction(y), CAST_FORMATS["bf16"]) if narrow else y)
    return np.array(values, np.float32).reshape(len(a.codes), len(b.codes))


def _checked(inputs: Arrays, attrs: dict[str, Any]) -> tuple[Operand, Operand, int, dict[str, Any]]:
    at = fill(DEFAULTS, attrs)
    fmt = CAST_FORMATS[choose("format", at["format"], FORMATS)]
    choose("scale_order", at["scale_order"], ("one by one", "product first"))
    choose("out", at["out"], ("fp32", "bf16"))
    hardware(at["accumulator"])
    tile, promote = positive("tile", at["tile"]), at["promote"]
    if promote < 0 or (promote and tile % promote):
        raise ValueError(f"promote must be 0 or divide tile = {tile}, got {promote}")
    a, b = inputs["a_codes"], inputs["b_codes"]
    (n, d), o, tiles = a.shape, len(b), -(-a.shape[1] // tile)
    if b.shape[1] != d:
        raise ValueError(f"a_codes has {d} columns, b_codes {b.shape[1]}")
    for name in ("a", "b"):
        code_list(inputs[f"{name}_codes"], fmt, f"{name}_codes")
        scale, rows = inputs[f"{name}_scale"], (n,) if name == "a" else (-(-o // 128), o)
        carrier(scale)
        if scale.ndim != 2 or scale.shape[0] not in rows or scale.shape[1] != tiles:
            raise ValueError(f"{name}_scale has shape {scale.shape}, expected {rows} rows, {tiles} columns")
        if not all(0 < s < math.inf for s in scale.ravel().tolist()):
            raise ValueError(f"{name}_scale must be finite and positive")
    return rows_of(a, inputs["a_scale"]), rows_of(b, inputs["b_scale"]), d, at


def gemm(inputs: Arrays, attrs: dict[str, Any]) -> Arrays:
    """fp8.gemm: a_codes, a_scale, b_codes, b_scale -> y."""
    return {"y": in_truth(*_checked(inputs, attrs))}


def gemm_in_float32(inputs: Arrays, attrs: dict[str, Any]) -> np.ndarray:
    """y of fp8.gemm as float32 hardware has it, bit for bit with a tensor core's accumulator; scales must be float32."""
    if any(carrier(inputs[f"{name}_scale"]) is not BINARY32 for name in ("a", "b")):
        raise TypeError("scales must be float32")
    return in_float32(*_checked(inputs, attrs))
