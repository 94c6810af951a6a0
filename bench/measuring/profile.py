"""What a step launches and allocates, from a trace by ``torch.profiler``.

Private parts of torch used here, read in torch 2.13: the profiler's ``kineto_results``.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity, profile

from bench.measuring.timing import synchronize
from bench.rows.runs import Run


def profile_step(run: Run) -> tuple[int | None, int]:
    """Profile one step of ``run``, which is warmed up.

    Returns:
        The kernels on a GPU, else None; the most bytes that it held beside its tensors.
    """
    device = run.work.params[0].device
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    run.prepare(run.work.new_grads())
    try:
        synchronize(device)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        with profile(activities=activities, profile_memory=not on_gpu) as profiler:
            run.step()
            synchronize(device)
        if on_gpu:
            on_it = [e for e in profiler.events() if e.device_type.name == "CUDA"]
            kernels = sum(not event.name.startswith("Mem") for event in on_it)  # copies and sets
            return kernels, torch.cuda.max_memory_allocated(device) - before
        traced = profiler.profiler.kineto_results.events()
        changes = [e for e in traced if e.name() == "[memory]"]
        changes.sort(key=lambda event: event.start_ns())
        return None, max(accumulate((e.nbytes() for e in changes), initial=0))
    finally:
        run.release()
