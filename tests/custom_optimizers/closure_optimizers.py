"""Optimizers whose steps take a closure: as those of other packages write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer


def closure_of(opt: Optimizer) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        opt.zero_grad()
        loss = sum(p.square().sum() for group in opt.param_groups for p in group["params"])
        assert isinstance(loss, Tensor)
        loss.backward()
        return loss

    return closure


class SharpnessAware(SGD):
    """Sharpness-aware without an optimizer inside, as BSAM of pytorch_optimizer."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)

    def _move(self, by: float) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(by)


class Needs(SharpnessAware):
    """Raises without one."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if closure is None:
            raise RuntimeError("lost without it")
        self._move(0.05)
        with torch.enable_grad():
            closure()
        self._move(-0.05)
        return super().step()


class Asserts(SharpnessAware):
    """Fails without one."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        assert closure is not None
        return super().step(closure)


class Decorates(SharpnessAware):
    """Calls it in a mode of its own."""

    def step(self, closure: Any = None) -> Any:
        self._move(0.05)
        loss = torch.enable_grad()(closure)()
        super().step()
        return loss


class DecoratesFirst(SharpnessAware):
    """Gives it a mode first."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        closure = torch.enable_grad()(closure)
        self._move(0.05)
        return closure()


class HandsOn(SharpnessAware):
    """Another method calls it."""

    def step(self, closure: Any = None) -> Any:
        self._move(0.05)
        return self._second(again=closure)

    def _second(self, again: Any) -> Any:
        loss = again()
        super().step()
        return loss


class Twice(SharpnessAware):
    """Without a closure, silently an ordinary step."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            self._move(0.05)
            with torch.enable_grad():
                closure()
            self._move(-0.05)
        super().step()
        return loss


class TwiceByParts(SharpnessAware):
    """Calls it, and has the class above call it again."""

    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure else None
        self._move(0.0)
        super().step(closure)
        return loss


class InALoop(SharpnessAware):
    """Calls it time after time."""

    def step(self, closure: Any = None) -> Any:
        for _ in range(3):
            if closure is None:
                break
            closure()
        return super().step()


class Wrapped(SharpnessAware):
    """Calls what calls it."""

    def step(self, closure: Any = None) -> Any:
        def again() -> Any:
            return closure()

        if closure is not None:
            again()
            again()
        return super().step()


class AsTorchs(SharpnessAware):
    """As torch writes it."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        super().step()
        return loss


class ByTwoWays(SharpnessAware):
    """Calls it once on each way."""

    def step(self, closure: Any = None) -> Any:
        if closure is None:
            return super().step()
        if len(self.state) == 0:
            return super().step(closure)
        loss = closure() if callable(closure) else None
        super().step()
        return loss


class BringsItsOwn(SharpnessAware):
    """Has another one where none is given."""

    def step(self, closure: Any = None) -> Any:
        closure = closure or (lambda: None)
        loss = closure()
        super().step()
        return loss


class Tries(SharpnessAware):
    """Does without, as it finds out."""

    def step(self, closure: Any = None) -> Any:
        try:
            loss = closure()
        except TypeError:
            loss = None
        super().step()
        return loss


class Refuses(SharpnessAware):
    """Never steps, with a closure or without (LOMO)."""

    def step(self, closure: Any = None) -> Any:
        raise NotImplementedError("call fused_backward")


NEEDS, CALLS = "needs a closure", "may call its closure more than once"
ASKING = {
    Needs: NEEDS,
    Asserts: NEEDS,
    Decorates: NEEDS,
    DecoratesFirst: NEEDS,
    HandsOn: NEEDS,
    Twice: CALLS,
    TwiceByParts: CALLS,
    InALoop: CALLS,
    Wrapped: CALLS,
}
