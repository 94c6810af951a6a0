"""Processes that run one check after the other, as ranks of one gloo group."""

from __future__ import annotations

import contextlib
import datetime
import importlib
import multiprocessing
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SECONDS = 120  # of one check


def _serve(rank: int, world: int, port: int, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=SECONDS / 2),
    )
    while True:
        asked = pipe.recv()
        if asked is None:
            break
        module, name, args = asked
        try:
            answer = True, getattr(importlib.import_module(module), name)(*args)
        except BaseException:
            answer = False, f"rank {rank} of {world}:\n{traceback.format_exc()}"
        pipe.send(answer)
    dist.destroy_process_group()


class RankPool:
    """``world`` processes; one that fails or hangs is replaced with all others."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        for rank in range(self.world):
            mine, theirs = context.Pipe()
            args = (rank, self.world, port, theirs)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(mine)

    def run(self, check: Callable[..., Any], *args: Any, seconds: float = SECONDS) -> list[Any]:
        """Run ``check(*args)``, a function of a module, on all ranks; what each returned.

        Raises:
            AssertionError: it raised on a rank, or took too long.
        """
        if not self._processes:
            self._start()
            seconds += 60  # they import torch
        module = Path(check.__code__.co_filename).stem  # not "__main__", if it is a program's
        for pipe in self._pipes:
            pipe.send((module, check.__name__, args))
        until = time.monotonic() + seconds
        answers, faults = [], []
        for rank, pipe in enumerate(self._pipes):
            try:
                if not pipe.poll(max(until - time.monotonic(), 0.01)):
                    raise TimeoutError(f"rank {rank} hangs")
                fine, answer = pipe.recv()
            except (TimeoutError, EOFError, OSError) as error:
                fine, answer = False, f"rank {rank}: {type(error).__name__} {error}"
            answers.append(answer)
            if not fine:
                faults.append(answer)
                until = min(until, time.monotonic() + 5)
        if faults:
            self.stop()
            raise AssertionError("\n\n".join(faults))
        return answers

    def stop(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in self._processes:
            process.join(2)
            if process.is_alive():
                process.kill()
        self._processes, self._pipes = [], []
