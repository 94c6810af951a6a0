"""Falling back to eager: for which reasons, and that it is said once."""

from __future__ import annotations

import warnings


class FallbackWarning(UserWarning):
    """What was asked for is done by slower means; the result is right all the same."""


class CannotCompileError(RuntimeError):
    """Why a step is not to be compiled, and what to do about it."""

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(cause)
        self.cause, self.remedy = cause, remedy


class UnsupportedError(ValueError):
    """A program holds an operation or a dtype that a lowering has no code for."""


_said: set[str] = set()


def warn_fallback(what: str, cause: str, remedy: str, to: str = "eager") -> None:
    """Warn, once per distinct message, that ``what`` was not done."""
    message = f"{what} falls back to {to}: {cause}. Remedy: {remedy}."
    if message not in _said:
        _said.add(message)
        warnings.warn(message, FallbackWarning, stacklevel=3)
