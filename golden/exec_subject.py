"""A subject that is any program, exec:PROGRAM [ARGS], asked in JSON lines over its standard input and output.

Each command is one object on a line, and so is each answer; arrays are in safetensors files; standard error is a log. At "stop", and
when its standard input ends, the program ends. Protocol leadline.exec/1:

    {"command": "start", "protocol": "leadline.exec/1"}
        {"ok": true, "name": "mine 1.0"}                                  name may be left out
    {"command": "describe"}
        {"ok": true, "ties": "lowest", "ops": {"rmsnorm": {...}}}         ties may be left out, and of each op all but its name:
            "directions": ["forward", "backward"]                         forward alone
            "attrs": ["eps"]                                              attributes that it takes; cases that need others are SKIPPED
            "declares": {"cast_order": "cast_then_weight"}                attributes that it is built with
            "precisions": ["fp32", "bf16"]                                all
            "inputs": ["x", "weight"]                                     all; optional inputs, and a backward's choice, may be missing
    {"command": "run", "op": "rmsnorm", "direction": "forward", "precision": "bf16", "attrs": {"eps": 1e-06},
     "inputs": "/tmp/…/inputs.safetensors", "outputs": "/tmp/…/outputs.safetensors"}
        {"ok": true}                                                      the outputs are written, by name, and the reference's named
                                                                          intermediates if it likes (leadline ops show OP)
        {"ok": false, "kind": "refused", "error": "why"}                  it does not do this: SKIPPED. Kind "failed": ERROR
    {"command": "stop"}
        no answer is needed

Inputs are F64, F32, BF16 or F16 as the precision says (constants F32 at 16 bits), indices I64, codes U8, U16 or U32. Outputs are the same;
F32 will do at 16 bits.
"""

import contextlib
import json
import os
import shlex
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..ref.op import Op, Tensor
from .described import parse
from .errors import Misbehaved, Refused, UsageError
from .intermediates import more_of
from .judge import Returned
from .precision import Precision
from .program import Program, shown
from .safetensor_file import Reader, Writer
from .subject import Contract, handed
from .wire import pack, plain, unpack
from .worker import Died

PROTOCOL = "leadline.exec/1"
LARGEST = 1 << 28  # bytes of a file of outputs


class ExecSubject:
    """The same questions as a Subject's, asked of a program that is started again when it dies."""

    framework = "safetensors"

    def __init__(self, spec: str, framework: str | None = None, ties: str | None = None, timeout: float = 120.0):
        if framework is not None:
            raise UsageError(f"subject {spec} reads its arrays from files; --framework is for Python's")
        self.name, self.timeout = spec, timeout
        self._command = _command(spec)
        self._program: Program | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="leadline-", ignore_cleanup_errors=True)
        self._cases = 0
        try:
            self.title = self._start()
            about = self._call("describe")
            open_ties = about.get("ties", "lowest")
            if open_ties not in ("lowest", "any"):
                raise UsageError(f"subject {spec} describes its ties as {plain(repr(open_ties), 40)}; expected lowest or any")
            self.any_tie = (ties or open_ties) == "any"
            self.ops = parse(about.get("ops"), spec)
        except Died as error:
            self.close()
            raise UsageError(f"subject {spec} does not start: {error}") from error
        except BaseException:
            self.close()
            raise
        self.declares = {name: op.declares for name, op in self.ops.items()}

    def _start(self) -> str:
        try:
            self._program = Program(self._command)
        except OSError as error:
            raise Died(f"{self._command[0]}: {error.strerror}") from error
        answer = self._call("start", protocol=PROTOCOL)
        if answer.get("ok") is not True:
            self._kill()
            raise Died(f"it refuses to: {_error(answer)}")
        return plain(str(answer.get("name", "")), 60)

    def _call(self, command: str, **arguments: Any) -> dict[str, Any]:
        if self._program is None:
            self._start()
        assert self._program is not None
        try:
            line = self._program.ask(json.dumps({"command": command, **arguments}, default=_number), self.timeout)
        except BaseException:
            self._program = None  # it is gone
            raise
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict) or (command != "describe" and not isinstance(answer.get("ok"), bool)):
            self._kill()
            wanted = "a JSON object" if command == "describe" else 'a JSON object with "ok"'
            raise Died(f"it answered {command} with {shown(line)}; expected {wanted} (logs go to standard error)")
        return answer

    def contract(self, op: Op, direction: str) -> Contract | None:
        about = self.ops.get(op.name)
        return None if about is None else about.contract(op, direction, self.name)

    def ask(self, op: Op, direction: str, inputs: Mapping[str, np.ndarray], attrs: Mapping[str, Any], p: Precision) -> dict[str, Returned]:
        """The outputs by name. Refused, Misbehaved, Died, or RuntimeError with what the program says of its failure."""
        contract = self.contract(op, direction)
        if contract is None:
            raise Refused(f"{self.name} has no {op.name} {direction}")
        if p.name not in self.ops[op.name].precisions:
            raise Refused(f"it does not declare {p.name}")
        given, outputs = handed(op, direction, inputs, contract)
        with self._case() as folder:
            packed = {t.name: pack(inputs[t.name], p.format_of(t)) for t in given}
            asked, written = folder / "inputs.safetensors", folder / "outputs.safetensors"
            with Writer(asked, [(name, dtype, x.shape) for name, (dtype, x) in packed.items()]) as file:
                for name, (_, x) in packed.items():
                    file.write(name, x)
            answer = self._call(
                "run",
                op=op.name,
                direction=direction,
                precision=p.name,
                attrs={k: v for k, v in attrs.items() if k in contract.attrs},
                inputs=str(asked),
                outputs=str(written),
            )
            if answer["ok"]:
                return read_outputs(written, outputs, op.name)
        if answer.get("kind") == "refused":
            raise Refused(_error(answer))
        raise RuntimeError(_error(answer))

    @contextlib.contextmanager
    def _case(self) -> Iterator[Path]:
        """A folder for one case, removed with all that the program wrote into it."""
        self._cases += 1
        folder = Path(self._folder.name) / f"case-{self._cases}"
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # what is left, close() removes

    def _kill(self) -> None:
        if self._program is not None:
            self._program.kill()
            self._program = None

    def stop(self) -> int | None:
        """Asks the program to end. Its exit status, or None if it had to be killed."""
        program, self._program = self._program, None
        return None if program is None else program.stop(json.dumps({"command": "stop"}))

    def close(self) -> None:
        try:
            self.stop()
        finally:
            self._folder.cleanup()


