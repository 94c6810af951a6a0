"""Compiled training steps whose optimizer is not torch's, or that raise an error of their own."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from test_traced_parameters import (
    Run,
    Step,
    _fresh,
    compile_step,
    one_graph,
    train,
    zeroes_first,
)
from test_training_step import counting
from torch import Tensor
from torch._dynamo.utils import counters
from torch.torch_version import TorchVersion

import compileclip
from compileclip.fallback import FallbackWarning

__all__ = ["_fresh", "one_graph"]


@pytest.mark.parametrize("bad", [torch.ones(3, 9), torch.ones(7, 4)], ids=["shape", "ValueError"])
def test_one_step_in_error_changes_nothing_for_the_next(bad: Tensor) -> None:
    def layout(run: Run) -> Step:
        def step(x: Tensor) -> Tensor:
            if x.shape[0] == 7:
                raise ValueError("seven")
            return zeroes_first(run)(x)

        return step

    ours, theirs = (Run(layout) for _ in range(2))
    compile_step(ours)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        for first in (0, 2):
            train(ours, theirs, first=first, steps=2)
            for run in (ours, theirs):
                with pytest.raises((ValueError, RuntimeError), match=r"seven|cannot be multiplied"):
                    run.step(bad)
        graphs = counters["stats"]["unique_graphs"]
        train(ours, theirs, first=4, steps=2)
    assert counters["stats"]["unique_graphs"] == graphs


class Foreign(torch.optim.Optimizer):
    """Its step reads what an instance, a class and a property hold, and writes into a group."""

    sign = -1.0

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.factor = 0.5

    @property
    def twice(self) -> float:
        return 2 * self.factor

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad * group["lr"] * self.twice, alpha=self.sign)
            group["ran"] = True


class Untraceable(Foreign):
    def step(self, closure: None = None) -> None:
        torch._dynamo.graph_break()
        super().step()


def foreign(cls: Any, **options: Any) -> Run:
    run = Run(zeroes_first)
    base = cls(run.params, lr=0.1)
    run.optimizer = compileclip.wrap(base, 0.1, write_grads=True, **options)
    return run


@pytest.mark.usefixtures("one_graph")
def test_attributes_of_a_foreign_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = (foreign(Foreign) for _ in range(2))
    compile_step(ours)
    train(ours, theirs, steps=4)
    assert ours.optimizer.param_groups[0]["ran"]
    for run in (ours, theirs):
        run.optimizer.optimizer.factor = 0.25
    train(ours, theirs, first=4, steps=1)
    if TorchVersion(torch.__version__) >= "2.12":  # 2.11 has no guard on constants of a class
        counters.clear()
        monkeypatch.setattr(Foreign, "sign", 1.0)
        train(ours, theirs, first=5, steps=2)


def test_a_step_that_dynamo_cannot_trace_is_not_traced_piece_by_piece() -> None:
    ours, theirs = (foreign(Untraceable) for _ in range(2))
    frames: list[str] = []

    def backend(module: Any, inputs: Any) -> Any:
        frames.append(str(module.graph))
        return counting([])(module, inputs)

    ours.step = compileclip.compile(ours.eager, backend=backend)
    with pytest.warns(FallbackWarning, match="one graph falls back to graph breaks"):
        train(ours, theirs, steps=2)
    compiled = len(frames)
    assert compiled <= 2  # the forward, and what the training step does afterwards
    train(ours, theirs, first=2)
    assert len(frames) == compiled
