"""The band of a trace's steps: the steps' own text on noisy arrays, all runs in one where that is as good."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..ref.op import Op
from .band import RUNS, Band, spread_of
from .judge import Judgement, Question, Returned, judge
from .montecarlo import Noise, noisy_inputs
from .precision import Precision
from .trace_steps import About, sources, value_of

WHOLE = 32  # tokens of a prompt that are all put through the Monte-Carlo runs; of a longer one
SPREAD = 8  # that are taken evenly,
WORST = 8  # and those that are furthest off
KEYS = ("attn.c_kv", "attn.k_pe")


class Stacked(Noise):
    """The noise of runs that lie one after the other: no two sums err alike, whatever their values."""

    def scattered(self, total: np.ndarray, squares: np.ndarray, n: int, half: float) -> np.ndarray:
        deviation = half * np.sqrt((n + 1) * (squares / 6 + total * total / 3) / 3)
        radius, turn = np.sqrt(-2 * np.log1p(-self.rng.random(np.shape(total)))), 2 * np.pi * self.rng.random(np.shape(total))
        return np.where(np.isfinite(total), total + deviation * radius * np.cos(turn), total)


@dataclass(frozen=True)
class Rows:
    """Which tokens of a trace are put through the Monte-Carlo runs; those before `end` are the keys of an attention among the steps."""

    rows: np.ndarray
    end: int
    even: np.ndarray | None = None  # [rows]: which were not taken for being far off; None: all

    def of(self, name: str, values: np.ndarray) -> np.ndarray:
        return values[: self.end] if name in KEYS else values[self.rows]


def rows_for(way: set[str], got: np.ndarray, truth: np.ndarray) -> Rows:
    """All tokens of a short prompt; of a long one those furthest off and some spread evenly. Tokens that attend follow each other."""
    n = len(truth)
    everything = Rows(np.arange(n), n)
    if n <= WHOLE:
        return everything
    flat = (got.astype(np.float64) - truth).reshape(n, -1), truth.reshape(n, -1)
    with np.errstate(invalid="ignore", over="ignore"):
        size = np.sqrt(np.mean(flat[1] ** 2, axis=1)) + np.finfo(np.float64).tiny
        ranks = [np.max(np.abs(flat[0]), axis=1) / size, np.sqrt(np.mean(flat[0] ** 2, axis=1)) / size]
    ranks = [np.where(np.isfinite(r), r, np.inf) for r in ranks]
    if "attn.o" in way:
        if way & {"attn.q", *KEYS}:
            return everything
        worst = int(np.argmax(ranks[0]))
        end = min(n, max(worst + WORST, SPREAD + WORST))
        return Rows(np.arange(end - SPREAD - WORST, end), end)
    even = np.linspace(0, n - 1, SPREAD).astype(int)
    rows = np.unique(np.concatenate([even, *(np.argsort(-r, kind="stable")[: WORST // 2] for r in ranks)]))
    return Rows(rows, n, np.isin(rows, even))


def runs_of(name: str, given: Mapping[str, np.ndarray], about: About, precision: Precision, rows: Rows) -> np.ndarray:
    """[runs, rows, …]: a step's output in Monte-Carlo arithmetic, from what is given"""
    _, way = sources(about.config, about.layer, name, given)
    own = {k: rows.of(k, np.asarray(v)) for k, v in given.items()}
    there = replace(about, positions=about.positions[rows.rows])
    with np.errstate(all="ignore"):
        if way & {"attn.q", "attn.k_pe"}:  # the frequencies' own rounding is one for all tokens of a run
            runs = [np.asarray(value_of(name, noisy_inputs(own, Noise(precision, seed)), there)) for seed in range(RUNS)]
            return np.stack(runs)
        tiled = {k: np.concatenate([v] * RUNS) for k, v in own.items()}
        y = np.asarray(value_of(name, noisy_inputs(tiled, Stacked(precision, 0)), replace(there, runs=RUNS)))
    return y.reshape(RUNS, -1, *y.shape[1:])


def question_of(name: str, dims: Sequence[str], precision: Precision) -> Question:
    """A step as an op that returns y, for the judge."""

    def fwd() -> None:
        raise NotImplementedError

    fwd.sig = f"x?[n] -> y[{','.join(dims)}]"  # type: ignore[attr-defined]
    return Question(Op(f"trace.{name}", fwd, None, (), "", "", choice=None), "forward", {}, {}, precision)


def judge_step(question: Question, got: np.ndarray, truth: np.ndarray, runs: np.ndarray, rows: Rows) -> Judgement:
    """y[rows] held to its band. Rows that were taken for being far off are held to what one row may be, not to what all are in the mean."""
    far = None if rows.even is None else ~rows.even
    judgement = Judgement()
    for part in (slice(None),) if far is None else (~far, far):
        sigma, limits = spread_of(truth[part], runs[:, part], question.precision)
        band = Band({"y": truth[part]}, {"y": sigma}, {"y": limits})
        if far is not None and part is far:
            band.limits["y"] |= dict.fromkeys(("rms", "block", "mean", "gain"), np.inf)
        carried = got[part].astype(question.precision.carrier)
        found = judge(question, {"y": Returned(carried, str(carried.dtype))}, band)
        at = np.arange(len(truth))[part]
        for reason in found.reasons:
            judgement.fail(re.sub(r"\by\[(\d+)", lambda m, at=at: f"y[{rows.rows[at[int(m[1])]]}", reason))
        keep(judgement.statistics, judgement.limits, found)
    return judgement


def keep(statistics: dict[str, dict[str, float]], limits: dict[str, dict[str, float]], found: Judgement) -> None:
    """Of two judgements the statistics that are nearer to their limits"""
    for name, value in found.statistics.get("y", {}).items():
        limit = found.limits["y"][name]
        have = statistics.setdefault("y", {}).get(name)
        if have is None or value * limits["y"][name] > have * limit:
            statistics["y"][name], limits.setdefault("y", {})[name] = float(value), float(limit)
