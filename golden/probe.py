"""What an FP8 multiply-and-add unit does inside, from its outputs alone: fraction bits, rounding, groups and their order.

A subject is a callable (a_codes[m,k], b_codes[m,k], c[m]) -> d[m]: m sums c + Σ_k a b, of E4M3 codes (uint8) and float32. Two products
that cancel, M and -M, hides whatever is aligned with them: a small number elsewhere comes out or does not, and that tells who is added
with whom (after FPRev, arXiv:2411.00442) and how many bits are kept.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
from numpy.typing import NDArray

from ..ref.cast import decode
from ..ref.formats import E4M3FN
from ..ref.fp8_accumulate import Accumulator

Subject = Callable[[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float32]], NDArray[np.float32]]

TOP, NORMAL, LEAST = 16, -12, -18  # exponents of powers of two: the largest product, the smallest of normal numbers, of any
AT_ONCE = 1 << 15  # sums that a subject is handed at a time
ROUNDINGS: dict[str, Callable[[float], float]] = {
    "toward zero": np.trunc,
    "to nearest, ties to even": np.round,
    "to nearest, ties away": lambda x: np.copysign(np.floor(abs(x) + 0.5), x),
    "down": np.floor,
    "up": np.ceil,
}
FRACTIONS = (0.25, 0.5, 0.75, 1.25, 1.5, 1.75, 2.5)


@dataclass(frozen=True)
class Finding:
    """What was found. None: it could not be told apart, or nothing was ever lost."""

    k: int
    fraction: int | None  # bits below the largest exponent that a term keeps
    kept: int | None  # mantissa bits of a group's result
    term_rounding: str | None
    result_rounding: str | None
    groups: tuple[int, ...] | None  # products in each step, first to last; None: not a sequence of groups
    order: tuple[int, ...] | None  # the products, first to last; -1 is c
    renormalised: bool | None  # a product's exponent counts 1.5·1.5 = 2.25 as 2^1
    subnormals: bool | None  # a subnormal's exponent is its leading bit's, not the format's least

    @property
    def group(self) -> int | None:
        """The size of all groups, where they have one"""
        return self.groups[0] if self.groups and len(set(self.groups)) == 1 else None

    @property
    def in_sequence(self) -> bool:
        return self.order == tuple(range(-1, self.k))

    @property
    def accumulator(self) -> Accumulator | None:
        """Our model with these numbers, where it has the form of ours"""
        truncates = self.term_rounding == self.result_rounding == "toward zero"
        plain = self.in_sequence and truncates and not self.renormalised and not self.subnormals
        if self.fraction is None or self.kept is None or self.group is None or not plain:
            return None
        return Accumulator(self.fraction, self.kept, self.group)

    def lines(self) -> Iterator[str]:
        """For a reader"""
        lost = "no bit is lost within E4M3's range" if self.fraction is None else f"{self.fraction} below the largest exponent of a group"
        yield f"fraction bits  {lost}"
        yield (
            f"terms          rounded {self.term_rounding or 'in a way that was not recognised'}"
            if self.fraction
            else "terms          exact"
        )
        kept = "?" if self.kept is None else str(self.kept)
        yield f"result         {kept} mantissa bits, rounded {self.result_rounding or 'as its terms, or unknown'}"
        if self.groups is None:
            yield "groups         not a sequence of groups: a tree, or nothing is ever lost"
        else:
            sizes = f"{self.group} products" if self.group else f"of {', '.join(map(str, self.groups))} products"
            yield f"groups         {sizes} and the accumulator at a time"
            order = " ".join("c" if i < 0 else str(i) for i in self.order or ())
            yield f"order          {'first to last, c first' if self.in_sequence else order}"
        if self.fraction is not None:
            products = "renormalised" if self.renormalised else "as e_a + e_b"
            yield f"exponents      products {products}, subnormals {'by their leading bit' if self.subnormals else 'as the least normal'}"


@lru_cache
def factors() -> dict[float, tuple[int, int]]:
    """Two codes for each number that is a product; normal operands and a power of two first"""
    values = decode(E4M3FN, np.arange(256, dtype=np.uint8))
    codes = sorted(range(1, 0x7F), key=lambda c: (c % 8 != 0, abs(np.log2(values[c]))))
    pairs: dict[float, tuple[int, int]] = {}
    for least in (8, 1):
        for a, b in product([c for c in codes if c >= least], repeat=2):
            pairs.setdefault(float(values[a]) * float(values[b]), (a, b))
    return pairs


class Bench:
    """Sums of a few chosen products and c, all else zero."""

    def __init__(self, subject: Subject, k: int) -> None:
        self.subject, self.k = subject, k

    def ask(self, sums: list[dict[int, float | tuple[int, int]]]) -> NDArray[np.float32]:
        """Each sum: the number at some places, as a value or as two codes; place -1 is c."""
        out = []
        for first in range(0, len(sums), AT_ONCE):
            part = sums[first : first + AT_ONCE]
            a, b = (np.zeros((len(part), self.k), np.uint8) for _ in range(2))
            c = np.zeros(len(part), np.float32)
            for row, places in enumerate(part):
                for place, what in places.items():
                    if place < 0:
                        c[row] = what
                        continue
                    x, y = what if isinstance(what, tuple) else factors()[abs(what)]
                    negative = not isinstance(what, tuple) and what < 0
                    a[row, place], b[row, place] = x | (0x80 if negative else 0), y
            out.append(np.asarray(self.subject(a, b, c), np.float32))
        return np.concatenate(out)

    def ask_at(self, places: NDArray[np.int64], values: tuple[float, ...]) -> NDArray[np.float32]:
        """Many sums of the same numbers: places[m,·] says where each stands."""
        out = []
        for first in range(0, len(places), AT_ONCE):
            part = places[first : first + AT_ONCE]
            a, b = (np.zeros((len(part), 1 + self.k), np.uint8) for _ in range(2))
            c, rows = np.zeros(len(part), np.float32), np.arange(len(part))
            for place, value in zip(part.T, values, strict=True):
                x, y = factors()[abs(value)]
                a[rows, 1 + place], b[rows, 1 + place] = x | (0x80 if value < 0 else 0), y
                c = np.where(place < 0, np.float32(value), c)
            out.append(np.asarray(self.subject(a[:, 1:], b[:, 1:], c), np.float32))
        return np.concatenate(out)


def hidden_by(bench: Bench, small: float) -> NDArray[np.int64]:
    """L[i,j] = 2 + how many other terms are lost beside M at i and -M at j: the terms added by the time both are in. Index 0 is c."""
    n = bench.k + 1
    i, j = (x.repeat(n) for x in np.triu_indices(n, 1))
    u = np.tile(np.arange(n), n * (n - 1) // 2)
    i, j, u = (x[(u != i) & (u != j)] for x in (i, j, u))
    lost = bench.ask_at(np.stack([i, j, u], axis=1) - 1, (2.0**TOP, -(2.0**TOP), small)) != np.float32(small)
    table = np.zeros((n, n), np.int64)
    table[np.triu_indices(n, 1)] = 2 + lost.reshape(-1, n - 2).sum(axis=1)
    return table + table.T


def sequence_of(table: NDArray[np.int64]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The sizes of the groups and the order of the products, if L[i,j] is the end of the later one's group"""
    n = table.shape[0]
    ends = np.where(np.eye(n, dtype=bool), n + 1, table).min(axis=1)
    predicted = np.maximum(ends[:, None], ends[None, :])
    stops, sizes = np.unique(ends, return_counts=True)
    if (predicted != table)[~np.eye(n, dtype=bool)].any() or (np.cumsum(sizes) != stops).any():
        return None
    first_has_c = ends[0] == stops[0]
    groups = [int(s) for s in sizes]
    groups[int(np.searchsorted(stops, ends[0]))] -= 1  # c is no product
    order = tuple(int(i) - 1 for i in np.argsort(ends, kind="stable"))
    return (tuple(g for g in groups if g), order) if first_has_c or len(groups) > 1 else None


