"""What a program or a library says of itself: which ops, directions, precisions, attributes and inputs it takes."""

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..ref.op import OPS, Op, check_attr
from .errors import UsageError
from .precision import PRECISIONS
from .subject import Contract
from .vectors import directions
from .wire import plain

FIELDS = ("directions", "attrs", "declares", "precisions", "inputs")


@dataclass(frozen=True)
class Described:
    """One op as a subject has it. Inputs: the names that it reads (output gradients need no mention), None for all."""

    directions: tuple[str, ...]
    attrs: tuple[str, ...] = ()
    declares: Mapping[str, Any] = field(default_factory=dict)
    precisions: tuple[str, ...] = tuple(PRECISIONS)
    inputs: tuple[str, ...] | None = None

    def contract(self, op: Op, direction: str, name: str) -> Contract | None:
        if direction not in self.directions:
            return None
        tensors, _ = op.signature_of(direction)
        choice = op.choice[0] if op.choice and direction == "backward" else None
        read = [t.name for t in tensors] if self.inputs is None else self.inputs
        absent = [t for t in tensors[: len(op.inputs)] if t.name not in read]
        if needed := [t.name for t in absent if not (t.optional or t.kind == "like")]:
            raise UsageError(f"subject {name} does not read {', '.join(needed)}, which {op.name} {direction} needs")
        return Contract(self.attrs, choice is not None and choice in read, tuple(sorted(t.name for t in absent)))


def parse(about: Any, name: str) -> dict[str, Described]:
    """{"rmsnorm": {"directions": ["forward"], "attrs": ["eps"], ...}} checked, or a UsageError that names the place and the mend."""
    if not isinstance(about, dict) or not about:
        raise UsageError(f"subject {name} describes its ops as {plain(repr(about), 80)}; expected an object, op by op")
    return {op: _op(described, op, f"subject {name}, op {plain(op, 40)}") for op, described in about.items()}


def _op(about: Any, name: str, where: str) -> Described:
    _known([name], OPS, f"{where}: unknown op")
    if not isinstance(about, dict):
        raise UsageError(f"{where} is described by {plain(repr(about), 80)}; expected an object with {', '.join(FIELDS)}")
    _known(about, FIELDS, f"{where}: unknown field")
    op = OPS[name]
    choice = [op.choice[0]] if op.choice else []
    allowed = {"directions": directions(op), "attrs": op.attrs, "precisions": PRECISIONS, "inputs": [*(t.name for t in op.inputs), *choice]}
    lists: dict[str, tuple[str, ...]] = {}
    for key, names in allowed.items():
        if (value := about.get(key)) is not None:
            if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
                raise UsageError(f"{where}: {key} is {plain(repr(value), 80)}; expected a list of names")
            _known(value, names, f"{where}: {key} has the unknown")
            lists[key] = tuple(value)
    declares = about.get("declares") or {}
    if not isinstance(declares, dict):
        raise UsageError(f"{where}: declares is {plain(repr(declares), 80)}; expected an object of attributes")
    _known(declares, op.attrs, f"{where}: declares the unknown attribute")
    for key, value in declares.items():
        try:
            check_attr(name, op.attrs[key], value)
        except ValueError as error:
            raise UsageError(f"{where}: declares {plain(str(error))}") from error
    return Described(**{"directions": ("forward",), **lists}, declares=declares)


def _known(names: Collection[str], known: Collection[str], problem: str) -> None:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=2, cutoff=0.4)
            hint = f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(list(known)[:12]) or 'none'}"
            raise UsageError(f"{problem} {plain(name, 40)!r}; {hint}")
