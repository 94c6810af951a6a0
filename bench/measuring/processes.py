"""Fresh processes, in which functions are called."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import torch

# As malloc.h of glibc has them; the second value is the largest that it takes.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_TRIM, LARGEST_MMAP = 2**31 - 1, 32 * 2**20


def fresh_process(limit: float = 0.0) -> ProcessPoolExecutor:
    """One process, begun at the first call, with as many threads as this one.

    Args:
        limit: seconds after which it is ended, whatever it does; 0 is no limit. A call then raises
            ``BrokenProcessPool``, as where the process ends otherwise.
    """
    return ProcessPoolExecutor(
        1, get_context("spawn"), initializer=_begin, initargs=(torch.get_num_threads(), limit)
    )


def _begin(threads: int, limit: float) -> None:
    torch.set_num_threads(threads)
    prepare_process()
    signal.setitimer(signal.ITIMER_REAL, limit)


def prepare_process() -> None:
    """Set what each process that measures has in common."""
    # At each compilation Dynamo says that it leaves the optimizer's profiler range out.
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Have this process keep what is freed, for the next step, as jemalloc or a GPU's cache would.

    Whether glibc gives it back depends on what else lies there: from process to process a row with
    intermediate results took 90 or 150 ms (64 of 1024 x 1024, foreach). Tensors of more than
    ``LARGEST_MMAP`` bytes are given back all the same. Other C libraries stay as they are.
    """
    with contextlib.suppress(AttributeError):
        set_option = ctypes.CDLL(None).mallopt
        set_option(M_TRIM_THRESHOLD, LARGEST_TRIM)
        set_option(M_MMAP_THRESHOLD, LARGEST_MMAP)


def use_caches(folder: Path | None) -> contextlib.AbstractContextManager[object]:
    """Have this process and those that it starts use the caches in ``folder``; None: their own.

    Inductor splits its command lines at spaces, so there must be none in the path.
    """
    own = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}", "TRITON_CACHE_DIR": f"{folder}/triton"}
    return mock.patch.dict(os.environ, own if folder else {})
