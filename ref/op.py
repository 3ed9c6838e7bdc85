"""Op: the one record of an op. Vectors, strategies, tests, the command line and the README's table are derived from it.

A signature reads "logits[n,e] bias[e]:const -> topk_idx[n,k]:index topk_weight[n,k]". Letters are dimensions (or attributes), "/" divides
and rounds up. A kind follows the colon:

    real    (the default) floating point; an input has a gradient, an output is judged by a tolerance
    const   floating point input without a gradient
    exact   floating point output, judged bit for bit
    code    bit patterns: uint8 or uint16
    index   integers; as an output, a choice that is compared as a set along the last axis
    like    an array whose framework, dtype and device the outputs take, for an op that has no other; subjects need not take it

An input whose name ends in "?" may be left out (a model without a query LoRA has no q_a_proj); its gradient is then left out too.
"""

import difflib
import functools
import inspect
import math
import numbers
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

from array_api_compat import is_array_api_obj

from .xp import Array, xp_of

KINDS = ("real", "const", "exact", "code", "index", "like")


@dataclass(frozen=True)
class Tensor:
    """One array of a signature: its name, its dimensions as written, its kind."""

    name: str
    dims: tuple[str, ...]
    kind: str
    optional: bool = False

    def shape(self, letters: Mapping[str, Any]) -> tuple[int, ...]:
        return tuple(extent(dim, letters) for dim in self.dims)


