"""Optimizers of other classes than torch's elementwise ones, where ranks hold parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parameters import Spot, Twins
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

import compileclip
from compileclip.distributed.shards import local

SPOTS = [Spot((7, 3), (2,), "S0"), Spot((4,), (2,), "S0"), Spot((3, 5), (2,), "R")]


class Lion(Optimizer):
    """Of another class than torch's, elementwise; asks for shapes where told to."""

    def __init__(self, params: Any, lr: float = 0.01, by_size: bool = False) -> None:
        super().__init__(params, {"lr": lr, "by_size": by_size})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                update = state["exp_avg"].mul(0.9).add(p.grad, alpha=0.1).sign()
                scale = 1.0 if not group["by_size"] else 1.0 / (1 + (p.numel() > 16))
                p.add_(update, alpha=-group["lr"] * scale * getattr(p, "scale", 1.0))
                state["exp_avg"].mul_(0.99).add_(p.grad, alpha=0.01)


class AsksForShards(Lion):
    """Takes another way with sharded parameters."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad, alpha=-0.1 if hasattr(p, "device_mesh") else -0.2)


class AsksForDTensor(Lion):
    """The same by its class."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad, alpha=-0.1 if isinstance(p, DTensor) else -0.2)


def check_asking(kind: Any) -> None:
    params = [nn.Parameter(s.hold(torch.zeros(s.shape))) for s in SPOTS[:2]]
    opt = compileclip.wrap(kind(params), None)
    for p, s in zip(params, SPOTS, strict=False):
        p.grad = s.hold(torch.ones(s.shape))
    opt.step()
    assert all(bool((local(p) == -0.1).all()) for p in params)
    assert "as if parameters were whole" in opt.explain()


@pytest.mark.parametrize("kind", [AsksForShards, AsksForDTensor])
def test_a_step_that_asks_for_shards(on_ranks: Any, kind: Any) -> None:
    on_ranks(2, check_asking, kind)


class OfTheWhole(Lion):
    """Divides by a norm of each parameter's gradient: no step of parts."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    norm = torch.linalg.vector_norm(p.grad)
                    p.add_(p.grad / norm, alpha=-group["lr"])


def check_foreign(by_size: bool) -> None:
    twins = Twins(SPOTS, lambda p: Lion(p, by_size=by_size))
    for step in range(5):
        if step == 3:  # attributes, which parts have too
            for params in (twins.parts, twins.wholes):
                params[0].scale = 2.0
        twins.step(step)
        twins.check()
        if step < 3:
            assert (twins.ours._modes.kernels.why_not is not None) == by_size


@pytest.mark.parametrize("by_size", [False, True])
def test_another_class(on_ranks: Any, by_size: bool) -> None:
    on_ranks(2, check_foreign, by_size)


def check_of_the_whole() -> None:
    twins = Twins(SPOTS, OfTheWhole)
    for step in range(3):
        twins.step(step)
        twins.check(rtol=1e-5, atol=1e-6)
    assert twins.ours._modes.kernels.why_not is not None


def test_a_step_of_whole_parameters(on_ranks: Any) -> None:
    on_ranks(2, check_of_the_whole)


def check_muon(mode: str) -> None:
    spots = [Spot((6, 4), (2,), "S0"), Spot((4, 6), (2,), "R")]
    twins = Twins(spots, lambda p: torch.optim.Muon(p, lr=0.1), mode=mode)
    for step in range(3):
        twins.step(step)
        twins.check(rtol=1e-2, atol=1e-2)  # it rounds to bfloat16 inside


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["auto", "inductor"])
def test_muon(on_ranks: Any, mode: str) -> None:
    on_ranks(2, check_muon, mode)
