"""Decisions: chosen experts, power-of-two scales. Judged as sets; what rounding could have turned is accepted, and counted."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..ref.op import Tensor, bind
from .band import DEVIATIONS, SLACK, Arrays, Band, band_of, carrier, scatter
from .draw import ulp
from .question import Judgement, Question

INSTABILITY = 8.0  # a decision that eight times the noise can turn is not held against a backward that decides for itself


def judge_choice(question: Question, values: Arrays, band: Band, judgement: Judgement) -> Band:
    """Judges the decision as a set, accepts what rounding could have turned, and returns the band for the subject's own decision."""
    op = question.op
    assert op.choice is not None
    name = op.choice[0]
    tensor = next(t for t in op.outputs if t.name == name)
    got, expected = values[name], band.truth[name]
    differs = np.any(np.sort(got, -1) != np.sort(expected, -1), axis=-1) if tensor.kind == "index" else ~same(got, expected)
    if not differs.any():
        order = tensor.kind == "index" and not np.array_equal(got, expected)
        return _band(question, got, band) if order else band
    possible = choosable(got, question) if tensor.kind == "index" else np.ones(got.shape, dtype=bool)
    legal = np.where(possible[..., None], got, expected) if tensor.kind == "index" else got
    regret, noise = regrets(question, tensor, legal, differs)
    regret = np.where(possible, regret, np.inf)
    finite = np.isfinite(regret)
    tie = _ties(question, tensor, legal, expected, differs & finite & (regret == 0))
    accepted = np.where(tie, question.any_tie, finite & (regret <= SLACK * DEVIATIONS * noise))
    judgement.ambiguous += int(np.sum(differs & accepted))
    for where in np.argwhere(differs & ~accepted)[:1]:
        at = tuple(int(i) for i in where)
        count = int(np.sum(differs & ~accepted))
        judgement.fail(_describe_choice(name, at, got, expected, float(regret[at]), float(noise[at]), bool(tie[at]), count, differs.size))
    if tensor.kind == "index":
        legal = np.where((accepted | ~differs)[..., None], legal, expected)
        return _band(question, legal, band)
    return _band(question, np.where(accepted, got, expected), band)


