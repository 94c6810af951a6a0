"""Rows that ``torch.compile`` makes of torch's two calls.

Private parts of torch used here, read in torch 2.11 to 2.13: the wrappers around
``Optimizer.step``, and the patch of Dynamo's that lets it trace what is below them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_

from bench.cases.workload import Workload
from bench.rows.optimizers import MAX_NORM
from bench.rows.runs import Run, with_counts_on_device


class TwoCalls(Run):
    """As users write it: torch breaks the graph before the step, so two graphs are compiled."""

    def __init__(self, work: Workload) -> None:
        super().__init__(work)
        params, optimizer = self.params, with_counts_on_device(work, self.params)

        def clip_and_step() -> None:
            clip_grad_norm_(params, MAX_NORM)
            optimizer.step()

        self._compiled = torch.compile(clip_and_step)

    def step(self) -> None:
        """Clip and step."""
        self._compiled()


class OneGraph(Run):
    """The step taken from below the wrappers that break the graph."""

    def __init__(self, work: Workload) -> None:
        super().__init__(work)
        params, optimizer = self.params, with_counts_on_device(work, self.params)
        torch._dynamo.eval_frame.TorchPatcher.patch()
        step: Any = type(optimizer).step
        while hasattr(step, "__wrapped__"):
            step = step.__wrapped__

        def clip_and_step() -> None:
            clip_grad_norm_(params, MAX_NORM)
            step(optimizer)

        self._compiled = torch.compile(clip_and_step, fullgraph=True)

    @torch.no_grad()
    def step(self) -> None:
        """Clip and step."""
        self._compiled()
