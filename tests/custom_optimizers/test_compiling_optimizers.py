"""Optimizers whose own step calls torch.compile are left to themselves, as if never tried."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import assert_same, clone_params, params_like, set_grads
from test_optim_db import all_params
from torch import Tensor
from torch._dynamo.utils import counters
from torch.optim import Optimizer

import compileclip


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Compiling(Optimizer):
    """Plain descent by a compiled function, which ``function`` gives."""

    function: Callable[[], Any]

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(type(self).function()(p, p.grad, group["lr"]))


def made(when: str, fullgraph: bool) -> type[Compiling]:
    """A class whose function is compiled once, or in each step; a new one for each test."""

    def update(p: Tensor, grad: Tensor, lr: float) -> Tensor:
        return p - lr * grad

    once = torch.compile(update, fullgraph=fullgraph, backend="eager")

    def function() -> Any:
        return once if when == "once" else torch.compile(update, backend="eager")

    return type("Made", (Compiling,), {"function": staticmethod(function)})


@pytest.mark.parametrize("mode", ["auto", "multi_tensor", "eager"])
@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("when", ["once", "each step"])
@pytest.mark.filterwarnings("ignore::compileclip.FallbackWarning")
def test_it_compiles_as_it_does_bare(when: str, fullgraph: bool, mode: str) -> None:
    cls, params = made(when, fullgraph), params_like([(3, 4), (5,)])
    ours, theirs = (
        compileclip.wrap(cls(params), 0.5, mode=mode),
        made(when, fullgraph)(clone_params(params)),
    )
    profiler = sys.getprofile()
    for seed in range(4):
        for opt in (ours, theirs):
            set_grads(all_params(opt), seed)
        ours.step()
        compileclip.clip_grad_norm_(all_params(theirs), 0.5)
        theirs.step()
        assert_same(all_params(ours), all_params(theirs), "parameter")
    assert sys.getprofile() is profiler
    assert counters["frames"]["ok"] == counters["frames"]["total"]
    assert counters["stats"]["unique_graphs"] > 0
    if mode != "eager":
        assert "why eager: the step compiles by itself" in ours.explain()
    before = counters["stats"]["unique_graphs"]
    bare = cls(clone_params(params))
    set_grads(all_params(bare), 0)
    bare.step()
    assert counters["stats"]["unique_graphs"] == before  # it is still compiled, and known
