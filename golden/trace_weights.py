"""A checkpoint's weights as an engine of a precision holds them."""

from collections.abc import Mapping

import numpy as np

from ..ref.cast import round_to
from ..ref.config import Config
from ..ref.names import MODEL, expert_names, layer_names
from .precision import Precision

HELD = 2**30  # bytes of a layer's weights that are kept in float64 from one use to the next


class Weights:
    """A checkpoint's weights as an engine of a precision holds them, in float64; the selection bias stays float32."""

    def __init__(self, checkpoint: Mapping[str, np.ndarray], config: Config, precision: Precision):
        self.checkpoint, self.config, self.precision = checkpoint, config, precision
        self._layer: int | None = None
        self._held: dict[str, np.ndarray] = {}

    def __call__(self, layer: int | None, name: str) -> np.ndarray | None:
        """A weight by the op's name, None where the model has none. The weights of one layer are kept."""
        self._turn(layer)
        names = MODEL if layer is None else layer_names(self.config, layer)
        return self._read(names[name], name == "e_score_correction_bias") if name in names else None

    def rows(self, name: str, index: np.ndarray) -> np.ndarray:
        """Some rows of a table"""
        values = np.asarray(self.checkpoint[MODEL[name]])[index].astype(np.float32)
        return rounded(values, self.precision).astype(np.float64)

    def expert(self, layer: int, e: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        self._turn(layer)
        gate, up, down = (self._read(name) for name in expert_names(layer, e))
        return gate, up, down

    def _turn(self, layer: int | None) -> None:
        if layer is not None and layer != self._layer:
            self._layer, self._held = layer, {}

    def _read(self, name: str, as_it_is: bool = False) -> np.ndarray:
        if name in self._held:
            return self._held[name]
        values = np.asarray(self.checkpoint[name], dtype=np.float32)
        values = (values if as_it_is else rounded(values, self.precision)).astype(np.float64)
        if sum(v.nbytes for v in self._held.values()) + values.nbytes < HELD:
            self._held[name] = values
        return values


def rounded(values: np.ndarray, precision: Precision) -> np.ndarray:
    """float32 at the nearest number of a 16-bit format. Most checkpoints hold those already."""
    if precision.io.bits >= 32 or (precision.io.name == "bf16" and not np.any(values.view(np.uint32) & 0xFFFF)):
        return values
    return round_to(precision.io, values)
