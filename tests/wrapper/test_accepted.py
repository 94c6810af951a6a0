"""What ``wrap`` refuses, and what trainers put in front of an optimizer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import assert_same, clone_params, params_like, set_grads
from torch.optim import SGD, Optimizer, lr_scheduler

import compileclip


class Prepared(Optimizer):
    """As ``accelerator.prepare`` makes it: it has not run ``Optimizer.__init__``."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        return self.optimizer.state

    @property
    def defaults(self) -> Any:
        return self.optimizer.defaults

    def step(self, closure: Any = None) -> None:
        self.optimizer.step(closure)


class _InFront:
    """As Fabric and Lightning make it: its class is made of the held optimizer's."""

    def __init__(self, optimizer: Optimizer, scaler: Any = None) -> None:
        self._optimizer = optimizer
        self._strategy = SimpleNamespace(precision=SimpleNamespace(scaler=scaler))
        kind = type(optimizer)
        self.__class__ = type(f"Fabric{kind.__name__}", (self.__class__, kind), {})

    @property
    def optimizer(self) -> Optimizer:
        return self._optimizer

    def step(self, closure: Any = None) -> Any:
        return self._optimizer.step()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


def test_what_prepare_has_made_is_refused_at_once() -> None:
    prepared = Prepared(SGD(params_like([(3,)]), lr=0.1))
    with pytest.raises(ValueError, match=r"Prepared stands in front.*prepare\(compileclip.wrap"):
        compileclip.wrap(prepared, 1.0)


def test_what_unscales_in_its_step_is_refused() -> None:
    inner = SGD(params_like([(3,)]), lr=0.1)
    front: Any = _InFront(inner, torch.amp.GradScaler("cpu"))
    with pytest.raises(ValueError, match=r"FabricSGD unscales .*fabric.setup\(model, compileclip"):
        compileclip.wrap(front, 1.0)


def test_what_only_hands_the_step_on_can_be_wrapped() -> None:
    ours = params_like([(3, 3), (3,)])
    theirs = clone_params(ours)
    front: Any = _InFront(SGD(ours, lr=0.1))
    opt, bare = compileclip.wrap(front, 0.5), SGD(theirs, lr=0.1)
    for seed in range(3):
        set_grads(ours, seed)
        set_grads(theirs, seed)
        norm = compileclip.clip_grad_norm_(theirs, 0.5)
        opt.step()
        bare.step()
        assert_same([*ours, opt.total_norm], [*theirs, norm], "tensor")


def test_an_optimizer_of_optimizers_can_be_wrapped() -> None:
    """As Lookahead and others of pytorch_optimizer: no groups of its own, but hooks."""

    class Lookahead(Prepared):
        def __init__(self, optimizer: Optimizer) -> None:
            super().__init__(optimizer)
            self._optimizer_step_pre_hooks = {}
            self._optimizer_step_post_hooks = {}

    params = params_like([(3,)])
    set_grads(params, 0)
    opt = compileclip.wrap(Lookahead(SGD(params, lr=0.1)), 0.5)
    before = params[0].detach().clone()
    opt.step()
    assert not torch.equal(params[0], before)


@pytest.fixture
def front() -> Any:
    params = params_like([(3, 3), (3,)])
    set_grads(params, 0, scale=10)
    return _InFront(compileclip.wrap(SGD(params, lr=0.1), 1.0))


def test_max_norm_is_set_through_a_trainers_object(front: Any) -> None:
    front.max_norm = 0.25
    assert front.max_norm == front.optimizer.max_norm == 0.25
    front.step()
    assert front.total_norm is front.optimizer.total_norm
    assert "0.25" in front.explain()


def test_a_scheduler_on_a_trainers_object(front: Any) -> None:
    scheduler = lr_scheduler.StepLR(front, 1, gamma=0.5)
    front.step()
    scheduler.step()
    assert front.optimizer.param_groups[0]["lr"] == 0.05


def test_a_trainers_object_is_not_wrapped_twice(front: Any) -> None:
    with pytest.raises(ValueError, match="wrapped already"):
        compileclip.wrap(front, 1.0)
