"""A directory that appears whole or not at all."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """A directory beside `target`, absent or empty, whose place it takes in the end; after any exception nothing is left of it."""
    part = Path(os.path.abspath(target)).parent / f".leadline-{secrets.token_hex(8)}.part"
    part.mkdir()
    try:
        yield part
        if target.exists():
            target.rmdir()
        part.rename(target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
