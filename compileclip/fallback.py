"""Falling back to eager, said once."""

from __future__ import annotations

import warnings


class FallbackWarning(UserWarning):
    """What was asked for is done by slower means; the result is right all the same."""


_said: set[str] = set()


def warn_fallback(what: str, cause: str, remedy: str, to: str = "eager") -> None:
    """Warn, once per distinct message, that ``what`` was not done."""
    message = f"{what} falls back to {to}: {cause}. Remedy: {remedy}."
    if message not in _said:
        _said.add(message)
        warnings.warn(message, FallbackWarning, stacklevel=3)
