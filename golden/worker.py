"""A subject in a process of its own: it may hang, exit or crash, and costs one case."""

import contextlib
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from ..ref.op import Op, op_named
from .errors import Misbehaved, Refused, UsageError
from .judge import Returned
from .precision import Precision, precision_named
from .subject import Contract, Subject, load


class Died(Exception):
    """The process is gone, or did not answer in time."""


LOADING = 120.0  # seconds at least: the time limit is a case's, and imports of large packages on a busy machine take many of them


class IsolatedSubject:
    """The same questions as a Subject's, asked of a child process that is started again when it dies."""

    def __init__(self, spec: str, framework: str | None, ties: str | None, direction: str, timeout: float):
        self.name, self.timeout = spec, timeout
        self._start_with = (spec, framework, ties, direction)
        self._process: subprocess.Popen | None = None
        self._start()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        # -P: nothing in the current folder may stand in for an installed package.
        command = [sys.executable, "-P", "-m", "leadline.golden.worker", str(theirs.fileno())]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log)
        theirs.close()
        self._pipe = Connection(ours.detach())
        try:
            about = self._call("load", *self._start_with)
        except Died as error:
            self.close()
            raise UsageError(f"subject {self.name} does not load: {error}") from error
        self.framework, self.declares, self.any_tie = about

    def _call(self, *message: Any) -> Any:
        if self._process is None:
            self._start()
        try:
            self._pipe.send(message)
            limit = self.timeout if message[0] == "ask" else max(self.timeout, LOADING)
            if not self._pipe.poll(limit):
                self.close()
                raise Died(f"no answer within {limit:g} s" + (" (--timeout)" if limit == self.timeout else ""))
            status, value = self._received()
        except Died:
            raise
        except (EOFError, ConnectionError, OSError) as error:
            raise Died(self._epitaph()) from error
        except Exception as error:
            self.close()
            raise Died(f"its answer cannot be read ({type(error).__name__})") from error
        if status == "value":
            return value
        raise {"usage": UsageError, "refused": Refused, "misbehaved": Misbehaved}.get(status, RuntimeError)(value)

    def _received(self) -> Any:
        """The answer. A subject that writes into its own pipe can announce an answer that never ends: the time limit holds there too."""
        assert self._process is not None
        late = threading.Timer(self.timeout, self._process.kill)
        late.start()
        try:
            return self._pipe.recv()
        finally:
            late.cancel()

    def _epitaph(self) -> str:
        assert self._process is not None
        code = self._process.wait()
        self._log.seek(0)
        said = self._log.read()[-4000:].decode(errors="replace").strip().splitlines()
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
        self.close()
        return f"its process was {how}" + (f"; its last words: {said[-1][:200]}" if said else "")

    def contract(self, op: Op, direction: str) -> Contract | None:
        return self._call("contract", op.name, direction)

    def ask(self, op: Op, direction: str, inputs: Mapping[str, np.ndarray], attrs: Mapping[str, Any], p: Precision) -> dict[str, Returned]:
        return self._call("ask", op.name, direction, dict(inputs), dict(attrs), p.name)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._pipe.close()
            self._log.close()
            self._process = None


def serve(pipe: Connection) -> None:
    """Answers until the other side is gone."""
    subject: Subject | None = None
    while True:
        try:
            kind, *arguments = pipe.recv()
        except EOFError:
            return
        try:
            if kind == "load":
                subject = load(*arguments)
                value: Any = (subject.framework, dict(subject.declares), subject.any_tie)
            elif kind == "contract":
                assert subject is not None
                value = subject.contract(op_named(arguments[0]), arguments[1])
            else:
                assert subject is not None
                name, direction, inputs, attrs, precision = arguments
                value = subject.ask(op_named(name), direction, inputs, attrs, precision_named(precision))
            answer = ("value", value)
        except UsageError as error:
            answer = ("usage", str(error))
        except Refused as error:
            answer = ("refused", str(error))
        except Misbehaved as error:
            answer = ("misbehaved", str(error))
        except Exception as error:
            answer = ("raised", f"{type(error).__name__}: {error}")
        pipe.send(answer)


if __name__ == "__main__":
    connection = Connection(int(sys.argv[1]))
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        serve(connection)
