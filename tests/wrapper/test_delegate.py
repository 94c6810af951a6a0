"""Hooks and profilers of a step that has a quick way past both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import params_like, set_grads
from torch.optim import SGD
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import compileclip

RANGE = "Optimizer.step#ClippedOptimizer.step"


@pytest.fixture
def opt() -> Any:
    params = params_like([(3, 4), (5,)])
    set_grads(params, 0)
    return compileclip.wrap(SGD(params, lr=0.1), 1.0)


@pytest.mark.parametrize("owner", ["wrapper", "wrapped", "global"])
@pytest.mark.parametrize("kind", ["pre", "post"])
def test_a_hook_runs_once_with_the_wrapper(opt: Any, owner: str, kind: str) -> None:
    called: list[Any] = []
    both = register_optimizer_step_pre_hook, register_optimizer_step_post_hook
    if owner == "global":
        register: Any = both[kind == "post"]
    else:
        where = opt if owner == "wrapper" else opt.optimizer
        register = getattr(where, f"register_step_{kind}_hook")
    opt.step()  # before there is any
    assert opt.total_norm is not None
    removable = register(lambda *args: called.append(args))
    opt.step()
    assert called == [(opt, (opt,), {})]
    removable.remove()
    opt.step()
    assert len(called) == 1


def test_a_pre_hook_changes_the_arguments(opt: Any) -> None:
    opt.register_step_pre_hook(lambda opt, args, kwargs: ((*args, lambda: "a loss"), kwargs))
    assert opt.step() == "a loss"


def test_a_profiler_sees_the_step(opt: Any) -> None:
    seen: list[Any] = []
    opt._optimizer_step_code = lambda: seen.append(True)  # what a profiler of Python looks for
    opt.step()
    assert not seen
    with torch.profiler.profile() as profile:
        opt.step()
    assert [event.key for event in profile.key_averages()].count(RANGE) == 1
    assert seen == [True]


@pytest.mark.parametrize("enabled", [True, False])
def test_the_grad_mode_is_as_it_was(opt: Any, enabled: bool) -> None:
    def closure() -> float:
        assert torch.is_grad_enabled()
        return 1.0

    with torch.set_grad_enabled(enabled):
        assert opt.step(closure) == 1.0
        assert torch.is_grad_enabled() == enabled
        opt.param_groups[0]["params"][0].grad[0, 0] = torch.nan
        opt = compileclip.wrap(opt.optimizer, 1.0, nonfinite="raise")
        with pytest.raises(RuntimeError, match="nan"):
            opt.step()
        assert torch.is_grad_enabled() == enabled
