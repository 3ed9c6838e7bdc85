"""A subject that is a shared library, ctypes:LIB.so: a C function for each op, named as adapters/leadline.h says.

The functions share this process: run it where a crash costs no more than itself (leadline verify does).
"""

import ctypes
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..ref.op import OPS, Op
from .band import truth_of
from .described import Described, parse
from .errors import Misbehaved, Refused, UsageError
from .judge import Returned
from .precision import Precision
from .safetensor_file import DTYPES
from .subject import Contract, Subject, handed
from .vectors import directions
from .wire import dtype_of, pack, plain, unpack

# leadline_dtype in leadline.h
CODES = dict(F64=1, F32=2, BF16=3, F16=4, U8=5, U16=6, U32=7, U64=8, I8=9, I16=10, I32=11, I64=12, BOOL=13)  # noqa: C408
REFUSED = 1
UNWRITTEN, GUARD, MARGIN = 0xFF, 0xA5, 64  # what outputs and the bytes around them are filled with; how many bytes on each side


class CArray(ctypes.Structure):
    """leadline_array"""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("name", ctypes.c_char_p),
    )


class Library(Subject):
    """A library's functions, asked as a Subject's callables are."""

    def __init__(self, spec: str, framework: str | None = None, ties: str | None = None):
        if framework is not None:
            raise UsageError(f"subject {spec} takes C arrays; --framework is for Python's")
        path = Path(spec.removeprefix("ctypes:"))
        if not path.is_file():
            raise UsageError(f"subject {spec}: there is no file {path}; expected ctypes:LIB.so")
        try:
            library = ctypes.CDLL(str(path.resolve()))
        except OSError as error:
            raise UsageError(f"subject {spec} does not load: {plain(str(error))}") from error
        about = _description(library, spec)
        open_ties = (ties or about.get("ties", "lowest")) == "any"
        super().__init__(spec, library, "ctypes", any_tie=open_ties)
        self.ops = parse(about["ops"], spec) if "ops" in about else self._exported()
        self.declares = {name: op.declares for name, op in self.ops.items()}

    def _exported(self) -> dict[str, Described]:
        """Every op that the library has a function for, with every attribute."""
        found = {}
        for op in OPS.values():
            if have := tuple(d for d in directions(op) if self.find(op, d)):
                found[op.name] = Described(have, tuple(op.attrs))
        if not found:
            raise UsageError(
                f"subject {self.name} exports no function of an op; expected leadline_rmsnorm or the like (adapters/leadline.h)"
            )
        return found

    def find(self, op: Op, direction: str) -> Callable | None:
        return getattr(self.source, symbol_of(op, direction), None)

    def contract(self, op: Op, direction: str) -> Contract | None:
        contract = self.ops[op.name].contract(op, direction, self.name) if op.name in self.ops else None
        if contract is not None and self.find(op, direction) is None:
            raise UsageError(f"subject {self.name} describes {op.name} {direction} but exports no {symbol_of(op, direction)}")
        return contract

    def ask(self, op: Op, direction: str, inputs: Mapping[str, np.ndarray], attrs: Mapping[str, Any], p: Precision) -> dict[str, Returned]:
        fn: Any = self.find(op, direction)
        contract = self.contract(op, direction)
        if fn is None or contract is None:
            raise Refused(f"{self.name} has no {op.name} {direction}")
        if p.name not in self.ops[op.name].precisions:
            raise Refused(f"it does not declare {p.name}")
        tensors, outputs = handed(op, direction, inputs, contract)
        truth = truth_of(op, direction, dict(inputs), attrs)  # for the outputs' shapes, which may depend on the inputs' values
        given = {t.name: Held(*pack(inputs[t.name], p.format_of(t))) for t in tensors}
        results = {t.name: Held(dtype_of(t, truth[t.name], p), shape=truth[t.name].shape) for t in outputs}
        before = {name: held.bytes.copy() for name, held in given.items()}
        text = json.dumps({k: v for k, v in attrs.items() if k in contract.attrs}, default=lambda value: value.item())
        fn.argtypes = (ctypes.POINTER(CArray), ctypes.c_int, ctypes.POINTER(CArray), ctypes.c_int, ctypes.c_char_p)
        fn.restype = ctypes.c_int
        status = fn(*_arrays(given), *_arrays(results), text.encode())
        if status == REFUSED:
            raise Refused(f"{symbol_of(op, direction)} refuses")
        if status != 0:
            raise RuntimeError(f"{symbol_of(op, direction)} returned {status}")
        for name, held in given.items():
            if not np.array_equal(before[name], held.bytes):
                raise Misbehaved(f"{name} was changed in place; inputs must be left as they are")
        for t in outputs:
            results[t.name].check(t.name, t.kind in ("code", "index") and set(truth[t.name].tobytes()) == {UNWRITTEN})
        return {t.name: unpack(results[t.name].dtype, results[t.name].array, t.kind) for t in outputs}


class Held:
    """An array in memory of its own, with a margin on each side that nobody may write."""

    def __init__(self, dtype: str, array: np.ndarray | None = None, shape: tuple[int, ...] = ()):
        kind = DTYPES[dtype]
        assert kind is not None
        self.dtype, self.shape = dtype, shape if array is None else array.shape
        size = int(np.prod(self.shape, dtype=np.int64)) * kind.itemsize
        room = np.full(size + 3 * MARGIN, GUARD, dtype=np.uint8)
        start = MARGIN + -room.ctypes.data % MARGIN  # so that the array is aligned
        self._room, self._start, self._end = room, start, start + size
        self.bytes = room[start : start + size]
        self.array = self.bytes.view(kind).reshape(self.shape)
        if array is None:
            self.bytes[:] = UNWRITTEN
        else:
            self.array[...] = array
        self._shape = (ctypes.c_int64 * max(len(self.shape), 1))(*self.shape)

    def as_c(self, name: str) -> CArray:
        return CArray(self._room.ctypes.data + self._start, CODES[self.dtype], len(self.shape), self._shape, name.encode())

    def check(self, name: str, may_look_unwritten: bool) -> None:
        if np.any(self._room[: self._start] != GUARD) or np.any(self._room[self._end :] != GUARD):
            raise Misbehaved(f"it wrote beyond {name}, which has {len(self.bytes)} bytes")
        if len(self.bytes) and np.all(self.bytes == UNWRITTEN) and not may_look_unwritten:
            raise Misbehaved(f"{name} was not written")


def symbol_of(op: Op, direction: str) -> str:
    return f"leadline_{op.name.replace('.', '_')}{'_bwd' * (direction == 'backward')}"


def _arrays(held: Mapping[str, Held]) -> tuple[Any, int]:
    return (CArray * max(len(held), 1))(*(h.as_c(name) for name, h in held.items())), len(held)


def _description(library: ctypes.CDLL, spec: str) -> dict[str, Any]:
    """What leadline_describe says, if there is one."""
    describe = getattr(library, "leadline_describe", None)
    if describe is None:
        return {}
    describe.argtypes, describe.restype = (), ctypes.c_char_p
    text = describe() or b""
    try:
        about = json.loads(text)
    except (ValueError, RecursionError):
        about = None
    if not isinstance(about, dict) or "ops" not in about or about.get("ties", "lowest") not in ("lowest", "any"):
        raise UsageError(
            f"subject {spec}: leadline_describe returns {plain(repr(text), 80)}; expected JSON with ops, as exec: programs have it"
        )
    return about
