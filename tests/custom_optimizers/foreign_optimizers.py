"""Ordinary Python optimizers that keep things where torch's do not, or do what those never do.

Each is the least that some published optimizer does: named in its docstring, all of them of
pytorch_optimizer 4.1.0 but for optimi's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer


class Foreign(Optimizer):
    """Calls ``update`` for each parameter."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(group, self.state[p], p, p.grad)

    def update(self, group: Any, state: Any, p: Tensor, grad: Tensor) -> None:
        raise NotImplementedError


class StepInGroup(Foreign):
    """The step count is a tensor in the group, counted in place (optimi's Adam)."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        for group in self.param_groups:
            group["step"] = torch.tensor(0.0)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for group in self.param_groups:
            group["step"].add_(1)
        return super().step()

    def update(self, group: Any, state: Any, p: Tensor, grad: Tensor) -> None:
        p.add_(grad, alpha=-group["lr"] / group["step"].item())


class StepInState(Foreign):
    """The step count is an entry of ``state`` of its own (MADGRAD)."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        self.state.setdefault("k", torch.tensor(0.0)).add_(1)
        return super().step()

    def update(self, group: Any, state: Any, p: Tensor, grad: Tensor) -> None:
        p.add_(grad, alpha=-group["lr"] / self.state["k"].item())


class StepInList(Foreign):
    """The step count lies in an attribute that is changed in place."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.count = [0.0]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        self.count[0] += 1
        return super().step()

    def update(self, group: Any, state: Any, p: Tensor, grad: Tensor) -> None:
        p.add_(grad, alpha=-group["lr"] / self.count[0])


class DictOfTensors(Foreign):
    """State is a dict of tensors (AggMo)."""

    def update(self, group: Any, state: Any, p: Tensor, grad: Tensor) -> None:
        buffers = state.setdefault("buffers", {b: torch.zeros_like(p) for b in (0.0, 0.9)})
        for beta, buffer in buffers.items():
            buffer.mul_(beta).add_(grad)
            p.sub_(buffer, alpha=group["lr"] / 2)


class Queue(Foreign):
    """State is a queue of tensors (AdaShift)."""

    def update(self, group: Any, state: Any, p: Tensor, grad: Tensor) -> None:
        queue = state.setdefault("queue", deque(maxlen=2))
        queue.append(grad.clone())
        p.add_(queue[0], alpha=-group["lr"])


class PowerInPlace(Foreign):
    """A power in place (PAdam)."""

    def update(self, group: Any, state: Any, p: Tensor, grad: Tensor) -> None:
        p.addcdiv_(grad, grad.abs().pow_(2).add_(1), value=-group["lr"])


class SgnLion(Foreign):
    """Lion by ``sgn_``, without a count (lion_pytorch 0.2.5)."""

    def update(self, group: Any, state: Any, p: Tensor, grad: Tensor) -> None:
        if len(state) == 0:
            state["exp_avg"] = torch.zeros_like(p)
        exp_avg = state["exp_avg"]
        p.data.mul_(1.0 - group["lr"] * 0.1)
        update = exp_avg.clone().mul_(0.9).add(grad, alpha=1.0 - 0.9).sgn_()
        p.add_(update, alpha=-group["lr"])
        exp_avg.mul_(0.99).add_(grad, alpha=1.0 - 0.99)


class Atan2Adam(Foreign):
    """An angle in the place of a quotient (adam-atan2-pytorch)."""

    def update(self, group: Any, state: Any, p: Tensor, grad: Tensor) -> None:
        if len(state) == 0:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        state["exp_avg"].lerp_(grad, 0.1)
        state["exp_avg_sq"].lerp_(grad.square(), 0.01)
        p.add_(state["exp_avg"].atan2(state["exp_avg_sq"].abs()), alpha=-group["lr"])


class Bounds(Foreign):
    """Numbers in 0-dim tensors, one of them made on the parameter's device (AdaBound)."""

    def update(self, group: Any, state: Any, p: Tensor, grad: Tensor) -> None:
        step_size = torch.full((), group["lr"], dtype=p.dtype, device=p.device)
        update = grad.abs().add_(0.1)
        torch.div(step_size, update, out=update)
        update.clamp_(min=torch.tensor(0.01), max=torch.tensor(0.5))
        p.sub_(update.mul_(torch.minimum(grad, torch.tensor(0.25))))


class BoundsInPlace(Foreign):
    """One of them written to after that."""

    def update(self, group: Any, state: Any, p: Tensor, grad: Tensor) -> None:
        step_size = torch.full((), group["lr"], dtype=p.dtype, device=p.device)
        p.sub_(step_size.mul_(2) / grad.abs().add_(1))


class Masks(Foreign):
    """Elements chosen by masks (FTRL, cautious optimizers, MSVAG)."""

    def update(self, group: Any, state: Any, p: Tensor, grad: Tensor) -> None:
        agrees, small = p * grad > 0, grad.abs() <= 0.01
        update = (grad / p).nan_to_num_(0.0, posinf=1.0, neginf=-1.0)
        update.masked_fill_((agrees | small) & ~(p > 1), 0.0)
        update.masked_fill_(agrees ^ small, group["lr"])
        p.sub_(torch.where(update.isnan(), 0.0, update), alpha=group["lr"])


class Refilled(Foreign):
    """State that begins anew at some steps."""

    def update(self, group: Any, state: Any, p: Tensor, grad: Tensor) -> None:
        if len(state) == 0:
            state.update(step=0, mean=torch.zeros_like(p), most=torch.empty_like(p).fill_(0.5))
        state["step"] += 1
        if state["step"] % 3 == 0:
            state["mean"].zero_()
            state["most"].fill_(torch.tensor(0.25))
        state["mean"].add_(grad)
        torch.max(state["most"], grad.abs(), out=state["most"])
        p.sub_(state["mean"].floor().div_(state["most"]), alpha=group["lr"])


class Lottery(Foreign):
    """One random number for each parameter (Magma)."""

    def update(self, group: Any, state: Any, p: Tensor, grad: Tensor) -> None:
        p.mul_(torch.rand(()))
        p.add_(grad, alpha=-group["lr"])


class Dithered(Foreign):
    """Random numbers for each element (Gravity)."""

    def update(self, group: Any, state: Any, p: Tensor, grad: Tensor) -> None:
        p.add_(grad + torch.randn_like(p), alpha=-group["lr"])


class Around(Foreign):
    """Around another optimizer, which it steps (Lookahead, OrthoGrad, schedule-free wrappers)."""

    def __init__(self, params: Any) -> None:
        self.inner = SGD(params, lr=0.1, momentum=0.9)
        self.defaults = self.inner.defaults
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = {}, {}

    @property
    def param_groups(self) -> Any:
        return self.inner.param_groups

    @property
    def state(self) -> Any:
        return self.inner.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        self.inner.step()
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(0.99)


class AroundAMethod(Foreign):
    """The same, by the other's method alone."""

    def __init__(self, params: Any) -> None:
        params = list(params)
        super().__init__(params)
        self.inner_step = SGD(params, lr=0.1).step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        self.inner_step()
        return super().step()

    def update(self, group: Any, state: Any, p: Tensor, grad: Tensor) -> None:
        p.mul_(0.99)


class GroupedAround(Foreign):
    """The same, with groups and state of its own."""

    def __init__(self, params: Any) -> None:
        params = list(params)
        super().__init__(params)
        self.inner = SGD(params, lr=0.1)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        self.inner.step()
        return super().step()

    def update(self, group: Any, state: Any, p: Tensor, grad: Tensor) -> None:
        p.mul_(0.99)
