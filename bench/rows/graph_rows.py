"""Rows whose step is captured in a CUDA graph, then replayed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench.cases.workload import Workload
from bench.rows.runs import ClipAndStep, Ours, Run

WARM_UP = 3  # steps before the capture, on a side stream: kernels are compiled and state laid out


class InGraph(Run):
    """The step of another row, which the host launches as one.

    Gradients are copied into the tensors that the graph reads, which is not timed: in training the
    backward would write there. Warm-up moves parameters, state and step counts, of which the graph
    has the addresses: they are set back in place.
    """

    def __init__(self, work: Workload, start: Callable[[Workload], ClipAndStep | Ours]) -> None:
        self._captured = start(work)  # the graph reads tensors that it holds
        self.work, self.params = work, self._captured.params
        self._captured.prepare(work.fixed_grads)
        self.prepare(work.new_grads())
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._captured.step()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._captured.step()
        self._captured.check()
        work.reset()
        work.reset_counts(self._captured.optimizer, self.params)

    def prepare(self, grads: Sequence[Tensor]) -> None:
        """Copy the gradients of the next step to where the graph reads them."""
        torch._foreach_copy_(self.work.fixed_grads, list(grads))

    def step(self) -> None:
        """Clip and step."""
        self._graph.replay()

    def release(self) -> None:
        """Gradients stay where the graph reads them."""


def stock(work: Workload) -> InGraph:
    """Torch's two calls."""
    return InGraph(work, lambda work: ClipAndStep(work, foreach=True, fused=True, capturable=True))


def ours(work: Workload) -> InGraph:
    """The wrapper's step."""
    return InGraph(work, lambda work: Ours(work, "multi_tensor", capturable=True))
