"""A small optimizer in mode="inductor", and how far two runs are apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import params_like
from torch import Tensor
from torch.optim import SGD

import compileclip
from compileclip import fallback


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is compiled anew, and a warning said in another test is said again."""
    torch._dynamo.reset()
    monkeypatch.setattr(fallback, "_said", set())


def largest_difference(ours: Any, theirs: Any) -> float:
    """Relative to 1 + |value|; infinite where one is finite and the other is not."""
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if not isinstance(a, Tensor):
            assert a == b
            continue
        a, b = a.detach().double(), b.detach().double()
        assert torch.equal(a.isfinite(), b.isfinite())
        difference = ((a - b).abs() / (1 + b.abs())).nan_to_num(0.0)
        worst = max(worst, difference.max().item() if difference.numel() else 0.0)
    return worst


def wrapped(make: Any = None, **options: Any) -> Any:
    torch.manual_seed(0)
    params = params_like([(3, 3), (4,)])
    inner = make(params) if make else SGD(params, lr=0.1, momentum=0.9)
    return compileclip.wrap(inner, 1.0, mode="inductor", **options)
