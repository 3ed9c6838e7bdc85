"""What an error looks like when no known bug fits: a factor, a sign, an order, a shift, a transposition, and where it is."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from .band import DEVIATIONS, SLACK, Arrays, Band
from .judge import Question, Returned

ALIKE = SLACK * DEVIATIONS  # errors of a correct subject are below so many σ
TRIED = 512  # slices of an axis that are compared with each other

AXES = {
    "b": "sequence",
    "s": "query position",
    "t": "key position",
    "n": "row",
    "h": "head",
    "g": "head of the keys",
    "d": "channel",
    "e": "expert",
    "k": "slot",
    "c": "latent channel",
    "r": "rotary channel",
    "o": "output channel",
    "v": "channel of the values",
}


@dataclass(frozen=True)
class Print:
    """A fingerprint: its name, one sentence, and how much of the error it leaves, in σ rms."""

    id: str
    text: str
    left: float


@dataclass(frozen=True)
class Output:
    """One real output as returned and as it should be, its σ, and what its axes are called."""

    name: str
    got: np.ndarray
    truth: np.ndarray
    sigma: np.ndarray
    axes: tuple[str, ...]

    def z(self, other: np.ndarray, sigma: np.ndarray | None = None) -> np.ndarray:
        """(got - other)/σ; elements that no rounding disturbs count by the smallest σ there is"""
        sigma = self.sigma if sigma is None else sigma
        positive = sigma[sigma > 0]
        least = float(np.min(positive)) if positive.size else 1.0
        with np.errstate(invalid="ignore", over="ignore"):
            z = (self.got - other) / np.where(sigma > 0, sigma, least)
        same = (self.got == other) | (np.isnan(self.got) & np.isnan(other))
        return np.where(same, 0.0, np.where(np.isfinite(z), z, np.inf))

    def rms(self, other: np.ndarray, sigma: np.ndarray | None = None) -> float:
        return float(np.sqrt(np.mean(np.square(self.z(other, sigma))))) if self.got.size else 0.0


def outputs_of(question: Question, returned: Mapping[str, Returned], band: Band) -> Iterator[Output]:
    _, tensors = question.op.signature_of(question.direction, question.inputs)
    for t in tensors:
        if t.name in band.sigma and returned[t.name].values.dtype.kind == "f":
            got = returned[t.name].values.astype(np.float64)
            if got.ndim == band.truth[t.name].ndim:
                yield Output(t.name, got, band.truth[t.name], band.sigma[t.name], tuple(AXES.get(d, d) for d in t.dims))


def constants(attrs: Mapping[str, Any], inputs: Arrays) -> dict[str, float]:
    """Factors that get lost, doubled or inverted in practice."""
    known = {
        "2": 2.0,
        "√2": math.sqrt(2),
        "ln 2": math.log(2),
        "448/240 (the maxima of E4M3FN and E4M3FNUZ)": 448 / 240,
        "√(192/576) (head widths before and after absorption)": math.sqrt(192 / 576),
        "√(576/512)": math.sqrt(576 / 512),
        "0.4": 0.4,
    }
    for name in ("routed_scaling_factor", "scale", "num_experts_per_tok", "k", "factor", "alpha", "gamma", "tile", "devices"):
        value = attrs.get(name)
        if isinstance(value, (int, float)) and value not in (0, 1, 2):
            known[f"{name} = {value:g}"] = float(value)
    factor, mscale = float(attrs.get("factor") or 1.0), float(attrs.get("mscale_all_dim") or 0.0)
    if factor > 1 and mscale:
        m = 0.1 * mscale * math.log(factor) + 1
        known |= {f"mscale = 0.1·mscale_all_dim·ln(factor) + 1 = {m:.5g}": m, f"mscale² = {m * m:.5g}": m * m}
    for name, x in inputs.items():
        if x.ndim and x.dtype.kind == "f" and x.shape[-1] > 2:
            known[f"√{x.shape[-1]} (the width of {name})"] = math.sqrt(x.shape[-1])
            known[f"{x.shape[-1]} (the width of {name})"] = float(x.shape[-1])
    return known


def factor(o: Output, known: Mapping[str, float]) -> Print | None:
    """got = c · truth"""
    use = np.isfinite(o.got) & np.isfinite(o.truth) & (o.sigma > 0)
    g, t = o.got[use] / o.sigma[use], o.truth[use] / o.sigma[use]
    power = float(np.sum(t * t))
    if power < ALIKE**2:
        return None
    c = float(np.sum(g * t)) / power
    deviation = max(power**-0.5, 2.0**-24)
    if abs(c - 1) < ALIKE * deviation or c == 0:
        return None
    left = float(np.sqrt(np.mean(np.square((g - c * t) / max(abs(c), 1.0)))))
    if left > 2 * SLACK:
        return None
    if abs(c + 1) < ALIKE * deviation:
        return Print("sign", f"{o.name} has the wrong sign everywhere.", left)
    room = abs(c) * max(ALIKE * deviation, 1e-6)
    named = [(abs(v - c), label) for label, v in known.items() if abs(v - c) <= room]
    named += [(abs(1 / v - c), f"1/({label})") for label, v in known.items() if abs(1 / v - c) <= room]
    what = f", which is {min(named)[1]}" if named else ""
    text = f"{o.name} is {c:.6g} (± {deviation * abs(c):.1g}) times what it should be{what}: look for a factor."
    return Print("constant-factor", text, left)


def slices(x: np.ndarray, axis: int) -> np.ndarray:
    return np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)


def orders_along(o: Output, axis: int) -> Iterator[np.ndarray]:
    """Which slice of the truth each returned slice might be: the nearest, if every one is then exactly one of them; of many slices, the
    orders that are got wrong in practice."""
    count = o.truth.shape[axis]
    at = np.arange(count)
    if count > TRIED:
        yield at[::-1]
        yield from (np.roll(at, shift) for shift in (1, -1, count // 2))
        if count % 2 == 0:
            yield np.concatenate([at[::2], at[1::2]])
            yield at.reshape(2, -1).T.reshape(-1)
    elif count > 1:
        got, truth, sigma = (slices(x, axis) for x in (o.got, o.truth, o.sigma))
        typical = np.median(sigma, axis=0)
        weight = np.where(typical > 0, 1 / np.where(typical > 0, typical, 1.0), 0.0)
        g, t = np.nan_to_num(got * weight), np.nan_to_num(truth * weight)
        order = np.argmin(np.sum(g * g, 1)[:, None] + np.sum(t * t, 1)[None, :] - 2 * g @ t.T, axis=1)
        if len(set(order.tolist())) == count and np.any(order != at):
            yield order


def described(order: np.ndarray) -> str:
    """A permutation in words."""
    n, at = len(order), np.arange(len(order))
    shift = int(order[0])
    if np.array_equal(order, (at + shift) % n):
        return f"shifted by {shift if shift <= n // 2 else shift - n}"
    if np.array_equal(order, n - 1 - at):
        return "reversed"
    if n % 2 == 0:
        halves = np.concatenate([at[::2], at[1::2]])
        if np.array_equal(order, halves):
            return "evens first, then odds (interleaved taken as halves)"
        if np.array_equal(halves[order], at):
            return "halves interleaved"
    moved = np.flatnonzero(order != at)
    return f"permuted: {', '.join(f'{i} has {order[i]}' for i in moved[:3])}{' …' if len(moved) > 3 else ''}"


def permutation(o: Output) -> Print | None:
    """got[…, i, …] = truth[…, p(i), …] along some axis"""
    for axis, what in enumerate(o.axes):
        for order in orders_along(o, axis):
            left = o.rms(np.take(o.truth, order, axis=axis), np.take(o.sigma, order, axis=axis))
            if left <= 2 * SLACK:
                return Print("order", f"{o.name} is right but for the order along its axis {axis} ({what}): {described(order)}.", left)
    return None


def transposition(o: Output) -> Print | None:
    """Two axes exchanged, or the memory of the transposed array read as it lies."""
    for i, j in combinations(range(o.truth.ndim), 2):
        turned, sigma = np.swapaxes(o.truth, i, j), np.swapaxes(o.sigma, i, j)
        for shape in (turned.shape, o.truth.shape):
            other = turned.reshape(shape)
            if other.shape != o.got.shape or not np.any(other != o.truth):
                continue
            if (left := o.rms(other, sigma.reshape(shape))) <= 2 * SLACK:
                return Print(
                    "transposed", f"{o.name} is right but for its axes {i} and {j} ({o.axes[i]}, {o.axes[j]}), which are exchanged.", left
                )
    return None


def runs(index: np.ndarray, count: int) -> str:
    """Indices in words: all from 128 on, every 2nd, 3 of 64."""
    if len(index) == 1:
        return f"{index[0]}"
    steps = set(np.diff(index).tolist())
    if steps == {1}:
        return f"{index[0]} to {index[-1]}" if index[-1] < count - 1 else f"{index[0]} and on"
    if len(steps) == 1:
        return f"every {index[1] - index[0]}th from {index[0]}"
    return f"{len(index)} of {count}: {', '.join(map(str, index[:4]))}{' …' if len(index) > 4 else ''}"


def place(o: Output) -> Print | None:
    """Where the error is: the indices of each axis beyond which everything is right."""
    wrong = np.abs(o.z(o.truth)) > ALIKE
    if not wrong.any() or wrong.mean() > 0.9:
        return None
    parts = []
    for axis, what in enumerate(o.axes):
        at = np.flatnonzero(np.any(wrong, axis=tuple(i for i in range(wrong.ndim) if i != axis)))
        if len(at) < o.truth.shape[axis]:
            parts.append(f"{what} {runs(at, o.truth.shape[axis])}")
    bad = o.got[wrong]
    kind = "NaN" if np.isnan(bad).all() else "0" if not bad.any() else ""
    if not parts and not kind:
        return None
    where = f" at {', '.join(parts)}" if parts else ""
    return Print(
        "place",
        f"{o.name} is wrong only{where} ({int(wrong.sum())} of {wrong.size} elements){f': {kind} there' if kind else ''}.",
        math.inf,
    )


def fingerprints(question: Question, returned: Mapping[str, Returned], band: Band) -> list[Print]:
    """What is found, the most telling first: one of factor, order, transposition for each output, else the place."""
    known = constants({**question.op.defaults, **question.attrs}, question.inputs)
    found = []
    for o in outputs_of(question, returned, band):
        if o.got.shape != o.truth.shape:
            if o.got.shape == o.truth.shape[::-1]:
                found.append(Print("transposed", f"{o.name} has the shape of its transpose.", math.inf))
            continue
        if not np.any(np.abs(o.z(o.truth)) > ALIKE):
            factored = factor(o, known)  # a bias below any element's bound
            found += [factored] if factored else []
            continue
        telling = factor(o, known) or permutation(o) or transposition(o) or place(o)
        found += [telling] if telling else []
    return sorted(found, key=lambda p: p.left)
