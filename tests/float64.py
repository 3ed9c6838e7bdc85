"""What tests of properties share: declared cases drawn in float64, and when two evaluations of one are near enough."""

from typing import Any

import numpy as np
from leadline.golden.band import DEVIATIONS, SLACK
from leadline.golden.draw import draw_case
from leadline.golden.precision import PRECISIONS
from leadline.ref.op import OPS, Op

FP64 = PRECISIONS["fp64"]
Arrays = dict[str, np.ndarray]


def drawn(name: str, case: str, way: str = "forward", seed: int = 0) -> tuple[Op, Arrays, dict[str, Any]]:
    op = OPS[name]
    chosen = next(c for c in op.cases if c.name == case)
    return op, draw_case(op, chosen, way, FP64, seed), dict(chosen.attrs)


def near(got: np.ndarray, want: np.ndarray, sigma: np.ndarray) -> bool:
    """Two correct evaluations in float64, each within SLACK·6 σ of the truth."""
    return got.shape == want.shape and bool(np.all(np.abs(got - want) <= 2 * SLACK * DEVIATIONS * sigma))
