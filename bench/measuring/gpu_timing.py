"""Times of a GPU's steps: the GPU's with the host hidden, and the host's by itself.

A GPU works on what the host has enqueued. With both in one figure, a step of which the GPU takes
0.95 ms reads 1.6 ms because the host took longer, although in training the host is often ahead.
"""

from __future__ import annotations

import functools
import json
import time
from typing import Any

import torch
from torch import Tensor, nn

from bench.cases.case import NotRunError
from bench.measuring.timing import Clock, prepared, synchronize
from bench.rows.runs import Run

SAFETY = 1.5  # times the host's time that the GPU is kept busy for, at first
LEAST = 2e-4  # seconds beside that
TRIES = 5  # each twice as long as the one before
CALIBRATION = 20_000_000  # cycles: some 10 ms
EVICTING = bytearray(4 * 2**20)  # several times what a core has of cache for itself
DOCUMENT = {f"key {i}": list(range(i)) for i in range(50)}


def clock_for(device: torch.device, cold: bool) -> Clock:
    """The clock that fits ``device``."""
    return GpuClock(device, cold) if device.type == "cuda" else Clock(device, cold)


class GpuClock(Clock):
    """Takes two steps for one time each.

    The host's is the time of the call alone, with an idle GPU, after other work. The GPU's is that
    between two events around a step that was enqueued while the GPU was busy with something else,
    so that it never waits for the host.
    """

    def __init__(self, device: torch.device, cold: bool) -> None:
        super().__init__(device, cold)
        with torch.cuda.device(device):
            self._cycles_per_second = _cycles_per_second()

    def time(self, run: Run) -> tuple[float, float]:
        """Seconds of a step on the GPU and, of another, on the host."""
        with torch.cuda.device(self.device):
            host = self._host(run)
            return self._gpu(run, host), host

    def _host(self, run: Run) -> float:
        with prepared(run):
            synchronize(self.device)
            work_elsewhere()
            start = time.perf_counter()
            run.step()
            return time.perf_counter() - start

    def _gpu(self, run: Run, host: float) -> float:
        busy = SAFETY * host + LEAST
        for _ in range(TRIES):
            before, after = _events()
            with prepared(run):
                self.flush()
                torch.cuda._sleep(round(busy * self._cycles_per_second))
                before.record()
                run.step()
                after.record()
                hidden = not before.query()  # the GPU has not come so far yet
                after.synchronize()
            if hidden:
                return float(before.elapsed_time(after)) / 1e3
            busy *= 2
        raise NotRunError("its step waits for the GPU, or launches more than the GPU can queue")


def _events() -> tuple[Any, Any]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def _cycles_per_second() -> float:
    before, after = _events()
    torch.cuda._sleep(CALIBRATION)  # brings the clock of an idle GPU to what it is under work
    before.record()
    torch.cuda._sleep(CALIBRATION)
    after.record()
    after.synchronize()
    return CALIBRATION / (float(before.elapsed_time(after)) / 1e3)


def work_elsewhere() -> None:
    """Do other work of Python and torch on the host, for about a millisecond.

    In training, forward and backward come before a step: when it begins, its code, its objects and
    its branches are no longer in the core's caches. In a tight loop they are, and a host's time
    from there is up to half of what training pays.
    """
    model, inputs = _model()
    EVICTING[:] = bytes(len(EVICTING))
    for _ in range(2):
        model(inputs).square().sum().backward()
        json.loads(json.dumps(DOCUMENT))


@functools.cache
def _model() -> tuple[nn.Module, Tensor]:
    """Small, for one thread."""
    model = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 8))
    return model, torch.ones(4, 32)
