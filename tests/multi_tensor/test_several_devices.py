"""One optimizer with parameters on a GPU and on the CPU: one norm over all, kernels on each."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from helpers import assert_same_optimizer, clone_params, params_like, same, set_grads
from optimizer_registry import maker
from test_optim_db import all_params
from torch import nn

import compileclip
from compileclip.fallback import FallbackWarning

pytestmark = pytest.mark.gpu
SHAPES = [(64, 33), (7,), (1030,), (5, 4, 3)]


def twins(name: str, **options: Any) -> tuple[Any, Any]:
    params = [nn.Parameter(p.detach().cuda()) for p in params_like(SHAPES)]
    params += params_like(SHAPES)
    make = maker(name, lr=0.1 if name.startswith("SGD") else 0.01, foreach=False)
    ours = compileclip.wrap(make(params), 1.0, **options)
    options = {"write_grads": False, **options, "mode": "eager"}
    return ours, compileclip.wrap(make(clone_params(params)), 1.0, **options)


@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
def test_one_norm_and_kernels_on_each(nonfinite: str) -> None:
    ours, theirs = twins("SGD, momentum", nonfinite=nonfinite)
    for seed in range(6):
        for opt in (ours, theirs):
            set_grads(all_params(opt), seed, scale=0.1 if seed % 2 else 10)
            opt.max_norm = 0.5 + seed
            if nonfinite == "skip" and seed == 3:
                all_params(opt)[0].grad[0] = math.nan
        with warnings.catch_warnings():
            warnings.simplefilter("error", FallbackWarning)
            ours.step()
        theirs.step()
        assert same(ours.total_norm, theirs.total_norm)
        assert_same_optimizer(ours, theirs)
    assert len(ours._modes.kernels._works) == 2
    assert "eager" not in ours.explain()


def test_close_where_roots_are_not_the_same() -> None:
    """ATen's square root on a CPU is not correctly rounded."""
    ours, theirs = twins("AdamW")
    for seed in range(6):
        for opt in (ours, theirs):
            set_grads(all_params(opt), seed)
            opt.step()
    for a, b in zip(all_params(ours), all_params(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_the_norm_is_that_of_one_device() -> None:
    grads = [torch.randn(s, dtype=torch.float64) for s in SHAPES]
    spread = [g.cuda() if i % 2 else g for i, g in enumerate(grads)]
    for order in (1.0, 2.0, 3.0, math.inf):
        norm = compileclip.get_total_norm(spread, order)
        expected = compileclip.get_total_norm(grads, order)
        assert norm.device == spread[0].device
        # Sums in another order; not observed yet.
        torch.testing.assert_close(norm, expected, rtol=1e-14, atol=0)
