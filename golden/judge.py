"""One case, one verdict: a subject's outputs held to the band."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..ref.cast import decode, round_to
from ..ref.formats import FORMATS, Format
from ..ref.op import Op, Tensor, bind
from .band import DEVIATIONS, SLACK, Arrays, Band, band_of, carrier, floor_of, in_sigma, reach, scatter, statistics
from .draw import ulp
from .precision import Precision

PASS, FAIL, ERROR, SKIPPED = "PASS", "FAIL", "ERROR", "SKIPPED"
UNITS = {"max": " reaches", "rms": " σ", "row": " σ", "block": " σ", "mean": " σ", "gain": ""}
INSTABILITY = 8.0  # a decision that eight times the noise can turn is not held against a backward that decides for itself


@dataclass
class Returned:
    """What a subject gave back for one output: values on a NumPy carrier, and the dtype they came in."""

    values: np.ndarray
    dtype: str


@dataclass
class Judgement:
    """The verdict on one case, with the evidence."""

    verdict: str = PASS
    reasons: list[str] = field(default_factory=list)
    ambiguous: int = 0  # decisions that rounding could have turned, and did
    statistics: dict[str, dict[str, float]] = field(default_factory=dict)
    limits: dict[str, dict[str, float]] = field(default_factory=dict)
    band: Band | None = None  # what was judged by: the band of the subject's own decision; None if nothing could be compared
    judged: Arrays = field(default_factory=dict)  # which elements were

    def fail(self, reason: str) -> None:
        self.verdict = FAIL
        self.reasons.append(reason)


@dataclass(frozen=True)
class Question:
    """What was asked: an op, a direction, inputs and attributes at a precision; whether any winner of an exact tie is right; and whether
    a backward was handed the forward's decision or makes it again (as one that leaves ties open does: rows whose decision rounding could
    turn are then not judged)."""

    op: Op
    direction: str
    inputs: Arrays
    attrs: Mapping[str, Any]
    precision: Precision
    any_tie: bool = False
    handed_choice: bool = True


def judge(question: Question, returned: Mapping[str, Returned], band: Band) -> Judgement:
    """Holds the outputs to the band. Decisions first; the rest is then judged for the decision that the subject made."""
    judgement = Judgement()
    op, precision = question.op, question.precision
    _, tensors = op.signature_of(question.direction, question.inputs)
    for tensor in tensors:
        if problem := _form(tensor, returned[tensor.name], band.truth[tensor.name], precision):
            judgement.fail(problem)
    if judgement.verdict == FAIL:
        return judgement
    values = {name: r.values for name, r in returned.items()}
    judged = {t.name: np.ones(t_shape(band, t), dtype=bool) for t in tensors}
    if op.choice and question.direction == "forward":
        band = _choice(question, values, band, judgement)
    elif op.choice and (question.any_tie or not question.handed_choice):
        unstable = unstable_rows(question)
        judgement.ambiguous += int(unstable.sum())
        rows = next(t for t in op.outputs if t.name == op.choice[0]).dims[0]
        for tensor in tensors:  # a weight's gradient gathers from all rows: one that may turn leaves it open
            judged[tensor.name][unstable if tensor.dims[0] == rows else np.any(unstable)] = False
    judgement.band, judgement.judged = band, judged
    for tensor in tensors:
        if op.choice and tensor.name == op.choice[0]:
            continue
        if tensor.kind == "real":
            _real(tensor.name, values[tensor.name], band, judged[tensor.name], precision, judgement)
        else:
            _exact(tensor, values[tensor.name], band.truth[tensor.name], code_format(question), judgement)
    return judgement


def code_format(question: Question) -> Format | None:
    """What the op's codes mean; None where bits are moved, whatever they mean."""
    op = question.op
    if op.name.startswith(("pack.", "unpack.")):
        return None
    return FORMATS.get(question.attrs.get("format") or op.defaults.get("format") or op.name.rsplit(".", 1)[-1])


def t_shape(band: Band, tensor: Tensor) -> tuple[int, ...]:
    return band.truth[tensor.name].shape


