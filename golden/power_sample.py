"""What the quick form of the kill matrix asks: which bugs, on which cases. Chosen by hashes of their names, so the same every time."""

import functools
import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..ref.op import Case, Op
from .bugs import Bug
from .catalogue import Caught, caught
from .vectors import DIRECTORY, LARGE, Store

CORRECT = "(correct)"  # the reference in a bug's place
QUICK = {"share": 12, "cases": 2, "flops": 20_000}  # one bug in 12, on 2 cases that are stored whole and cost no more, one that reveals it
FP8 = {"share": 6, "cases": 1, "flops": 20_000}  # the same where there are recipes: so many cases of each


def chosen(op: Op, direction: str, precision: str, ids: list[str]) -> list[str]:
    """A share of the bugs, of those that a cheap case is known to reveal or that none is."""
    cheap = {c.name for c in sample(op)}
    some = [id for id in ids if cheap and draw(f"{op.name} {direction} {id}", form(op)["share"])]
    return [id for id in some if not (known := revealing(id, op, direction, precision)) or known & cheap]


def sample(op: Op) -> list[Case]:
    """The cases that the quick form may take: the cheap ones, in an order that a hash draws."""
    cheap = [c for c in op.cases if c.quick and elements(op, c) <= LARGE and flops(op, c) <= form(op)["flops"]]
    return sorted(cheap, key=lambda c: hashed(f"{op.name} {c.name}"))


def form(op: Op) -> dict[str, int]:
    return FP8 if any(recipes_of(op, c) for c in op.cases) else QUICK


def recipes_of(op: Op, case: Case) -> tuple[str, ...]:
    """What a case of an FP8 op follows: the recipe of its scales, its accumulator."""
    if not op.name.startswith("fp8."):
        return ()
    own = {**op.defaults, **case.attrs}
    return tuple(str(own[name]) for name in ("recipe", "accumulator") if name in own)


def drawn(
    bug: Bug, op: Op, direction: str, precision: str, store: Store, differs: Callable[[Case], bool] = lambda case: True
) -> list[Case]:
    """The quick form's cases of a bug: one that the stored vectors say reveals it, or on which it differs, and others; where there are
    recipes, of each. `differs` also tells the forms of a bug apart that share its id."""
    known = revealing(bug.id, op, direction, precision, store.directory)
    found: dict[str, Case] = {}
    for recipes in dict.fromkeys(recipes_of(op, c) for c in sample(op)):
        cases = [c for c in sample(op) if recipes_of(op, c) == recipes]
        likely = [c for c in cases if c.name in known] if known else [] if bug.id == CORRECT else cases
        first = next((c for c in likely if differs(c)), cases[0])
        found |= dict(list({c.name: c for c in (first, *cases)}.items())[: form(op)["cases"]])
    return list(found.values())


def revealing(id: str, op: Op, direction: str, precision: str, directory: Path = DIRECTORY) -> set[str]:
    """The cases that the stored vectors say reveal a bug: at float32, or at bfloat16 if any does there."""
    flagged = _caught(directory).get(id, {})
    found: set[str] = set()
    for name in ("fp32",) if precision == "fp32" else ("bf16", "fp32"):
        vectors = [vector.partition("/") for vector in flagged.get(name, {}).get(op.name, [])]
        found = found or {case for case, _, way in vectors if way == direction}
    return found


@functools.cache
def _caught(directory: Path) -> dict[str, Caught]:
    return caught(directory)


def _letters(op: Op, case: Case) -> dict[str, Any]:
    return {"x": 1, **op.defaults, **case.attrs, **case.dims}  # x: as long as the values make it


def elements(op: Op, case: Case) -> int:
    """Of all arrays in and out"""
    tensors = (*op.signature_of("forward", case.draw)[0], *op.outputs)
    return sum(math.prod(t.shape(_letters(op, case))) for t in tensors)


def flops(op: Op, case: Case) -> int:
    return eval(op.flops, {"__builtins__": {}}, _letters(op, case))  # a formula of the declaration, in its letters


def hashed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def draw(text: str, share: int) -> bool:
    return hashed(text) % share == 0
