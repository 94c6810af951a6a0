"""ClippedOptimizer with bad or empty input: arguments, groups, gradients on other devices."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import assert_same, params_like, set_grads
from torch.optim import SGD
from wrapper_cases import both

import compileclip

__all__ = ["both"]


def test_empty_group_works() -> None:
    opt = compileclip.wrap(SGD([{"params": []}], lr=0.1), 1.0)
    opt.step()
    assert opt.total_norm == 0.0
    with pytest.raises(ValueError, match="empty parameter list"):
        compileclip.wrap(SGD([], lr=0.1), 1.0)


def test_bad_arguments() -> None:
    inner = SGD(params_like([(3,)]), lr=0.1)
    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, "max_norm=-1.0", {"max_norm": -1.0}),
        (ValueError, "max_norm=nan", {"max_norm": math.nan}),
        (TypeError, "max_norm='big'", {"max_norm": "big"}),
        (TypeError, "norm_type=None", {"max_norm": 1.0, "norm_type": None}),
        (ValueError, "norm_type is nan", {"max_norm": 1.0, "norm_type": math.nan}),
        (ValueError, "nonfinite='ignore'", {"max_norm": 1.0, "nonfinite": "ignore"}),
        (ValueError, "write_grads='yes'", {"max_norm": 1.0, "write_grads": "yes"}),
        (ValueError, "mode='fast'", {"max_norm": 1.0, "mode": "fast"}),
    ]
    for error, message, options in wrong:
        with pytest.raises(error, match=message):
            compileclip.wrap(inner, **options)
    with pytest.raises(TypeError, match="got Linear"):
        compileclip.wrap(torch.nn.Linear(2, 2), 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="wrapped already"):
        compileclip.wrap(compileclip.wrap(inner, 1.0), 1.0)
    with pytest.raises(ValueError, match="needs a closure"):
        compileclip.wrap(torch.optim.LBFGS(params_like([(3,)])), 1.0)


def test_gradient_on_another_device_than_its_parameter() -> None:
    a, b = params_like([(3,), (3,)])
    set_grads([a, b], seed=0)
    opt = compileclip.wrap(SGD([a, b], lr=0.1), 0.1)
    before, grad = a.detach().clone(), a.grad.clone()

    class Moved(torch.nn.Parameter):
        device = torch.device("meta")

    b.__class__ = Moved
    with pytest.raises(RuntimeError, match=r"shape \(3,\) on meta has its gradient on cpu"):
        opt.step()
    assert_same([a, a.grad], [before, grad], "tensor")


@pytest.mark.parametrize("nonfinite", ["propagate", "raise", "skip"])
def test_meta_tensors(nonfinite: str) -> None:
    """As torch: a step has shapes but no values; a decision by value is an error."""
    p = torch.nn.Parameter(torch.empty(3, device="meta"))
    p.grad = torch.empty(3, device="meta")
    opt = compileclip.wrap(SGD([p], lr=0.1), 1.0, nonfinite=nonfinite)
    if nonfinite == "propagate":
        opt.step()
        assert opt.total_norm.is_meta
    else:
        with pytest.raises(RuntimeError, match="meta"):
            opt.step()