def read_outputs(path: Path, outputs: tuple[Tensor, ...], op: str) -> dict[str, Returned]:
    """The outputs, and intermediates, in a file that a stranger wrote, from a copy: it may change yet, and a map of a file that shrinks is
    death."""
    kinds = {t.name: t.kind for t in outputs}
    with tempfile.TemporaryDirectory(prefix="leadline-") as folder:
        copy = Path(folder) / path.name
        _copy(path, copy)
        try:
            with Reader(copy) as file:
                if missing := [t.name for t in outputs if t.name not in file]:
                    raise Misbehaved(f"{path.name} has {plain(', '.join(file.keys()), 100) or 'nothing'}; {', '.join(missing)} is missing")
                names = [*kinds, *more_of(op, file.keys(), kinds)]
                return {name: unpack(file.entry(name).dtype, np.array(file.array(name)), kinds.get(name, "real")) for name in names}
        except ValueError as error:
            raise Misbehaved(plain(str(error).replace(str(copy), path.name))) from error


def _copy(path: Path, copy: Path) -> None:
    """A regular file as long as it is now; Misbehaved for whatever else there is."""
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        raise Misbehaved(f"{path.name} cannot be read ({error.strerror})") from error
    try:
        about = os.fstat(fd)
        if not stat.S_ISREG(about.st_mode):
            raise Misbehaved(f"{path.name} is no regular file; expected a safetensors file")
        if about.st_size > LARGEST:
            raise Misbehaved(f"{path.name} has {about.st_size} bytes; expected at most {LARGEST}")
        with open(copy, "wb") as target:
            left = about.st_size
            while left > 0 and (piece := os.read(fd, min(left, 1 << 20))):
                left -= target.write(piece)
    finally:
        os.close(fd)


def _command(spec: str) -> list[str]:
    try:
        command = shlex.split(spec.removeprefix("exec:"))
    except ValueError as error:
        raise UsageError(f"subject {spec}: {error}; expected exec:PROGRAM [ARGS]") from error
    if not command:
        raise UsageError(f"subject {spec!r} names no program; expected exec:PROGRAM [ARGS]")
    if shutil.which(command[0]) is None:
        found = "cannot be run; make it executable" if Path(command[0]).exists() else "is not there; expected a path, or a name on PATH"
        raise UsageError(f"subject {spec}: the program {command[0]} {found}")
    return command


def _error(answer: Mapping[str, Any]) -> str:
    return plain(str(answer.get("error") or "")) or "it gives no reason"


def _number(value: Any) -> Any:
    """NumPy's scalars among the attributes."""
    return value.item()
