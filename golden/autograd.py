"""A forward of torch or JAX as its own backward (torch.autograd.grad, jax.vjp), and nn.Modules as functions of an op's inputs."""

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

from ..ref.op import Op
from .errors import Misbehaved

FRAMEWORKS = ("torch", "jax")


def is_module(source: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(source, torch.nn.Module)


def as_function(found: Callable, op: Op) -> Callable:
    """An nn.Module as a function of the op's inputs; any other callable as it is.

    An input that the module's forward does not take stands in for the module's parameter or buffer of that name: `weight`, or `gate_weight`
    for gate.weight, or `o_proj` for o_proj.weight.
    """
    if not is_module(found):
        return found
    from torch.func import functional_call

    module: Any = found
    state = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    own = {name.removesuffix(".weight").replace(".", "_"): name for name in state} | {name.replace(".", "_"): name for name in state}
    takes = inspect.signature(module.forward).parameters
    replaced = {t.name: own[t.name] for t in op.inputs if t.name not in takes and t.name in own}

    def forward(**given: Any) -> Any:
        tensors = {path: given.pop(name) for name, path in replaced.items() if name in given}
        return functional_call(module, tensors, (), given)

    return _with_parameters(forward, takes, replaced)


def takes_gradients(fn: Callable, op: Op) -> bool:
    """Whether a callable takes the gradients of the op's outputs, that is, is a backward by itself."""
    try:
        parameters = inspect.signature(fn).parameters
    except (TypeError, ValueError):  # written in C: nothing is known before the call
        return True
    return any(p.kind is p.VAR_KEYWORD for p in parameters.values()) or any(name in parameters for name in _gradients(op))


def backward_of(forward: Callable, op: Op, framework: str) -> Callable:
    """The gradients of forward's real inputs, from its inputs and the gradients of its real outputs."""
    differentiate = _by_torch if framework == "torch" else _by_jax

    def backward(**given: Any) -> dict[str, Any]:
        dys = [given.pop(name) for name in _gradients(op)]
        leaves = {t.name: given.pop(t.name) for t in op.inputs if t.kind == "real" and t.name in given}

        def real_outputs(**leaves: Any) -> list[Any]:
            return _real(forward(**given, **leaves), op)

        return {f"d{name}": dx for name, dx in zip(leaves, differentiate(real_outputs, leaves, dys), strict=True)}

    return _with_parameters(backward, inspect.signature(forward).parameters, _gradients(op))


def _gradients(op: Op) -> list[str]:
    return [f"d{t.name}" for t in op.outputs if t.kind == "real"]


def _real(result: Any, op: Op) -> list[Any]:
    values = [result[t.name] for t in op.outputs] if isinstance(result, Mapping) else result
    values = list(values) if isinstance(values, (tuple, list)) else [values]
    if len(values) != len(op.outputs):
        raise Misbehaved(f"forward returned {len(values)} outputs; expected {len(op.outputs)}: {', '.join(t.name for t in op.outputs)}")
    return [y for t, y in zip(op.outputs, values, strict=True) if t.kind == "real"]


def _by_torch(outputs: Callable, leaves: Mapping[str, Any], dys: list[Any]) -> list[Any]:
    import torch

    xs = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    with torch.enable_grad():
        pairs = [(y, dy.to(y.dtype)) for y, dy in zip(outputs(**xs), dys, strict=True) if y.requires_grad]
    if not pairs:
        raise Misbehaved("autograd finds no way from the outputs back to the inputs; forward must not detach them")
    found = torch.autograd.grad([y for y, _ in pairs], list(xs.values()), [dy for _, dy in pairs], allow_unused=True)
    return [torch.zeros_like(x) if dx is None else dx for x, dx in zip(xs.values(), found, strict=True)]


def _by_jax(outputs: Callable, leaves: Mapping[str, Any], dys: list[Any]) -> list[Any]:
    import jax

    ys, pull = jax.vjp(lambda *xs: outputs(**dict(zip(leaves, xs, strict=True))), *leaves.values())
    return list(pull([dy.astype(y.dtype) for y, dy in zip(ys, dys, strict=True)]))


def _with_parameters(fn: Callable, takes: Mapping[str, inspect.Parameter], more: Any) -> Callable:
    """fn under a signature: the parameters of another, by keyword, and more names."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    own = [p.replace(kind=keyword) if p.kind is p.POSITIONAL_OR_KEYWORD else p for p in takes.values()]
    named = [inspect.Parameter(name, keyword) for name in more]
    fn.__signature__ = inspect.Signature(sorted([*own, *named], key=lambda p: p.kind))  # type: ignore[attr-defined]
    return fn
