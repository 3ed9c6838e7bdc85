"""Slow, exact, per-element oracles, written from the contract's text alone; they share no code with `ref`.

`ORACLES[op, "forward" | "backward"](inputs, attrs) -> outputs`: dicts of numpy arrays by the contract's names; `attrs` may be partial.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from . import attention, cast, linear, mla, norm, quantize, rope, router
from .floats import CAST_FORMATS

Oracle = Callable[[dict[str, np.ndarray], dict], dict[str, np.ndarray]]

ORACLES: dict[tuple[str, str], Oracle] = {
    ("fp8.quantize_tile", "forward"): quantize.quantize_tile,
    ("fp8.dequantize_tile", "forward"): quantize.dequantize_tile,
    ("rmsnorm", "forward"): norm.forward,
    ("rmsnorm", "backward"): norm.backward,
    ("router.noaux_tc", "forward"): router.forward,
    ("router.noaux_tc", "backward"): router.backward,
    ("linear", "forward"): linear.forward,
    ("linear", "backward"): linear.backward,
    ("rope.frequencies", "forward"): rope.frequencies,
    ("rope", "forward"): rope.forward,
    ("rope", "backward"): rope.backward,
    ("attention", "forward"): attention.forward,
    ("attention", "backward"): attention.backward,
    ("attention.merge", "forward"): attention.merge,
    ("attention.merge", "backward"): attention.merge_backward,
    ("mla.prefill", "forward"): mla.forward,
    ("mla.prefill", "backward"): mla.backward,
    ("mla.absorb", "forward"): mla.forward,  # in exact arithmetic, one function
    ("mla.absorb", "backward"): mla.backward,
    ("mla.decode", "forward"): mla.decode,
}
for _name in CAST_FORMATS:
    ORACLES[f"cast.{_name}", "forward"] = partial(cast.cast, _name)
    ORACLES[f"encode.{_name}", "forward"] = partial(cast.encode, _name)
    ORACLES[f"decode.{_name}", "forward"] = partial(cast.decode, _name)

__all__ = ["ORACLES", "Oracle", "attention", "cast", "linear", "mla", "norm", "quantize", "rope", "router"]