def rounding_named(seen: dict[float, float]) -> str | None:
    """The rule that makes each number (in units of the last place) what came out; None if none or several do"""
    fits = [name for name, rule in ROUNDINGS.items() if all(rule(x) == y for x, y in seen.items())]
    return fits[0] if len(fits) == 1 else None


def probe(subject: Subject, k: int = 64) -> Finding:
    """Asks some 10^5 sums; k a multiple of the instruction's own k, two of them at least, so that groups show."""
    bench, big = Bench(subject, k), 1.5 * 2.0**TOP  # whose neighbours on both sides have its exponent
    smalls = [2.0 ** (TOP - bits) for bits in range(1, TOP - LEAST + 1)]

    def leftover(places: tuple[int, ...], values: list[float]) -> NDArray[np.float32]:
        """M, then the number, then -M: in this order, should it matter"""
        return bench.ask([dict(zip(places, (big, v, -big), strict=True)) for v in values])

    def bits(places: tuple[int, ...]) -> int | None:
        survived = leftover(places, smalls) == np.array(smalls, np.float32)
        return None if survived.all() else int(np.argmin(survived))  # survived[n - 1]: n bits are kept

    first = bits((0, 1, 2))
    # Small enough to be lost beside M; where a subnormal's exponent is the least normal's, it must not lose itself.
    sequence = sequence_of(hidden_by(bench, 2.0 ** (LEAST if first is None or first > 20 else NORMAL)))
    groups, order = sequence or (None, None)
    products = tuple(p for p in order or range(k) if p >= 0)
    fraction = bits(products[:3])
    if fraction is None:
        return Finding(k, None, None, None, None, None, None, None, None)
    unit = 2.0 ** (TOP - fraction)
    asked = [sign * f * unit for f in FRACTIONS if f < 2**fraction for sign in (1, -1)]
    term = rounding_named({x / unit: float(y) / unit for x, y in zip(asked, leftover(products[:3], asked), strict=True)})
    together = products[-groups[-1] :] if groups else products  # the last group, whose result nothing touches afterwards
    kept, result = _result(bench, fraction, together) if len(together) > 1 else (min(fraction, 23), term)
    return Finding(k, fraction, kept, term, result, groups, order, *_exponents(bench, products, fraction))