def _form(tensor: Tensor, got: Returned, truth: np.ndarray, precision: Precision) -> str | None:
    """Shape and dtype."""
    if got.values.shape != truth.shape:
        return f"{tensor.name} has shape {got.values.shape}; expected {truth.shape}"
    allowed = {
        "index": {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
        "code": {str(truth.dtype)},
        "exact": {str(truth.dtype), *_float_names(precision)},
    }.get(tensor.kind, _float_names(precision))
    if got.dtype not in allowed:
        return f"{tensor.name} is {got.dtype}; expected {' or '.join(sorted(allowed)) if len(allowed) < 4 else 'an integer dtype'}"
    return None


def _float_names(precision: Precision) -> set[str]:
    """16-bit claims may return float32, the carrier: more than was asked."""
    own = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[precision.io.name]
    return {own, precision.carrier}


def _choice(question: Question, values: Arrays, band: Band, judgement: Judgement) -> Band:
    """Judges the decision as a set, accepts what rounding could have turned, and returns the band for the subject's own decision."""
    op = question.op
    assert op.choice is not None
    name = op.choice[0]
    tensor = next(t for t in op.outputs if t.name == name)
    got, expected = values[name], band.truth[name]
    differs = np.any(np.sort(got, -1) != np.sort(expected, -1), axis=-1) if tensor.kind == "index" else ~_same(got, expected)
    if not differs.any():
        order = tensor.kind == "index" and not np.array_equal(got, expected)
        return _band(question, got) if order else band
    legal = np.where(in_range(got, question)[..., None], got, expected) if tensor.kind == "index" else got
    regret, noise = regrets(question, tensor, legal, differs)
    finite = np.isfinite(regret)
    tie = finite & (regret == 0)
    accepted = np.where(tie, question.any_tie, finite & (regret <= SLACK * DEVIATIONS * noise))
    if tensor.kind == "index":
        accepted &= in_range(got, question)
    judgement.ambiguous += int(np.sum(differs & accepted))
    for where in np.argwhere(differs & ~accepted)[:1]:
        at = tuple(int(i) for i in where)
        count = int(np.sum(differs & ~accepted))
        judgement.fail(_describe_choice(name, at, got, expected, float(regret[at]), float(noise[at]), bool(tie[at]), count, differs.size))
    if tensor.kind == "index":
        legal = np.where((accepted | ~differs)[..., None], legal, expected)
        return _band(question, legal)
    return _band(question, np.where(accepted, got, expected))


def regrets(question: Question, tensor: Tensor, choice: np.ndarray, differs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far the numbers behind the decision would have to move for it to be right, and the deviation that rounding gives that number.
    Only where it differs; the noise only if no place is beyond all noise (its verdict is known then)."""
    op = question.op
    assert op.choice is not None
    name, regret_of = op.choice
    rows = np.flatnonzero(np.any(differs.reshape(len(differs), -1), axis=1)) if tensor.dims[0] == "n" and tensor.kind == "index" else None
    inputs = {
        t.name: question.inputs[t.name][rows] if rows is not None and t.dims[0] == tensor.dims[0] else question.inputs[t.name]
        for t in op.signature_of("forward", question.inputs)[0]
    }
    chosen = choice if rows is None else choice[rows]

    def run(arrays: Mapping[str, Any]) -> Arrays:
        return {"regret": regret_of(*(arrays.get(t.name) for t in op.inputs), **{name: chosen}, **question.attrs)}

    with np.errstate(all="ignore"):
        regret = np.asarray(run(carrier(inputs, np.float64))["regret"])
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


def _band(question: Question, choice: np.ndarray) -> Band:
    return band_of(question.op, question.direction, question.inputs, question.attrs, question.precision, choice)


def in_range(idx: np.ndarray, question: Question) -> np.ndarray:
    """[n]: whether every chosen index stands for something"""
    tensors, _ = question.op.signature_of("forward", question.inputs)
    count = bind(question.op.name, tensors, question.inputs)["e"]  # what a choice chooses among
    return np.all((idx >= 0) & (idx < count), axis=-1)


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
    """[n]: rows whose decision INSTABILITY times the rounding noise can turn.

    The inputs are moved as well, each element by its own amount: exact ties, whose members round alike, come apart.
    """
    op = question.op
    assert op.choice is not None
    name = op.choice[0]
    inputs = {t.name: question.inputs[t.name] for t in op.signature_of("forward", question.inputs)[0]}
    rng = np.random.Generator(np.random.Philox(key=0))

    def run(arrays: Mapping[str, Any]) -> Arrays:
        unit = {k: ulp(question.precision.work, np.max(np.abs(x), initial=0.0)) for k, x in inputs.items()}
        moved = {k: a + INSTABILITY * unit[k] * rng.uniform(-1, 1, a.shape) for k, a in arrays.items()}
        return op.run("forward", moved, question.attrs)

    runs = scatter(run, inputs, question.precision, [name], INSTABILITY)[name]
    return np.any(np.sort(runs, -1) != np.sort(question.inputs[name], -1)[None], axis=(0, -1))


def _real(name: str, got: np.ndarray, band: Band, judged: np.ndarray, precision: Precision, judgement: Judgement) -> None:
    """The error in σ, its statistics held to the limits; what must be finite, infinite or zero is."""
    truth, sigma = band.truth[name], band.sigma[name]
    got = got.astype(np.float64)
    rounded = round_to(precision.io, truth, overflow="nan")
    finite = np.isfinite(rounded)
    strange = judged & np.where(finite, ~np.isfinite(got), ~((got == rounded) | (np.isnan(got) & np.isnan(rounded))))
    if strange.any():
        at = tuple(int(i) for i in np.argwhere(strange)[0])
        judgement.fail(f"{name}[{_at(at)}] is {got[at]}; the truth is {truth[at]:.6g} [{int(strange.sum())} such elements]")
        return
    usable = judged & finite & np.isfinite(truth)
    error = np.where(usable, got - np.where(usable, truth, 0.0), 0.0)
    certain = usable & (sigma == 0) & (round_to(precision.io, got, overflow="nan") != truth)  # no rounding disturbs these
    if certain.any():
        at = tuple(int(i) for i in np.argwhere(certain)[0])
        judgement.fail(f"{name}[{_at(at)}] is {got[at]:.6g}; expected exactly {truth[at]:.6g} [{int(certain.sum())} such elements]")
    z = in_sigma(error, sigma)
    strength = in_sigma(np.where(usable, truth, 0.0), sigma)
    reaches = reach(floor_of(precision, truth, sigma > 0), sigma)
    found = statistics(z, strength, reaches)
    judgement.statistics[name], judgement.limits[name] = found, band.limits[name]
    beyond = [s for s in found if found[s] > band.limits[name][s]]
    if beyond:
        at = tuple(int(i) for i in np.unravel_index(int(np.argmax(np.abs(z) / reaches)), z.shape))
        parts = ", ".join(f"{s} {found[s]:.3g}{UNITS[s]} (limit {band.limits[name][s]:.3g})" for s in beyond)
        judgement.fail(f"{name} is off by {parts}; worst {name}[{_at(at)}] = {got[at]:.8g}, truth {truth[at]:.8g}, σ {sigma[at]:.2g}")


def _exact(tensor: Tensor, got: np.ndarray, truth: np.ndarray, fmt: Format | None, judgement: Judgement) -> None:
    """No element may differ."""
    wrong = differing(tensor, got, truth, fmt)
    judgement.statistics[tensor.name] = {"differ": float(wrong.sum())}
    judgement.limits[tensor.name] = {"differ": 0.0}
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        shown = [f"{v[at]:#04x}" if tensor.kind == "code" else str(v[at]) for v in (got, truth)]
        judgement.fail(f"{tensor.name}[{_at(at)}] is {shown[0]}; expected {shown[1]} [{int(wrong.sum())} of {wrong.size} differ]")


def differing(tensor: Tensor, got: np.ndarray, truth: np.ndarray, fmt: Format | None) -> np.ndarray:
    """Which elements differ, bit for bit; every NaN counts as NaN."""
    if tensor.kind == "code" and fmt is not None:
        return _one_nan(fmt, got) != _one_nan(fmt, truth)
    if tensor.kind == "index":
        return got != truth
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return ~_same(got.astype(np.float64), truth.astype(np.float64))


def _same(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return ((a == b) & (np.signbit(a) == np.signbit(b))) | (np.isnan(a) & np.isnan(b))


def _one_nan(fmt: Format, codes: np.ndarray) -> np.ndarray:
    """Codes with every NaN pattern made the canonical one."""
    if fmt.nan_code is None:
        return codes
    return np.where(np.isnan(decode(fmt, codes)) & (codes.astype(np.int64) < 2**fmt.bits), fmt.nan_code, codes)


def _at(index: tuple[int, ...]) -> str:
    return ", ".join(map(str, index))


def as_returned(question: Question, outputs: Mapping[str, np.ndarray]) -> dict[str, Returned]:
    """A reference's (or a bug's) float64 outputs as a subject of the precision would return them: rounded once at the end."""
    _, tensors = question.op.signature_of(question.direction, question.inputs)
    result = {}
    for t in tensors:
        y = np.asarray(outputs[t.name])
        if t.kind in ("real", "const"):
            y = round_to(question.precision.io, y.astype(np.float64), overflow="nan").astype(question.precision.carrier)
        result[t.name] = Returned(y, str(y.dtype))
    return result


__all__ = ["ERROR", "FAIL", "PASS", "SKIPPED", "Judgement", "Question", "Returned", "as_returned", "judge", "ulp"]