def regrets(question: Question, tensor: Tensor, choice: np.ndarray, differs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far the numbers behind the decision would have to move for it to be right, and the deviation that rounding gives that number.
    Only where it differs; the noise only if no place is beyond all noise (its verdict is known then)."""
    op = question.op
    rows = np.flatnonzero(np.any(differs.reshape(len(differs), -1), axis=1)) if tensor.dims[0] == "n" and tensor.kind == "index" else None
    inputs = {
        t.name: question.inputs[t.name][rows] if rows is not None and t.dims[0] == tensor.dims[0] else question.inputs[t.name]
        for t in op.signature_of("forward", question.inputs)[0]
    }
    chosen = choice if rows is None else choice[rows]

    def run(arrays: Mapping[str, Any]) -> Arrays:
        return {"regret": _regret(question, chosen, arrays)}

    regret = _regret(question, chosen, carrier(inputs, np.float64))
    noise = np.zeros_like(regret)
    if not np.isinf(regret[differs if rows is None else slice(None)]).any():
        runs = scatter(run, inputs, question.precision, ["regret"])["regret"]
        finite = np.isfinite(runs) & np.isfinite(regret)
        noise = np.sqrt(np.mean(np.where(finite, runs - np.where(np.isfinite(regret), regret, 0.0), 0.0) ** 2, axis=0))
    if rows is None:
        return regret, noise
    whole = np.zeros(differs.shape), np.zeros(differs.shape)
    for part, values in zip(whole, (regret, noise), strict=True):
        part[rows] = values
    return whole


def _regret(question: Question, choice: np.ndarray, arrays: Mapping[str, Any]) -> Any:
    assert question.op.choice is not None
    name, regret_of = question.op.choice
    with np.errstate(all="ignore"):
        return regret_of(*(arrays.get(t.name) for t in question.op.inputs), **{name: choice}, **question.attrs)


def _ties(question: Question, tensor: Tensor, choice: np.ndarray, expected: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Where the reference's decision would be as right as the subject's, which is. It need not be where decisions follow from earlier ones
    (of layers, or of MTP modules): beside the subject's choice in one, its choice may be the only right one in the next."""
    if tensor.kind != "index" or tensor.dims[0] == "n":
        return right
    found, arrays = np.zeros_like(right), carrier(question.inputs, np.float64)
    for j in np.flatnonzero(right.reshape(len(right), -1).any(axis=1)):
        beside = choice.copy()
        beside[j] = np.where(right[j][..., None], expected[j], choice[j])
        found[j] = right[j] & (_regret(question, beside, arrays)[j] == 0)
    return found


def _band(question: Question, choice: np.ndarray, own: Band) -> Band:
    """The band for this decision, kept beside the one for the reference's own: subjects that decide otherwise often decide alike."""
    key = choice.tobytes()
    if key not in own.decided:
        asked = question.op, question.direction, question.inputs, question.attrs, question.precision
        own.decided[key] = band_of(*asked, choice, runs=own.runs)
    return own.decided[key]


def choosable(idx: np.ndarray, question: Question) -> np.ndarray:
    """[n]: whether every chosen index stands for something, and no two for the same"""
    tensors, _ = question.op.signature_of("forward", question.inputs)
    count = bind(question.op.name, tensors, question.inputs)["e"]  # what a choice chooses among
    ordered = np.sort(idx, axis=-1)
    return np.all((idx >= 0) & (idx < count), axis=-1) & np.all(ordered[..., 1:] > ordered[..., :-1], axis=-1)


def _describe_choice(name: str, at: tuple, got: Any, expected: Any, regret: float, noise: float, tie: bool, count: int, total: int) -> str:
    place = f"{name}[{', '.join(map(str, at))}]"
    if got.ndim > len(at):
        extra = sorted(set(got[at].tolist()) - set(expected[at].tolist()))
        missing = sorted(set(expected[at].tolist()) - set(got[at].tolist()))
        what = f"has {_few(extra)} where the reference has {_few(missing)}" if extra else "repeats a choice"
    else:
        what = f"is {got[at]!r}; expected {expected[at]!r}"
    if tie:
        why = "an exact tie, which the lowest index wins (--ties any accepts every winner)"
    elif np.isfinite(regret):
        why = f"the decision would need an error of {regret:.3g}, {regret / max(noise, 1e-300):.3g} times the rounding noise"
    else:
        why = "no rounding leads there"
    return f"{place} {what}: {why} [{count} of {total} differ]"


def _few(values: list) -> str:
    return ", ".join(map(str, values[:4])) + (", …" if len(values) > 4 else "")


def unstable_rows(question: Question) -> np.ndarray:
    """[n], or the decision's own leading dimensions: rows whose decision INSTABILITY times the rounding noise can turn.

    The inputs are moved as well, each element by its own amount: exact ties, whose members round alike, come apart.
    """
    op = question.op
    assert op.choice is not None
    name = op.choice[0]
    inputs = {t.name: question.inputs[t.name] for t in op.signature_of("forward", question.inputs)[0]}
    rng = np.random.Generator(np.random.Philox(key=0))

    def run(arrays: Mapping[str, Any]) -> Arrays:
        unit = {k: ulp(question.precision.work, np.max(np.abs(x), initial=0.0)) for k, x in inputs.items() if x.dtype.kind == "f"}
        moved = {k: a + INSTABILITY * unit[k] * rng.uniform(-1, 1, a.shape) if k in unit else a for k, a in arrays.items()}
        return op.run("forward", moved, question.attrs)

    runs = scatter(run, inputs, question.precision, [name], INSTABILITY)[name]
    return np.any(np.sort(runs, -1) != np.sort(question.inputs[name], -1)[None], axis=(0, -1))


def same(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return ((a == b) & (np.signbit(a) == np.signbit(b))) | (np.isnan(a) & np.isnan(b))
