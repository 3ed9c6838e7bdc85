"""How tensor cores add up: groups of products and the accumulator, aligned to the largest exponent, truncated, summed. Spec §4.4.

The models are those of MMA-Sim (arXiv:2511.10909): bit-accurate claims about hardware, made from its outputs. All is exact in float64.
"""

from dataclasses import dataclass

from array_api_compat import device

from .formats import Format
from .xp import Array, clip, floor_log2, power_of_two, xp_of

AT_ONCE = 2**21  # products that are held at a time
ZERO = -1000  # the exponent of a zero: below all others


@dataclass(frozen=True)
class Accumulator:
    """`group` products and the accumulator are truncated toward zero to `fraction` bits below the largest exponent among them; their exact
    sum is truncated to a float32 with `kept` mantissa bits."""

    fraction: int
    kept: int
    group: int = 32


def accumulator_named(op: str, name: str) -> Accumulator | None:
    """None where no hardware is simulated: "fp32" and "exact"."""
    known = {"wgmma13": 13, "mma25": 25}
    if isinstance(name, str):
        if name in ("fp32", "exact"):
            return None
        kind, _, digits = name.partition(":")
        bits = known.get(name) or (int(digits) if kind == "bits" and digits.isascii() and digits.isdigit() else 0)
        if 1 <= bits <= 30:
            return Accumulator(bits, min(bits, 23))
    raise ValueError(f"{op}: accumulator is {name!r}; expected fp32, exact, wgmma13, mma25 or bits:F with F from 1 to 30")


def exponents(values: Array, emin: int) -> Array:
    """The exponent that aligns a number: of its leading bit, a subnormal's being emin; ZERO for 0"""
    xp = xp_of(values)
    magnitude = xp.abs(values)
    known = xp.where(xp.isfinite(magnitude), magnitude, xp.zeros_like(magnitude))
    e = clip(floor_log2(xp, known), emin, None)
    return xp.where(known > 0, e, xp.full_like(e, ZERO))


def fused_dot(a: Array, b: Array, fmt: Format, how: Accumulator, start: Array | None = None) -> Array:
    """c[n,o] in float64: `group` after `group` of a[n,d] b[o,d] along d, c := kept(Σ_d trunc(a b / u) + trunc(c / u)) u

    u = 2^(E - fraction), E the largest of exponent(a) + exponent(b) and exponent(c) (products are not renormalised: theirs is up to 4 times
    2^E). Any NaN, or infinities of both signs, give NaN; -0 becomes +0. `start` is the accumulator to begin with.
    """
    xp = xp_of(a)
    (n, d), o = a.shape, b.shape[0]
    rows = max(1, AT_ONCE // max(1, o * how.group))
    if n > rows:
        parts = [fused_dot(a[i : i + rows, :], b, fmt, how, None if start is None else start[i : i + rows, :]) for i in range(0, n, rows)]
        return xp.concat(parts, axis=0)
    a, b = xp.astype(a, xp.float64), xp.astype(b, xp.float64)
    ea, eb = exponents(a, fmt.emin), exponents(b, fmt.emin)
    c = xp.zeros((n, o), dtype=xp.float64, device=device(a)) if start is None else start
    for k in range(0, d, how.group):
        group = slice(k, min(k + how.group, d))
        product = a[:, None, group] * b[None, :, group]  # [n,o,group], exact
        e = xp.max(ea[:, None, group] + eb[None, :, group], axis=2)
        c = truncated_sum(product, c, xp.where(e > exponents(c, -126), e, exponents(c, -126)), how)
    return c


def truncated_sum(product: Array, c: Array, e: Array, how: Accumulator) -> Array:
    """One step of the accumulator: [n,o]"""
    xp, dev = xp_of(c), device(c)
    e = clip(e, -200, None)  # all zero: any unit does
    scale = power_of_two(xp, how.fraction - e, xp.float64, dev)
    total = xp.sum(xp.trunc(product * scale[:, :, None]), axis=2) + xp.trunc(c * scale)
    total = total * power_of_two(xp, e - how.fraction, xp.float64, dev)
    unit = power_of_two(xp, clip(floor_log2(xp, xp.abs(total)), -126, 127) - how.kept, xp.float64, dev)
    return xp.where(xp.isfinite(total), xp.trunc(total / unit) * unit, total) + 0.0
