"""One case, one verdict: a subject's outputs held to the band."""

from collections.abc import Mapping

import numpy as np

from ..ref.cast import decode, round_to
from ..ref.formats import Format
from ..ref.op import Tensor
from .band import Band, band_of, floor_of, in_sigma, reach, statistics
from .decisions import choosable, judge_choice, regrets, same, unstable_rows
from .precision import Precision
from .question import ERROR, FAIL, PASS, SKIPPED, Judgement, Question, Returned, as_returned, code_format

CLOSE = 4.0  # times its limit: a statistic that more runs may excuse
CLOSER = 4
UNITS = {"max": " reaches", "rms": " σ", "row": " σ", "block": " σ", "mean": " σ", "gain": ""}


def judge_closely(question: Question, returned: Mapping[str, Returned], band: Band) -> Judgement:
    """judge(); and where nothing but a statistic is beyond its limit, by no more than CLOSE times, again by CLOSER times the runs.

    Of a rounding that turns one time in ten, RUNS runs see nothing in one case of five (0.9^16): σ is then too small, for all that it
    reaches. CLOSER times the runs miss it once in a thousand. Garbage and most bugs are far beyond CLOSE, and cost nothing more.
    """
    found = judge(question, returned, band)
    if not _close(found):
        return found
    asked = question.op, question.direction, question.inputs, question.attrs, question.precision
    return judge(question, returned, band_of(*asked, truth=band.truth, runs=CLOSER * band.runs))


def _close(found: Judgement) -> bool:
    """Whether it fails, and by nothing but statistics, each at most CLOSE times its limit."""
    limits = found.limits
    beyond = [(name, of[s] <= CLOSE * limits[name][s]) for name, of in found.statistics.items() for s in of if of[s] > limits[name][s]]
    told = len({name for name, _ in beyond}) == len(found.reasons)  # a reason an output: no other is among them
    return found.verdict == FAIL and told and all(near for _, near in beyond)


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
        band = judge_choice(question, values, band, judgement)
    elif op.choice and (question.any_tie or not question.handed_choice):
        unstable = unstable_rows(question)
        judgement.ambiguous += int(unstable.sum())
        by_token = next(t for t in op.outputs if t.name == op.choice[0]).dims[0] == "n"
        for tensor in tensors:  # what gathers from all rows is left open by one that may turn: a weight's gradient, attention's tokens
            judged[tensor.name][unstable if by_token and tensor.dims[:1] == ("n",) else np.any(unstable)] = False
    judgement.band, judgement.judged = band, judged
    for tensor in tensors:
        if op.choice and tensor.name == op.choice[0]:
            continue
        judge_array(tensor, values[tensor.name], band, judged[tensor.name], question, judgement)
    return judgement


def judge_array(tensor: Tensor, got: np.ndarray, band: Band, judged: np.ndarray, question: Question, judgement: Judgement) -> None:
    """One array: in σ, or bit for bit."""
    if tensor.kind == "real":
        _real(tensor.name, got, band, judged, question.precision, judgement)
    else:
        _exact(tensor, got, band.truth[tensor.name], code_format(question), judgement)


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
        return ~same(got.astype(np.float64), truth.astype(np.float64))


def _one_nan(fmt: Format, codes: np.ndarray) -> np.ndarray:
    """Codes with every NaN pattern made the canonical one."""
    if fmt.nan_code is None:
        return codes
    return np.where(np.isnan(decode(fmt, codes)) & (codes.astype(np.int64) < 2**fmt.bits), fmt.nan_code, codes)


def _at(index: tuple[int, ...]) -> str:
    return ", ".join(map(str, index))


__all__ = [
    "ERROR",
    "FAIL",
    "PASS",
    "SKIPPED",
    "Judgement",
    "Question",
    "Returned",
    "as_returned",
    "choosable",
    "code_format",
    "differing",
    "judge",
    "judge_array",
    "judge_closely",
    "regrets",
    "unstable_rows",
]
