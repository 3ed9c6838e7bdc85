"""Where a run's reports go: JSON lines as they come, and HTML, JUnit and Markdown at its end. A file that cannot be written costs a line on
standard error and that file, never the run."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import click

from .errors import UsageError

FORMATS = {
    "html": "One page, with error maps.",
    "junit": "JUnit XML.",
    "markdown": "A summary for a CI job.",
    "jsonl": "JSON lines, from which `leadline report` makes the others.",
}
PATH = click.Path(path_type=Path)


def file_options(*formats: str) -> Callable[[Callable], Callable]:
    """Adds --html FILE and so on to a command, which gets them as `files`: paths by format."""

    def add(command: Callable) -> Callable:
        @functools.wraps(command)
        def gathered(*args: Any, **kwargs: Any) -> Any:
            files = {name: path for name in formats if (path := kwargs.pop(name)) is not None}
            if twice := [str(p) for p in files.values() if list(files.values()).count(p) > 1]:
                raise UsageError(f"{twice[0]} is named for two reports")
            return command(*args, files=files, **kwargs)

        for name in reversed(formats):
            gathered = click.option(f"--{name}", type=PATH, metavar="FILE", help=FORMATS[name])(gathered)
        return gathered

    return add


class Outputs:
    """Takes a run's lines. On leaving, makes what can be made of them: after an interrupt, too."""

    def __init__(self, files: dict[str, Path], echo: bool):
        self.files, self.echo = dict(files), echo
        self.lines: list[str] = []
        self.failed = False
        self._stream: TextIO | None = None

    @property
    def wanted(self) -> bool:
        return self.echo or bool(self.files) or self._stream is not None

    def __enter__(self) -> "Outputs":
        for name, path in list(self.files.items()):  # known before the run, not after it
            if reason := unwritable(path):
                self._lost(name, path, reason)
                del self.files[name]
        if path := self.files.pop("jsonl", None):
            self._stream = path.open("w", encoding="utf-8")
            self._path = path
        return self

    def line(self, text: str) -> None:
        """A line, written at once."""
        if self.files:
            self.lines.append(text)
        if self.echo:
            click.echo(text)
        if self._stream is not None:
            try:
                print(text, file=self._stream, flush=True)
            except OSError as error:
                self._lost("jsonl", self._path, str(error.strerror or error))
                self._stream = None

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self._stream.close()
        if len(self.lines) > 1:
            self.failed |= write(self.files, "\n".join(self.lines), "the run")

    def _lost(self, name: str, path: Path, reason: str) -> None:
        self.failed = True
        lost(name, path, reason)


def lost(name: str, path: Path, reason: str) -> None:
    click.echo(f"leadline: --{name} {path} cannot be written: {reason}; all else goes on", err=True)


def unwritable(path: Path) -> str | None:
    """Why a file cannot be written, or None. Makes its folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        path.open("ab").close()
        if not existed:
            path.unlink()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        return str(getattr(error, "strerror", None) or error)
    return None


def write(files: dict[str, Path], text: str, source: str) -> bool:
    """Makes the reports of JSON lines; whether one of them could not be written."""
    failed = False
    if files:
        from .runs import read

        run = read(source, text)
        for name, path in files.items():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(maker(name)(run).encode("utf-8", "replace"))
            except OSError as error:
                lost(name, path, str(error.strerror or error))
                failed = True
    return failed


def maker(name: str) -> Callable[[Any], str]:
    from . import html, summaries

    return {"html": html.html, "junit": summaries.junit, "markdown": summaries.markdown}[name]


@click.command()
@click.argument("lines", type=click.File(encoding="utf-8", errors="replace"))
@file_options("html", "junit", "markdown")
def report(lines: TextIO, files: dict[str, Path]) -> None:
    """Make the reports of an earlier run from its JSON LINES (a file, or - for standard input)."""
    if not files:
        raise UsageError("name what to make: --html FILE, --junit FILE, --markdown FILE")
    if write(files, lines.read(), getattr(lines, "name", "standard input")):
        raise click.exceptions.Exit(2)


def given(**options: Any) -> dict[str, Any]:
    """The options that were given, as JSON has them."""
    kept = {name: value for name, value in options.items() if value not in (None, (), [], {})}
    return {name: str(value) if isinstance(value, Path) else value for name, value in kept.items()}
