"""Optimizers whose steps are launched on a stub for CUDA's driver."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import params_like
from stub_driver import Stub, stubbed
from torch import Tensor

import compileclip
from compileclip.fallback import FallbackWarning

SHAPES = [(3, 4), (5,), (2, 3, 2), (20000,), (1,)]
SCALED = {"grad_scale": 4.0, "found_inf": 0.0}


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    with stubbed(monkeypatch) as made, warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        warnings.filterwarnings("ignore", "gradients come to the step")  # norms are never written
        yield made


def wrapped(make: Any, kwargs: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    params = params_like(SHAPES, dtype)
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    return compileclip.wrap(make(groups, **kwargs), 1.0, mode="multi_tensor", **options)


def give(opt: Any, seed: int) -> None:
    torch.manual_seed(seed)
    for group in opt.param_groups:
        for p in group["params"]:
            p.grad = torch.randn_like(p)


def steps(opt: Any, count: int, **scaled: float) -> None:
    for seed in range(count):
        give(opt, seed)
        for name, value in scaled.items():
            setattr(opt, name, torch.tensor(value))
        opt.step()


@pytest.fixture
def opt(stub: Stub) -> Any:
    """A wrapped AdamW in two groups, whose next step may be a native call."""
    made = wrapped(torch.optim.AdamW, {"lr": 1e-2})
    steps(made, 4)
    assert made._modes.kernels.steady is not None
    stub.reset()
    return made


def is_quick(opt: Any) -> bool:
    """Step; whether by the native call."""
    before = opt._modes.kernels.steady
    opt.step()
    return before is not None and opt._modes.kernels.steady is before


def all_params(opt: Any) -> list[Tensor]:
    return [p for group in opt.param_groups for p in group["params"]]
