"""Rows that run torch's own kernels, and compileclip's rows."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim import Optimizer

import compileclip
from bench.cases.case import NotRunError
from bench.cases.workload import Difference, Workload
from bench.rows.optimizers import MAX_NORM


class Run:
    """A row over a case's tensors.

    ``prepare``, then ``step``, then ``release``: only ``step`` is timed. It may return before a GPU
    is done.

    Attributes:
        foreign: whether another library steps, whose memory torch's profiler does not see.
        scale: what a time is to be multiplied by, where a run does a part of the work.
    """

    foreign = False
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

    def difference(self) -> Difference | None:
        """From the reference, after the steps of the check; None for a row that computes none."""
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
        check_option(work, "fused" if fused else "foreach")
        options = {"fused": True} if fused else {"foreach": bool(foreach)}
        if capturable and work.case.recipe.has("capturable"):
            options["capturable"] = True
        self.optimizer = work.case.recipe.make(self.params, **options)
        work.load(self.optimizer, self.params)
        self.foreach = foreach

    def step(self) -> None:
        """Clip and step."""
        clip_grad_norm_(self.params, MAX_NORM, foreach=self.foreach)
        self.optimizer.step()

    def check(self) -> None:
        """Raise ``NotRunError`` if the latest step was not what the row is about."""


class ByHand(Run):
    """The clip coefficient handed to torch's fused kernels, which divide gradients by it."""

    def __init__(self, work: Workload) -> None:
        super().__init__(work)
        check_option(work, "fused")
        self.optimizer = work.case.recipe.make(self.params, fused=True)
        work.load(self.optimizer, self.params)
        # As GradScaler sets it: Optimizer declares neither this nor grad_scale.
        self.optimizer.found_inf = torch.zeros((), device=work.case.device)  # type: ignore[attr-defined]

    def step(self) -> None:
        """Clip and step."""
        norm = get_total_norm([p.grad for p in self.params if p.grad is not None])
        scale = ((norm.float() + 1e-6) / MAX_NORM).clamp(min=1.0)
        self.optimizer.grad_scale = scale  # type: ignore[attr-defined]  # as GradScaler sets it
        self.optimizer.step()


class Ours(Run):
    """``compileclip.wrap`` in one of its modes."""

    def __init__(self, work: Workload, mode: str, capturable: bool = False) -> None:
        super().__init__(work)
        recipe = work.case.recipe
        if mode == "inductor" or capturable:
            stock = with_counts_on_device(work, self.params)
        else:
            # Eager mode runs torch's kernels, so it gets the fused ones as the baseline does.
            options = {"fused": True} if mode == "eager" and recipe.has("fused") else {}
            stock = recipe.make(self.params, **options)
            work.load(stock, self.params)
        self.mode = mode
        self.optimizer = compileclip.wrap(stock, MAX_NORM, mode=mode)
        self.served = mode == "eager"

    def step(self) -> None:
        """Clip and step; a first step that falls back to another mode is an error."""
        if self.served:
            self.optimizer.step()
            return
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", compileclip.FallbackWarning)
                self.optimizer.step()
        except compileclip.FallbackWarning as warning:
            raise NotRunError(f"not served: {_reason(str(warning))}") from warning
        self.check()
        self.served = True

    def check(self) -> None:
        """Raise ``NotRunError`` if another mode took the latest step."""
        # The warning is given once per process, the table at any time.
        found = re.search(r"^why eager: (.*)$", self.optimizer.explain(), re.MULTILINE)
        if found:
            raise NotRunError(f"not served: {found.group(1)}")


def _reason(warning: str) -> str:
    return warning.partition(": ")[2].partition(". Remedy")[0] or warning


def with_counts_on_device(work: Workload, params: Sequence[Tensor]) -> Optimizer:
    """An optimizer for torch.compile or a CUDA graph: its step counts are on the GPU."""
    recipe = work.case.recipe
    capturable = params[0].is_cuda and recipe.has("capturable")
    optimizer = recipe.make(params, **({"capturable": True} if capturable else {}))
    work.load(optimizer, params)
    return optimizer


def check_option(work: Workload, option: str) -> None:
    """Raise ``NotRunError`` where the optimizer's class has no such implementation."""
    if not work.case.recipe.has(option):
        raise NotRunError(f"torch.optim.{work.case.optimizer} has no {option}=True")
