"""What is under test: a callable, or a module or object whose attributes are named after ops. Loaded, asked, and its answer read.

A module may say FRAMEWORK = "torch", DECLARES = {"rmsnorm": {"cast_order": "cast_then_weight"}} (attributes it is built with) and
TIES = "any" (it leaves the winner of an exact tie open). What returns its outputs in a dict may add the reference's intermediates, by the
names that `leadline ops show` lists: a FAIL then says which is the first that is wrong.
"""

import difflib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..ref.op import Op, Tensor
from . import autograd, frameworks
from .errors import Misbehaved, Refused, UsageError
from .judge import Returned
from .precision import Precision

BUILT_IN = {
    "kernels.cpu": ("leadline.kernels.cpu", "numba"),
    "kernels.gpu": ("leadline.kernels.gpu", "numba-cuda"),
    "ref": ("leadline.golden.subjects.ref", ""),
    "torch": ("leadline.golden.subjects.torch", "torch"),
    "ml_dtypes": ("leadline.golden.subjects.ml_dtypes", "ml_dtypes"),
    "gfloat": ("leadline.golden.subjects.gfloat", "gfloat"),
    "transformers": ("leadline.golden.subjects.transformers", "transformers"),
    "transformers.v2": ("leadline.golden.subjects.transformers_v2", "transformers"),
}


@dataclass(frozen=True)
class Contract:
    """What a callable takes: the attributes it accepts, and whether a backward is handed the forward's decision."""

    attrs: tuple[str, ...]
    takes_choice: bool
    left_out: tuple[str, ...] = ()  # inputs that it may do without and has no parameter for


@dataclass
class Subject:
    """An implementation and what it says of itself."""

    name: str
    source: Any  # a callable, or an object with attributes named after ops
    framework: str = "numpy"
    declares: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    any_tie: bool = False
    direction: str = "forward"  # what a bare callable computes

    def find(self, op: Op, direction: str) -> Callable | None:
        """The callable for an op, or None. A torch or JAX callable that is no backward, and any nn.Module, becomes one by autograd."""
        if named := _attribute(self.source, op.name, direction):
            return autograd.as_function(named, op)
        if callable(self.source) and not isinstance(self.source, (ModuleType, type)) and direction == self.direction:
            own = autograd.as_function(self.source, op)
            if direction == "forward" or self.framework not in autograd.FRAMEWORKS or autograd.takes_gradients(own, op):
                return own
            return autograd.backward_of(own, op, self.framework)
        forward = _attribute(self.source, op.name, "forward")
        if direction == "backward" and forward is not None and autograd.is_module(forward):
            return autograd.backward_of(autograd.as_function(forward, op), op, "torch")
        return None

    def close(self) -> None:
        """Nothing is held; subjects that are processes have something to end."""

    def contract(self, op: Op, direction: str) -> Contract | None:
        """None if the subject does not have the op; a UsageError if what it has cannot be called by the op's names."""
        fn = self.find(op, direction)
        return None if fn is None else fit(fn, op, direction, self.name)

    def ask(self, op: Op, direction: str, inputs: Mapping[str, np.ndarray], attrs: Mapping[str, Any], p: Precision) -> dict[str, Returned]:
        """The outputs by name. Whatever the callable raises comes through; Misbehaved if what it returns cannot be judged."""
        fn = self.find(op, direction)
        contract = self.contract(op, direction)
        if fn is None or contract is None:
            raise Refused(f"{self.name} has no {op.name} {direction}")
        tensors, outputs = handed(op, direction, inputs, contract)
        given = {t.name: frameworks.hand_over(inputs[t.name], p.format_of(t), t.kind, self.framework) for t in tensors}
        before = {name: frameworks.snapshot(x) for name, x in given.items()}
        try:
            with np.errstate(all="ignore"):  # vectors hold infinities and zeros on purpose
                result = fn(**given, **{k: v for k, v in attrs.items() if k in contract.attrs})
        except NotImplementedError as error:
            raise Refused(str(error) or "not implemented") from error
        for name, x in given.items():
            if not np.array_equal(before[name], frameworks.snapshot(x)):
                raise Misbehaved(f"{name} was changed in place; inputs must be left as they are")
        return _by_name(result, op, outputs)


def handed(op: Op, direction: str, inputs: Mapping[str, np.ndarray], contract: Contract) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The arrays that a subject is handed, and those that it returns."""
    tensors, outputs = op.signature_of(direction, inputs)
    spared = {*contract.left_out, *([op.choice[0]] if op.choice and not contract.takes_choice else [])}
    return tuple(t for t in tensors if t.name not in spared), outputs


def _attribute(source: Any, name: str, direction: str) -> Callable | None:
    """source.router.noaux_tc or source.router_noaux_tc; with _bwd for the backward."""
    suffix = "" if direction == "forward" else "_bwd"
    found: Any = source
    for part in (name + suffix).split("."):
        found = getattr(found, part, None)
    found = found if callable(found) else getattr(source, name.replace(".", "_") + suffix, None)
    return found if callable(found) else None


def fit(fn: Callable, op: Op, direction: str, name: str) -> Contract:
    """Whether a callable can be called by keyword with the op's inputs; which attributes it takes."""
    tensors, _ = op.signature_of(direction)
    names, attrs = [t.name for t in tensors], list(op.attrs)
    choice = op.choice[0] if op.choice and direction == "backward" else None
    try:
        parameters = inspect.signature(fn).parameters
    except (TypeError, ValueError):  # written in C: nothing is known before the call
        return Contract(tuple(attrs), True)
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    takes = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    optional = {t.name for t in tensors if t.optional or t.kind == "like"}
    missing = [n for n in names if n not in takes and n != choice and n not in optional and not anything]
    foreign = [
        n
        for n, p in parameters.items()
        if p.kind is p.POSITIONAL_ONLY
        or (p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.default is p.empty and n not in (*names, *attrs))
    ]
    if missing or foreign:
        takes_text = ", ".join(parameters) or "nothing"
        wants = ", ".join(n for n in names if n != choice) + (f" (and, if it likes, {', '.join(([choice] if choice else []) + attrs)})")
        raise UsageError(f"{name} takes {takes_text}; {op.name} {direction} passes by keyword {wants}")
    accepted = tuple(a for a in attrs if anything or a in takes)
    left_out = tuple(n for n in sorted(optional) if not anything and n not in takes)
    return Contract(accepted, choice is not None and (anything or choice in takes), left_out)


