"""The truth, and how far from it a correct subject may be: computed, not chosen.

The truth is the reference in float64. RUNS Monte-Carlo runs give each output element its own deviation s; with half a unit h in the last
place of the output's format it makes σ² = s² + h². An element's reach is h + 6 s: a rounding has an end, what is rounded has tails. Six
statistics of the error in σ are held to limits. A limit comes from the same statistics of the runs
themselves, each judged by the σ of the others: SLACK · (mean + 6 deviations), and never less than SLACK times what one rounding of the
output explains. SLACK = 2 is the room for a subject's own order of operations.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..ref.cast import round_to
from ..ref.op import Op
from .draw import ulp
from .montecarlo import Noise, noisy_inputs
from .precision import Precision

RUNS = 16
SLACK = 2.0
DEVIATIONS = 6.0
BLOCK = 32  # columns of a block

Arrays = dict[str, np.ndarray]


@dataclass
class Band:
    """Truth, σ and limits by output name, from so many runs. Exact outputs have a truth only. `decided`: the bands for other decisions, by
    their bytes."""

    truth: Arrays
    sigma: Arrays = field(default_factory=dict)
    limits: dict[str, dict[str, float]] = field(default_factory=dict)
    runs: int = RUNS
    decided: dict[bytes, "Band"] = field(default_factory=dict, repr=False, compare=False)


def reach(floor: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """How far an element may reach, in its σ: half a unit, which no rounding exceeds, and six deviations of what is rounded, which has
    tails. σ² = floor² + s², so that s is had back."""
    share = np.divide(floor, sigma, out=np.ones_like(sigma), where=sigma > 0)
    return share + DEVIATIONS * np.sqrt(np.maximum(1.0 - share * share, 0.0))


def statistics(z: np.ndarray, strength: np.ndarray, reach: np.ndarray) -> dict[str, float]:
    """The error z in σ: its largest element (in its reach), its rms over all, over the worst row and the worst block of 32 columns, its
    mean, and its gain, the multiple of the truth (strength = truth/σ) that it contains."""
    if z.size == 0:
        return dict.fromkeys(("max", "rms", "row", "block", "mean", "gain"), 0.0)
    square = z * z
    flat = square.reshape(-1, square.shape[-1]) if square.ndim > 1 else square.reshape(1, -1)
    blocks = np.add.reduceat(flat, np.arange(0, flat.shape[1], BLOCK), axis=1)
    widths = np.diff(np.r_[np.arange(0, flat.shape[1], BLOCK), flat.shape[1]])
    power = float(np.sum(strength * strength))
    return {
        "max": float(np.max(np.abs(z) / reach)),
        "rms": float(np.sqrt(np.mean(square))),
        "row": float(np.sqrt(np.max(np.mean(flat, axis=1)))),
        "block": float(np.sqrt(np.max(np.sum(blocks, axis=0) / (widths * flat.shape[0])))),
        "mean": abs(float(np.mean(z))),
        "gain": abs(float(np.sum(z * strength)) / power) if power > 0 else 0.0,
    }


def floor_of(precision: Precision, truth: np.ndarray, disturbed: np.ndarray | bool = False) -> np.ndarray:
    """Half a unit in the last place of the output's format; none where the truth is a zero that no rounding disturbs."""
    return np.where(np.isfinite(truth) & ((truth != 0) | disturbed), ulp(precision.io, truth) / 2, 0.0)


