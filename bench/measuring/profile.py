"""What a step launches and allocates, from a trace by ``torch.profiler``."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.measuring.timing import synchronize
from bench.rows.runs import Run


@dataclass(frozen=True)
class Profile:
    """Of one step: kernels on a GPU, else None; the most bytes that it held beside its tensors."""

    kernels: int | None
    extra_bytes: int | None


def profile_step(run: Run, device: torch.device) -> Profile:
    """Profile one step of ``run``, which is warmed up."""
    run.prepare(run.work.new_grads())
    try:
        with _quiet():
            events, extra = _traced(run, device) if device.type == "cuda" else _on_host(run)
    finally:
        run.release()
    kernels = sum(e.get("cat") == "kernel" for e in events) if device.type == "cuda" else None
    return Profile(kernels, None if run.foreign else extra)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the profiler's C++ part writes to stderr, at each start and stop."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _traced(run: Run, device: torch.device) -> tuple[list[dict[str, Any]], int]:
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run.step()
        synchronize(device)
    return _events(profiler), torch.cuda.max_memory_allocated(device) - before


def _on_host(run: Run) -> tuple[list[dict[str, Any]], int]:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run.step()
    events = _events(profiler)
    changes = [e for e in events if e.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda e: float(e["ts"])):
        held += int(event["args"]["Bytes"])
        peak = max(peak, held)
    return events, peak


def _events(profiler: Any) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        # Names of operators may hold what is no JSON to a strict reader.
        events: list[dict[str, Any]] = json.loads(path.read_text(), strict=False)["traceEvents"]
    return events
