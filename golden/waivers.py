"""A file of known failures: `op direction precision case  # reason`, a line each, the first four as patterns (*, ?, [a-z])."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from ..ref.op import OPS
from .errors import UsageError
from .precision import PRECISIONS
from .properties import properties_of
from .vectors import directions


@dataclass(frozen=True)
class Waiver:
    """One line of the file."""

    line: int
    patterns: tuple[str, str, str, str]
    reason: str

    def covers(self, op: str, direction: str, precision: str, case: str) -> bool:
        return all(fnmatchcase(n, p) for n, p in zip((op, direction, precision, case), self.patterns, strict=True))


def read(path: Path) -> list[Waiver]:
    """The waivers of a file, or a UsageError that names the line: without a reason, or for what no op has."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise UsageError(f"waivers {path}: {getattr(error, 'strerror', None) or error}") from error
    waivers = []
    for number, line in enumerate(lines, 1):
        what, _, reason = line.partition("#")
        words = what.split()
        if not words:  # a comment, or nothing
            continue
        where = f"{path}, line {number}"
        if len(words) != 4:
            raise UsageError(f"{where} has {len(words)} words before the reason; expected: op direction precision case  # reason")
        if not reason.strip():
            raise UsageError(f"{where} gives no reason; expected: {' '.join(words)}  # reason")
        waiver = Waiver(number, (words[0], words[1], words[2], words[3]), reason.strip())
        _check(where, waiver)
        waivers.append(waiver)
    return waivers


def _check(where: str, waiver: Waiver) -> None:
    """Every word stands for something that there is."""
    op_word, direction_word, precision_word, case_word = waiver.patterns
    ops = [op for op in OPS.values() if fnmatchcase(op.name, op_word)]
    if not ops:
        raise UsageError(f"{where}: unknown op {op_word!r}{_near(op_word, OPS)}")
    ways = [(op, way) for op in ops for way in directions(op) if fnmatchcase(way, direction_word)]
    if not ways:
        raise UsageError(f"{where}: {op_word} has no direction {direction_word!r}; expected forward or backward")
    if not any(fnmatchcase(p, precision_word) for p in PRECISIONS):
        raise UsageError(f"{where}: unknown precision {precision_word!r}{_near(precision_word, PRECISIONS)}")
    cases = {name for op, way in ways for name in (*(c.name for c in op.cases), *(p.name for p in properties_of(op, way)), "absent")}
    if not any(fnmatchcase(name, case_word) for name in cases):
        raise UsageError(f"{where}: {op_word} has no case {case_word!r}{_near(case_word, cases)}")


def _near(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, known, n=2, cutoff=0.4)
    return f"; did you mean {' or '.join(near)}?" if near else ""