def pieces(x: float) -> list[float]:
    """x > 0 as powers of two, none above M"""
    parts = []
    while x:
        parts.append(min(2.0**TOP, 2.0 ** np.floor(np.log2(x))))
        x -= parts[-1]
    return parts


def _result(bench: Bench, fraction: int, together: tuple[int, ...]) -> tuple[int | None, str | None]:
    """How many bits the sum of a group keeps, and how it is rounded to them"""

    def total(doublings: int, rest: float, sign: int = 1) -> float:
        """±(2^doublings M + rest), all in one group; NaN if it is too small for that"""
        terms = [2.0**TOP] * 2**doublings + pieces(rest)
        if len(terms) > len(together):
            return np.nan
        return sign * float(bench.ask([{p: sign * x for p, x in zip(together, terms, strict=False)}])[0])

    def exact(doublings: int, bits: int) -> bool:
        rest = 2.0 ** (TOP - bits)
        return total(doublings, rest) == 2.0 ** (TOP + doublings) + rest

    kept = next((bits for bits in range(min(fraction, 23), 0, -1) if exact(0, bits)), None)
    if kept is None:
        return None, None
    doublings = 1
    while kept == fraction + doublings - 1 and exact(doublings, fraction):
        kept, doublings = kept + 1, doublings + 1
    doublings = max(0, kept - fraction + 2)  # so that two bits below the result's last are still there
    unit, start, seen = 2.0 ** (TOP + doublings - kept), 2.0 ** (TOP + doublings), {}
    for f in (f for f in FRACTIONS if f < 2**kept):
        for sign in (1, -1):
            seen[sign * f] = sign * (total(doublings, f * unit, sign) - start) / unit
    return kept, rounding_named(seen)


def _exponents(bench: Bench, products: tuple[int, ...], fraction: int) -> tuple[bool, bool]:
    """Whether 1.5·1.5 counts as 2^1, and whether a subnormal operand counts as what it is. The small number is c, of any size."""
    i, j = products[:2]
    half, subnormal, large = 0x3C, 1, 0x78  # 1.5; 2^-9, whose product with 2^8 is 2^-1 while the operands' exponents are -6 and 8
    tiny = 2.0**-fraction, 2.0 ** (-1 - fraction)
    pairs = ((half, half), (half | 0x80, half)), ((subnormal, large), (subnormal | 0x80, large))
    out = bench.ask([{-1: t, i: pair[0], j: pair[1]} for t, pair in zip(tiny, pairs, strict=True)])
    return bool(out[0] != tiny[0]), bool(out[1] == tiny[1])
