"""Kernels that programs become: C++ on a CPU, Triton on a GPU.

In: a ``Program``, a list of tensors. Out: kernels, and what launches them. Read ``program.py`` and
``target.py`` first: what is lowered, and what a kind of device has to offer. ``targets.py`` has
both kinds, by way of the packages ``cpp`` and ``triton``.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

SERVED = ("cpu", "cuda")  # types of devices that have kernels
CHUNK = 16384  # elements that one turn of a CPU thread works through; the norm splits alike


def why_no_kernels(device: torch.device) -> str | None:
    """Why nothing on ``device`` has kernels, as far as that is known at once."""
    if device.type not in SERVED:
        return f"there are no kernels for {device.type} tensors"
    if device.type == "cuda" and not has_triton():
        return "triton is not installed"
    return None


@functools.cache
def has_triton() -> bool:
    """Whether Triton can be imported; it is not."""
    return importlib.util.find_spec("triton") is not None


_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def is_disabled() -> bool:
    """Whether the user has turned all kernels off."""
    name = "COMPILECLIP_DISABLE"
    return name in os.environ and os.environ[name] == "1"  # "get" of what is not there is slow


def threads() -> int:
    """How many threads a kernel may use: torch's number, and one in a forked process.

    A child does not have its parent's OpenMP threads, but GNU's OpenMP would wait for them.
    """
    return 1 if _forked else torch.get_num_threads()
