"""Vectors, verdicts and diagnosis: what holds an implementation to the reference.

Names are imported when they are first asked for: the pytest plugin is loaded in every run of pytest, and must cost it nothing.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .conforms import conforms
    from .errors import UsageError
    from .verify import CaseResult, Report, VerdictError, verify

__all__ = ["CaseResult", "Report", "UsageError", "VerdictError", "conforms", "verify"]

HOME = {"conforms": "conforms", "UsageError": "errors", **dict.fromkeys(("CaseResult", "Report", "VerdictError", "verify"), "verify")}


class _Package(ModuleType):
    """verify and conforms are functions, each in a module of its own name: the import of the module must not hide the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{HOME[name]}", __name__), name)
    setattr(sys.modules[__name__], name, value)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
