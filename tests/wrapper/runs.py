"""A small training run that is the same wrapped and unwrapped, for tests to interrupt."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import compileclip

MAX_NORM = 0.5


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))


def adamw(params: Any, **kwargs: Any) -> Optimizer:
    return torch.optim.AdamW(params, lr=1e-2, **kwargs)


class Run:
    """Training with our wrapper, or with ``compileclip.clip_grad_norm_`` and the bare optimizer."""

    def __init__(
        self,
        wrapped: bool,
        make: Callable[..., Optimizer] = adamw,
        scheduler: Callable[[Optimizer], Any] | None = None,
        **options: Any,
    ) -> None:
        self.model = model()
        self.wrapped = wrapped
        # The last layer joins by add_param_group.
        self.optimizer = make(list(self.model[:4].parameters()))
        if wrapped:
            # Eager, to be compared bit by bit.
            self.optimizer = compileclip.wrap(
                self.optimizer, MAX_NORM, **{"mode": "eager", **options}
            )
        self.scheduler = scheduler(self.optimizer) if scheduler else None
        self.norms: list[Tensor] = []

    def loss(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, 6, generator=generator)
        y = torch.randn(16, 2, generator=generator)
        return (self.model(x) - y).square().mean() * 10

    def step(self, step: int) -> None:
        self.loss(step).backward()
        if not self.wrapped:
            params = [p for group in self.optimizer.param_groups for p in group["params"]]
            self.norms.append(compileclip.clip_grad_norm_(params, MAX_NORM))
        self.optimizer.step()
        if isinstance(self.optimizer, compileclip.ClippedOptimizer):
            assert self.optimizer.total_norm is not None
            self.norms.append(self.optimizer.total_norm)
        self.optimizer.zero_grad()
        self.model.zero_grad()
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(1.0)
        elif self.scheduler is not None:
            self.scheduler.step()

    def checkpoint(self) -> io.BytesIO:
        parts = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.scheduler is not None:
            parts["scheduler"] = self.scheduler.state_dict()
        file = io.BytesIO()
        torch.save(parts, file)
        file.seek(0)
        return file

    def load(self, file: io.BytesIO) -> None:
        parts = torch.load(file, weights_only=True)
        self.model.load_state_dict(parts["model"])
        self.optimizer.load_state_dict(parts["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(parts["scheduler"])
