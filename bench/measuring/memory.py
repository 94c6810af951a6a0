"""What the C library does with memory that is freed."""

from __future__ import annotations

import contextlib
import ctypes

# As malloc.h of glibc has them; the second value is the largest that it takes.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_TRIM, LARGEST_MMAP = 2**31 - 1, 32 * 2**20


def keep_freed_memory() -> None:
    """Have this process keep what is freed, for the next step, as jemalloc or a GPU's cache would.

    Whether glibc gives it back depends on what else lies there, so from process to process a row
    with intermediate results took 90 or 150 ms (64 of 1024 x 1024, foreach), the most of the
    difference for 65,536 page faults. Tensors of more than ``LARGEST_MMAP`` bytes are given back
    all the same. Other C libraries have no such function, and stay as they are.
    """
    with contextlib.suppress(AttributeError):
        set_option = ctypes.CDLL(None).mallopt
        set_option(M_TRIM_THRESHOLD, LARGEST_TRIM)
        set_option(M_MMAP_THRESHOLD, LARGEST_MMAP)
