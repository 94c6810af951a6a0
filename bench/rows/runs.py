"""Rows that run torch's own kernels, compiled or not, and compileclip's rows.

Private parts of torch used here, read in torch 2.11 to 2.13: the wrappers around
``Optimizer.step``, and the patch of Dynamo's that lets it trace what is below them.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim import Optimizer

import compileclip
from bench.cases.case import NotRunError
from bench.cases.workload import Workload
from bench.rows.optimizers import MAX_NORM, has

WARM_UP = 3  # steps before a capture, on a side stream: kernels are compiled and state laid out


class Run:
    """A row over a case's tensors.

    ``prepare``, then ``step``, then ``release``: only ``step`` is timed. It may return before a GPU
    is done.

    Attributes:
        scale: what a time is to be multiplied by, where a run does a part of the work.
    """

    scale = 1.0

    def __init__(self, work: Workload) -> None:
        self.work = work
        self.params = work.parameters()

    def prepare(self, grads: Sequence[Tensor]) -> None:
        """Take the gradients of the next step."""
        for p, grad in zip(self.params, grads, strict=True):
            p.grad = grad

    def step(self) -> None:
        """Clip and step."""
        raise NotImplementedError

    def release(self) -> None:
        """Let the gradients go."""
        for p in self.params:
            p.grad = None

    def difference(self) -> float | None:
        """``Workload.difference``; None for a row that computes nothing."""
        return self.work.difference()


class ClipAndStep(Run):
    """The two calls that torch offers."""

    def __init__(
        self,
        work: Workload,
        foreach: bool | None = None,
        fused: bool = False,
        capturable: bool = False,
    ) -> None:
        super().__init__(work)
        if fused and not has(work.case.optimizer, "fused"):
            raise NotRunError(f"torch.optim.{work.case.optimizer} has no fused=True")
        options = {"fused": True} if fused else {"foreach": bool(foreach)}
        self.optimizer = _loaded(work, self.params, **options, capturable=capturable)
        self.foreach = foreach

    def step(self) -> None:
        """Clip and step."""
        clip_grad_norm_(self.params, MAX_NORM, foreach=self.foreach)
        self.optimizer.step()

    def check(self) -> None:
        """Raise ``NotRunError`` if the latest step was not what the row is about."""


class ByHand(ClipAndStep):
    """The clip coefficient handed to torch's fused kernels, which divide gradients by it."""

    def __init__(self, work: Workload) -> None:
        super().__init__(work, fused=True)
        # As GradScaler sets it: Optimizer declares neither this nor grad_scale.
        self._scaled = cast(Any, self.optimizer)
        self._scaled.found_inf = torch.zeros((), device=work.case.device)

    def step(self) -> None:
        """Clip and step."""
        norm = get_total_norm([p.grad for p in self.params if p.grad is not None])
        self._scaled.grad_scale = ((norm.float() + 1e-6) / MAX_NORM).clamp(min=1.0)
        self.optimizer.step()


class Compiled(Run):
    """What ``torch.compile`` makes of the two calls.

    As users write it, torch breaks the graph before the step, and two are compiled. In one graph
    the step is taken from below the wrappers that break it.
    """

    def __init__(self, work: Workload, one_graph: bool = False) -> None:
        super().__init__(work)
        params = self.params
        # The step counts of a compiled optimizer are on the GPU.
        optimizer = _loaded(work, params, capturable=params[0].is_cuda)
        step: Any = type(optimizer).step
        if one_graph:
            torch._dynamo.eval_frame.TorchPatcher.patch()
            while hasattr(step, "__wrapped__"):
                step = step.__wrapped__

        def clip_and_step() -> None:
            clip_grad_norm_(params, MAX_NORM)
            step(optimizer)

        self._compiled = torch.compile(clip_and_step, fullgraph=one_graph)

    @torch.no_grad()
    def step(self) -> None:
        """Clip and step."""
        self._compiled()


class Ours(Run):
    """``compileclip.wrap`` in one of its modes."""

    def __init__(self, work: Workload, mode: str, capturable: bool = False) -> None:
        super().__init__(work)
        on_device = self.params[0].is_cuda and (mode == "inductor" or capturable)
        # Eager mode runs torch's kernels, so it gets the fused ones as the baseline does.
        options = {"fused": True} if mode == "eager" else {}
        stock = _loaded(work, self.params, **options, capturable=on_device)
        self.optimizer = compileclip.wrap(stock, MAX_NORM, mode=mode)
        self._served = mode == "eager"

    def step(self) -> None:
        """Clip and step; a first step that falls back to another mode is an error."""
        if self._served:
            self.optimizer.step()
            return
        with warnings.catch_warnings():
            # It is given once per process, and what ``check`` reads at any time.
            warnings.simplefilter("ignore", compileclip.FallbackWarning)
            self.optimizer.step()
        self.check()
        self._served = True

    def check(self) -> None:
        """Raise ``NotRunError`` if another mode took the latest step."""
        found = re.search(r"^why eager: (.*)$", self.optimizer.explain(), re.MULTILINE)
        if found:
            raise NotRunError(f"not served: {found.group(1)}")


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


def _loaded(work: Workload, params: Sequence[Tensor], **options: bool) -> Optimizer:
    """The case's optimizer over ``params``, at the checkpoint."""
    optimizer = work.case.make_optimizer(params, **options)
    work.load(optimizer, params)
    return optimizer
