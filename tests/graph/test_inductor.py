"""mode="inductor" against eager: parameters, state, norms and gradients of many steps."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from helpers import assert_same, assert_same_optimizer, flat_state, params_like, set_grads
from inductor_runs import fresh, largest_difference, wrapped
from optimizer_registry import INDUCTOR, OPTIMIZERS, is_dense, torch_inputs
from runs import Run
from test_optim_db import all_params, give_gradients, grads_of, make
from torch.optim import SGD, AdamW, Optimizer, lr_scheduler

import compileclip
from compileclip.fallback import FallbackWarning

__all__ = ["fresh"]

STEPS = 8
INPUTS = [
    pytest.param(info, kwargs, id=name, marks=[] if name.endswith("-0") else [pytest.mark.sweep])
    for info, kwargs, name in torch_inputs(is_dense)
]


@pytest.mark.parametrize("dtype", INDUCTOR)
@pytest.mark.parametrize(("info", "kwargs"), INPUTS)
def test_every_optimizer(info: Any, kwargs: Any, dtype: torch.dtype) -> None:
    """Two groups, clipped and not in turn, every parameter with a gradient."""
    ours = compileclip.wrap(make(info, kwargs, dtype), 1.0, mode="inductor")
    theirs = compileclip.wrap(make(info, kwargs, dtype), 1.0, mode="eager", write_grads=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        for step in range(STEPS):
            for opt in (ours, theirs):
                give_gradients(info, opt, step + 10)  # without the step that lacks a gradient
                opt.max_norm = 0.05 if step % 2 else 1e3
            before = grads_of(ours)
            ours.step()
            theirs.step()
            assert ours.total_norm is not None
            assert torch.equal(ours.total_norm, theirs.total_norm)
            assert_same(grads_of(ours), before, "gradient")
    worst = max(
        largest_difference(all_params(ours), all_params(theirs)),
        largest_difference([v for _, v in flat_state(ours)], [v for _, v in flat_state(theirs)]),
    )
    print(f"observed {worst:.1e}")
    assert worst <= OPTIMIZERS[info.name].inductor[dtype]
    assert ours._modes.compiled.compilations <= 2


def test_write_grads_stores_the_clipped_gradient() -> None:
    opt, other = wrapped(write_grads=True), wrapped(write_grads=True)
    for step in range(3):
        set_grads(all_params(opt), step, scale=5)
        set_grads(all_params(other), step, scale=5)
        all_params(opt)[1].grad = torch.ones(1).expand(4)  # cannot be written in place
        all_params(other)[1].grad = torch.ones(4)
        norm = compileclip.clip_grad_norm_(all_params(other), 1.0)
        other.optimizer.step()
        opt.step()
        assert torch.equal(opt.total_norm, norm)
        for a, b in zip(all_params(opt), all_params(other), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=2e-7, atol=0.0)
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("nonfinite", ["propagate", "raise", "skip"])
def test_nonfinite(nonfinite: str) -> None:
    opt = wrapped(nonfinite=nonfinite, make=lambda p: AdamW(p, lr=0.1))
    for step in range(2):
        set_grads(all_params(opt), step)
        opt.step()
    before = copy.deepcopy(opt)
    set_grads(all_params(opt), 2)
    all_params(opt)[0].grad[0, 0] = math.nan
    if nonfinite == "raise":
        with pytest.raises(RuntimeError, match="non-finite"):
            opt.step()
    else:
        opt.step()
    assert opt.total_norm.isnan()
    if nonfinite == "propagate":
        assert all_params(opt)[0].isnan().all()
    else:
        assert_same_optimizer(opt, before)
        set_grads(all_params(opt), 3)
        opt.step()
        assert opt.total_norm.isfinite()
        assert all(s["step"] == 3 for s in opt.state.values())


def test_compilations_with_a_changing_learning_rate_and_max_norm() -> None:
    ours, theirs = (
        Run(True, scheduler=lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=100), mode=mode)
        for mode in ("inductor", "eager")
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        for step in range(100):
            for run in (ours, theirs):
                run.optimizer.max_norm = 0.5 + 0.01 * step
                run.step(step)
    assert ours.optimizer._modes.compiled.compilations == 2
    assert largest_difference(ours.model.parameters(), theirs.model.parameters()) < 2e-4
    assert largest_difference(ours.norms, theirs.norms) < 1e-3


@pytest.mark.parametrize("foreach", [False, True])
def test_compilations_with_cycling_betas(foreach: bool) -> None:
    ours, theirs = (
        Run(
            True,
            lambda p: AdamW(p, lr=0.01, foreach=foreach),
            scheduler=lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=12),
            mode=mode,
        )
        for mode in ("inductor", "eager")
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        for step in range(10):
            ours.step(step)
            theirs.step(step)
    # Constant, then the learning rate variable, then the betas too.
    assert ours.optimizer._modes.compiled.compilations <= 3
    assert largest_difference(ours.model.parameters(), theirs.model.parameters()) < 1e-4


def test_hooks_state_dict_and_copies() -> None:
    log: list[str] = []
    opt = wrapped()
    opt.register_step_pre_hook(lambda *_: log.append("pre"))
    opt.register_step_post_hook(lambda *_: log.append("post"))
    inner = SGD(params_like([(3, 3), (4,)]), lr=0.1, momentum=0.9)
    twin = compileclip.wrap(inner, 1.0, mode="eager")
    for p, q in zip(all_params(twin), all_params(opt), strict=True):
        p.data.copy_(q)
    for step in range(4):
        set_grads(all_params(opt), step)
        set_grads(all_params(twin), step)
        opt.step()
        twin.step()
        if step == 1:  # a checkpoint in the middle, and another object from here on
            saved = copy.deepcopy(opt.state_dict())
            opt.load_state_dict(saved)
            opt = copy.deepcopy(opt)
            assert opt.mode == "inductor"
    assert log == ["pre", "post"] * 2
    assert largest_difference(all_params(opt), all_params(twin)) < 1e-6
    assert opt.state_dict().keys() == twin.state_dict().keys()


class Lion(Optimizer):
    """A third-party optimizer in ordinary Python: Lion, arXiv:2302.06675."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                update = state["exp_avg"] * beta1 + p.grad * (1 - beta1)
                p.add_(update.sign(), alpha=-group["lr"])
                state["exp_avg"].mul_(beta2).add_(p.grad, alpha=1 - beta2)


def test_third_party_optimizer() -> None:
    opt, twin = wrapped(Lion), wrapped(Lion)
    twin = compileclip.wrap(twin.optimizer, 1.0, mode="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        for step in range(5):
            for o in (opt, twin):
                set_grads(all_params(o), step, scale=3)
                o.step()
            assert torch.equal(opt.total_norm, twin.total_norm)
    assert largest_difference(all_params(opt), all_params(twin)) < 1e-6


def test_gradients_that_come_and_go() -> None:
    opt, twin = wrapped(), wrapped()
    twin = compileclip.wrap(twin.optimizer, 1.0, mode="eager")
    for step in range(5):
        for o in (opt, twin):
            set_grads(all_params(o), step, scale=3)
            if step in (1, 3):
                all_params(o)[step // 2].grad = None
            o.step()
        assert torch.equal(opt.total_norm, twin.total_norm)
        opt.zero_grad()
    opt.step()  # no gradient at all
    assert opt.total_norm == 0
    assert largest_difference(all_params(opt), all_params(twin)) < 1e-6
