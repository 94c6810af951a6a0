"""Published optimizers, wrapped, against ``clip_grad_norm_`` and bare; for whoever has them.

Read in pytorch_optimizer 4.1.0, torch-optimi 0.3.3 and lion-pytorch 0.2.5. Of the 128 classes of
the first, mode="multi_tensor" served 43 where they could be made without arguments, 31 of them to
the bit; what went wrong is in test_foreign_optimizers.py.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import pytest
import torch
from helpers import assert_same, clone_params, flat_state, params_like, set_grads
from test_multi_tensor import ExactSqrt

import compileclip
from compileclip.fallback import FallbackWarning

# Equal to the bit, but for roots, which are taken correctly rounded on both sides.
SERVED = [
    ("pytorch_optimizer", name)
    for name in ("Lion", "QHM", "Tiger", "SignSGD", "PNM", "ScheduleFreeSGD")
] + [("optimi", "Lion"), ("optimi", "SGD")]
# By roots in other forms. Observed after 5 steps, of the largest: 6e-8.
CLOSE = [("pytorch_optimizer", name) for name in ("AdaBelief", "AdEMAMix", "Yogi", "Adan", "VSGD")]
REFUSED = [("pytorch_optimizer", name) for name in ("LARS", "AdaFactor", "Shampoo", "NovoGrad")]


def both(package: str, name: str) -> tuple[Any, Any]:
    """The optimizer wrapped and bare, after 5 steps each."""
    cls = getattr(pytest.importorskip(package), name)
    params = params_like([(16, 8), (8,), (3, 4, 5)])
    others = clone_params(params)
    ours = compileclip.wrap(cls(params, lr=1e-2), 1.0, write_grads=True)
    theirs = cls(others, lr=1e-2)
    for opt in (ours, theirs):
        if hasattr(opt, "train"):
            opt.train()  # schedule-free ones ask for it
    for seed in range(5):
        for tensors in (params, others):
            set_grads(tensors, seed)
        with warnings.catch_warnings():
            warnings.simplefilter("error", FallbackWarning)
            ours.step()
        norm = compileclip.clip_grad_norm_(others, 1.0)
        with ExactSqrt():
            theirs.step()
        assert_same([ours.total_norm], [norm], "norm")
    return ours, theirs


def params_of(opt: Any) -> list[Any]:
    return [p for group in opt.param_groups for p in group["params"]]


@pytest.mark.parametrize(("package", "name"), SERVED)
def test_served_to_the_bit(package: str, name: str) -> None:
    ours, theirs = both(package, name)
    assert ours._modes.kernels.why_not is None
    assert_same(params_of(ours), params_of(theirs), "parameter")
    mine, other = flat_state(ours), flat_state(theirs)
    assert [n for n, _ in mine] == [n for n, _ in other]
    assert_same([v for _, v in mine], [v for _, v in other], "state")


@pytest.mark.parametrize(("package", "name"), CLOSE)
def test_served_within_rounding(package: str, name: str) -> None:
    ours, theirs = both(package, name)
    assert ours._modes.kernels.why_not is None
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-7 * q.abs().max().item())


@pytest.mark.parametrize(("package", "name"), REFUSED)
def test_refused_with_a_reason(package: str, name: str) -> None:
    """In mode="auto" they step in eager mode, without a warning."""
    ours, theirs = both(package, name)
    assert "pointwise" in ours._modes.kernels.why_not[0]
    assert "pointwise" in ours.explain()
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-7 * q.abs().max().item())


def test_lion_pytorch() -> None:
    ours, theirs = both("lion_pytorch", "Lion")
    assert ours._modes.kernels.why_not is None
    assert_same(params_of(ours), params_of(theirs), "parameter")
    assert importlib.import_module("lion_pytorch").Lion is type(theirs)