def extent(dim: str, letters: Mapping[str, Any]) -> int:
    """The value of a dimension as written: a letter, a number, or a/b rounded up."""
    top, *bottom = (int(p) if p.isdigit() else int(letters[p]) for p in dim.split("/"))
    return -(-top // bottom[0]) if bottom else top


@functools.cache
def parse(sig: str) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The inputs and the outputs of a signature."""
    sides = [
        tuple(
            Tensor(n, tuple(d.split(",")) if d else (), k or "real", bool(o))
            for n, o, d, k in re.findall(r"(\w+)(\??)\[([^\]]*)\](?::(\w+))?", side)
        )
        for side in sig.split("->")
    ]
    inputs, outputs = sides
    if unknown := [t.name for t in (*inputs, *outputs) if t.kind not in KINDS]:
        raise ValueError(f"signature {sig!r}: unknown kind at {unknown}; expected one of {KINDS}")
    return inputs, outputs


def signature(sig: str) -> Callable[[Callable], Callable]:
    """Declares a forward's arrays and checks every call: ranks, shapes, dtypes and attributes, before any work."""
    inputs, _ = parse(sig)

    def wrap(fwd: Callable) -> Callable:
        parameters = inspect.signature(fwd).parameters

        @functools.wraps(fwd)
        def checked(*arrays: Array, **keywords: Any) -> Any:
            name = checked.op_name  # type: ignore[attr-defined]
            twice = [t.name for t in inputs[: len(arrays)] if t.name in keywords]
            if twice or len(arrays) > len(inputs):
                problem = f"{twice[0]} is given twice" if twice else f"{len(arrays)} arrays are given"
                raise ValueError(f"{name}: {problem}; expected {', '.join(t.name for t in inputs)}")
            named = dict(zip((t.name for t in inputs), arrays, strict=False)) | {
                t.name: keywords.pop(t.name) for t in inputs if t.name in keywords
            }
            bind(name, inputs, named)
            for key, value in keywords.items():
                if key in parameters:
                    check_attr(name, parameters[key], value)
            return fwd(*(named.get(t.name) for t in inputs), **keywords)

        checked.sig = sig  # type: ignore[attr-defined]
        checked.op_name = fwd.__name__.removesuffix("_fwd")  # type: ignore[attr-defined]
        return checked

    return wrap


def keywords(fn: Callable) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a function"""
    return {name: p for name, p in inspect.signature(fn).parameters.items() if p.kind is p.KEYWORD_ONLY}


def attributes_of(*parts: Callable, without: Collection[str] = ("keep",)) -> Callable[[Callable], Callable]:
    """Gives fn(*arrays, **attrs) the keyword-only parameters of its parts, each once, then its own: those it hands on are written once."""

    def wrap(fn: Callable) -> Callable:
        every = {name: p for part in (*parts, fn) for name, p in keywords(part).items() if name not in without}
        mine = inspect.signature(fn)
        arrays = [p for p in mine.parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)]
        fn.__signature__ = mine.replace(parameters=[*arrays, *every.values()])  # type: ignore[attr-defined]
        return fn

    return wrap


def bind(op: str, tensors: tuple[Tensor, ...], arrays: Mapping[str, Array]) -> dict[str, int]:
    """The value of every letter, or a ValueError that names the array that does not fit."""
    letters: dict[str, int] = {}
    for tensor in tensors:
        if tensor.optional and arrays.get(tensor.name) is None:
            continue
        if tensor.name not in arrays:
            raise ValueError(f"{op}: {tensor.name} is missing; expected an array [{','.join(tensor.dims)}]")
        array = arrays[tensor.name]
        if not is_array_api_obj(array):
            raise ValueError(f"{op}: {tensor.name} is {type(array).__name__}; expected an array [{','.join(tensor.dims)}]")
        if len(array.shape) != len(tensor.dims):
            raise ValueError(f"{op}: {tensor.name} has shape {tuple(array.shape)}; expected [{','.join(tensor.dims)}]")
        for letter, size in zip(tensor.dims, array.shape, strict=True):
            if letter.isalpha() and letters.setdefault(letter, int(size)) != size:
                raise ValueError(f"{op}: {tensor.name} has shape {tuple(array.shape)}; expected {letter} = {letters[letter]}")
        check_dtype(op, tensor, array)
    return letters


def check_dtype(op: str, tensor: Tensor, array: Array) -> None:
    xp = xp_of(array)
    kind = {"code": "unsigned integer", "index": "integral"}.get(tensor.kind, "real floating")
    if not is_kind(xp, array.dtype, kind):
        raise ValueError(f"{op}: {tensor.name} is {array.dtype}; expected a {kind} dtype")


@functools.cache
def is_kind(xp: Any, dtype: Any, kind: str) -> bool:
    return xp.isdtype(dtype, kind)


@functools.cache
def allowed(annotation: Any) -> tuple[Any, bool, tuple[Any, ...]]:
    """What an attribute is declared as: its type, whether None stands for none, and the values if there are but some."""
    optional = get_origin(annotation) is UnionType
    expected = next(kind for kind in get_args(annotation) if kind is not NoneType) if optional else annotation
    return expected, optional, get_args(expected) if get_origin(expected) is Literal else ()


def check_attr(op: str, parameter: inspect.Parameter, value: Any) -> None:
    expected, optional, values = allowed(parameter.annotation)
    if optional and value is None:
        return
    if values:
        if value not in values or type(value) not in {type(a) for a in values}:
            raise ValueError(f"{op}: {parameter.name} is {value!r}; expected one of {', '.join(map(str, values))}")
    elif expected in KIND_OF_NUMBER:
        fits = isinstance(value, KIND_OF_NUMBER[expected]) and (expected is bool or not isinstance(value, bool))
        if not fits or (expected is float and not math.isfinite(value)):
            raise ValueError(f"{op}: {parameter.name} is {value!r}; expected a finite {expected.__name__}")


KIND_OF_NUMBER = {bool: bool, int: numbers.Integral, float: numbers.Real}  # NumPy's scalars are numbers too


@dataclass(frozen=True)
class Case:
    """One declared input: sizes, how each array is drawn (leadline.golden.draw), attributes that differ from the defaults."""

    name: str
    dims: Mapping[str, int]
    draw: Mapping[str, tuple]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    quick: bool = True


@dataclass(frozen=True)
class Op:
    """An op: a pure forward, its backward if it has one, and what is needed to draw, judge and cost it."""

    name: str
    fwd: Callable
    bwd: Callable | None
    cases: tuple[Case, ...]
    flops: str  # in the signature's letters and the attributes
    source: str
    vary: str = "n"  # the letters that may take any size while the attributes stay
    # An output that is a decision (chosen experts, a power-of-two scale). fwd takes it back under the same keyword; the function says
    # by how much the numbers behind the decision would have to move for it to be right (0 for the reference's own, inf for never).
    choice: tuple[str, Callable] | None = None

    @property
    def sig(self) -> str:
        return self.fwd.sig  # type: ignore[attr-defined]

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return parse(self.sig)[0]

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        return parse(self.sig)[1]

    @property
    def exact(self) -> bool:
        """Whether every output is discrete: judged bit for bit, in the inputs' own dtype."""
        return all(t.kind != "real" for t in self.outputs)

    @functools.cached_property
    def attrs(self) -> dict[str, inspect.Parameter]:
        """The attributes: forward's keyword-only parameters, less a decision that is handed back."""
        names = {t.name for t in self.outputs}
        return {name: p for name, p in keywords(self.fwd).items() if name not in names}

    @property
    def defaults(self) -> dict[str, Any]:
        return {name: p.default for name, p in self.attrs.items()}

    def signature_of(self, direction: str, given: Collection[str] | None = None) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The arrays in and out. Backward takes the forward's inputs, its decision and d<output>, and returns d<input>.

        With the names that are given, optional inputs that are not among them are left out, and their gradients.
        """
        inputs = tuple(t for t in self.inputs if not t.optional or given is None or t.name in given)
        if direction == "forward":
            return inputs, self.outputs
        chosen = tuple(t for t in self.outputs if self.choice and t.name == self.choice[0])
        grads = tuple(Tensor(f"d{t.name}", t.dims, "real") for t in self.outputs if t.kind == "real")
        wrt = tuple(Tensor(f"d{t.name}", t.dims, "real", t.optional) for t in inputs if t.kind == "real")
        return (*inputs, *chosen, *grads), wrt

    def run(self, direction: str, inputs: Mapping[str, Array], attrs: Mapping[str, Any]) -> dict[str, Array]:
        """Outputs by name. A decision among the inputs is taken as given."""
        given = {self.choice[0]: inputs[self.choice[0]]} if self.choice and self.choice[0] in inputs else {}
        result, saved = self.fwd(*(inputs.get(t.name) for t in self.inputs), **attrs, **given)
        tensors = self.outputs
        if direction == "backward":
            if self.bwd is None:
                raise ValueError(f"{self.name} has no backward; expected direction forward")
            result = self.bwd(*(inputs[f"d{t.name}"] for t in self.outputs if t.kind == "real"), saved)
            tensors = self.signature_of("backward", inputs)[1]
        return dict(zip((t.name for t in tensors), result if isinstance(result, tuple) else (result,), strict=True))


OPS: dict[str, Op] = {}


def declare(op: Op) -> Op:
    """Adds an op to the registry, once."""
    if op.name in OPS:
        raise ValueError(f"op {op.name} is declared twice")
    op.fwd.op_name = op.name  # type: ignore[attr-defined]  # what messages call it
    OPS[op.name] = op
    return op


def op_named(name: str) -> Op:
    """The op of that name, or a ValueError with near names."""
    if name not in OPS:
        near = difflib.get_close_matches(name, OPS, n=3, cutoff=0.4)
        raise ValueError(f"unknown op {name!r}; " + (f"did you mean {', '.join(near)}?" if near else "`leadline ops` lists them"))
    return OPS[name]
