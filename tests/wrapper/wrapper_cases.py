"""A wrapped optimizer for tests of the wrapper, which run with and without compiling."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import params_like, set_grads
from torch import Tensor
from torch.optim import SGD, Optimizer

import compileclip


@pytest.fixture(autouse=True, params=["", "1"], ids=["compiled", "eager"])
def both(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test as users have it, and with everything compiled switched off."""
    monkeypatch.setenv("COMPILECLIP_DISABLE", request.param)


def wrapped_sgd(**options: Any) -> Any:
    params = params_like([(3, 3), (3,)])
    set_grads(params, seed=0, scale=10)
    return compileclip.wrap(SGD(params, lr=0.1), 1.0, **options)


def grads_of(optimizer: Optimizer) -> list[Tensor]:
    return [
        p.grad.clone() for g in optimizer.param_groups for p in g["params"] if p.grad is not None
    ]
