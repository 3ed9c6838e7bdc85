"""Known bugs and conventions, each a short variant of the reference: vectors must catch them, a failing subject is told which fits."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ...ref.op import Op

FILES = (
    "attention",
    "attention_backward",
    "balance",
    "balance_load",
    "cache",
    "cast",
    "decode",
    "fp8",
    "fp8_block",
    "fp8_gemm",
    "fp8_linear",
    "loss",
    "mla",
    "mla_backward",
    "mla_weights",
    "model",
    "moe",
    "moe_experts",
    "moe_layer",
    "mtp",
    "norm",
    "parts",
    "rope",
    "router",
    "router_softmax",
    "swiglu",
)


@dataclass(frozen=True)
class Bug:
    """One known mistake, or a convention that differs. It replaces an op's forward or backward, or sets attributes."""

    id: str
    ops: tuple[str, ...]
    what: str
    sources: str = ""
    fwd: Callable | None = None  # same arguments and results as the op's forward
    bwd: Callable | None = None
    attrs: Mapping[str, Any] = field(default_factory=dict)
    benign: bool = False  # a convention: no failure once the subject declares it (--attr)
    directions: tuple[str, ...] = ("forward", "backward")  # where it shows

    def variant(self, op: Op) -> Op:
        """The op with the bug in it."""
        if self.fwd is not None:
            self.fwd.sig = op.sig  # type: ignore[attr-defined]
        return replace(op, fwd=self.fwd or op.fwd, bwd=self.bwd or op.bwd)

    def touches(self, direction: str) -> bool:
        """A wrong forward of an op that has a backward of its own is judged forward; a wrong backward backward; attributes in both."""
        wrong = bool(self.attrs) or (self.fwd if direction == "forward" else self.bwd) is not None
        return wrong and direction in self.directions


def bugs_of(op: Op, direction: str) -> list[Bug]:
    """The bugs known for an op."""
    found = (bug for name in FILES for bug in importlib.import_module(f".{name}", __package__).BUGS)
    return [bug for bug in found if op.name in bug.ops and bug.touches(direction)]
