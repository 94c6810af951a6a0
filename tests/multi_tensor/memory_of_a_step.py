"""Print how much memory a step takes beyond what was there: Python's, torch's and the process's.

Usage: python memory_of_a_step.py CASE:MODE ... On Linux alone, in a process of its own.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim import AdamW, Optimizer

import compileclip


class Lion(Optimizer):
    """Keeps a Python integer for each parameter."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1e-2})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["steps"] = torch.zeros_like(p), 1000
                state["steps"] += 1
                p.add_(state["exp_avg"].lerp_(p.grad, 0.1).sign(), alpha=-group["lr"])


CASES: dict[str, tuple[Callable[[Any], Optimizer], int, tuple[int, int]]] = {
    "64 large": (AdamW, 64, (1024, 1024)),
    "2000 small": (AdamW, 2000, (32, 32)),
    "5000 small with an int": (Lion, 5000, (8, 8)),
}


def of_python(step: Callable[[], Any]) -> int:
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    step()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak - before


def of_torch(step: Callable[[], Any]) -> int:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    assert profile.profiler is not None
    results = profile.profiler.kineto_results
    events = [e for e in results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def of_the_process(step: Callable[[], Any]) -> int:
    """How far the resident set rises; what malloc keeps of freed memory is given back before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


def resident(kind: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in status if line.startswith(kind)]
    return int(line.split()[1]) * 1024


def measured(case: str, mode: str) -> dict[str, list[int]]:
    make, count, shape = CASES[case]
    params = [torch.nn.Parameter(torch.ones(shape)) for _ in range(count)]
    opt = compileclip.wrap(make(params), 1.0, mode=mode, write_grads=False)
    found: dict[str, list[int]] = {}
    for measure in (*[None] * 2, of_python, of_torch, of_the_process):
        for _ in range(1 if measure is None else 2):
            for p in params:
                p.grad = torch.ones_like(p)
            if measure is None:
                opt.step()
            else:
                found.setdefault(measure.__name__, []).append(measure(opt.step))
    assert ("multi_tensor  compiled" in opt.explain()) == (mode == "multi_tensor")
    return found


if __name__ == "__main__":
    print(json.dumps([measured(*case.split(":")) for case in sys.argv[1:]]))
