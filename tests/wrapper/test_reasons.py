"""Why a step is not served: the same reason at each step, and a remedy that was tried."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_same, clone_params, params_like, set_grads
from test_optim_db import all_params
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, Optimizer

import compileclip
from compileclip import fallback
from compileclip.fallback import FallbackWarning

STEPS = 8


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fallback, "_said", set())


class Noisy(Optimizer):
    """A step by chance."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(torch.randn(()) * p.grad, alpha=-group["lr"])


class Normed(Noisy):
    """A step by a parameter's own norm."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad / p.grad.square().sum().sqrt() * group["lr"])


def sgd(params: Any) -> Optimizer:
    return SGD(params, lr=0.1, momentum=0.9)


def gaps() -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().repeat(1, 2)[:, ::2]) for p in params_like([(3, 4), (5, 2)])]


def of_no_dimension() -> list[nn.Parameter]:
    return [nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(2.0))]


def matrices() -> list[Any]:
    return params_like([(3, 4), (5, 2)])


CASES: dict[str, tuple[Callable[[], list[Any]], Callable[[Any], Optimizer], str]] = {
    "gaps": (
        gaps,
        sgd,
        "2 parameters, one of shape (3, 4): a parameter of shape (3, 4) has gaps in memory",
    ),
    "0-dim": (of_no_dimension, sgd, "2 parameters, one of shape (): a parameter is 0-dim"),
    "state": (matrices, lambda p: Adafactor(p, lr=0.1), "'row_var' is not shaped as its"),
    "not pointwise": (matrices, Normed, "is not pointwise"),
    "by chance": (matrices, Noisy, "draws random numbers"),
}


def run(opt: Any, mode: str) -> set[str]:
    """Eight steps; the reasons that are given."""
    reasons = set()
    for seed in range(STEPS):
        set_grads(all_params(opt), seed)
        torch.manual_seed(seed)
        opt.step()
        reasons |= {line for line in opt.explain().splitlines() if line.startswith("why eager: ")}
    return reasons


@pytest.mark.parametrize("case", CASES)
def test_one_reason_and_a_remedy_that_helps(case: str) -> None:
    make_params, make, reason = CASES[case]
    params = make_params()
    after: list[list[Tensor]] = []
    for mode in ("multi_tensor", "auto", "eager"):
        opt = compileclip.wrap(
            make(clone_params(params) if case != "gaps" else gaps()), 1.0, mode=mode
        )
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            reasons = run(opt, mode)
        said = [str(w.message) for w in given if issubclass(w.category, FallbackWarning)]
        if mode == "multi_tensor":
            assert len(said) == 1
            assert reason in said[0]
            assert 'Remedy: take mode="auto"' in said[0]
            assert 'or mode="eager"' in said[0]
        else:
            assert not said
        assert len(reasons) == 1
        assert (reason if mode != "eager" else 'mode="eager" was asked for') in reasons.pop()
        after.append([p.detach() for p in all_params(opt)])
    if case != "gaps":
        assert_same(after[0], after[1], "parameter")
        assert_same(after[0], after[2], "parameter")
