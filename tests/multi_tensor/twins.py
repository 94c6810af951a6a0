"""The same optimizer twice, in mode multi_tensor and in eager, compared at each step."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_same, clone_params, flat_state, params_like, set_grads
from optimizer_registry import maker
from test_optim_db import all_params, grads_of
from torch.optim import Optimizer

import compileclip
from compileclip import fallback
from compileclip.fallback import FallbackWarning

SHAPES = [(3, 4), (5,), (2, 3, 2), (17, 1000), (0,), (1,)]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A warning said in another test is said again."""
    monkeypatch.setattr(fallback, "_said", set())


class Lion(Optimizer):
    """A third-party optimizer that makes its state in its first step."""

    def __init__(self, params: Any, lr: float = 1e-2, betas: Any = (0.9, 0.99), wd: float = 0.1):
        super().__init__(params, {"lr": lr, "betas": betas, "wd": wd})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if len(state) == 0:
                    state["exp_avg"] = torch.zeros_like(p)
                    state["steps"] = 0
                state["steps"] += 1
                beta1, beta2 = group["betas"]
                p.mul_(1 - group["lr"] * group["wd"])
                update = state["exp_avg"] * beta1 + p.grad * (1 - beta1)
                p.add_(update.sign(), alpha=-group["lr"])
                state["exp_avg"].mul_(beta2).add_(p.grad, alpha=1 - beta2)


# Without a square root, so that all is equal to the bit.
sgd = maker("SGD, Nesterov", lr=0.1)


class Twins:
    """The same parameters and optimizer twice: in mode multi_tensor and in eager."""

    def __init__(
        self, make: Callable[[Any], Optimizer] = sgd, shapes: Any = SHAPES, **options: Any
    ) -> None:
        params = params_like(shapes)
        self.ours = compileclip.wrap(make(params), 1.0, mode="multi_tensor", **options)
        options = {"write_grads": False, **options}
        self.theirs = compileclip.wrap(make(clone_params(params)), 1.0, mode="eager", **options)

    @property
    def both(self) -> tuple[Any, Any]:
        return self.ours, self.theirs

    def params(self) -> list[tuple[Any, Any]]:
        return list(zip(all_params(self.ours), all_params(self.theirs), strict=True))

    def step(self, seed: int, served: bool = True, change: Any = None) -> None:
        for opt in self.both:
            set_grads(all_params(opt), seed, scale=0.1 if seed % 2 else 10)
            for i, p in enumerate(all_params(opt)):
                if change is not None:
                    change(i, p)
        before = grads_of(self.ours)
        with warnings.catch_warnings():
            if served:
                warnings.simplefilter("error", FallbackWarning)
            self.ours.step()
        self.theirs.step()
        self.check()
        if self.ours.write_grads is True:
            assert_same(grads_of(self.ours), grads_of(self.theirs), "gradient")
        elif served or self.ours.write_grads is False:
            assert_same(grads_of(self.ours), before, "gradient")

    def check(self) -> None:
        assert torch.equal(self.ours.total_norm, self.theirs.total_norm)
        assert_same(all_params(self.ours), all_params(self.theirs), "parameter")
        mine, other = flat_state(self.ours), flat_state(self.theirs)
        assert [name for name, _ in mine] == [name for name, _ in other]
        assert_same([v for _, v in mine], [v for _, v in other], "state")
