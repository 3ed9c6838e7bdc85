"""What is asked of a subject, what it returns, and what is found of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..ref.cast import round_to
from ..ref.formats import FORMATS, Format
from ..ref.op import Op
from .band import Arrays, Band
from .precision import Precision

PASS, FAIL, ERROR, SKIPPED = "PASS", "FAIL", "ERROR", "SKIPPED"


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


def code_format(question: Question) -> Format | None:
    """What the op's codes mean; None where bits are moved, whatever they mean."""
    op = question.op
    if op.name.startswith(("pack.", "unpack.")):
        return None
    return FORMATS.get(question.attrs.get("format") or op.defaults.get("format") or op.name.rsplit(".", 1)[-1])


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
