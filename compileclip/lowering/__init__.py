"""Kernels that step graphs become: C++ on a CPU, Triton on a GPU."""

from __future__ import annotations

import os

import torch

CHUNK = 16384  # elements that one turn of a CPU thread works through; the norm splits alike


class UnsupportedError(ValueError):
    """A program holds an operation or a dtype that a lowering has no code for."""


_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def threads() -> int:
    """How many threads a kernel may use: torch's number, and one in a forked process.

    A child does not have its parent's OpenMP threads, but GNU's OpenMP would wait for them.
    """
    return 1 if _forked else torch.get_num_threads()