def in_sigma(error: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    return np.divide(error, sigma, out=np.zeros_like(error), where=sigma > 0)


def rounding_alone(shape: tuple[int, ...], strength: np.ndarray) -> dict[str, float]:
    """The statistics of one rounding to the output's format, at six deviations: errors uniform in ±σ (σ is half a unit), so their squares
    have the mean 1/3 and the variance 4/45."""

    def rms(count: int) -> float:
        return min(1.0, float(np.sqrt(1 / 3 + DEVIATIONS * np.sqrt(4 / 45 / max(count, 1)))))

    size, columns = int(np.prod(shape)), shape[-1] if shape else 1
    power = float(np.sum(strength * strength))
    return {
        "max": 1.0,
        "rms": rms(size),
        "row": rms(columns),
        "block": rms(size // max(columns, 1) * (columns % BLOCK or BLOCK)),
        "mean": min(1.0, DEVIATIONS / np.sqrt(3 * max(size, 1))),
        "gain": DEVIATIONS / np.sqrt(3 * power) if power > 0 else 0.0,
    }


def scaled(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A power of two an element, about its largest deviation, and the deviations [runs, …] over it: their squares do not underflow."""
    _, exponent = np.frexp(np.max(np.abs(raw), axis=0))
    size = np.ldexp(1.0, np.maximum(exponent, -1000))
    return size, raw / size


def limits_of(errors: np.ndarray, raw: np.ndarray, floor: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """The limits from the runs' errors [runs, …], rounded and raw: each run is judged by the deviation of the others. Where a run errs
    all alone the others do not say how far: it counts for at most RUNS² deviations, or one run would lift every limit to anything."""
    size, raw = scaled(raw)
    total = np.sum(raw * raw, axis=0)
    left_out = []
    for error, own in zip(errors, raw, strict=True):
        others = np.maximum((total - own * own) / (len(raw) - 1), total / len(raw) ** 4)
        sigma = np.hypot(size * np.sqrt(others), floor)
        left_out.append(statistics(in_sigma(error, sigma), in_sigma(truth, sigma), reach(floor, sigma)))
    sigma = np.hypot(size * np.sqrt(total / len(raw)), floor)
    least = rounding_alone(truth.shape, in_sigma(truth, sigma))
    limits = {}
    for name in least:
        values = np.array([s[name] for s in left_out])
        limits[name] = SLACK * max(float(np.mean(values) + DEVIATIONS * np.std(values, ddof=1)), least[name])
    return limits


Run = Callable[[Mapping[str, Any]], Arrays]


def scatter(
    run: Run, inputs: Arrays, precision: Precision, names: list[str], amplify: float = 1.0, runs: int = RUNS
) -> dict[str, np.ndarray]:
    """The outputs of Monte-Carlo runs, stacked: [runs, …]"""
    found = []
    for seed in range(runs):
        with np.errstate(all="ignore"):
            outputs = run(noisy_inputs(inputs, Noise(precision, seed, amplify)))
        found.append({name: np.asarray(outputs[name]) for name in names})
    return {name: np.stack([one[name] for one in found]) for name in names}


def reference_run(op: Op, direction: str, attrs: Mapping[str, Any]) -> Run:
    return lambda arrays: op.run(direction, arrays, attrs)


def carrier(arrays: Arrays, dtype: Any) -> Arrays:
    return {name: x.astype(dtype) if x.dtype.kind == "f" else x for name, x in arrays.items()}


def truth_of(op: Op, direction: str, inputs: Arrays, attrs: Mapping[str, Any]) -> Arrays:
    """The reference's outputs: in float64, or in the inputs' own dtype where every output is discrete."""
    arrays = inputs if op.exact else carrier(inputs, np.float64)
    with np.errstate(all="ignore"):
        return {name: np.asarray(y) for name, y in op.run(direction, arrays, attrs).items()}


def spread_of(exact: np.ndarray, runs: np.ndarray, precision: Precision) -> tuple[np.ndarray, dict[str, float]]:
    """σ and the limits of one array, from its truth and its runs."""
    finite = np.isfinite(exact)
    truth = np.where(finite, exact, 0.0)
    raw = np.where(finite & np.isfinite(runs), runs - truth, 0.0)
    floor = floor_of(precision, exact, np.any(raw != 0, axis=0))
    errors = np.where(finite, round_to(precision.io, runs, overflow="nan") - truth, 0.0)
    errors = np.where(np.isfinite(errors), errors, 0.0)
    size, units = scaled(raw)
    return np.hypot(size * np.sqrt(np.mean(units * units, axis=0)), floor), limits_of(errors, raw, floor, truth)


def band_of(
    op: Op,
    direction: str,
    inputs: Arrays,
    attrs: Mapping[str, Any],
    precision: Precision,
    choice: np.ndarray | None = None,
    truth: Arrays | None = None,
    runs: int = RUNS,
) -> Band:
    """Truth, σ and limits for these inputs. With a decision given, for that decision; without, for the reference's own. A truth that is
    known already is not computed again."""
    given = {op.choice[0]: choice} if op.choice and choice is not None else {}
    band = Band(truth_of(op, direction, {**inputs, **given}, attrs) if truth is None else dict(truth), runs=runs)
    _, outputs = op.signature_of(direction, inputs)
    names = [t.name for t in outputs if t.kind == "real"]
    if not names:
        return band
    if op.choice:
        given = {op.choice[0]: inputs[op.choice[0]] if op.choice[0] in inputs else band.truth[op.choice[0]]}
    scattered = scatter(reference_run(op, direction, attrs), {**inputs, **given}, precision, names, runs=runs)
    for name in names:
        band.sigma[name], band.limits[name] = spread_of(band.truth[name], scattered[name], precision)
    return band
