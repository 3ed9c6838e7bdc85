"""Hypothesis strategies derived from an op's signature and declared cases, for this project's tests and for yours.

    from hypothesis import given
    from leadline.golden import strategies

    @given(strategies.questions("router.noaux_tc"))
    def test_mine(question):
        idx, weight = my_router(**question.inputs, **question.attrs)

Sizes are boundary sizes (0, 1, 127, 128, 129 where the op lets a letter vary), arrays are drawn as in the declared cases with special
values mixed in, and routers meet near ties. The seed of every array is drawn by Hypothesis, so a failure shrinks and is replayed.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from ..ref.cast import round_to
from ..ref.op import Case, Op, op_named
from .band import Arrays
from .draw import draw_case, in_float64, ulp
from .precision import Precision, precision_named

SIZES = (0, 1, 2, 127, 128, 129)


@dataclass(frozen=True)
class Drawn:
    """Inputs by name, every attribute, and what they were drawn for."""

    op: Op
    direction: str
    precision: Precision
    inputs: Arrays
    attrs: Mapping[str, Any]
    case: Case
    seed: int

    def __repr__(self) -> str:
        sizes = ", ".join(f"{k}={v}" for k, v in self.case.dims.items())
        what = f"{self.op.name} {self.direction} {self.precision.name}, case {self.case.name!r}"
        return f"Drawn({what}, {sizes}, seed={self.seed}, attrs={dict(self.attrs)})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What Hypothesis prints of a failing example: a line, not the arrays."""
        printer.text(repr(self))


@st.composite
def questions(
    draw: st.DrawFn, op: str | Op, *, direction: str = "forward", precision: str = "fp32", empty: bool = True, large: int = 20_000
) -> Drawn:
    """Inputs and attributes of an op at a precision. `empty` allows sizes of 0; cases of more than `large` elements are left out."""
    declared = op_named(op) if isinstance(op, str) else op
    p = precision_named(precision)
    ordered = sorted(declared.cases, key=lambda c: math.prod(c.dims.values()))
    case = draw(st.sampled_from([c for c in ordered if math.prod(c.dims.values()) <= large] or ordered[:1]))
    sizes = {}
    for letter in declared.vary:
        if letter in case.dims:  # no tokens is a batch that happens; no channels is not
            boundary = SIZES if empty and letter == "n" else SIZES[1:]
            sizes[letter] = draw(st.one_of(st.just(case.dims[letter]), st.sampled_from(boundary)))
    case = Case(case.name, {**case.dims, **sizes}, case.draw, case.attrs, case.note)
    seed = draw(st.integers(0, 2**32 - 1))
    inputs = draw_case(declared, case, direction, p, seed)
    stale = any(spec[0] in ("nan_tail", "stale_cache") for spec in case.draw.values())  # NaN where nothing may look: it must not be moved
    for tensor in () if stale else declared.signature_of("forward", inputs)[0]:
        x = inputs[tensor.name]
        ranged = tensor.kind == "const" and case.draw[tensor.name][0] in ("uniform", "scales")  # what is outside is refused
        if tensor.kind != "like" and not ranged and x.size and x.dtype.kind == "f" and draw(st.booleans()):
            _disturb(draw, x, p)
    if declared.choice and direction == "backward":  # the decision that belongs to the disturbed inputs
        exact = in_float64({t.name: inputs[t.name] for t in declared.signature_of("forward", inputs)[0]})
        inputs[declared.choice[0]] = declared.run("forward", exact, case.attrs)[declared.choice[0]]
    return Drawn(declared, direction, p, inputs, {**declared.defaults, **case.attrs}, case, seed)


def _disturb(draw: st.DrawFn, x: np.ndarray, p: Precision) -> None:
    """Puts special values in, or makes two neighbours equal or nearly so (one unit in the last place apart)."""
    flat = x.reshape(-1)
    where = st.integers(0, flat.size - 1)
    for _ in range(draw(st.integers(1, 4))):
        i, kind = draw(where), draw(st.sampled_from(("zero", "negative zero", "one", "tiny", "tie", "near tie")))
        j = draw(where)
        unit = ulp(p.io, flat[j : j + 1].astype(np.float64))[0]
        value = {"zero": 0.0, "negative zero": -0.0, "one": 1.0, "tiny": 2.0**p.io.emin, "tie": flat[j], "near tie": flat[j] + unit}[kind]
        flat[i] = round_to(p.io, np.asarray([value], dtype=np.float64), overflow="nan")[0]
