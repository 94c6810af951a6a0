"""What a GradScaler, and who watches whether it calls a step, see of a wrapped optimizer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer

import compileclip

OVERFLOWS = (2, 5)


def run(wrapped: bool, make: Any, **options: Any) -> tuple[list[int], list[float], Optimizer]:
    """Train under a GradScaler: the steps in which the optimizer's was called, and the rates."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    opt: Any = make(model.parameters())
    opt = compileclip.wrap(opt, 0.5, **options) if wrapped else opt
    called: list[int] = []
    step_of = opt.step

    def counted(*args: Any, **kwargs: Any) -> Any:
        called.append(step)
        return step_of(*args, **kwargs)

    scheduler = torch.optim.lr_scheduler.StepLR(opt, 2, gamma=0.5)
    opt.step = counted  # as Accelerate does
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    rates = []
    for step in range(8):
        loss = model(torch.ones(2, 4)).square().sum() * (math.inf if step in OVERFLOWS else 1.0)
        scaler.scale(loss).backward()
        if not wrapped:
            scaler.unscale_(opt)
            compileclip.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        if called and called[-1] == step:
            scheduler.step()
        rates.append(opt.param_groups[0]["lr"])
    return called, rates, opt


@pytest.mark.parametrize("mode", ["auto", "multi_tensor", "eager"])
@pytest.mark.parametrize("nonfinite", ["propagate", "raise"])
def test_a_step_that_overflows_is_not_called(nonfinite: str, mode: str) -> None:
    def make(params: Any) -> Optimizer:
        return SGD(params, lr=0.1, momentum=0.9, foreach=False)

    called, rates, ours = run(True, make, mode=mode, nonfinite=nonfinite)
    bare_called, bare_rates, theirs = run(False, make)
    assert called == bare_called == [0, 1, 3, 4, 6, 7]
    assert rates == bare_rates
    for a, b in zip(*(o.param_groups[0]["params"] for o in (ours, theirs)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda p: SGD(p, lr=0.1), {"nonfinite": "skip"}),
        (lambda p: SGD(p, lr=0.1, fused=True), {}),
    ],
)
def test_where_the_device_decides_it_is(make: Any, options: dict[str, Any]) -> None:
    called, _, _ = run(True, make, **options)
    assert called == list(range(8))


def test_who_is_asked() -> None:
    def asked(**kwargs: Any) -> bool:
        options = {k: kwargs.pop(k) for k in ("mode", "nonfinite") if k in kwargs}
        opt = Adam([nn.Parameter(torch.ones(3))], lr=0.1, **kwargs)
        return bool(compileclip.wrap(opt, 1.0, **options)._step_supports_amp_scaling)

    assert not asked()
    assert asked(fused=True)
    assert asked(capturable=True)
    assert asked(nonfinite="skip")
    assert not asked(mode="inductor", nonfinite="skip")
