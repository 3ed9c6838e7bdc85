"""A process that answers lines with lines. Whatever it does, it costs a time limit, a megabyte and one line of complaint at most."""

import contextlib
import os
import selectors
import signal
import subprocess
import time
from typing import NoReturn

from .wire import plain
from .worker import Died

LONGEST = 1 << 20  # bytes of an answer
LAST_WORDS = 4000  # bytes of standard error that are kept
TICK = 0.05  # seconds between looks at whether it is still there: a child that it left behind may hold the pipe open
FAREWELL = 2.0  # seconds that it has to end by itself


class Program:
    """A process in a session of its own, so that it can be ended with all that it started. After Died it is gone."""

    def __init__(self, command: list[str]):
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0, start_new_session=True)
        assert self._process.stdin is not None
        self._stdin = self._process.stdin
        self._streams = (self._stdin, self._process.stdout, self._process.stderr)
        self._selector = selectors.DefaultSelector()
        for stream in self._streams:
            assert stream is not None
            os.set_blocking(stream.fileno(), False)
            if stream is not self._stdin:
                self._selector.register(stream, selectors.EVENT_READ)
        self._printed, self._said, self._killed = bytearray(), b"", False

    def ask(self, line: str, limit: float) -> bytes:
        """The answer to a line: one line, and nothing after it."""
        try:
            self._read()
            if self._printed:
                self._die(f"it printed {shown(self._printed)} when nothing was asked (logs go to standard error)")
            if self._process.poll() is not None:
                self._die(f"{self._end()} before it was asked")
            self._send(line.encode() + b"\n")
            return self._answer(limit)
        except BaseException:
            self.kill()
            raise

    def _send(self, data: bytes) -> None:
        try:
            if os.write(self._stdin.fileno(), data) == len(data):
                return
        except BrokenPipeError:
            self._settle()
            self._die(f"{self._end()} without an answer")
        except BlockingIOError:
            pass
        self._die("it does not read its standard input")

    def _answer(self, limit: float) -> bytes:
        deadline = time.monotonic() + limit
        while b"\n" not in self._printed:
            left, had = deadline - time.monotonic(), len(self._printed)
            half = f"; it printed {shown(self._printed)} and no line's end" if had else ""
            if left <= 0:
                self._die(f"no answer within {limit:g} s (--timeout){half}")
            gone = self._process.poll() is not None  # asked before the read, which then has all that it wrote
            is_open = self._read(0.0 if gone else min(left, TICK))
            if len(self._printed) == had and (gone or not is_open):
                self._settle()
                self._die(f"{self._end()} without an answer{half}")
            if len(self._printed) > LONGEST:
                break
        line, _, rest = bytes(self._printed).partition(b"\n")
        if len(line) > LONGEST:
            self._die(f"it printed {shown(line)} and so on, a line of over a megabyte")
        if rest:
            self._die(f"it answered with more than one line: {shown(line)}, then {shown(rest)} (logs go to standard error)")
        self._printed.clear()
        return line

    def _read(self, wait: float = 0.0) -> bool:
        """Takes a piece of what is there, waiting for the first of it. Whether standard output is still open."""
        for key, _ in self._selector.select(wait):
            data = os.read(key.fd, 1 << 16)
            if not data:
                self._selector.unregister(key.fileobj)
            elif key.fileobj is self._process.stdout:
                self._printed += data
            else:
                self._said = (self._said + data)[-LAST_WORDS:]
        return self._process.stdout in self._selector.get_map()

    def _settle(self) -> None:
        """A moment for a process that closed its pipes to end, so that its status can be told."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(FAREWELL)

    def _end(self) -> str:
        code = self._process.poll()
        if code is None:
            return "it closed its pipes"
        if code >= 0:
            return f"it exited with status {code}"
        return f"it was killed by {signal.Signals(-code).name if -code in set(signal.Signals) else f'signal {-code}'}"

    def _die(self, what: str) -> NoReturn:
        self._read()
        said = self._said.decode(errors="replace").strip().splitlines()
        raise Died(what + (f"; its last words: {plain(said[-1], 200)}" if said else ""))

    def stop(self, line: str) -> int | None:
        """Says the last line and waits a little. Its exit status, or None if it had to be killed."""
        try:
            with contextlib.suppress(OSError):
                os.write(self._stdin.fileno(), line.encode() + b"\n")
            self._stdin.close()
            deadline = time.monotonic() + FAREWELL
            while self._process.poll() is None and time.monotonic() < deadline:
                self._read(TICK)
                self._printed.clear()
            return self._process.poll()
        finally:
            self.kill()

    def kill(self) -> None:
        """Ends it and what it started, but for what has left its session."""
        if self._killed:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._selector.close()
        for stream in self._streams:
            assert stream is not None
            stream.close()
        self._killed = True


def shown(data: bytes | bytearray) -> str:
    """The start of what was printed, in quotes."""
    return repr(plain(bytes(data[:400]).decode(errors="replace"), 60))
