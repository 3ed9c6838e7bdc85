"""Correct implementations, written separately from leadline, that its judge must pass: as different as real kernels are from each other."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import casts, decodes, norm, quantize, router, router_backward
from .floats import LAYOUTS, STORE

ALL = ("fp32", "bf16", "fp16", "fp64")
SINGLE = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Variant:
    """An implementation of one op and direction, and the precisions that it honestly computes in."""

    name: str
    op: str
    direction: str
    fn: Callable
    precisions: tuple[str, ...]
    rounded: tuple[int, ...] = ()  # the outputs that it rounds, once, to a 16-bit precision's format
    slow: bool = False  # plain Python over every element

    @property
    def id(self) -> str:
        return f"{self.op}-{self.direction}-{self.name}"

    def at(self, precision: str) -> Callable:
        """The callable that claims this precision."""
        if not self.rounded or precision in ("fp32", "fp64"):
            return self.fn

        @functools.wraps(self.fn)
        def stored(*arrays: Any, **keywords: Any) -> Any:
            result = self.fn(*arrays, **keywords)
            outputs = result if isinstance(result, tuple) else (result,)
            outputs = tuple(STORE[precision](y) if i in self.rounded else y for i, y in enumerate(outputs))
            return outputs if isinstance(result, tuple) else outputs[0]

        return stored


def _casts() -> list[Variant]:
    found = []
    for format in LAYOUTS:
        for name in casts.NAMES:
            precisions = ALL if name in casts.WIDE else SINGLE
            slow = name in casts.SLOW
            found.append(Variant(name, f"cast.{format}", "forward", casts.caster(name, format), precisions, slow=slow))
            found.append(Variant(name, f"encode.{format}", "forward", casts.encoder(name, format), precisions, slow=slow))
        found += [Variant(name, f"decode.{format}", "forward", decodes.decoder(name, format), ALL) for name in decodes.NAMES]
    return found


def _named(op: str, direction: str, fns: Any, rounded: tuple[int, ...], single: Callable[[str], bool]) -> list[Variant]:
    return [Variant(f.__name__, op, direction, f, SINGLE if single(f.__name__) else ALL, rounded) for f in fns]


VARIANTS = [
    *_casts(),
    *_named("fp8.quantize_tile", "forward", quantize.QUANTIZE, (), lambda n: n in quantize.SINGLE),
    *_named("fp8.dequantize_tile", "forward", quantize.DEQUANTIZE, (), lambda n: False),
    *_named("rmsnorm", "forward", norm.FORWARD, (0,), lambda n: n in norm.SINGLE),
    *_named("rmsnorm", "backward", norm.BACKWARD, (0, 1), lambda n: n in norm.SINGLE),
    *_named("router.noaux_tc", "forward", router.FORWARD, (1,), lambda n: n not in router.WIDE),
    *_named("router.noaux_tc", "backward", router_backward.BACKWARD, (0,), lambda n: n not in router_backward.WIDE),
]
EAGER = [
    Variant("eager", "rmsnorm", "forward", norm.forward_eager, ("bf16-eager",)),
    Variant("eager-rsqrt", "rmsnorm", "forward", norm.forward_eager_rsqrt, ("bf16-eager",)),
    Variant("eager", "rmsnorm", "backward", norm.backward_eager, ("bf16-eager",)),
    Variant("eager", "router.noaux_tc", "forward", router.forward_eager, ("bf16-eager",)),
    Variant("eager", "router.noaux_tc", "backward", router_backward.eager, ("bf16-eager",)),
]
VARIANTS += EAGER
FAST_EXP = Variant("fast-exp", "router.noaux_tc", "forward", router.FAST, SINGLE, (1,))
ROUNDED_FIRST = [  # for cast_order="cast_then_weight"
    Variant("cast-first", "rmsnorm", "forward", norm.forward_cast_first, ("bf16",)),
    Variant("cast-first", "rmsnorm", "backward", norm.backward_cast_first, ("bf16",)),
]
