"""Vectors, verdicts and diagnosis: what holds an implementation to the reference."""

from .errors import UsageError
from .verify import CaseResult, Report, VerdictError, verify

__all__ = ["CaseResult", "Report", "UsageError", "VerdictError", "verify"]
