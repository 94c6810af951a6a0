"""Times of several runs that take turns."""

from __future__ import annotations

import contextlib
import gc
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import quantiles

import torch
from torch import Tensor

from bench.rows.runs import Run

MOST = 20  # times the repetitions that were asked for
FLUSH_BYTES = {"cpu": 512 * 2**20, "cuda": 256 * 2**20}  # several times a last-level cache


@dataclass
class Times:
    """Seconds per step: until the device was done, and until the host could go on.

    On a GPU the two are taken one after the other, as ``gpu_timing.GpuClock`` says.
    """

    device: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)


def quartiles(times: Sequence[float]) -> list[float]:
    """The lower one, the median and the upper one of ``times``, of which one is enough."""
    return quantiles(times, n=4, method="inclusive") if len(times) > 1 else list(times) * 3


class Clock:
    """Times single steps by the host's clock; ``gpu_timing.clock_for`` knows a GPU's."""

    def __init__(self, device: torch.device, cold: bool) -> None:
        self.device = device
        self._flushed: Tensor | None = None
        if cold:
            size = FLUSH_BYTES.get(device.type, FLUSH_BYTES["cpu"])
            self._flushed = torch.zeros(size // 4, device=device)

    def time(self, run: Run) -> tuple[float, float]:
        """Seconds of a step on the device and on the host."""
        with prepared(run):
            self.flush()
            start = time.perf_counter()
            run.step()
            host = time.perf_counter() - start
            synchronize(self.device)
            return time.perf_counter() - start, host

    def flush(self) -> None:
        """Push everything out of the caches if that is asked for; then wait for the device."""
        if self._flushed is not None:
            self._flushed.add_(1)
        synchronize(self.device)


@contextlib.contextmanager
def prepared(run: Run) -> Iterator[None]:
    """With new gradients, as a backward makes them, and without the garbage collector."""
    run.prepare(run.work.new_grads())
    gc.collect(0)
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        run.release()


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has done what it was told."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def interleave(
    runs: dict[str, Run], clock: Clock, repetitions: int, warmup: int, seconds: float = 0.0
) -> tuple[dict[str, Times], dict[str, Exception]]:
    """Time the runs in rounds of one step each, in an order that is drawn anew for each round.

    Args:
        runs: by name; a run that fails is left out from there on.
        clock: takes the times.
        repetitions: how many rounds are timed at least.
        warmup: how many come before.
        seconds: up to ``MOST`` times as many are timed until they took so long: other programs
            disturb short steps for longer than thirty of them take.

    Returns:
        The times, and the errors of those that failed.
    """
    times = {name: Times() for name in runs}
    errors: dict[str, Exception] = {}
    drawn = random.Random(0)
    end = math.inf
    for turn in range(warmup + MOST * repetitions):
        if turn == warmup:
            end = time.perf_counter() + seconds
        if turn >= warmup + repetitions and time.perf_counter() > end:
            break
        order = list(times)
        drawn.shuffle(order)
        for name in order:
            try:
                device, host = clock.time(runs[name])
            except Exception as error:
                errors[name] = error
                del times[name]
                continue
            if turn >= warmup:
                times[name].device.append(device * runs[name].scale)
                times[name].host.append(host)
    return times, errors
