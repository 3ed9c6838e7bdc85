"""The reference itself, in the precision's own arithmetic: the harness held to its own standard."""

from types import SimpleNamespace
from typing import Any

from ...ref.op import OPS


def _callables(direction: str) -> dict[str, Any]:
    def bound(op: Any) -> Any:
        return lambda **arrays: op.run(
            direction, {k: v for k, v in arrays.items() if k not in op.attrs}, {k: v for k, v in arrays.items() if k in op.attrs}
        )

    return {op.name: bound(op) for op in OPS.values() if direction == "forward" or op.bwd}


def _flat(suffix: str, found: dict[str, Any]) -> dict[str, Any]:
    return {name.replace(".", "_") + suffix: fn for name, fn in found.items()}


globals().update(vars(SimpleNamespace(**_flat("", _callables("forward")), **_flat("_bwd", _callables("backward")))))