def _by_name(result: Any, op: Op, outputs: tuple[Tensor, ...]) -> dict[str, Returned]:
    """The outputs, and of a mapping the reference's named intermediates that are in it too. A None beside the outputs is nothing."""
    kinds = {t.name: t.kind for t in outputs}
    names = list(kinds)
    if isinstance(result, Mapping):
        if missing := [n for n in names if n not in result]:
            raise Misbehaved(f"returned {', '.join(map(str, result)) or 'nothing'}; {', '.join(missing)} is missing")
        more = [n for n in result if n not in kinds and result[n] is not None]
        if more:
            from .intermediates import more_of  # what most subjects have no need of

            more = more_of(op.name, more, names)
        names += more
        values = [result[n] for n in names]
    else:
        values = list(result) if isinstance(result, (tuple, list)) else [result]
        if len(values) != len(names):
            raise Misbehaved(f"returned {len(values)} output{'s' * (len(values) != 1)}; expected {len(names)}: {', '.join(names)}")
    read = {}
    for name, value in zip(names, values, strict=True):
        try:
            read[name] = Returned(*frameworks.take_back(value, kinds.get(name, "real")))
        except Exception as error:
            raise Misbehaved(f"{name} is {type(value).__name__}, which is no array ({error})") from error
    return read


def load(spec: Any, framework: str | None = None, ties: str | None = None, direction: str = "forward") -> Subject:
    """A subject from what the user named: a built-in name, module, module:attr, file.py, file.py:attr, ctypes:LIB.so; or a callable or
    object itself."""
    frameworks.check(framework)
    if isinstance(spec, str) and spec.startswith("ctypes:"):
        from .ctypes_subject import Library  # a Subject itself

        return Library(spec, framework, ties)
    if not isinstance(spec, str):
        source, name = spec, getattr(spec, "__name__", type(spec).__name__)
    else:
        source, name = _resolve(spec), spec
    return Subject(
        name,
        source,
        framework or getattr(source, "FRAMEWORK", "torch" if autograd.is_module(source) else "numpy"),
        getattr(source, "DECLARES", {}),
        (ties or getattr(source, "TIES", "lowest")) == "any",
        direction,
    )


def heading_of(spec: str) -> str | None:
    """What a subject runs on, where it is not this machine's processor alone."""
    return load(spec).source.heading() if spec == "kernels.gpu" else None


def _resolve(spec: str) -> Any:
    if spec in BUILT_IN:
        module, needs = BUILT_IN[spec]
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            missing = (error.name or needs).split(".")[0]
            raise UsageError(f"subject {spec} needs {missing}; install it with: python3 -m pip install {missing}") from error
        if hasattr(found, "check_device"):
            try:
                found.check_device()  # a device that is not there: one line now, and no case of any op
            except ValueError as error:
                raise UsageError(str(error)) from error
        return found
    where, _, attribute = spec.partition(":")
    is_file = where.endswith(".py") or os.sep in where
    if is_file and not Path(where).is_file():
        raise UsageError(f"subject {spec}: there is no file {where}")
    try:
        module = _import_file(Path(where)) if is_file else _import_module(where)
    except UsageError:
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        if not is_file and isinstance(error, ModuleNotFoundError) and error.name and f"{where}.".startswith(f"{error.name}."):
            near = difflib.get_close_matches(spec, BUILT_IN, n=2, cutoff=0.5)
            hint = (
                f"did you mean {' or '.join(near)}?"
                if near
                else f"built in are {', '.join(BUILT_IN)}; else name module:attr or file.py:attr"
            )
            raise UsageError(f"unknown subject {spec!r}; {hint}") from error
        raise UsageError(f"subject {spec}: {where} does not import: {type(error).__name__}: {_first_line(error)}") from error
    found: Any = module
    for part in attribute.split(".") if attribute else ():
        if not hasattr(found, part):
            names = [n for n in dir(found) if not n.startswith("_")]
            near = difflib.get_close_matches(part, names, n=3, cutoff=0.4)
            raise UsageError(f"subject {spec}: {where} has no {attribute}" + (f"; did you mean {', '.join(near)}?" if near else ""))
        found = getattr(found, part)
    return found


def _import_module(name: str) -> ModuleType:
    if not name or any(not part.isidentifier() for part in name.split(".")):
        raise UsageError(f"unknown subject {name!r}; built in are {', '.join(BUILT_IN)}; else name module:attr or file.py:attr")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last: nothing here may stand in for an installed package
    return importlib.import_module(name)


def _import_file(path: Path) -> ModuleType:
    sys.path.append(str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"subject {path}: expected a Python file, name.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"
