"""What a command-line option's text can be, for options of the demo and of the subcommands."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def integer(lowest: int, read: Callable[[str], int] = int) -> Callable[[str], int]:
    """An integer from ``lowest`` on, as ``read`` takes it from a text."""

    def parse(text: str) -> int:
        try:
            value = read(text)
        except (ValueError, OverflowError):
            value = lowest - 1
        if value < lowest:
            raise argparse.ArgumentTypeError(f"{text!r} is no integer from {lowest} on")
        return value

    return parse


def positive(text: str) -> float:
    """A number above 0, infinity too."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return value
